"""Plan batches of records: a number or a budget of tokens, pairs of one prompt together, ranks balanced.

An epoch is planned as a whole, identically on every rank, from the seed and its number: records -> units (pairs of one prompt) ->
batches -> slots (one batch for every rank) -> optimiser steps (consecutive slots).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from itertools import chain, repeat
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from transformers.trainer_pt_utils import BatchRebalanceSampler

from mpo.batching.planned import Batches, Floats, Ints, PackingReport, first_fit, pack, split, take_units
from mpo.encoding.costs import PairCosts

BALANCE_SLOTS = 8
"""By default ranks are balanced by exchanging batches among this many slots (or those of a step, if more)."""
EVEN_TOKENS = 1.085
"""Largest tokens of a batch, as a multiple of the mean, where tiles fill batches."""
IDENTITY = (
    *("batching", "pairs_per_batch", "max_tokens", "max_tiles", "group_same_prompt", "micro_batches_per_step", "world_size"),
    *("shuffle", "seed", "drop_last", "window", "attention_cost", "tile_cost"),
)
"""The settings that determine the pairs of a step."""


class PairBatchSampler(BatchRebalanceSampler):  # type: ignore[misc]  # transformers is not typed for mypy
    """Iterate over a rank's micro-batches: lists of record indices.

    transformers' Trainer uses a `BatchRebalanceSampler` as the data loader's batch sampler and does not shard it again; nothing
    else of that class is used. Every epoch and every rank has the same number of micro-batches, because the Trainer counts them
    once. A padding pair is computed but must not count: it has the index ``-1 - i`` of a record ``i`` (see `IndexedRecords`) and
    its own batch; there are fewer of these than ranks, and none while a batch of two pairs can be split.

    Args:
        costs: the cost of each record (`mpo.encoding.costs.measure`), or only their number: with ``batching="pairs"`` batches
            are then distributed over ranks as if all cost the same.
        batching: ``"pairs"``: ``pairs_per_batch`` pairs in every micro-batch (a few may have fewer). ``"tokens"``: as many as
            ``max_tokens`` and ``max_tiles`` allow.
        pairs_per_batch: pairs of a micro-batch, for ``batching="pairs"``.
        max_tokens: tokens of a micro-batch, a prompt shared in a unit counted once, for ``batching="tokens"``.
        max_tiles: image tiles of a micro-batch; None: no limit.
        group_same_prompt: up to this many pairs of the same prompt and images form a unit that stays in one batch.
        micro_batches_per_step: gradient accumulation steps. Needed for balancing and for ``drop_last``.
        world_size, rank: number of ranks with different batches, and this one, from 0.
        shuffle: a new order every epoch. False keeps the order of the records as far as packing allows.
        seed: random seed of the order.
        drop_last: leave out the batches that do not fill an optimiser step on all ranks.
        allow_oversized: for ``batching="tokens"``, put a record that exceeds a budget into its own batch; else it is an error.
        window: number of units from which a batch is packed.
        balance_slots: number of slots among which ranks exchange batches of like cost. 1: only those of the same optimiser step, so
            that the batches of a step are a uniform draw.

    Raises:
        ValueError: for incompatible settings, no records, or a record that exceeds a budget.

    >>> sampler = PairBatchSampler(5, pairs_per_batch=2, shuffle=False)
    >>> list(sampler)
    [[0, 1], [2, 3], [4]]
    """

    attention_cost = 5e-5  # of a query-key pair, relative to a token: 2 x layers x width / parameters of the layers
    tile_cost = 100.0  # of a tile in the vision tower: about 50 for an 8B model, 600 for 1B

    def __init__(
        self,
        costs: PairCosts | int,
        *,
        batching: Literal["pairs", "tokens"] = "pairs",
        pairs_per_batch: int | None = None,
        max_tokens: int | None = None,
        max_tiles: int | None = None,
        group_same_prompt: int = 1,
        micro_batches_per_step: int = 1,
        world_size: int = 1,
        rank: int = 0,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        allow_oversized: bool = False,
        window: int = 1024,
        balance_slots: int = BALANCE_SLOTS,
    ) -> None:
        # Not BatchRebalanceSampler's, which plans with a fixed number of padded rows per step.
        limits = {"pairs_per_batch": pairs_per_batch, "max_tokens": max_tokens, "max_tiles": max_tiles}
        _check_limits(batching, {**limits, "allow_oversized": allow_oversized or None})
        counts = {name: value for name, value in limits.items() if value is not None} | {
            "window": window,
            "group_same_prompt": group_same_prompt,
            "micro_batches_per_step": micro_batches_per_step,
            "world_size": world_size,
            "balance_slots": balance_slots,
        }
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, not {value}.")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be from 0 to world_size - 1 = {world_size - 1}, not {rank}.")
        if isinstance(costs, int) and (batching == "tokens" or group_same_prompt > 1):
            setting = "batching='tokens'" if batching == "tokens" else f"group_same_prompt={group_same_prompt}"
            raise ValueError(f"{setting} needs the costs of records: pass `costs` from mpo.encoding.costs.measure, not a number.")
        self.is_measured = not isinstance(costs, int)
        self.costs = PairCosts.equal(costs) if isinstance(costs, int) else costs
        if len(self.costs) == 0:
            raise ValueError("The data set is empty: there are no records to batch.")
        self.batching, self.pairs_per_batch, self.max_tokens, self.max_tiles = batching, pairs_per_batch, max_tokens, max_tiles
        self.group_same_prompt = min(group_same_prompt, pairs_per_batch or group_same_prompt)
        self.micro_batches_per_step, self.world_size, self.rank = micro_batches_per_step, world_size, rank
        self.shuffle, self.seed, self.drop_last, self.window = shuffle, seed, drop_last, window
        self.balance_slots = balance_slots
        self.epoch = self.begun = 0
        self._oversized = self._find_oversized(allow_oversized)
        self._plan: tuple[int, Batches] | None = None
        first = self._compose(0, 0)
        self._target = self._count_batches(len(first))
        self._plan = (0, self._arrange(first, 0))

    def __iter__(self) -> Iterator[list[int]]:
        """The micro-batches of this rank in the current epoch; the same each time it is iterated.

        With `begun`, those before it are empty and take no time: the data loader of a resumed epoch drops them unread.
        """
        return chain(repeat([], self.begun), self.after(self.begun))

    def after(self, number: int) -> Iterator[list[int]]:
        """The micro-batches of this rank in the current epoch without the first `number`, which are not read."""
        batches = self._planned()
        ends = batches.ends
        for place in range(self.rank + number * self.world_size, self._target, self.world_size):
            yield batches.records[batches.starts[place] : ends[place]].tolist()

    def __len__(self) -> int:
        """Micro-batches of a rank in an epoch, the same for every rank and every epoch."""
        return self._target // self.world_size

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    @property
    def steps(self) -> int:
        """Optimiser steps of an epoch; the last may have fewer micro-batches."""
        return -(-len(self) // self.micro_batches_per_step)

    @property
    def identity(self) -> str:
        """A checksum of everything that determines the pairs of a step, compared when a checkpoint is resumed."""
        settings = {name: getattr(self, name) for name in IDENTITY}
        settings |= {"balance_slots": self.balance_slots} if self.balance_slots != BALANCE_SLOTS else {}
        checksum = zlib.crc32(repr(settings).encode())
        for values in self.costs.arrays():
            checksum = zlib.crc32(values.tobytes(), checksum)
        return f"{checksum:08x}"

    def report(self) -> PackingReport:
        """Packing statistics of the current epoch, over all ranks."""
        batches = self._planned()
        tokens, tiles, cost = self._measure(batches)
        real = batches.records[batches.starts] >= 0
        pairs = (batches.ends - batches.starts)[real]
        slots = cost.reshape(-1, self.world_size)
        fill = tokens[real] / self.max_tokens if self.max_tokens else None
        return PackingReport(
            batches=int(real.sum()),
            padding=int((~real).sum()),
            steps=self.steps,
            pairs=int(pairs.sum()),
            tokens=int(tokens[real].sum()) if self.is_measured else None,
            tiles=int(tiles[real].sum()) if self.is_measured else None,
            mean_fill=None if fill is None else float(fill.mean()),
            min_fill=None if fill is None else float(fill.min()),
            pairs_per_batch=(int(pairs.min()), float(pairs.mean()), int(pairs.max())),
            imbalance=float((slots.max(axis=1) / slots.mean(axis=1)).mean()),
            oversized=len(self._oversized),
        )

    # --- The plan of an epoch

    def _planned(self) -> Batches:
        if self._plan is None or self._plan[0] != self.epoch:
            self._plan = (self.epoch, self._arrange(self._compose_within_target(self.epoch), self.epoch))
        return self._plan[1]

    def _find_oversized(self, allowed: bool) -> Ints:
        if self.max_tokens is None:
            return np.zeros(0, dtype=np.int64)
        tokens, tiles = self.costs.tokens(), self.costs.tiles
        found = np.flatnonzero(self.costs.beyond((self.max_tokens, self.max_tiles)))
        if len(found) and not allowed:
            worst = found[np.argmax(tokens[found])]
            listed = f"{', '.join(map(str, found[:5]))}{', ...' * (len(found) > 5)}"
            raise ValueError(
                f"{len(found)} of {len(tokens)} records exceed a batch of max_tokens={self.max_tokens}, max_tiles={self.max_tiles} "
                f"({listed}). The longest is record {worst} with {tokens[worst]} tokens and {tiles[worst]} tiles. Raise the "
                "budget, truncate with max_length, leave them out, or give each its own batch with allow_oversized=True."
            )
        return found

    def _count_batches(self, first: int) -> int:
        """The number of batches of every epoch, on all ranks together, when epoch 0 is packed into `first`."""
        if self.drop_last:
            step = self.world_size * self.micro_batches_per_step
            if first < step:
                needed = f"one optimiser step takes {step} ({self.world_size} ranks x {self.micro_batches_per_step})"
                found = f"drop_last=True leaves nothing: all records make {first} batches, and {needed}"
                raise ValueError(f"{found}. Set drop_last=False or make batches smaller.")
            return first // step * step
        if self.batching == "tokens" and self.shuffle:
            # Other epochs may need a few more batches: about the standard deviation of a sum over windows.
            windows = -(-len(self.costs) // (self.window * self.group_same_prompt))
            slack = int(np.sqrt(windows)) if windows > 1 else 0
            first = max(first, min(first + slack, len(self.costs)))
        return -(-first // self.world_size) * self.world_size

    def _compose_within_target(self, epoch: int) -> Batches:
        for attempt in range(4):
            batches = self._compose(epoch, attempt)
            if len(batches) <= self._target or self.drop_last:
                return batches
        return self._compose(0, 0)  # known to fit; the order of batches is still the epoch's

    def _compose(self, epoch: int, attempt: int) -> Batches:
        rng = np.random.default_rng((self.seed, epoch, attempt))
        records, unit_starts = self._units(rng)
        if self.pairs_per_batch is not None:
            size = self.pairs_per_batch
            if self.group_same_prompt > 1:
                sizes = np.diff(unit_starts, append=len(records))
                unit_bins = first_fit(sizes[None], (size,), self.window, rng if self.shuffle else None)
                filled = np.bincount(unit_bins, sizes)[unit_bins] == size
                # Units that do not fill a batch are split where a batch is full, so that all have the same number of pairs.
                order = np.lexsort((unit_bins, ~filled))
                records, unit_starts = take_units(records, unit_starts, order)
            starts = np.arange(0, len(records), size)
        else:
            unit_tokens, unit_tiles, _ = self._unit_costs(records, unit_starts)
            assert self.max_tokens is not None
            limits = (self.max_tokens,) if self.max_tiles is None else (self.max_tokens, self.max_tiles)
            own, draw = np.stack([unit_tokens, unit_tiles])[: len(limits)], rng if self.shuffle else None
            unit_bins = pack(own, limits, self.window, draw)
            alone = self.balance_slots == self.micro_batches_per_step == 1
            if self.shuffle and self.max_tiles and self.world_size > 1 and alone:
                # Nothing else balances a slot: where tiles fill batches, tokens are kept near their mean if that costs none.
                even = int(EVEN_TOKENS * unit_tokens.sum() * self.max_tiles / max(unit_tiles.sum(), 1))
                if 0 < even < self.max_tokens:
                    evened = pack(own, (even, self.max_tiles), self.window, draw)
                    unit_bins = evened if evened.max() <= 1.005 * unit_bins.max() else unit_bins
            order = np.argsort(unit_bins, kind="stable")
            records, unit_starts = take_units(records, unit_starts, order)
            starts = unit_starts[np.flatnonzero(np.diff(unit_bins[order], prepend=-1))]
        return Batches(records, _marked(unit_starts, len(records)), starts)

    def _units(self, rng: np.random.Generator) -> tuple[Ints, Ints]:
        count = len(self.costs)
        records = rng.permutation(count) if self.shuffle else np.arange(count)
        if self.group_same_prompt == 1:
            return records, np.arange(count)
        records = records[np.argsort(self.costs.group[records], kind="stable")]
        group = self.costs.group[records]
        group_start = np.flatnonzero(np.concatenate([[True], group[1:] != group[:-1]]))
        place = np.arange(count) - np.repeat(group_start, np.diff(group_start, append=count))
        starts = np.flatnonzero(place % self.group_same_prompt == 0)
        starts = self._split_units(records, starts)
        order = rng.permutation(len(starts)) if self.shuffle else np.argsort(records[starts], kind="stable")
        return take_units(records, starts, order)

    def _split_units(self, records: Ints, starts: Ints) -> Ints:
        if self.max_tokens is None:
            return starts
        tokens, tiles, _ = self._unit_costs(records, starts)
        ends = np.append(starts[1:], len(records))
        completions = self.costs.chosen + self.costs.rejected
        more: list[int] = []
        for unit in np.flatnonzero((tokens > self.max_tokens) & (ends - starts > 1)):
            total = 0
            for place in range(starts[unit], ends[unit]):
                record = records[place]
                total += int(completions[record])
                if place == starts[unit]:
                    total += int(self.costs.prompt[record])
                elif total > self.max_tokens:
                    more.append(place)
                    total = int(completions[record] + self.costs.prompt[record])
        return np.sort(np.concatenate([starts, np.array(more, dtype=np.int64)]))

    def _arrange(self, batches: Batches, epoch: int) -> Batches:
        """Reach the target number of batches and distribute them over ranks: batch ``slot * world_size + rank``."""
        rng = np.random.default_rng((self.seed, epoch, 2**32))  # independent of every attempt's
        _, _, cost = self._measure(batches)
        batches = split(batches, cost, self._record_costs(), self._target)
        if self.shuffle:
            batches = batches.take(rng.permutation(len(batches)))
        else:
            batches = batches.take(np.argsort(np.minimum.reduceat(batches.records, batches.starts), kind="stable"))
        batches = batches.take(np.arange(min(len(batches), self._target)))  # with drop_last there may be more
        missing = self._target - len(batches)
        if missing:  # of one padding record each
            records = np.append(batches.records, np.full(missing, -1 - int(np.argmin(self._record_costs()))))
            starts = np.append(batches.starts, len(batches.records) + np.arange(missing))
            batches = Batches(records, np.append(batches.is_first, np.ones(missing, dtype=bool)), starts)
        if self.world_size > 1:
            batches = batches.take(self._deal(self._measure(batches)[2], rng))
        return batches

    def _deal(self, cost: Floats, rng: np.random.Generator) -> Ints:
        slots = max(self.micro_batches_per_step, self.balance_slots) if self.shuffle else self.micro_batches_per_step
        size = slots * self.world_size
        whole = len(cost) // size * size
        dealt = [np.zeros(0, dtype=np.int64)]
        for begin, end in ((0, whole), (whole, len(cost))):
            if begin == end:
                continue
            rows = cost[begin:end].reshape(-1, size if begin == 0 and whole else end - begin)
            places = np.argsort(-rows, axis=1, kind="stable") + np.arange(begin, end, rows.shape[1])[:, None]
            by_slot = places.reshape(len(rows), -1, self.world_size)
            if self.shuffle:
                by_slot = rng.permuted(by_slot, axis=2)
                order = np.argsort(rng.random(by_slot.shape[:2]), axis=1)
            else:
                by_slot = np.sort(by_slot, axis=2)
                order = np.argsort(by_slot[:, :, 0], axis=1)
            dealt.append(np.take_along_axis(by_slot, order[:, :, None], axis=1).ravel())
        return np.concatenate(dealt)

    # --- Costs

    def _record_costs(self) -> Floats:
        return self._cost(self.costs.tokens(), self.costs.attention(), self.costs.tiles)

    def _cost(self, tokens: Any, attention: Any, tiles: Any) -> Floats:
        cost: Floats = tokens + self.attention_cost * attention + self.tile_cost * tiles
        return cost

    def _unit_costs(self, records: Ints, starts: Ints, is_first: NDArray[np.bool_] | None = None) -> tuple[Ints, Ints, Floats]:
        """Tokens, tiles and query-key pairs of consecutive records; prompt and images count where `is_first`, by default once."""
        costs = self.costs
        is_first = _marked(starts, len(records)) if is_first is None else is_first
        shared = np.where(is_first, 0, costs.prompt[records].astype(np.int64))
        tokens = np.add.reduceat(costs.tokens()[records] - shared, starts)
        tiles = np.add.reduceat(np.where(is_first, costs.tiles[records], 0), starts, dtype=np.int64)
        attention = np.add.reduceat(costs.attention()[records] - 0.5 * shared.astype(np.float64) ** 2, starts)
        return tokens, tiles, attention

    def _measure(self, batches: Batches) -> tuple[Ints, Ints, Floats]:
        records = np.where(batches.records < 0, -1 - batches.records, batches.records)
        is_first = batches.is_first | _marked(batches.starts, len(records))  # both batches of a split unit have its prompt
        tokens, tiles, attention = self._unit_costs(records, batches.starts, is_first)
        return tokens, tiles, self._cost(tokens, attention, tiles)


def _marked(places: Ints, count: int) -> NDArray[np.bool_]:
    marked = np.zeros(count, dtype=bool)
    marked[places] = True
    return marked


def _check_limits(batching: str, limits: dict[str, int | None]) -> None:
    if batching not in ("pairs", "tokens"):
        raise ValueError(f"batching must be 'pairs' or 'tokens', not {batching!r}.")
    for name in {"tokens": ["pairs_per_batch"], "pairs": ["max_tokens", "max_tiles", "allow_oversized"]}[batching]:
        if limits[name] is not None:
            raise ValueError(f"{name}={limits[name]} has no effect with batching={batching!r}. Leave it out, or change batching.")
    needed = {"tokens": "max_tokens", "pairs": "pairs_per_batch"}[batching]
    if limits[needed] is None:
        raise ValueError(f"batching={batching!r} needs {needed}, 1 or more.")
