"""Encode records as token ids and image tensors: each distinct image is opened and processed once, each text tokenized once."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations, groupby
from typing import Any

import torch
from torch import Tensor

from mpo.data.video import with_frames
from mpo.encoding.chat import check_processor, is_processor
from mpo.encoding.images import Opening, process
from mpo.encoding.keys import prompt_key
from mpo.encoding.labels import Completion, encode_with_prompt, end_of_turn_token, is_opened, with_eos
from mpo.encoding.tiles import jpeg_seed, tile_limits
from mpo.encoding.turns import SIDES, Opened, Record, Rendered, describe, encoded_images, render
from mpo.models.control_tokens import added_start
from mpo.schema import BAD, COUNTED


@dataclass
class Encoded:
    """Token ids of a prompt and its completions.

    ``extra``: the processor's other per-token outputs for the prompt. ``prompt``: the index of the first record of the batch
    that shares its prompt and images, which may be this one. ``limits``: tile limits that differ from the processor's
    (`mpo.encoding.tiles.tile_limits`).
    """

    prompt_ids: list[int]
    completions: list[Completion]
    prompt: int
    images: list[Any] = field(default_factory=list)
    extra: dict[str, Tensor] = field(default_factory=dict)
    limits: dict[str, Any] = field(default_factory=dict)

    def longest(self) -> int:
        """Tokens of the longest completion."""
        return max((len(completion.ids) for completion in self.completions), default=0)


@dataclass
class Encoder:
    """Encode records as token ids and the processor's image tensors.

    Args:
        processing_class: a tokenizer, or a processor when records have images.
        max_length, truncation_mode, completion_end, tile_budget: as in `mpo.batching.collator.PairCollator`.
        share: records of one prompt share it, by the key by which batches are planned (`mpo.encoding.keys.prompt_key`).
        augment_seed: as `seed` in `mpo.encoding.tiles.jpeg_seed`.
        context: the longest prompt with one completion, in tokens, whose log-probs do not depend on the rest of its batch
            (`mpo.models.packable.fixed_context`); a longer one is an error.
        features: a `mpo.training.features.cache.FeatureCache`: images that it has are neither decoded nor processed.
    """

    processing_class: Any
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    completion_end: str = "end_of_turn"
    tile_budget: str = "prompt"
    share: bool = False
    augment_seed: int = 0
    context: int | None = None
    features: Any = None

    def __post_init__(self) -> None:
        self.tokenizer = self.processing_class.tokenizer if is_processor(self.processing_class) else self.processing_class
        self.splits_turns = self.completion_end == "end_of_turn"
        self._end_of_turn = end_of_turn_token(self.processing_class) if self.splits_turns else None

    def __call__(
        self, records: Sequence[Record], sides: Sequence[str] = SIDES
    ) -> tuple[list[Encoded], dict[str, Tensor], Tensor | None]:
        """Encode the records of a batch.

        Args:
            sides: the columns of the completions; none for prompts to generate from.

        Returns:
            an `Encoded` per record; the processor's image tensors; and, if these are tiles, their order
            (`mpo.encoding.images.process`): they are then stored once per distinct image, otherwise once per distinct prompt.
        """
        for bad in (record[BAD] for record in records if BAD in record):
            raise bad
        records = [with_frames(record, where=describe(record)) for record in records]
        opened: dict[Any, Opened] = {}
        rendered = [
            render(record, self.processing_class, sides=sides, split_turns=self.splits_turns, opened=self._opened(record, opened))
            for record in records
        ]
        limits = [self._limits(record, len(one.images)) for record, one in zip(records, rendered, strict=True)]
        keys = [prompt_key(one.prompt, record) for one, record in zip(rendered, records, strict=True)] if self.share else []
        prompts = list(map(keys.index, keys)) if self.share else list(range(len(records)))
        with_images, pixels, order = self._encode_image_prompts(rendered, prompts, limits)
        tokenize = cache(self.tokenize)
        found = []
        for record, one, prompt, limit in zip(records, rendered, prompts, limits, strict=True):
            ids, completions = self.encode_text(one, describe(record), tokenize)
            if one.later_images:
                encoded = self._with_later_images(one, ids, completions[0], *with_images[prompt], describe(record), tokenize)
                encoded.prompt, encoded.images, encoded.limits = prompt, one.images, limit
            elif prompt in with_images:
                shared, extra = with_images[prompt]
                # The end of the prompt, where a completion's tokens merge with it:
                left_out = tokenize(one.prompt, is_opened(one, self.completion_end))[len(ids) :]
                kept = len(shared) - len(left_out)
                if shared[kept:] != left_out:
                    merged = (
                        f"its completions merge with the tokens that {type(self.processing_class).__name__} writes for an image"
                    )
                    raise ValueError(f"{describe(record)}: {merged}. Put text between the image and the completions.")
                extra = {name: value[:kept] for name, value in extra.items()}
                encoded = Encoded(shared[:kept], completions, prompt, one.images, extra, limit)
            else:
                encoded = Encoded(ids, completions, prompt)
            if self.max_length is not None:
                self._check_length(record, encoded, self.max_length)
            if self.context is not None:
                self._check_context(record, encoded, self.context)
            if one.images and record.get(COUNTED, len(encoded.prompt_ids)) != len(encoded.prompt_ids):
                changed = f"had {record[COUNTED]} tokens when batches were planned and has {len(encoded.prompt_ids)} now"
                raise ValueError(f"{describe(record)}: its prompt {changed}: an image was replaced since. Start the run again.")
            found.append(encoded)
        return found, pixels, order

    def encode_text(
        self, rendered: Rendered, where: str, tokenize: Callable[[str, bool], list[int]] | None = None
    ) -> tuple[list[int], list[Completion]]:
        """Encode the text of a record, in which each image is one placeholder, by `tokenize` or a cache of it."""
        encode, special = tokenize or self.tokenize, is_opened(rendered, self.completion_end)

        def own(text: str) -> list[int]:
            return encode(text, special)

        eos = self.tokenizer.eos_token
        completions = [with_eos(pieces, rendered, eos, self.completion_end) for pieces in rendered.completions]
        return encode_with_prompt(rendered.prompt, completions, own, self._end_of_turn, where)

    def tokenize(self, text: str, special: bool) -> list[int]:
        """Tokenize a text, with the special tokens that the tokenizer adds by default if `special`."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids

    def _opened(self, record: Record, opened: dict[Any, Opened]) -> Opened:
        """The images of a batch that are opened already; with cached features, of records with the same tile limits."""
        if self.features is None:
            return opened.setdefault(None, {})
        limits = self._limits(record, len(encoded_images(record)))
        return opened.setdefault(tuple(sorted(limits.items())), Opening(self.features, limits))

    def _limits(self, record: Record, images: int) -> dict[str, Any]:
        name = describe(record)
        return {
            **tile_limits(record, images, self.processing_class, name, budget=self.tile_budget),
            **jpeg_seed(record, images, self.processing_class, name, seed=self.augment_seed),
        }

    def _encode_image_prompts(
        self, rendered: list[Rendered], prompts: list[int], limits: list[dict[str, Any]]
    ) -> tuple[dict[int, tuple[list[int], dict[str, Tensor]]], dict[str, Tensor], Tensor | None]:
        """Process all prompts with images at once: ids and other outputs by prompt, image tensors, and the order of tiles."""
        places = [prompt for prompt in dict.fromkeys(prompts) if rendered[prompt].images]
        if not places:
            return {}, {}, None
        check_processor(self.processing_class)
        processed, order = process(
            self.processing_class,
            text=[rendered[place].with_images for place in places],
            images=[rendered[place].images for place in places],
            limits=[limits[place] for place in places],
            cache=self.features,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            add_special_tokens=False,  # a chat template has written them; those of plain text are added below
        )
        ids, mask = processed.pop("input_ids"), processed.pop("attention_mask").bool()
        per_token = {name: value for name, value in processed.items() if value.shape == ids.shape}
        pixels = {name: value for name, value in processed.items() if name not in per_token}
        encoded = {}
        for row, place in enumerate(places):
            start = added_start(self.tokenizer) if is_opened(rendered[place], self.completion_end) else []
            own = {name: value[row][mask[row]] for name, value in per_token.items()}
            extra = {name: torch.cat([value.new_zeros(len(start)), value]) for name, value in own.items()}
            encoded[place] = (start + ids[row][mask[row]].tolist(), extra)
        return encoded, pixels, order

    def _with_later_images(
        self,
        rendered: Rendered,
        prompt_ids: list[int],
        completion: Completion,
        processed: list[int],
        extra: dict[str, Tensor],
        where: str,
        tokenize: Callable[[str, bool], list[int]],
    ) -> Encoded:
        """Put the processor's tokens of every image in the place of its placeholder, in the prompt and in the completion."""
        written = tokenize(rendered.with_images, is_opened(rendered, self.completion_end))
        widths = placeholder_widths(written, processed, getattr(self.processing_class, "image_token_id", None))
        count = len(prompt_ids) + len(completion.ids)
        if widths is None or written[:count] != prompt_ids + completion.ids:
            found = (
                f"the images of its later turns are not found among the tokens that {type(self.processing_class).__name__} writes"
            )
            raise ValueError(f"{where}: {found}. Put text between images, or all images into the first turn.")
        begin, end = sum(widths[: len(prompt_ids)]), sum(widths[:count])
        flags = zip(completion.loss_mask, widths[len(prompt_ids) : count], strict=True)
        whole = Completion(processed[begin:end], [flag for flag, width in flags for _ in range(width)])
        return Encoded(processed[:begin], [whole], 0, extra={name: value[:end] for name, value in extra.items()})

    def _check_context(self, record: Record, encoded: Encoded, context: int) -> None:
        longest = len(encoded.prompt_ids) + encoded.longest()
        if min(longest, self.max_length or longest) > context:
            raise ValueError(
                f"{describe(record)}: prompt and completion have {longest} tokens, and beyond {context} a log-prob would depend on "
                "the longest row of the batch, by this model's rope_type ('dynamic' or 'longrope'). Set max_length="
                f"{context} or less, leave the record out, or give its config fixed frequencies ('yarn', 'linear')."
            )

    def _check_length(self, record: Record, encoded: Encoded, max_length: int) -> None:
        prompt, longest = len(encoded.prompt_ids), len(encoded.prompt_ids) + encoded.longest()
        kept, wrong, other_way = max_length - prompt, "", "leave the record out"
        if longest <= max_length:
            return
        if self.truncation_mode == "keep_end":
            mode = f"truncation_mode='keep_end' with max_length={max_length}"
            if encoded.longest() >= max_length:
                wrong = f"a completion alone has {encoded.longest()} tokens, and {mode} leaves nothing of the prompt"
            elif is_processor(self.processing_class):
                wrong = f"it has {longest} tokens, and {mode} would remove image tokens at its beginning"
                other_way = "use 'keep_start'"
        elif kept <= 0:
            wrong = (
                f"its prompt alone has {prompt} tokens (image tokens included), and max_length={max_length} leaves no completion"
            )
        elif any(one.ids[:kept] == other.ids[:kept] for one, other in combinations(encoded.completions, 2)):
            wrong = f"truncated to max_length={max_length}, 'chosen' and 'rejected' are the same"
        if wrong:
            raise ValueError(f"{describe(record)}: {wrong}. Raise max_length, set it to None, or {other_way}.")


def placeholder_widths(written: Sequence[int], processed: Sequence[int], image_token: int | None) -> list[int] | None:
    """The number of processed tokens that each written token became: 1 for text, more for the placeholder of an image.

    Args:
        written: a text's tokens, with one image token for each image.
        processed: the same after the processor has replaced each image token by the same tokens around a run of image tokens.
            None is returned if the two do not correspond in this way.

    >>> placeholder_widths([5, 0, 6, 0], [5, 8, 0, 0, 9, 6, 8, 0, 9], image_token=0)  # 8 and 9 stand around the image tokens
    [1, 4, 1, 3]
    """
    once = (token for place, token in enumerate(processed) if token != image_token or processed[place - 1 : place] != [token])
    texts, runs = _between(written, image_token), _between(once, image_token)
    if len(runs) != len(texts):
        return None
    before = len(runs[0]) - len(texts[0])
    after = len(runs[-1]) - len(texts[-1])
    opening, closing = runs[0][len(texts[0]) :], runs[-1][: max(after, 0)]
    ends = [[], *[closing] * (len(texts) - 1)], [*[opening] * (len(texts) - 1), []]
    if min(before, after) < 0 or any(run != [*a, *text, *b] for run, text, a, b in zip(runs, texts, *ends, strict=True)):
        return None
    counts = [len(list(run)) for is_image, run in groupby(processed, lambda token: token == image_token) if is_image]
    images = iter([before + count + after for count in counts])
    return [next(images) if token == image_token else 1 for token in written]


def _between(ids: Iterable[int], image_token: int | None) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in ids:
        if token == image_token:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts
