"""Records -> one padded batch: the chosen rows, then the rejected rows, each a prompt with its answer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mpo.packing.streams import FILLER
from mpo.packing.turns import (
    Answer,
    Record,
    RenderedPair,
    describe,
    encode_answer,
    encode_with_prompt,
    end_of_turn_token,
    is_processor,
    render,
)


@dataclass
class EncodedPair:
    """Token ids of a prompt and its two answers. ``extra`` are the processor's other per-token outputs for the prompt."""

    prompt_ids: list[int]
    chosen: Answer
    rejected: Answer
    extra: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class PairCollator:
    """Turns preference records in TRL's formats, with or without pictures, into one padded batch.

    The processor runs once per prompt; its picture tensors are repeated for the rejected rows.

    Args:
        processing_class: a tokenizer, or a processor when records have pictures.
        max_length: longest row in tokens. Answers are cut to it; a prompt that leaves no token of an answer, or picture
            tokens that would be cut, are refused. ``None``: no limit.
        truncation_mode: which end of a too long row to keep, ``"keep_start"`` or (text only) ``"keep_end"``.
        answer_end: ``"end_of_turn"`` scores an answer up to and including its end-of-turn token; ``"template"`` scores
            everything the chat template puts behind the prompt, as TRL does.
        pad_to_multiple_of: pad rows to a multiple of this many tokens.

    Returns (from a call with P records, rows of at most T tokens):
        ``input_ids``, ``attention_mask``, ``completion_mask`` of shape (2P, T), chosen rows first; the processor's picture
        tensors, repeated for the second half; ``ref_chosen_logps`` and ``ref_rejected_logps`` of shape (P,) when the
        records hold them; ``is_cut`` of shape (2P,), whether max_length took the end of an answer, when there is a max_length;
        ``names``, what errors call the records; ``counted``, when the last records only fill the batch up.

    Example:
        >>> from transformers import AutoTokenizer  # doctest: +SKIP
        >>> collator = PairCollator(AutoTokenizer.from_pretrained("Qwen/Qwen2.5-0.5B-Instruct"))  # doctest: +SKIP
        >>> batch = collator([{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}])  # doctest: +SKIP
    """

    processing_class: Any
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    answer_end: str = "end_of_turn"
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:  # noqa: D105
        self.tokenizer = self.processing_class.tokenizer if is_processor(self.processing_class) else self.processing_class
        self._end_of_turn = end_of_turn_token(self.processing_class) if self.answer_end == "end_of_turn" else None

    def __call__(self, records: Sequence[Record]) -> dict[str, Any]:
        """Collate records; see the class."""
        rendered = [render(record, self.processing_class, split_turns=self.answer_end == "end_of_turn") for record in records]
        with_pictures, pictures = self._encode_picture_prompts(rendered)
        pairs = [with_pictures[index] if index in with_pictures else self._encode_text(pair) for index, pair in enumerate(rendered)]
        if self.max_length is not None:
            for record, pair in zip(records, pairs, strict=True):
                self._check_length(record, pair, self.max_length)
        batch = self._pad(pairs)
        # Every picture stands before both of its answers: once for the chosen rows, once for the rejected ones.
        batch.update({name: torch.cat([value, value]) for name, value in pictures.items()})
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in records[0]:
                batch[name] = torch.tensor([record[name] for record in records])
        described: dict[str, Any] = {"names": [describe(record) for record in records]}
        if any(FILLER in record for record in records):
            described["counted"] = sum(FILLER not in record for record in records)
        return {**batch, **described}

    def _encode_text(self, pair: RenderedPair) -> EncodedPair:
        def tokenize(text: str) -> list[int]:
            ids: list[int] = self.tokenizer(text, add_special_tokens=not pair.conversational)["input_ids"]
            return ids

        sides = [self._with_eos(pieces, pair) for pieces in (pair.chosen, pair.rejected)]
        prompt_ids, (chosen, rejected) = encode_with_prompt(pair.prompt, sides, tokenize, self._end_of_turn)
        return EncodedPair(prompt_ids, chosen, rejected)

    def _encode_picture_prompts(self, rendered: list[RenderedPair]) -> tuple[dict[int, EncodedPair], dict[str, Tensor]]:
        """Run the processor once over all prompts that have pictures.

        Returns:
            the encoded pairs by their place in the batch, and the processor's per-picture tensors.
        """
        places = [index for index, pair in enumerate(rendered) if pair.images]
        if not places:
            return {}, {}
        if not is_processor(self.processing_class):
            raise ValueError(
                "The records have pictures, but the processing class is a tokenizer. Pass the model's processor "
                "(AutoProcessor.from_pretrained) as `processing_class`, or drop the 'images' column."
            )
        processed = self.processing_class(
            images=[rendered[index].images for index in places],
            text=[rendered[index].prompt for index in places],
            padding=True,
            padding_side="left",
            return_tensors="pt",
            add_special_tokens=False,  # the chat template has put the special tokens there already
        )
        ids, mask = processed.pop("input_ids"), processed.pop("attention_mask").bool()
        per_token = {name: value for name, value in processed.items() if value.shape == ids.shape}
        pictures = {name: value for name, value in processed.items() if name not in per_token}

        def tokenize(text: str) -> list[int]:
            answer_ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            return answer_ids

        encoded = {}
        for row, index in enumerate(places):
            pair = rendered[index]
            chosen, rejected = (
                encode_answer(self._with_eos(pieces, pair), tokenize, self._end_of_turn) for pieces in (pair.chosen, pair.rejected)
            )
            extra = {name: value[row][mask[row]] for name, value in per_token.items()}
            encoded[index] = EncodedPair(ids[row][mask[row]].tolist(), chosen, rejected, extra)
        return encoded, pictures

    def _with_eos(self, pieces: list[Any], pair: RenderedPair) -> list[Any]:
        """Plain text ends in eos, so that the model learns to stop. (TRL leaves it out beside pictures.)"""
        eos = self.tokenizer.eos_token
        as_trl = self.answer_end == "template" and pair.images
        if pair.conversational or eos is None or as_trl or pieces[-1].text.endswith(eos):
            return pieces
        return [*pieces[:-1], type(pieces[-1])(pieces[-1].text + eos, pieces[-1].scored)]

    def _check_length(self, record: Record, pair: EncodedPair, max_length: int) -> None:
        longest = len(pair.prompt_ids) + max(len(pair.chosen.ids), len(pair.rejected.ids))
        if longest <= max_length:
            return
        if self.truncation_mode == "keep_start" and len(pair.prompt_ids) >= max_length:
            raise ValueError(
                f"{describe(record)}: its prompt alone has {len(pair.prompt_ids)} tokens (picture tokens included), and "
                f"max_length={max_length} leaves none for the answers. Raise max_length, set it to None, or leave the "
                "record out."
            )
        if self.truncation_mode == "keep_start":
            kept = max_length - len(pair.prompt_ids)
            if pair.chosen.ids[:kept] == pair.rejected.ids[:kept]:
                raise ValueError(
                    f"{describe(record)}: cut to max_length={max_length}, 'chosen' and 'rejected' are the same. Raise "
                    "max_length, set it to None, or leave the record out."
                )
        elif max(len(pair.chosen.ids), len(pair.rejected.ids)) >= max_length:
            raise ValueError(
                f"{describe(record)}: an answer alone has {max(len(pair.chosen.ids), len(pair.rejected.ids))} tokens, and "
                f"truncation_mode='keep_end' with max_length={max_length} leaves nothing of the prompt. Raise max_length, set it "
                "to None, or leave the record out."
            )
        if self.truncation_mode == "keep_end" and is_processor(self.processing_class):
            raise ValueError(
                f"{describe(record)} has {longest} tokens and would be cut at its start by truncation_mode='keep_end' and "
                f"max_length={max_length}: picture tokens stand there. Use 'keep_start' or raise max_length."
            )

    def _pad(self, pairs: list[EncodedPair]) -> dict[str, Tensor]:
        rows = [(pair, pair.chosen) for pair in pairs] + [(pair, pair.rejected) for pair in pairs]
        cut = slice(None)
        if self.max_length is not None:
            keep_end = self.truncation_mode == "keep_end"
            cut = slice(-self.max_length, None) if keep_end else slice(None, self.max_length)
        ids = [(pair.prompt_ids + answer.ids)[cut] for pair, answer in rows]
        scored = [([False] * len(pair.prompt_ids) + answer.scored)[cut] for pair, answer in rows]
        length = max(map(len, ids))
        if self.pad_to_multiple_of:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of

        def padded(values: list[list[Any]], fill: int) -> Tensor:
            return torch.tensor([row + [fill] * (length - len(row)) for row in values], dtype=torch.long)

        pad_token = self.tokenizer.pad_token_id
        batch = {
            "input_ids": padded(ids, self.tokenizer.eos_token_id if pad_token is None else pad_token),
            "attention_mask": padded([[1] * len(row) for row in ids], 0),
            "completion_mask": padded(scored, 0),
        }
        if self.max_length is not None:
            batch["is_cut"] = torch.tensor([len(pair.prompt_ids) + len(answer.ids) > self.max_length for pair, answer in rows])
        for name in {name for pair in pairs for name in pair.extra}:
            values = [pair.extra[name].tolist() if name in pair.extra else [0] * len(pair.prompt_ids) for pair, _ in rows]
            batch[name] = padded([(row + [0] * length)[cut][:length] for row in values], 0)
        return batch
