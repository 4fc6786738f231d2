"""The costs of a record: tokens and image tiles, measured without decoding images."""

from __future__ import annotations

import bisect
import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset, Features, Value
from datasets.features.features import require_decoding
from datasets.fingerprint import Hasher
from numpy.typing import NDArray

from mpo.data.encoded import file_state, with_encoded_images
from mpo.data.images import image_size
from mpo.data.video import DEFAULT_FRAMES, Frame, checked_frames, frame_size, with_frames
from mpo.encoding.encoder import Encoder
from mpo.encoding.keys import prompt_key, settings_of
from mpo.encoding.shapes import SHAPED, STAND_IN, Shape, Shapes
from mpo.encoding.tiles import image_rule, tile_limits
from mpo.encoding.turns import SIDES, Rendered, as_completion, describe, encoded_images, render
from mpo.io import RECORD_ERRORS, BadRecord, bad_record, without_collection
from mpo.schema import CONVERSATION_COLUMNS, IMAGE_COLUMNS, TRL_COLUMNS, names

logger = logging.getLogger(__name__)
READ_COLUMNS = ("id", *names(encoded=True), *TRL_COLUMNS, *CONVERSATION_COLUMNS)
MEASURED = ("prompt", "chosen", "rejected", "tiles", "group")
FORMAT = 7
"""Increased when the same records would be measured differently, so that no result of an earlier version is read from the cache."""

_BAD_GROUP = 1268533372142178071
"""Group of all bad records; any number would do, and this one leaves batches as earlier versions planned them."""

Budget = tuple[int, int | None]
"""Tokens and tiles of a row."""


@dataclass(frozen=True, eq=False)
class PairCosts:
    """The costs of N records, each array of shape (N,).

    ``prompt``: tokens of the prompt, image tokens included. ``chosen``, ``rejected``: tokens of the completions, up to the last
    labelled one. ``tiles``: image tiles of the prompt. ``group``: the key of the prompt (`mpo.encoding.keys.prompt_key`).
    Of a conversation, ``chosen`` is the one completion with the images of later turns, ``rejected`` is 0, and ``group`` the most
    frames of one of its videos, if these are fewer so that it fits a row, otherwise 0.
    """

    prompt: NDArray[np.int32]
    chosen: NDArray[np.int32]
    rejected: NDArray[np.int32]
    tiles: NDArray[np.int32]
    group: NDArray[np.int64]

    def __post_init__(self) -> None:
        lengths = [len(values) for values in self.arrays()]
        if len(set(lengths)) > 1:
            raise ValueError(f"Expected arrays of the same length, one value per record; {', '.join(MEASURED)} have {lengths}.")

    @classmethod
    def equal(cls, count: int) -> PairCosts:
        """Placeholder costs of `count` unmeasured records: all equal, no shared prompts."""
        one, none = np.ones(count, dtype=np.int32), np.zeros(count, dtype=np.int32)
        return cls(none, one, one, none, np.arange(count))

    def __len__(self) -> int:
        return len(self.prompt)

    def arrays(self) -> tuple[NDArray[Any], ...]:
        """All arrays, in the order of the fields."""
        return self.prompt, self.chosen, self.rejected, self.tiles, self.group

    def tokens(self) -> NDArray[np.int64]:
        """Tokens of each record's row, the prompt once, shape (N,): an upper bound, since completions may share tokens."""
        return self.prompt.astype(np.int64) + self.chosen + self.rejected

    def attention(self) -> NDArray[np.float64]:
        """Query-key pairs of each record's row: prompt to prompt, each completion to the prompt and itself, shape (N,)."""
        prompt, chosen, rejected = (values.astype(np.float64) for values in (self.prompt, self.chosen, self.rejected))
        pairs: NDArray[np.float64] = prompt**2 / 2 + chosen * (prompt + chosen / 2) + rejected * (prompt + rejected / 2)
        return pairs

    def truncate(self, max_length: int | None, *, skip: bool = False) -> PairCosts:
        """The costs with completions truncated so that prompt and completion have at most `max_length` tokens.

        With `skip`, a record whose prompt leaves no token for a completion has the cost of the blank pair that replaces it.
        """
        if max_length is None:
            return self
        kept = np.maximum(max_length - self.prompt, 0)
        costs = replace(self, chosen=np.minimum(self.chosen, kept), rejected=np.minimum(self.rejected, kept))
        return costs._blank(kept == 0) if skip and not kept.all() else costs

    def beyond(self, budget: Budget) -> NDArray[np.bool_]:
        """Whether each record exceeds a row alone, shape (N,)."""
        found: NDArray[np.bool_] = (self.tokens() > budget[0]) | (self.tiles > (np.inf if budget[1] is None else budget[1]))
        return found

    def within(self, budget: Budget) -> tuple[PairCosts, dict[int, str]]:
        """The costs, with that of the blank record for each record that exceeds a row alone; and why, by index."""
        tokens, beyond = self.tokens(), self.beyond(budget)
        why = {int(place): exceeds(int(tokens[place]), int(self.tiles[place]), budget) for place in np.flatnonzero(beyond)}
        return self._blank(beyond), why

    def _blank(self, which: NDArray[np.bool_]) -> PairCosts:
        prompt, chosen, rejected = (np.where(which, 1, own).astype(np.int32) for own in (self.prompt, self.chosen, self.rejected))
        return PairCosts(prompt, chosen, rejected, np.where(which, 0, self.tiles).astype(np.int32), self.group)


def exceeds(tokens: int, tiles: int, budget: Budget) -> str:
    """Why a record does not fit a row."""
    found = f"{tokens} tokens and {tiles} tiles exceed a batch (max_tokens, max_tiles) of {budget}"
    return f"{found}. Raise the budget, leave the record out, or set `oversized`."


def measure(
    dataset: Any, processing_class: Any, *, max_length: int | None = None, num_proc: int | None = None, **rules: Any
) -> PairCosts:
    """Measure every record as `PairCollator` or `ConversationCollator` encodes it; only the headers of images are read.

    The result is cached by datasets: the same records, tokenizer, chat template and image processor settings are measured once.

    Args:
        dataset: preference records or conversations, a `datasets.Dataset`.
        processing_class: the tokenizer or processor of the run.
        max_length: as in `PairCollator`, with ``truncation_mode="keep_start"``. Cached measurements are valid for any `max_length`.
        rules: the other arguments of `RecordMeasure`.

    Raises:
        ValueError: for a stream, a processor that cannot count an image's tokens, or a record that cannot be encoded.
    """
    one = RecordMeasure(processing_class, **rules)
    if not isinstance(dataset, Dataset):
        unit = "pairs" if one.sides == SIDES else "conversations"
        what = "is a stream" if not hasattr(dataset, "__len__") else "is not a datasets.Dataset"
        found = f"The data set ({type(dataset).__name__}) {what}, and batches by tokens are planned from all records of an epoch"
        raise ValueError(f"{found}. Use batching={unit!r}, or load the records as a datasets.Dataset.")
    as_files = dataset.with_format(None)
    as_files = as_files.select_columns([name for name in dataset.column_names if name in READ_COLUMNS])
    as_files = with_encoded_images(as_files)
    if num_proc is None:  # a process for every 20,000 records
        num_proc = min(len(as_files) // 20_000, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1) or None
    settings = [FORMAT, one.completion_end, one.tile_budget, one.on_bad_record, *settings_of(processing_class)]
    settings += [] if one.sides == SIDES else [*one.sides, one.train_on]
    settings += [one.budget] if one.budget else []
    # Not the function's own hash: tokenizers change when they are used, so every run would measure again.
    fingerprint = Hasher.hash([as_files._fingerprint, settings, file_state(as_files)])

    def mapped(count: Callable[[Any], dict[str, list[int]]]) -> Dataset:
        return as_files.with_format(None if require_decoding(as_files.features) else "arrow").map(
            count,
            batched=True,
            remove_columns=as_files.column_names,
            features=Features({name: Value("int64" if name == "group" else "int32") for name in MEASURED}),
            new_fingerprint=fingerprint,
            num_proc=num_proc,
            desc="Measuring records",
        )

    try:
        measured = mapped(one.batch)
    except OtherCount as error:
        logger.warning(f"{error}; all records are measured one by one.")
        one.sampled = 0
        measured = mapped(one.batch)
    costs = PairCosts(*(measured.data.column(name).to_numpy() for name in MEASURED))
    return costs.truncate(max_length, skip=one.on_bad_record == "skip")


class OtherCount(RuntimeError):
    """A record has another number of tokens than its shape and words say."""


@dataclass(eq=False)
class RecordMeasure:
    """Measure records without decoding their images: a dict of `MEASURED`. Each process of datasets' `map` gets a copy.

    Plain conversations are counted by their shapes (`mpo.encoding.shapes`). The first of every shape
    that is counted, and one in `sampled` of all, are also encoded, and have to have the same count. 0: all records are encoded.
    A conversation that exceeds `budget` has fewer frames of its videos (`fitted`).

    Args:
        processing_class: the tokenizer or processor of the run.
        completion_end, tile_budget: as in `PairCollator`.
        on_bad_record: as in `PairCollator`; with ``"skip"``, a bad record has the cost of the blank pair that replaces it.
        sides: the columns of the completions: of pairs (`SIDES`), or `CONVERSATION`.
        train_on, budget: as in `ConversationCollator`.
    """

    processing_class: Any
    completion_end: str = "end_of_turn"
    tile_budget: str = "prompt"
    on_bad_record: str = "raise"
    sides: Sequence[str] = SIDES
    train_on: str = "all"
    sampled: int = 1000
    budget: Budget | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        self.encoder = Encoder(self.processing_class, completion_end=self.completion_end, tile_budget=self.tile_budget)
        self._shapes: Shapes | None = None
        self._sizes: dict[str | None, tuple[int, int]] = {}  # of image files, by path
        self._unchecked: set[Any] = set()  # keys of shapes, which are rendered the second time
        self._known: dict[Any, Shape | None] = {}
        self._seen = 0

    def __call__(self, record: dict[str, Any]) -> dict[str, int]:
        """The costs of a record, by name."""
        try:
            with bad_record(describe(record)):
                return self._costs(record)
        except BadRecord:
            if self.on_bad_record == "raise":
                raise
            return {"prompt": 1, "chosen": 1, "rejected": 1, "tiles": 0, "group": _BAD_GROUP}

    def batch(self, columns: Any) -> dict[str, list[int]]:
        """The costs of several records, by name; a table of Arrow, or a dict of columns."""
        with without_collection():
            if isinstance(columns, pa.Table):
                records = columns.to_pylist()
            else:
                records = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
            found = self.many(records)
            return {name: [one[name] for one in found] for name in MEASURED}

    def many(self, records: list[dict[str, Any]]) -> list[dict[str, int]]:
        """The costs of several records.

        Raises:
            OtherCount: for a record with another count than its shape and words say.
        """
        by_shape = self._by_shape(records) if self.sampled and self.sides != SIDES else {}
        found = []
        for place, record in enumerate(records):
            counted = by_shape.get(place)
            self._seen += 1
            if counted is None:
                found.append(self(record))
                continue
            found.append(counted)
            if self._seen % self.sampled == 0 and counted != (encoded := self(record)):
                raise OtherCount(f"{describe(record)} has the costs {encoded}, and {counted} by its shape and words")
        return found

    def fitted(self, record: dict[str, Any]) -> dict[str, Any]:
        """A conversation with at most as many frames of each of its videos as fit into the budget, if some do."""
        if self.budget is None or not record.get("videos") or not self._exceeds(self._of_conversation(record)):
            return record
        limits = checked_frames(record.get("frames")) or DEFAULT_FRAMES

        def limited(most: int) -> dict[str, Any]:
            return {**record, "frames": {"min": min(limits["min"], most), "max": most}}

        numbers = range(1, limits["max"] + 1)
        most = bisect.bisect_left(numbers, True, key=lambda one: self._exceeds(self._of_conversation(limited(one))))
        return limited(most) if most else record

    def _by_shape(self, records: list[dict[str, Any]]) -> dict[int, dict[str, int]]:
        shapes = self._shapes = self._shapes or Shapes(self.encoder)
        places, plain, rest = [], [], []
        for place, record in enumerate(records):
            try:
                found = self._plain(record, shapes)
            except RECORD_ERRORS:  # raised again where its turn comes
                continue
            if found is not None:
                places.append(place)
                plain.append(found[:2])
                rest.append(found[2:])
        costs = {}
        for place, lengths, (shape, _), more in zip(places, shapes.lengths(plain), plain, rest, strict=True):
            if lengths is not None:
                with contextlib.suppress(*RECORD_ERRORS):
                    counted = self._with_images("", *more, shape.later_images, *lengths)
                    if not self._exceeds(counted):
                        costs[place] = counted
        return costs

    def _plain(self, record: dict[str, Any], shapes: Shapes) -> tuple[Shape, list[str], dict[str, Any], list[Any]] | None:
        """The shape of a record, its texts, the record with its frames, and its images; None if it cannot be counted by them."""
        if any(value is not None and name not in SHAPED for name, value in record.items()):
            return None
        if record.get("videos"):
            record = self._completion(record)
        images = encoded_images(record)
        messages = [*record["prompt"], *record["completion"]] if "completion" in record else record["messages"]
        outline = None if None in images else shapes.outline(messages, len(images))
        if outline is None:
            return None
        key, texts = outline
        if key not in self._known or key in self._unchecked:
            completion = record if "completion" in record else self._completion(record)
            if key not in self._known:
                if key not in self._unchecked:
                    self._unchecked.add(key)
                    return None
                self._known[key] = shapes.shape(completion, len(images), texts)
        shape = self._known[key]
        if shape is None or not shape.takes(texts):
            return None
        if key in self._unchecked and (counted := shapes.lengths([(shape, texts)])[0]) is not None:
            self._unchecked.remove(key)
            lengths, rendered = self._lengths(completion, images)
            if (counted, shape.later_images) != (lengths, rendered.later_images):
                self._known[key] = None
        return None if self._known[key] is None else (shape, texts, record, images)

    def _costs(self, record: dict[str, Any]) -> dict[str, int]:
        if self.sides != SIDES:
            fitted = self.fitted(record)
            return self._of_conversation(fitted) | ({} if fitted is record else {"group": fitted["frames"]["max"]})
        record = with_frames(record, where=describe(record))
        costs, prompt = self._counted(record)
        return costs | {"group": prompt_key(prompt, record)}

    def _completion(self, record: dict[str, Any]) -> dict[str, Any]:
        return with_frames(as_completion(record, self.train_on), where=describe(record))

    def _of_conversation(self, record: dict[str, Any]) -> dict[str, int]:
        return self._counted(self._completion(record))[0]

    def _counted(self, record: dict[str, Any]) -> tuple[dict[str, int], str]:
        images = encoded_images(record)
        lengths, rendered = self._lengths(record, images)
        return self._with_images(describe(record), record, images, rendered.later_images, *lengths), rendered.prompt

    def _exceeds(self, costs: dict[str, int]) -> bool:
        if self.budget is None:
            return False
        max_tokens, max_tiles = self.budget
        return costs["prompt"] + costs["chosen"] > max_tokens or (max_tiles is not None and costs["tiles"] > max_tiles)

    def _lengths(self, record: dict[str, Any], images: list[Any]) -> tuple[tuple[int, ...], Rendered]:
        """Tokens of the prompt and of each completion, an image being one token; and the record as text."""
        stand_ins = [None if image is None else STAND_IN for image in images]
        record = {name: value for name, value in record.items() if name not in IMAGE_COLUMNS and value is not None}
        record = {**record, "images": stand_ins}
        rendered = render(record, self.processing_class, sides=self.sides, split_turns=self.encoder.splits_turns)
        prompt_ids, completions = self.encoder.encode_text(rendered, describe(record), cache(self.encoder.tokenize))
        return (len(prompt_ids), *(len(completion.ids) for completion in completions)), rendered

    def _with_images(
        self, where: str, record: dict[str, Any], images: list[Any], later: int, prompt: int, chosen: int, rejected: int = 0
    ) -> dict[str, int]:
        tiles = 0
        if images:
            limits = tile_limits(record, len(images), self.processing_class, where, budget=self.tile_budget)
            counts = self._of_images(images, limits, where)
            first = len(images) - later
            prompt += sum(added for added, _ in counts[:first])
            chosen += sum(added for added, _ in counts[first:])
            tiles = sum(own for _, own in counts)
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "tiles": tiles, "group": 0}

    def _of_images(self, images: list[Any], limits: dict[str, Any], where: str) -> list[tuple[int, int]]:
        """Of each image, the tokens added when its placeholder, of one token, is replaced by image tokens; and its tiles."""
        rule = image_rule(self.processing_class)
        counts = []
        for place, image in enumerate(images):
            path = image["path"] if isinstance(image, dict) and image.get("bytes") is None else None
            size = self._sizes.get(path)
            if size is None:
                size_of = frame_size if isinstance(image, Frame) else image_size  # from the header
                size = size_of(image, where=f"{where}: image {place + 1} of {len(images)}")
                if path is not None:
                    self._sizes[path] = size
            height, width = size
            image_tokens, image_tiles = rule(height, width, tuple(limits.items()))
            counts.append((image_tokens - 1, image_tiles))
        return counts
