"""Lay out a prompt and its completions as one row of tokens: positions, labels, attention segments, and sums per completion.

The row is a trie. A node is a token together with the token it has to predict. Completions share a node while both agree; where
they branch, the last token they share is repeated per branch, as `a` here, the last token of the prompt:

    tokens      [ prompt            | chosen         | a   rejected      ]     without each completion's last token
    positions     0 ... P-1           P ... P+C-2      P-1 P ... P+R-2
    labels        -100 ... c_0        c_1 ...          r_0 r_1 ...             what each node predicts
    segments    queries [prompt chosen] over keys [prompt chosen]                       causal
                queries [a rejected]    over keys [prompt minus last, a, rejected]      causal, aligned bottom-right

A completion's last token predicts nothing and nothing attends to it, so it is left out unless another completion continues it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from mpo.encoding.labels import Completion
from mpo.encoding.movable import Movable

IGNORED = -100
"""The label of an unlabelled node."""

Range = tuple[int, int]
"""Consecutive nodes: the first, and one past the last."""


@dataclass(frozen=True)
class Segment:
    """A branch. Its queries are its own nodes; its keys are those of `ancestors`, in order, and then its own."""

    queries: Range
    ancestors: tuple[Range, ...] = ()


@dataclass(frozen=True)
class Row:
    """A prompt and its completions. Every node is in exactly one segment; segments are in the order of the row.

    ``labelled``: of each completion, the nodes that predict its labelled tokens. With an empty prompt nothing predicts its first.
    """

    tokens: list[int]
    positions: list[int]
    labels: list[int]
    labelled: list[list[int]]
    segments: list[Segment]


def lay_out(prompt: Sequence[int], completions: Sequence[Completion]) -> Row:
    """Lay out a prompt and its completions as one row.

    The prompt's segment continues with the first completion, or with a longer one of which that is a prefix. Equal completions
    share all their nodes. A branch repeats the last shared token, which may be the last of the prompt: this must not be an image
    token, or the copy would need another image. The prompt has image tokens included, and may be empty (see `Row`).

    Raises:
        ValueError: without completions, and when there is nothing to predict.

    >>> row = lay_out([1, 2], [Completion([3, 4], [True, True]), Completion([5, 6, 7], [True, True, True])])
    >>> row.tokens, row.positions, row.labels
    ([1, 2, 3, 2, 5, 6], [0, 1, 2, 1, 2, 3], [-100, 3, 4, 5, 6, 7])
    >>> row.segments[1]
    Segment(queries=(3, 6), ancestors=((0, 1),))
    >>> row.labelled
    [[1, 2], [3, 4, 5]]
    """
    if not completions:
        raise ValueError("A row needs at least one completion.")
    texts = [[*prompt, *completion.ids] for completion in completions]
    tokens: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    paths: list[tuple[Range, ...]] = [()] * len(completions)

    def place(group: list[int], ancestors: tuple[Range, ...], depth: int, agreed: int) -> None:
        """Lay out completions that share `ancestors` (the nodes above `depth`) and their first `agreed` tokens."""
        stem = texts[group[0]]
        for index in group:  # one that continues the stem becomes the stem
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
            end = min(len(text), len(stem))
            common = next((at for at in range(agreed, end) if text[at] != stem[at]), end)
            if common == len(text):
                paths[index] = above(common - 1)
            else:
                branches.setdefault((common, text[common]), []).append(index)
        for (common, _), members in branches.items():
            fork = max(common - 1, 0)  # the last token shared with the stem, which the branch repeats
            place(members, above(fork), fork, common + 1)

    place(list(range(len(completions))), (), 0, len(prompt))
    if not tokens:
        raise ValueError("There is nothing to predict: prompt and completions together have fewer than two tokens.")
    return Row(tokens, positions, *_labelled(len(tokens), len(prompt), completions, paths), segments)


def _labelled(
    size: int, prompt: int, completions: Sequence[Completion], paths: Sequence[tuple[Range, ...]]
) -> tuple[list[int], list[list[int]]]:
    """What each of `size` nodes predicts, and the labelled ones of each completion: of its path, after the prompt's."""
    labels = [IGNORED] * size
    unpredicted = 0 if prompt else 1  # nothing precedes the first token of the row
    labelled: list[list[int]] = []
    for completion, path in zip(completions, paths, strict=True):
        nodes = list(chain.from_iterable(range(*part) for part in path))[max(prompt - 1, 0) :]
        labelled.append([])
        for node, token, counts in zip(nodes, completion.ids[unpredicted:], completion.loss_mask[unpredicted:], strict=True):
            if counts:
                labels[node] = token
                labelled[-1].append(node)
    return labels, labelled


def prompt_alone(prompt: Sequence[int]) -> Row:
    """A row in which nothing is labelled."""
    tokens = list(prompt)
    return Row(tokens, list(range(len(tokens))), [IGNORED] * len(tokens), [], [Segment((0, len(tokens)))])


@dataclass(frozen=True, eq=False)
class Segments(Movable):
    """The attention pattern of a batch of S segments, N queries and K keys; passed unchanged to the attention function.

    ``cu_seqlens_q``, ``cu_seqlens_k`` (S + 1,) int32: offsets of each segment's queries and keys; queries are the nodes in
    order. ``key_index`` (K,) int64: the node of each key; ``None`` when keys are the nodes in order. ``max_q``, ``max_k``: the
    longest segment's queries and keys, rounded up so that few values occur (`torch.compile` makes a graph for each).
    ``lengths``: each segment's queries and keys, on the host. ``query_index`` (N,) int64: the node of each query, where some nodes
    do not attend.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    key_index: Tensor | None
    max_q: int
    max_k: int
    lengths: tuple[tuple[int, int], ...]
    query_index: Tensor | None = None

    def offsets(self) -> tuple[Tensor, Tensor, int, int]:
        """The arguments of varlen kernels after queries, keys and values."""
        return self.cu_seqlens_q, self.cu_seqlens_k, self.max_q, self.max_k

    def masks(self) -> tuple[Tensor | None, ...]:
        """The boolean mask (queries, keys) of each segment, causal from the bottom-right corner; built once per batch.

        ``None`` where no mask is needed: a segment without ancestors is plain causal, and a single query attends to all its keys.
        """
        masks: tuple[Tensor | None, ...] | None = self.__dict__.get("_masks")
        if masks is None:
            device = self.cu_seqlens_q.device
            masks = tuple(
                None if queries in (1, keys) else torch.ones(queries, keys, dtype=torch.bool, device=device).tril_(keys - queries)
                for queries, keys in self.lengths
            )
            self.__dict__["_masks"] = masks  # the dataclass is frozen, but a cache is not part of its value
        return masks


@dataclass(frozen=True, eq=False)
class LabelledTokens(Movable):
    """The E labelled tokens of A completions, in the order of completions. A shared node is listed once per completion.

    ``node`` (E,) int64: the node that predicts the token, in the concatenated row. ``completion`` (E,) int64: the token's
    completion. ``ordinal`` (E,) int64: its index among the completion's labelled tokens, from 0. ``lengths`` (A,) int64: labelled
    tokens per completion.
    """

    node: Tensor
    completion: Tensor
    ordinal: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, node: Tensor, lengths: Tensor) -> LabelledTokens:
        """The tokens of completions from their nodes, one completion after the other, and their numbers."""
        completion = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        ordinal = torch.arange(len(node), device=lengths.device) - (lengths.cumsum(0) - lengths)[completion]
        return cls(node, completion, ordinal, lengths)

    def select(self, completions: Sequence[int]) -> LabelledTokens:
        """Select the tokens of completions, in the given order; a completion may be selected more than once.

        For values that differ between the pairs of a completion, such as LD-DPO's weights. Meant for the collator: on a GPU it
        would wait for the device.

        >>> tokens = LabelledTokens(*map(torch.tensor, ([4, 5, 8], [0, 0, 1], [0, 1, 0], [2, 1])))
        >>> tokens.select([1, 0, 1]).node
        tensor([8, 4, 5, 8])
        """
        own = torch.split(self.node, self.lengths.tolist())
        return LabelledTokens.of(torch.cat([own[place] for place in completions]), self.lengths[list(completions)])


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Concatenated rows without padding. ``input_ids``, ``position_ids``, ``shift_labels``: (1, N) int64.

    ``labelled_positions`` (M,) int64: the nodes that have a label, ascending. Used as ``logits_to_keep``: the LM head skips all
    other nodes. ``labelled_segments``: of each segment the queries from its first labelled node on, which are all that the last
    layer needs; None without labels.
    """

    input_ids: Tensor
    position_ids: Tensor
    shift_labels: Tensor
    labelled_positions: Tensor
    segments: Segments
    labelled_segments: Segments | None
    labelled: LabelledTokens


def concatenate(rows: Sequence[Row]) -> PackedRows:
    """Concatenate rows, at least one. Completions are numbered consecutively, in the order of rows."""
    if not rows:
        raise ValueError("A batch needs at least one row.")
    branches: list[tuple[Range, list[Range]]] = []
    nodes: list[int] = []
    labelled_lengths: list[int] = []
    offset = 0
    for row in rows:
        for segment in row.segments:
            ranges = [(begin + offset, end + offset) for begin, end in (*segment.ancestors, segment.queries)]
            branches.append((ranges[-1], ranges))
        nodes += [node + offset for own in row.labelled for node in own]
        labelled_lengths += map(len, row.labelled)
        offset += len(row.tokens)
    shift_labels = _joined([row.labels for row in rows])
    labelled_positions = (shift_labels[0] != IGNORED).nonzero()[:, 0]
    following = torch.cat([labelled_positions, torch.tensor([offset])])
    first = following[torch.searchsorted(labelled_positions, torch.tensor([begin for (begin, _), _ in branches]))].tolist()
    labelled_branches = [((begin, end), ranges) for begin, ((_, end), ranges) in zip(first, branches, strict=True) if begin < end]
    return PackedRows(
        input_ids=_joined([row.tokens for row in rows]),
        position_ids=_joined([row.positions for row in rows]),
        shift_labels=shift_labels,
        labelled_positions=labelled_positions,
        segments=_segments(branches),
        labelled_segments=_segments(labelled_branches, all_nodes=False) if labelled_branches else None,
        labelled=LabelledTokens.of(*(torch.tensor(values, dtype=torch.int64) for values in (nodes, labelled_lengths))),
    )


def _segments(branches: Sequence[tuple[Range, list[Range]]], *, all_nodes: bool = True) -> Segments:
    queries = [end - begin for (begin, end), _ in branches]
    keys = [sum(end - begin for begin, end in ranges) for _, ranges in branches]
    alone = all_nodes and queries == keys
    return Segments(
        cu_seqlens_q=_cumulative(queries),
        cu_seqlens_k=_cumulative(keys),
        key_index=None if alone else torch.cat([torch.arange(*part) for _, ranges in branches for part in ranges]),
        max_q=_bucket(max(queries)),
        max_k=_bucket(max(keys)),
        lengths=tuple(zip(queries, keys, strict=True)),
        query_index=None if all_nodes else torch.cat([torch.arange(*part) for part, _ in branches]),
    )


def completion_sums(node_logps: Tensor, labelled: LabelledTokens, weights: Tensor | None = None) -> Tensor:
    """Sum the log-probs of each completion's labelled tokens, E of A completions, on the same device; shape (A,), float32.

    Args:
        node_logps: shape (1, N) or (N,), the log-prob of each node's label; values of unlabelled nodes are not read.
        weights: shape (E,), the weight of each token; 1 by default.

    >>> labelled = LabelledTokens(*map(torch.tensor, ([1, 2, 1], [0, 0, 1], [0, 1, 0], [2, 1])))  # both completions share node 1
    >>> completion_sums(torch.tensor([[0.0, -1.0, -2.0]]), labelled)
    tensor([-3., -1.])
    """
    # Accumulated in float64, so that the float32 sum does not depend on the order in which a GPU adds.
    precise = torch.float32 if node_logps.device.type == "mps" else torch.float64
    values = node_logps.reshape(-1)[labelled.node].to(precise)
    if weights is not None:
        values = values * weights
    sums = torch.zeros(labelled.lengths.shape, dtype=precise, device=values.device)
    return sums.index_add(0, labelled.completion, values).float()


def ld_weights(labelled: LabelledTokens, ld_alpha: float, sides: int = 2) -> Tensor:
    """LD-DPO's weights (arXiv 2409.06411): `ld_alpha`, in [0, 1], for tokens beyond the record's shortest completion, else 1.

    `labelled`: the tokens of the completions of one of `sides` of all records (chosen), then those of the next in the same order
    (see `LabelledTokens.select`). Returns shape (E,), float32, for `completion_sums`.
    """
    shorter = labelled.lengths.view(sides, -1).amin(dim=0).repeat(sides)
    return torch.where(labelled.ordinal < shorter[labelled.completion], 1.0, ld_alpha)


def _cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def _joined(parts: Sequence[list[int]]) -> Tensor:
    return torch.tensor(list(chain.from_iterable(parts)), dtype=torch.int64).unsqueeze(0)


def _bucket(length: int) -> int:
    """Round up to a multiple of an eighth of its power of two (at least 128), at most an eighth too long."""
    step = max(128, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step
