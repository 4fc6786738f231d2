"""Collate records into one batch: packed rows in which completions share their prompt, or padded rows with one completion each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from mpo.batching.batch import BLANK, Batch, packed_batch, padded_batch, sort_out
from mpo.batching.layout import Row, lay_out, prompt_alone
from mpo.batching.logits_to_keep import label_padded_rows
from mpo.encoding.chat import is_processor, probe
from mpo.encoding.costs import Budget, RecordMeasure
from mpo.encoding.encoder import Encoded, Encoder
from mpo.encoding.images import VISION_FEATURES
from mpo.encoding.keys import completion_key, image_key
from mpo.encoding.labels import Completion
from mpo.encoding.tiles import AUGMENTED_AND_CACHED, AUGMENTED_FEATURES
from mpo.encoding.turns import CONVERSATION, SIDES, TRAIN_ON, Record, as_completion, describe
from mpo.io import RECORD_ERRORS, BadRecord, StoreError
from mpo.schema import EPOCH, PADDING

LAYOUTS = ("packed", "padded")
_WHITE = Image.new("RGB", (32, 32), "white")


@dataclass
class PairCollator:
    """Collate preference records in TRL's formats, with or without images, into one batch.

    Args:
        processing_class: a tokenizer, or a processor when records have images.
        max_length, completion_end, tile_budget: as in `MPOConfig`. A prompt that leaves no token for a completion, or image tokens
            that would be truncated, are errors.
        truncation_mode: which end of a longer sequence to keep, ``"keep_start"`` or (text in padded rows only) ``"keep_end"``.
        pad_to_multiple_of: pad rows to a multiple of this many tokens.
        layout: ``"padded"``: 2P rows, the chosen ones first, each a prompt with one completion. ``"packed"``: one row for each
            distinct prompt with all its completions, concatenated without padding (`mpo.batching.layout`).
        keys: add ``completion_keys``, the keys of the completions' contents (`mpo.encoding.keys`).
        ld_alpha: part of these keys, with the length of the pair's shorter completion, since LD-DPO's sums depend on both.
        blank_image: add an unlabelled row with a white image to a batch that has no image. A vision tower that is trained on
            several ranks, or sharded over them, has to run on all of them in every step; without it on one rank, the others
            wait forever. If tower and projector alone are trained, a batch of text has no gradient without it. (In a step without
            any image AdamW then applies the tower's momentum.)
        keep_records: while this is not zero, add the records to the batch. In shared memory, so that data loader workers, which
            have copies of the collator, see it change.
        on_bad_record: ``"raise"`` the ValueError of a record that cannot be collated, or ``"skip"`` it: a blank pair at the end of
            the batch replaces it and does not count.
        augment_seed: random seed of the JPEG augmentation (`mpo.encoding.images`) of records with ``augment``.
        context: the longest prompt with one completion whose log-probs do not depend on the rest of the batch; see `Encoder`.
        features: a `mpo.training.features.cache.FeatureCache`; batches then have ``vision_features`` (`mpo.encoding.images`).

    A call with records such as ``{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}`` returns a `mpo.batching.batch.Batch`.
    """

    sides: ClassVar[tuple[str, ...]] = SIDES

    processing_class: Any
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    completion_end: str = "end_of_turn"
    tile_budget: str = "prompt"
    pad_to_multiple_of: int | None = None
    layout: str = "padded"
    keys: bool = False
    ld_alpha: float | None = None
    blank_image: bool = False
    keep_records: Tensor | None = None
    on_bad_record: str = "raise"
    augment_seed: int = 0
    context: int | None = None
    features: Any = None

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"Expected layout to be one of {', '.join(LAYOUTS)}; got layout={self.layout!r}.")
        if self.layout == "packed" and self.truncation_mode == "keep_end" and self.max_length is not None:
            raise ValueError("truncation_mode='keep_end' truncates prompts, which are shared in packed rows. Use 'keep_start'.")
        self._encode = Encoder(
            self.processing_class,
            self.max_length,
            self.truncation_mode,
            self.completion_end,
            self.tile_budget,
            share=self.layout == "packed" and len(self.sides) > 1,
            augment_seed=self.augment_seed,
            context=self.context and self.context // (self.pad_to_multiple_of or 1) * (self.pad_to_multiple_of or 1),
            features=self.features,
        )
        self.tokenizer = self._encode.tokenizer

    def __call__(self, records: Sequence[Record]) -> Batch:
        """Collate records; see the class."""
        records = list(records)
        try:
            batch = self._collate(records)
        except RECORD_ERRORS as error:
            if isinstance(error, StoreError) or (self.on_bad_record == "raise" and isinstance(error, ValueError)):
                raise  # it names its cause
            kept, bad = sort_out(records, self._collate)
            if self.on_bad_record == "raise":
                raise (BadRecord(bad[0]["where"], bad[0]["reason"]) if bad else error) from error
            records = [records[place] for place in kept] + [BLANK] * (len(records) - len(kept))
            batch = replace(self._collate(records), kept=tuple(kept), bad=tuple(bad))
        if self.keep_records is not None and self.keep_records.item():
            batch = replace(batch, records=tuple(records))
        return batch

    def _collate(self, records: list[Record]) -> Batch:
        if self.keys and any(EPOCH in record for record in records):
            raise ValueError(AUGMENTED_AND_CACHED)
        if self.features is not None and any(EPOCH in record for record in records):
            raise ValueError(AUGMENTED_FEATURES)
        pairs, pixels, order = self._encode(records, self.sides)
        blank: list[Encoded] = []
        if self.blank_image and not pixels and is_processor(self.processing_class):  # a tokenizer's records have no images
            blank, pixels, order = self._blank()
        packed = self.layout == "packed"
        batch = (self._pack if packed else self._pad)(pairs, blank)
        # In padded rows an image belongs to all completions: of pairs, once for the chosen rows, once for the rejected ones.
        each = 1 if blank or packed else len(self.sides)
        images: dict[str, Any] = {**pixels}
        if VISION_FEATURES in images:
            images[VISION_FEATURES] = images[VISION_FEATURES].repeated(each)
        elif packed:
            if order is not None and len(order) > len(images["pixel_values"]):
                images["tile_order"] = order
        else:
            if order is not None:  # the tiles of an image in several prompts are repeated, as in TRL's rows
                images["pixel_values"] = images["pixel_values"][order]
            images = {name: value if each == 1 else torch.cat([value] * each) for name, value in images.items()}
        return replace(
            batch,
            model_inputs=batch.model_inputs | images,
            names=tuple(describe(record) for record in records),
            counted=sum(PADDING not in record for record in records) if any(PADDING in record for record in records) else None,
            is_truncated=self._is_truncated(pairs),
            completion_keys=tuple(self._completion_keys(pairs)) if self.keys else None,
            sides=len(self.sides),
        )

    def _blank(self) -> tuple[list[Encoded], dict[str, Tensor], Tensor | None]:
        prompt: Any = getattr(self.processing_class, "image_token", None)
        template = probe(self.processing_class) if getattr(self.processing_class, "chat_template", None) else None
        if template is not None and template.parts:
            system = [{"role": "system", "content": "."}] if template.needs_system else []
            prompt = [*system, {"role": "user", "content": [{"type": "image"}]}]
        return Encoder(self.processing_class, features=self.features)([{"prompt": prompt, "images": [_WHITE]}], sides=())

    def _is_truncated(self, pairs: list[Encoded]) -> Tensor | None:
        lengths = [len(pair.prompt_ids) + len(completion.ids) for pair, completion in self._by_side(pairs)]
        return None if self.max_length is None else torch.tensor(lengths) > self.max_length

    def _by_side(self, pairs: Sequence[Encoded]) -> list[tuple[Encoded, Completion]]:
        """Return each record with its completion: first all of the first side (chosen), then all of the second."""
        return [(pair, pair.completions[side]) for side in range(len(self.sides)) for pair in pairs]

    def _completion_keys(self, pairs: list[Encoded]) -> list[bytes]:
        image_keys: dict[int, bytes] = {}
        for image in (image for pair in pairs for image in pair.images):
            if id(image) not in image_keys:
                image_keys[id(image)] = image_key(image)
        keys = []
        for pair, each in self._by_side(pairs):
            prompt, completion = self._truncated(pair, each)
            settings = []  # each after a negative number, which is no token's id
            if "use_thumbnail" in pair.limits:  # the same ids: three tiles, or two and a thumbnail. (A count has one grid.)
                settings += [-2, int(pair.limits["use_thumbnail"])]
            if self.ld_alpha is not None:
                shorter = min(sum(self._truncated(pair, other)[1].loss_mask) for other in pair.completions)
                settings += [-1, shorter, round(self.ld_alpha * 1e9)]
            images = [image_keys[id(image)] for image in pair.images]
            keys.append(completion_key(images, prompt + settings, completion.ids, completion.loss_mask))
        return keys

    def _truncated(self, pair: Encoded, completion: Completion) -> tuple[list[int], Completion]:
        if self.max_length is None:
            return pair.prompt_ids, completion
        if self.truncation_mode == "keep_end":
            return pair.prompt_ids[-(self.max_length - len(completion.ids)) :], completion
        kept = self.max_length - len(pair.prompt_ids)
        return pair.prompt_ids, Completion(completion.ids[:kept], completion.loss_mask[:kept])

    def _pack(self, pairs: list[Encoded], blank: list[Encoded]) -> Batch:
        groups: dict[int, list[int]] = {}
        for number, pair in enumerate(pairs):
            groups.setdefault(pair.prompt, []).append(number)
        # Text may merge with its prompt's last token, so the prompt of a group is the common prefix of its pairs.
        rows: list[Row] = []
        places = [0] * (len(self.sides) * len(pairs))
        # Image tensors are in the order of their prompts; rows without images may be anywhere.
        for members in groups.values():
            prompt = min((pairs[number].prompt_ids for number in members), key=len)
            if any(pairs[number].extra for number in members):
                names = ", ".join(pairs[members[0]].extra)
                kind = type(self.processing_class).__name__
                raise ValueError(f"{kind} gives {names} per token too, which completions cannot share. Use rows='padded'.")
            image_token = getattr(self.processing_class, "image_token_id", None)
            if len(self.sides) > 1 and pairs[members[0]].images and prompt[-1] == image_token:
                found = f"A prompt ends in an image token ({image_token}), after which completions cannot branch"
                raise ValueError(f"{found}. Put text or a chat template after the image, or use rows='padded'.")
            limit = None if self.max_length is None else self.max_length - len(prompt)
            first = sum(len(row.labelled) for row in rows)
            completions: list[Completion] = []
            for number in members:
                for side, completion in enumerate(pairs[number].completions):
                    places[number + side * len(pairs)] = first + len(completions)
                    completions.append(_after_prompt(prompt, pairs[number].prompt_ids, completion, limit))
            rows.append(lay_out(prompt, completions))
        batch = packed_batch([*rows, *(prompt_alone(pair.prompt_ids) for pair in blank)], places)
        return replace(batch, tokens=sum(len(row.tokens) for row in rows))

    def _pad(self, pairs: list[Encoded], blank: list[Encoded]) -> Batch:
        kept = slice(None, self.max_length)
        if self.max_length is not None and self.truncation_mode == "keep_end":
            kept = slice(-self.max_length, None)
        padding = self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        return padded_batch(self._by_side(pairs), padding, blank=blank, kept=kept, multiple=self.pad_to_multiple_of or 1)


@dataclass
class ConversationCollator(PairCollator):
    """Collate conversations of any number of turns, with images in any turn of the user, into one batch.

    Args:
        train_on: which turns of the assistant are labelled, one of `mpo.encoding.turns.TRAIN_ON`.
        budget: tokens and tiles (None: no limit) of a row; a conversation that exceeds them alone has fewer frames of its videos,
            evenly spread: each at most the largest number with which it fits. None: all frames.
        args: as in `PairCollator`; records as `mpo.encoding.turns.as_completion` takes them. ``"packed"``: a row per
            conversation, concatenated; positions begin at 0 in each, and none attends to another. None is ever truncated.
    """

    sides: ClassVar[tuple[str, ...]] = CONVERSATION

    train_on: str = "all"
    budget: Budget | None = None

    def __post_init__(self) -> None:
        if self.train_on not in TRAIN_ON:
            raise ValueError(f"Expected train_on to be one of {', '.join(TRAIN_ON)}; got train_on={self.train_on!r}.")
        if self.max_length is not None or self.completion_end != "end_of_turn":
            raise ValueError(
                "Conversations are not truncated, and their turns end in end-of-turn tokens. Leave out max_length, completion_end."
            )
        super().__post_init__()
        rules: dict[str, Any] = {"sides": self.sides, "train_on": self.train_on, "budget": self.budget}
        self._measure = RecordMeasure(self.processing_class, tile_budget=self.tile_budget, **rules)

    def _collate(self, records: list[Record]) -> Batch:
        return super()._collate([as_completion(self._measure.fitted(record), self.train_on) for record in records])


@dataclass
class PackCollator:
    """Collate the one pack of `mpo.batching.streams.PackedStream` that a data loader fetches."""

    collator: Any

    def __call__(self, packs: Sequence[list[Record]]) -> Any:
        """Collate the records of a pack."""
        return self.collator(packs[0])


@dataclass
class LabelledBatches:
    """Wrap a user's collator of padded rows: add the labels for the LM head.

    Args:
        collator: returns a `Batch` of padded rows, or a mapping in TRL's format, with ``input_ids``, ``attention_mask`` and
            ``completion_mask`` of shape (2P, T), chosen rows first.
    """

    collator: Any

    def __call__(self, records: Sequence[Record]) -> Batch:
        """Collate records; see `PairCollator`."""
        collated = self.collator(records)
        if isinstance(collated, Batch):
            if "segments" in collated.model_inputs:
                raise ValueError("A data_collator of your own must make padded rows: layout='padded'. Or leave data_collator out.")
            return collated
        inputs = dict(collated)
        labels = label_padded_rows(inputs["input_ids"], inputs.pop("completion_mask"))
        return Batch(inputs, *labels, tokens=int(inputs["attention_mask"].sum()))


def _after_prompt(prompt: list[int], own_prompt: list[int], completion: Completion, limit: int | None) -> Completion:
    rest = own_prompt[len(prompt) :]
    ids, loss_mask = rest + completion.ids, [False] * len(rest) + completion.loss_mask
    return Completion(ids[:limit], loss_mask[:limit])
