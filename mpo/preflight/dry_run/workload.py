"""Measure a job's data: tokens and tiles of every record, the most expensive micro-batch, and the number of steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mpo.batching.collator import PairCollator
from mpo.batching.sampler import PackingReport, PairBatchSampler
from mpo.encoding.costs import PairCosts
from mpo.models.packable import why_not
from mpo.preflight.dry_run.activations import activations
from mpo.preflight.dry_run.batch import BatchShape
from mpo.preflight.dry_run.precision import Precision


@dataclass(frozen=True)
class Workload:
    """The measured data of a job.

    ``total``: number of records. ``records``: the measured ones, all or an evenly spaced subset; ``costs``: their costs.
    ``most_expensive``: indices of the records of the micro-batch with the highest memory; ``batch``: its sizes. ``packing``: report
    of the sampler that plans the batches; None without one.
    """

    total: int
    records: Any
    costs: PairCosts
    most_expensive: list[int]
    batch: BatchShape
    steps: int
    epochs: float
    micro_batches: int
    pairs_per_step: float
    packing: PackingReport | None

    @property
    def sampled(self) -> bool:
        """Whether only some of the records were measured."""
        return len(self.costs) < self.total


def plan_workload(
    pairs: Any, records: Any, costs: PairCosts, model: Any, processor: Any, args: Any, *, ranks: int, gpu: bool
) -> Workload:
    """Plan a run over its data.

    Args:
        pairs: all records.
        records: the measured ones.
        costs: costs of the measured records without truncation.
        model: the policy; parameters may be on the meta device.
        processor: processor of the run.
        args: the run's `MPOConfig`.
        ranks: number of ranks.
        gpu: whether the run uses GPUs.
    """
    truncated = costs.truncate(args.max_length, skip=args.on_bad_record == "skip")
    sampler = None
    if args.batching == "tokens" or args.group_same_prompt > 1:
        sampler = PairBatchSampler(
            truncated,
            batching=args.batching,
            pairs_per_batch=None if args.batching == "tokens" else args.per_device_train_batch_size,
            max_tokens=args.max_tokens_per_batch,
            max_tiles=args.max_tiles_per_batch,
            group_same_prompt=args.group_same_prompt,
            micro_batches_per_step=args.gradient_accumulation_steps,
            world_size=ranks,
            seed=args.seed if args.data_seed is None else args.data_seed,
            drop_last=args.dataloader_drop_last,
        )
    scale = len(pairs) / len(costs)
    if sampler is None:
        whole = args.per_device_train_batch_size * ranks
        micro_batches = len(pairs) // whole if args.dataloader_drop_last else -(-len(pairs) // whole)
    else:
        micro_batches = round(len(sampler) * scale)
    per_epoch = max(-(-micro_batches // args.gradient_accumulation_steps), 1)
    steps = args.max_steps if args.max_steps > 0 else int(np.ceil(args.num_train_epochs * per_epoch))
    most_expensive = _most_expensive(truncated, sampler, model, args, gpu)
    rules = {"completion_end": args.completion_end, "tile_budget": args.tile_budget, "max_length": args.max_length}
    collator = PairCollator(processor, layout=layout_of(model, args), **rules)
    return Workload(
        total=len(pairs),
        records=records,
        costs=costs,
        most_expensive=most_expensive,
        batch=BatchShape.of(collator([records[index] for index in most_expensive])),
        steps=steps,
        epochs=steps / per_epoch,
        micro_batches=micro_batches,
        pairs_per_step=len(pairs) / per_epoch,
        packing=None if sampler is None else sampler.report(),
    )


def layout_of(model: Any, args: Any) -> str:
    """Return the layout that the trainer will use: packed or padded."""
    keeps_end = args.truncation_mode == "keep_end" and args.max_length
    padded = args.rows == "padded" or args.pad_to_multiple_of or keeps_end or why_not(model) is not None
    return "padded" if padded else "packed"


def _most_expensive(costs: PairCosts, sampler: PairBatchSampler | None, model: Any, args: Any, gpu: bool) -> list[int]:
    """Return the planned batch with the largest activations; without a plan, a batch of the most expensive pairs."""
    each = _bytes_of(costs, model, args, gpu)
    if sampler is None:
        return np.argsort(-each, kind="stable")[: args.per_device_train_batch_size].tolist()
    batches = [[abs(index) - (index < 0) for index in batch] for batch in sampler]
    return max(batches, key=lambda batch: float(each[batch].sum()))


def _bytes_of(costs: PairCosts, model: Any, args: Any, gpu: bool) -> Any:
    """Approximate bytes of activations of each record, shape (N,): linear in its tokens and tiles."""
    precision = Precision.of(model, args, gpu=gpu)

    def kept(tokens: int, tiles: int) -> int:
        shape = BatchShape(tokens, tokens, 0, 1, tiles, 0, True, True)
        return activations(model, shape, precision, checkpointing=args.gradient_checkpointing).kept()

    none, token, tile = kept(0, 1), kept(1000, 1), kept(0, 1001)
    per_token, per_tile = (token - none) / 1000, (tile - none) / 1000 + 12 * 448 * 448
    return costs.tokens() * per_token + costs.tiles * per_tile
