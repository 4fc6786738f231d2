"""Convert a rendered record to token ids: where the prompt ends, and which tokens of a completion are labelled."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trl.data_utils import common_prefix_length

from mpo.encoding.chat import Piece, probe
from mpo.encoding.turns import Rendered

Tokenize = Callable[[str], list[int]]


@dataclass(frozen=True)
class Completion:
    """The tokens after the prompt; ``loss_mask[i]`` is whether token ``i`` was written by the assistant."""

    ids: list[int]
    loss_mask: list[bool]

    def __post_init__(self) -> None:
        tokens, flags = len(self.ids), len(self.loss_mask)
        if tokens != flags:
            raise ValueError(f"A completion has {tokens} tokens but {flags} flags in `loss_mask`. Give one flag per token.")


def encode_with_prompt(
    prompt: str, completions: Sequence[list[Piece]], tokenize: Tokenize, end_of_turn: int | None, where: str = "a record"
) -> tuple[list[int], list[Completion]]:
    """Tokenize prompt and completion as one text, as TRL does without images: tokens may merge across the boundary.

    A piece on its own could get different tokens: SentencePiece puts a space before the beginning of a text.

    Returns:
        the longest common prefix of the tokenized prompt and all tokenized rows, and the completions after it.

    Raises:
        ValueError: for an empty prompt, since nothing would predict a completion's first token.
    """
    prompt_ids = tokenize(prompt)
    if not prompt_ids:
        raise ValueError(f"{where}: its prompt is empty. Give it a prompt of one token or more.")
    rows: list[tuple[list[int], list[int]]] = []
    for pieces in completions:
        texts = [prompt]
        for piece in pieces:
            texts.append(texts[-1] + piece.text)
        ids = tokenize(texts[-1])
        rows.append((ids, [common_prefix_length(tokenize(text), ids) for text in texts[:-1]] + [len(ids)]))
    length = min([len(prompt_ids), *(starts[0] for _, starts in rows)])
    if not length:  # no common prefix, so nothing would predict the first token: tokenize prompt and completions separately
        length = len(prompt_ids)
        rows = [_one_by_one(prompt_ids, pieces, tokenize) for pieces in completions]
    found = []
    for (ids, starts), pieces in zip(rows, completions, strict=True):
        loss_mask: list[bool] = []
        starts[0] = length
        for number, piece in enumerate(pieces):
            own = ids[max(starts[number], length + len(loss_mask)) : starts[number + 1]]
            loss_mask += label_turn(own, end_of_turn) if piece.labelled else [False] * len(own)
        end = max((place + 1 for place, counts in enumerate(loss_mask) if counts), default=0)  # without an unlabelled tail
        found.append(Completion(ids[length : length + end], loss_mask[:end]))
    return prompt_ids[:length], found


def _one_by_one(prompt_ids: list[int], pieces: list[Piece], tokenize: Tokenize) -> tuple[list[int], list[int]]:
    ids, starts = list(prompt_ids), [len(prompt_ids)]
    for piece in pieces:
        ids += tokenize(piece.text)
        starts.append(len(ids))
    return ids, starts


def is_opened(rendered: Rendered, completion_end: str) -> bool:
    """Whether to add the tokenizer's special tokens (BOS) to a pair's text; for a conversation, the chat template writes them.

    TRL leaves them out for pairs with images, as does ``completion_end="template"``.
    """
    return not (rendered.conversational or (completion_end == "template" and rendered.images))


def with_eos(pieces: list[Piece], rendered: Rendered, eos: str | None, completion_end: str) -> list[Piece]:
    """Append eos to a plain-text completion, so that the model learns to stop. (TRL leaves it out for pairs with images.)"""
    if rendered.conversational or eos is None or not is_opened(rendered, completion_end) or pieces[-1].text.endswith(eos):
        return pieces
    return [*pieces[:-1], Piece(pieces[-1].text + eos, pieces[-1].labelled)]


def label_turn(ids: list[int], end_of_turn: int | None) -> list[bool]:
    """The loss mask of an assistant turn: all tokens up to and including its last end-of-turn token, or all without one.

    >>> label_turn([5, 6, 2, 9], end_of_turn=2)  # 9 is the newline that the template puts after the turn
    [True, True, True, False]
    """
    if end_of_turn is None or end_of_turn not in ids:
        return [True] * len(ids)
    last = len(ids) - 1 - ids[::-1].index(end_of_turn)
    return [position <= last for position in range(len(ids))]


def end_of_turn_token(processing_class: Any) -> int | None:
    """The id of the token that ends an assistant turn: the first special token that the chat template puts after one.

    It is `<|im_end|>` for InternVL, also where the tokenizer's eos differs. Without a chat template, or when the template
    puts no special token there, the tokenizer's eos.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    eos: int | None = tokenizer.eos_token_id
    if not getattr(processing_class, "chat_template", None):
        return eos
    after = tokenizer(probe(processing_class).after, add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return next((token for token in after if token in special), eos)
