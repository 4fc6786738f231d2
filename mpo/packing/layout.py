"""A prompt and its answers as one row of tokens: positions, labels, who attends to whom, and sums per answer.

The row is a trie. A node is a token together with the token it has to predict. Answers share a node while both agree; where
they part, the last token they share stands once per branch, as `a` here, the last token of the prompt:

    tokens      [ prompt            | chosen         | a   rejected      ]     without each answer's last token
    positions     0 ... P-1           P ... P+C-2      P-1 P ... P+R-2
    labels        -100 ... c_0        c_1 ...          r_0 r_1 ...             what each node predicts
    segments    queries [prompt chosen] over keys [prompt chosen]                       causal
                queries [a rejected]    over keys [prompt minus last, a, rejected]      causal, aligned bottom-right

An answer's last token predicts nothing and nothing attends to it, so it is left out unless another answer goes on after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

IGNORED = -100
"""The label of a node that no answer scores."""

Range = tuple[int, int]
"""Consecutive nodes: the first, and the one after the last."""


class AnswerTokens(Protocol):
    """The token ids after a prompt, and which of them are scored (`mpo.packing.turns.Answer`)."""

    @property
    def ids(self) -> list[int]: ...  # noqa: D102
    @property
    def scored(self) -> list[bool]: ...  # noqa: D102


@dataclass(frozen=True)
class Segment:
    """One branch. Its queries are its own nodes; its keys are those of `ancestors`, in order, and then its own."""

    queries: Range
    ancestors: tuple[Range, ...] = ()


@dataclass(frozen=True)
class AnswerNodes:
    """Where an answer is predicted: `nodes[i]` predicts its token `i`, which counts if `scored[i]`.

    After an empty prompt nothing predicts an answer's first token, as with shifted labels; `nodes` starts with the second.
    """

    nodes: list[int]
    scored: list[bool]


@dataclass(frozen=True)
class Row:
    """A prompt and its answers. Every node is in exactly one segment; segments are in the order of the row."""

    tokens: list[int]
    positions: list[int]
    labels: list[int]
    segments: list[Segment]
    answers: list[AnswerNodes]


def lay_out(prompt: Sequence[int], answers: Sequence[AnswerTokens]) -> Row:
    """Lay a prompt and its answers out as one row.

    The first answer goes on after the prompt in the same segment, or a longer answer that begins with all of it. Equal
    answers share all their nodes. A branch repeats the last token it shares, which with an answer right after it is the last
    of the prompt: this must not be an image token, or the copy would ask for an image of its own.

    Args:
        prompt: token ids, image tokens included. May be empty (see `AnswerNodes`).
        answers: any number of answers, at least one.

    Raises:
        ValueError: without an answer, when an answer has not one flag per token, or when there is nothing to predict.

    >>> from types import SimpleNamespace as Answer
    >>> row = lay_out([1, 2], [Answer(ids=[3, 4], scored=[True] * 2), Answer(ids=[5, 6, 7], scored=[True] * 3)])
    >>> row.tokens, row.positions, row.labels
    ([1, 2, 3, 2, 5, 6], [0, 1, 2, 1, 2, 3], [-100, 3, 4, 5, 6, 7])
    >>> row.segments[1]
    Segment(queries=(3, 6), ancestors=((0, 1),))
    >>> [answer.nodes for answer in row.answers]
    [[1, 2], [3, 4, 5]]
    """
    if not answers:
        raise ValueError("A row needs at least one answer.")
    for number, answer in enumerate(answers):
        if len(answer.ids) != len(answer.scored):
            raise ValueError(
                f"Answer {number} has {len(answer.ids)} tokens but {len(answer.scored)} flags in `scored`. Give one flag per token."
            )
    texts = [[*prompt, *answer.ids] for answer in answers]
    tokens: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    paths: list[tuple[Range, ...]] = [()] * len(answers)

    def place(group: list[int], ancestors: tuple[Range, ...], depth: int, agreed: int) -> None:
        """Lay out answers that share `ancestors` (the nodes above `depth`) and agree on their first `agreed` tokens."""
        stem = texts[group[0]]
        for index in group:  # one that goes on where the stem ends is the stem
            if len(texts[index]) > len(stem) and texts[index][: len(stem)] == stem:
                stem = texts[index]
        begin = len(tokens)
        tokens.extend(stem[depth:-1])
        positions.extend(range(depth, len(stem) - 1))
        if len(tokens) > begin:
            segments.append(Segment((begin, len(tokens)), ancestors))

        def above(other_depth: int) -> tuple[Range, ...]:
            end = begin + other_depth - depth
            return (*ancestors, (begin, end)) if end > begin else ancestors

        branches: dict[tuple[int, int], list[int]] = {}
        for index in group:
            text = texts[index]
            common = _common_prefix(text, stem, agreed)
            if common == len(text):
                paths[index] = above(common - 1)
            else:
                branches.setdefault((common, text[common]), []).append(index)
        for (common, _), members in branches.items():
            fork = max(common - 1, 0)  # where the last token they share with the stem stands; the branch repeats it
            place(members, above(fork), fork, common + 1)

    place(list(range(len(answers))), (), 0, len(prompt))
    if not tokens:
        raise ValueError("There is nothing to predict: prompt and answers together have less than two tokens.")
    labels = [IGNORED] * len(tokens)
    unpredicted = 0 if prompt else 1  # the first token of all has nothing before it
    placed = []
    for answer, path in zip(answers, paths, strict=True):
        nodes = list(chain.from_iterable(range(*part) for part in path))[max(len(prompt) - 1, 0) :]
        ids, scored = answer.ids[unpredicted:], answer.scored[unpredicted:]
        for node, token, counts in zip(nodes, ids, scored, strict=True):
            if counts:
                labels[node] = token
        placed.append(AnswerNodes(nodes, list(scored)))
    return Row(tokens, positions, labels, segments, placed)


def without_answers(prompt: Sequence[int]) -> Row:
    """A row in which nothing is scored.

    >>> without_answers([1, 2, 3]).labels
    [-100, -100, -100]
    """
    tokens = list(prompt)
    return Row(tokens, list(range(len(tokens))), [IGNORED] * len(tokens), [Segment((0, len(tokens)), ())], [])


@dataclass(frozen=True, eq=False)
class Segments:
    """Who attends to whom in a batch of S segments, N queries and K keys. Goes to the attention function as it is.

    ``cu_seqlens_q``, ``cu_seqlens_k`` (S + 1,) int32: where each segment's queries and keys begin; queries are the nodes in
    order. ``key_index`` (K,) int64: which node each key is; ``None`` when keys are the nodes in order. ``max_q``, ``max_k``: at
    least the longest segment's queries and keys, rounded up so that few values occur (`torch.compile` makes a graph for each).
    ``lengths``: each segment's queries and keys, known without asking the device.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    key_index: Tensor | None
    max_q: int
    max_k: int
    lengths: tuple[tuple[int, int], ...]

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Segments:
        """A copy on a device; accelerate and the Trainer call this."""
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        return self if moved.cu_seqlens_q is self.cu_seqlens_q else moved  # and keep the masks

    def pin_memory(self) -> Segments:
        """A copy in pinned memory; data loaders call this."""
        return self._map(lambda tensor: tensor.pin_memory())

    def masks(self) -> tuple[Tensor | None, ...]:
        """Each segment's boolean mask (queries, keys), causal from the bottom-right corner; built once per batch.

        ``None`` where none is needed: a segment without ancestors is plainly causal, and a single query sees all its keys.
        """
        masks: tuple[Tensor | None, ...] | None = self.__dict__.get("_masks")
        if masks is None:
            device = self.cu_seqlens_q.device
            masks = tuple(
                None if queries in (1, keys) else torch.ones(queries, keys, dtype=torch.bool, device=device).tril_(keys - queries)
                for queries, keys in self.lengths
            )
            self.__dict__["_masks"] = masks  # past the frozen fields: a cache is no part of the value
        return masks

    def _map(self, change: Callable[[Tensor], Tensor]) -> Segments:
        key_index = None if self.key_index is None else change(self.key_index)
        return Segments(change(self.cu_seqlens_q), change(self.cu_seqlens_k), key_index, self.max_q, self.max_k, self.lengths)


@dataclass(frozen=True, eq=False)
class ScoredTokens:
    """The E scored tokens of A answers, answer after answer. A node that answers share is there once for each.

    ``node`` (E,) int64: the node that predicts the token, in the concatenated row. ``answer`` (E,) int64: whose token it is.
    ``ordinal`` (E,) int64: its place among the answer's scored tokens, from 0. ``lengths`` (A,) int64: scored tokens per answer.
    """

    node: Tensor
    answer: Tensor
    ordinal: Tensor
    lengths: Tensor

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> ScoredTokens:
        """A copy on a device; accelerate and the Trainer call this."""
        return ScoredTokens(*(tensor.to(device, non_blocking=non_blocking) for tensor in self._tensors()))

    def pin_memory(self) -> ScoredTokens:
        """A copy in pinned memory; data loaders call this."""
        return ScoredTokens(*(tensor.pin_memory() for tensor in self._tensors()))

    def select(self, answers: Sequence[int]) -> ScoredTokens:
        """The tokens of some answers, in the order given; an answer may come more than once.

        For whatever differs between the pairs that an answer is in, as LD-DPO's weights do. Meant for the collator: on a GPU it
        would wait for the device.

        >>> tokens = ScoredTokens(*map(torch.tensor, ([4, 5, 8], [0, 0, 1], [0, 1, 0], [2, 1])))
        >>> tokens.select([1, 0, 1]).node
        tensor([8, 4, 5, 8])
        """
        chosen = torch.tensor(answers, dtype=torch.int64)
        lengths = self.lengths[chosen]
        answer = torch.repeat_interleave(torch.arange(len(answers)), lengths)
        ordinal = torch.arange(len(answer)) - (lengths.cumsum(0) - lengths)[answer]
        begin = (self.lengths.cumsum(0) - self.lengths)[chosen]
        return ScoredTokens(self.node[begin[answer] + ordinal], answer, ordinal, lengths)

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.node, self.answer, self.ordinal, self.lengths


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Rows one after the other, nothing padded. ``input_ids``, ``position_ids``, ``shift_labels``: (1, N) int64.

    ``labelled`` (M,) int64: the nodes that have a label, ascending. As ``logits_to_keep`` it spares all others the LM head.
    """

    input_ids: Tensor
    position_ids: Tensor
    shift_labels: Tensor
    labelled: Tensor
    segments: Segments
    scored: ScoredTokens


def concatenate(rows: Sequence[Row]) -> PackedRows:
    """Put rows one after the other. Answers are numbered through, row after row.

    Raises:
        ValueError: without a row.
    """
    if not rows:
        raise ValueError("A batch needs at least one row.")
    keys: list[Tensor] = []
    lengths: list[tuple[int, int]] = []
    nodes: list[int] = []
    scored_lengths: list[int] = []
    offset = 0
    for row in rows:
        for segment in row.segments:
            parts = [torch.arange(begin + offset, end + offset) for begin, end in (*segment.ancestors, segment.queries)]
            keys += parts
            lengths.append((len(parts[-1]), sum(map(len, parts))))
        for answer in row.answers:
            scored = [node + offset for node, counts in zip(answer.nodes, answer.scored, strict=True) if counts]
            nodes += scored
            scored_lengths.append(len(scored))
        offset += len(row.tokens)
    alone = all(queries == keys_ for queries, keys_ in lengths)
    segments = Segments(
        cu_seqlens_q=_cumulative([queries for queries, _ in lengths]),
        cu_seqlens_k=_cumulative([keys_ for _, keys_ in lengths]),
        key_index=None if alone else torch.cat(keys),
        max_q=_bucket(max(queries for queries, _ in lengths)),
        max_k=_bucket(max(keys_ for _, keys_ in lengths)),
        lengths=tuple(lengths),
    )
    count = torch.tensor(scored_lengths, dtype=torch.int64)
    answer_of = torch.repeat_interleave(torch.arange(len(scored_lengths)), count)
    ordinal = torch.arange(len(nodes)) - (count.cumsum(0) - count)[answer_of]
    shift_labels = _joined([row.labels for row in rows])
    return PackedRows(
        input_ids=_joined([row.tokens for row in rows]),
        position_ids=_joined([row.positions for row in rows]),
        shift_labels=shift_labels,
        labelled=(shift_labels[0] != IGNORED).nonzero()[:, 0],
        segments=segments,
        scored=ScoredTokens(torch.tensor(nodes, dtype=torch.int64), answer_of, ordinal, count),
    )


def completion_sums(node_logps: Tensor, scored: ScoredTokens, weights: Tensor | None = None) -> Tensor:
    """Sum the log-probs of each answer's scored tokens.

    Args:
        node_logps: shape (1, N) or (N,), the log-prob of each node's label; what unscored nodes hold is never read.
        scored: the batch's scored tokens, E of A answers, on the same device.
        weights: shape (E,), what each token counts; all count fully by default.

    Returns:
        shape (A,), float32.

    >>> scored = ScoredTokens(*map(torch.tensor, ([1, 2, 1], [0, 0, 1], [0, 1, 0], [2, 1])))  # both answers share node 1
    >>> completion_sums(torch.tensor([[0.0, -1.0, -2.0]]), scored)
    tensor([-3., -1.])
    """
    # Added up in float64, the sum is right to its last float32 digit in whatever order a GPU adds.
    precise = torch.float32 if node_logps.device.type == "mps" else torch.float64
    values = node_logps.reshape(-1)[scored.node].to(precise)
    if weights is not None:
        values = values * weights
    sums = torch.zeros(scored.lengths.shape, dtype=precise, device=values.device)
    return sums.index_add(0, scored.answer, values).float()


def ld_weights(scored: ScoredTokens, ld_alpha: float) -> Tensor:
    """LD-DPO's weights (arXiv 2409.06411): tokens beyond the length of the shorter answer of their pair count `ld_alpha`.

    Args:
        scored: the tokens of 2P answers, the chosen ones, then the rejected ones in the same order (see `ScoredTokens.select`).
        ld_alpha: in [0, 1].

    Returns:
        shape (E,), float32, for `completion_sums`.
    """
    shorter = torch.minimum(*scored.lengths.chunk(2)).repeat(2)
    return torch.where(scored.ordinal < shorter[scored.answer], 1.0, ld_alpha)


def _common_prefix(first: Sequence[int], second: Sequence[int], known: int) -> int:
    """How many tokens two texts share at their start, when they share at least `known`."""
    end = min(len(first), len(second))
    return next((index for index in range(known, end) if first[index] != second[index]), end)


def _cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def _joined(parts: Sequence[list[int]]) -> Tensor:
    return torch.tensor(list(chain.from_iterable(parts)), dtype=torch.int64).unsqueeze(0)


def _bucket(length: int) -> int:
    """Round up to a multiple of an eighth of its power of two (at least 128), at most an eighth too long."""
    step = max(128, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step
