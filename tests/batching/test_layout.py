"""A prompt and its completions in one row: literal rows, and for any completions the row against each completion on its own."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import sum_completions

from mpo.batching.layout import Segment, completion_sums, concatenate, lay_out, ld_weights
from mpo.encoding.labels import Completion

# Tokens 1, 2, 3 are the prompt's; a completion's are two-digit numbers.
PROMPT = [1, 2, 3]
IGNORED = -100


def completion(*ids, loss_mask=None):
    return Completion(list(ids), [True] * len(ids) if loss_mask is None else loss_mask)


def test_pair():
    """The chosen completion follows the prompt; the rejected one begins with a copy of the prompt's last token."""
    row = lay_out(PROMPT, [completion(11, 12, 13), completion(21, 22)])
    #                     prompt              | chosen | copy  rejected
    assert row.tokens == [1, 2, 3, 11, 12, 3, 21]
    assert row.positions == [0, 1, 2, 3, 4, 2, 3]
    assert row.labels == [IGNORED, IGNORED, 11, 12, 13, 21, 22]
    assert row.segments == [
        Segment(queries=(0, 5)),
        Segment(queries=(5, 7), ancestors=((0, 2),)),  # the prompt without its last token
    ]
    assert row.labelled == [[2, 3, 4], [5, 6]]


def test_completions_of_one_token():
    """Only the copies of the prompt's last token are needed."""
    row = lay_out(PROMPT, [completion(11), completion(21), completion(31)])
    assert row.tokens == [1, 2, 3, 3, 3]
    assert row.positions == [0, 1, 2, 2, 2]
    assert row.labels == [IGNORED, IGNORED, 11, 21, 31]
    assert row.segments == [Segment((0, 3)), Segment((3, 4), ((0, 2),)), Segment((4, 5), ((0, 2),))]
    assert row.labelled == [[2], [3], [4]]


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_a_completion_that_begins_with_another(order):
    """One segment, and no node of its own for the shorter completion, whichever comes first."""
    completions = [completion(11, 12), completion(11, 12, 13, 14)]
    row = lay_out(PROMPT, [completions[index] for index in order])
    assert row.tokens == [1, 2, 3, 11, 12, 13]
    assert row.labels == [IGNORED, IGNORED, 11, 12, 13, 14]
    assert row.segments == [Segment((0, 6))]
    assert [row.labelled[order.index(index)] for index in (0, 1)] == [[2, 3], [2, 3, 4, 5]]


def test_equal_completions():
    """Two of three completions are the same: its nodes are there once, and count in both."""
    row = lay_out(PROMPT, [completion(11, 12), completion(21), completion(11, 12)])
    assert row.tokens == [1, 2, 3, 11, 3]
    assert row.labels == [IGNORED, IGNORED, 11, 12, 21]
    assert row.labelled == [[2, 3], [4], [2, 3]]


def test_shared_halves():
    """The second completion leaves the first after 12, the third leaves the second after 22; last shared tokens are repeated."""
    row = lay_out(PROMPT, [completion(11, 12, 13, 14), completion(11, 12, 21, 22, 23), completion(11, 12, 21, 22, 31)])
    #                     prompt   | first     | second          | third
    assert row.tokens == [1, 2, 3, 11, 12, 13, 12, 21, 22, 22]
    assert row.positions == [0, 1, 2, 3, 4, 5, 4, 5, 6, 6]
    assert row.labels == [IGNORED, IGNORED, 11, 12, 13, 14, 21, 22, 23, 31]
    assert row.segments == [
        Segment((0, 6)),
        Segment((6, 9), ((0, 4),)),  # prompt and 11, then its own 12
        Segment((9, 10), ((0, 4), (6, 8))),  # ... then the second completion's 12 and 21, then its own 22
    ]
    assert row.labelled == [[2, 3, 4, 5], [2, 3, 6, 7, 8], [2, 3, 6, 7, 9]]


def test_branches_that_share_go_together():
    """Completions that leave at the same token for the same next one share what follows, though another comes between."""
    row = lay_out([1], [completion(11), completion(21, 22), completion(31), completion(21, 23)])
    #                     1->11 | 1->21 21->22 | 21->23 | 1->31
    assert row.tokens == [1, 1, 21, 21, 1]
    assert row.labels == [11, 21, 22, 23, 31]
    assert row.segments == [Segment((0, 1)), Segment((1, 3)), Segment((3, 4), ((1, 2),)), Segment((4, 5))]
    assert row.labelled == [[0], [1, 2], [4], [1, 3]]


def test_no_prompt():
    """Nothing predicts the first tokens, and no node is shared: 11 -> 12, 21 -> 22 and 11 -> 13 differ."""
    row = lay_out([], [completion(11, 12), completion(21, 22), completion(11, 13)])
    assert row.tokens == [11, 21, 11]
    assert row.positions == [0, 0, 0]
    assert row.labels == [12, 22, 13]
    assert row.segments == [Segment((0, 1)), Segment((1, 2)), Segment((2, 3))]
    assert row.labelled == [[0], [1], [2]]


def test_no_prompt_and_completions_that_begin_alike():
    """They share 11 -> 12; the last shared token, 12, is there once for 13 and once for 14."""
    row = lay_out([], [completion(11, 12, 13), completion(11, 12, 14)])
    assert row.tokens == [11, 12, 12]
    assert row.positions == [0, 1, 1]
    assert row.labels == [12, 13, 14]
    assert row.segments == [Segment((0, 2)), Segment((2, 3), ((0, 1),))]
    assert row.labelled == [[0, 1], [0, 2]]


def test_images_and_text_alone():
    """Image tokens (9) are there once for any number of completions; a text without completions is an ordinary row."""
    batch = concatenate(
        [lay_out([9, 9, 1], [completion(11), completion(21), completion(31, 32)]), lay_out([2], [completion(11), completion(21)])]
    )
    #                                  image     copies  longest | text, copy
    assert batch.input_ids.tolist() == [[9, 9, 1, 1, 1, 31, 2, 2]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 2, 2, 3, 0, 0]]
    assert batch.shift_labels.tolist() == [[IGNORED, IGNORED, 11, 21, 31, 32, 11, 21]]
    assert batch.segments.lengths == ((3, 3), (1, 3), (2, 4), (1, 1), (1, 1))
    assert batch.segments.key_index.tolist() == [0, 1, 2, 0, 1, 3, 0, 1, 4, 5, 6, 7]
    assert batch.labelled.node.tolist() == [2, 3, 4, 5, 6, 7]
    assert batch.labelled.completion.tolist() == [0, 1, 2, 2, 3, 4]


def test_a_node_is_scored_if_any_completion_scores_it():
    """The shared tokens of the second completion are not labelled; its log-prob is that of 22 only."""
    row = lay_out(PROMPT, [completion(11, 12), completion(11, 12, 22, loss_mask=[False, False, True])])
    assert row.labels == [IGNORED, IGNORED, 11, 12, 22]
    assert concatenate([row]).labelled.node.tolist() == [2, 3, 4]
    unlabelled = lay_out(PROMPT, [completion(11, 12, loss_mask=[False, True]), completion(11, 13, loss_mask=[False, True])])
    assert unlabelled.labels == [IGNORED, IGNORED, IGNORED, 12, 13]


def test_refusals():
    with pytest.raises(ValueError, match="at least one completion"):
        lay_out(PROMPT, [])
    with pytest.raises(ValueError, match="2 tokens but 1 flags"):
        lay_out(PROMPT, [completion(11, 12, loss_mask=[True])])
    with pytest.raises(ValueError, match="nothing to predict"):
        lay_out([], [completion(11), completion(12)])
    with pytest.raises(ValueError, match="at least one row"):
        concatenate([])


def test_batch():
    """A pair, a text alone, and three completions, one after the other; offsets everywhere, no padding."""
    rows = [
        lay_out([1, 2], [completion(11, 12), completion(21)]),  #  nodes 0 1 2 | 3
        lay_out([5], [completion(51, 52, loss_mask=[False, True])]),  # nodes 4 5
        lay_out([7], [completion(71), completion(72), completion(71, 73)]),  # nodes 6 7 | 8
    ]
    batch = concatenate(rows)
    assert batch.input_ids.tolist() == [[1, 2, 11, 2, 5, 51, 7, 71, 7]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 1, 0, 1, 0, 1, 0]]
    assert batch.shift_labels.tolist() == [[IGNORED, 11, 12, 21, IGNORED, 52, 71, 73, 72]]
    assert batch.labelled_positions.tolist() == [1, 2, 3, 5, 6, 7, 8]
    segments = batch.segments
    assert segments.lengths == ((3, 3), (1, 2), (2, 2), (2, 2), (1, 1))
    assert segments.cu_seqlens_q.tolist() == [0, 3, 4, 6, 8, 9]
    assert segments.cu_seqlens_k.tolist() == [0, 3, 5, 7, 9, 10]
    assert segments.key_index.tolist() == [0, 1, 2, 0, 3, 4, 5, 6, 7, 8]
    assert segments.cu_seqlens_q.dtype == segments.cu_seqlens_k.dtype == torch.int32
    assert segments.max_q >= 3 and segments.max_k >= 3
    labelled = batch.labelled
    assert labelled.node.tolist() == [1, 2, 3, 5, 6, 8, 6, 7]
    assert labelled.completion.tolist() == [0, 0, 1, 2, 3, 4, 5, 5]
    assert labelled.ordinal.tolist() == [0, 1, 0, 0, 0, 0, 0, 1]
    assert labelled.lengths.tolist() == [2, 1, 1, 1, 1, 2]


def test_rows_of_one_completion_need_no_key_index():
    batch = concatenate([lay_out(PROMPT, [completion(11, 12)]), lay_out(PROMPT, [completion(11, 12, 13), completion(11, 12)])])
    assert batch.segments.key_index is None
    assert batch.segments.lengths == ((4, 4), (5, 5))


def test_masks():
    """Plainly causal and single queries need none; a branch sees its ancestors and, causally, itself. Built once."""
    segments = concatenate([lay_out([1, 2], [completion(11), completion(21, 22), completion(31)])]).segments
    causal, branch, single = segments.masks()
    assert causal is None and single is None
    assert branch.int().tolist() == [
        [1, 1, 0],  # the copy of 2 sees 1 and itself
        [1, 1, 1],  # 21 sees all
    ]
    assert segments.masks()[1] is branch
    assert segments.to("cpu") is segments


def test_sums():
    """Node k has log-prob -2**k, so that a sum shows its nodes; unlabelled nodes hold nan, which is never read."""
    rows = [lay_out([1, 2], [completion(11, 12), completion(11, 13)]), lay_out([5], [completion(51, loss_mask=[False])])]
    batch = concatenate(rows)
    logps = -(2.0 ** torch.arange(batch.input_ids.shape[1])).unsqueeze(0)
    logps[batch.shift_labels == IGNORED] = float("nan")
    logps.requires_grad_()
    sums = completion_sums(logps, batch.labelled)
    assert sums.dtype == torch.float32
    assert sums.tolist() == [-2.0 - 4.0, -2.0 - 8.0, 0.0]  # nodes 1 2; 1 3; none
    sums.sum().backward()
    assert logps.grad.tolist() == [[0, 2, 1, 1, 0]]  # node 1 is in both completions
    weighted = completion_sums(logps, batch.labelled, torch.tensor([1.0, 0.5, 1.0, 0.0]))
    assert weighted.tolist() == [-2.0 - 2.0, -2.0, 0.0]


def test_sums_of_many_half_precision_terms():
    logps = torch.full((1, 4096), -1.0 - 2.0**-7, dtype=torch.bfloat16)
    labelled = concatenate([lay_out([1], [completion(*range(4096))])]).labelled
    assert completion_sums(logps, labelled).item() == -4096 * (1 + 2.0**-7)


@pytest.mark.parametrize("ld_alpha", [0.0, 0.3, 1.0])
def test_ld_weights_agree_with_padded_rows(ld_alpha):
    """Two pairs share their chosen completion, but not the length of the shorter one."""
    completions = [completion(11, 12, 13, 14), completion(21), completion(31, 32, 33)]
    batch = concatenate([lay_out(PROMPT, completions)])
    logps = torch.randn(batch.input_ids.shape, generator=torch.Generator().manual_seed(0))
    pairs = batch.labelled.select([0, 0, 1, 2])  # chosen, then rejected
    packed = completion_sums(logps, pairs, ld_weights(pairs, ld_alpha))
    padded = torch.zeros(4, 4)
    for number, index in enumerate([0, 0, 1, 2]):
        nodes = concatenate([lay_out(PROMPT, completions)]).labelled.select([index]).node
        padded[number, : len(nodes)] = logps[0, nodes]
    loss_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]])
    torch.testing.assert_close(packed, sum_completions(padded, loss_mask, ld_alpha))


def test_travels_between_processes():
    batch = pickle.loads(pickle.dumps(concatenate([lay_out(PROMPT, [completion(11), completion(21)])])))
    assert batch.segments.lengths == ((3, 3), (1, 3))


def test_maxima_take_few_values():
    """Prompts of 1 to 4000 tokens: no more than a few maxima, none below the length or more than an eighth (or 127) above."""
    maxima = {}
    for length in range(1, 4000, 7):
        longest = concatenate([lay_out(range(length), [completion(-1)])]).segments.max_q
        assert length <= longest <= max(length + 127, length * 9 / 8)
        maxima[longest] = True
    assert len(maxima) <= 24


def test_tokens_are_compared_a_few_times_each():
    """A prompt of 3,500 tokens and two completions of 1,000, whose common prefix is 500 tokens."""
    compared = []

    class Token(int):
        __hash__ = int.__hash__

        def __eq__(self, other):
            compared.append(self)
            return int(self) == int(other)

        def __ne__(self, other):
            compared.append(self)
            return int(self) != int(other)

    prompt = list(map(Token, range(3500)))
    lay_out(prompt, [completion(*map(Token, range(1000))), completion(*map(Token, (*range(500), *range(1500, 2000))))])
    assert 0 < len(compared) < 5500


tokens = st.integers(0, 2)  # few different ones, so that completions share much
some_completions = st.lists(
    st.lists(st.tuples(tokens, st.booleans()), max_size=6).map(
        lambda pairs: Completion([t for t, _ in pairs], [s for _, s in pairs])
    ),
    min_size=1,
    max_size=8,
)


some_groups = st.tuples(st.lists(tokens, max_size=4), some_completions).filter(
    lambda group: any(len(group[0]) + len(given_completion.ids) > 1 for given_completion in group[1])
)


@given(st.lists(some_groups, min_size=1, max_size=3))
def test_every_completion_sees_exactly_its_own_text(groups):
    """For each predicted token of each completion: the keys its node sees are the text before it, in order, at the right positions.

    After an empty prompt a completion's first token is not predicted.
    """
    rows = [lay_out(prompt, completions) for prompt, completions in groups]
    batch = concatenate(rows)
    tokens, positions = batch.input_ids[0].tolist(), batch.position_ids[0].tolist()
    sees = visible_nodes(batch)
    offset = 0
    for (prompt, completions), row in zip(groups, rows, strict=True):
        for given_completion, nodes in zip(completions, row.labelled, strict=True):
            unpredicted = 0 if prompt else 1
            text, counts = prompt + given_completion.ids, given_completion.loss_mask[unpredicted:]
            ends = [end for end, own in zip(range(len(text) - len(counts), len(text)), counts, strict=True) if own]
            for node, end in zip(nodes, ends, strict=True):
                before = sees[node + offset]
                assert before[-1] == node + offset
                assert [tokens[key] for key in before] == text[:end]
                assert [positions[key] for key in before] == list(range(end))
                assert row.labels[node] == text[end]
        offset += len(row.tokens)
    all_labelled = {node for node, label in enumerate(batch.shift_labels[0].tolist()) if label != IGNORED}
    assert all_labelled == set(batch.labelled.node.tolist())


@given(st.lists(tokens, min_size=0, max_size=3), some_completions)
def test_no_node_twice(prompt, completions):
    """A row has as many nodes as there are different (text before, next token), and each is a query exactly once."""
    texts = [prompt + given_completion.ids for given_completion in completions]
    different = {tuple(text[: end + 1]) for text in texts for end in range(1, len(text))}
    if not different:
        with pytest.raises(ValueError, match="nothing to predict"):
            lay_out(prompt, completions)
        return
    row = lay_out(prompt, completions)
    assert len(row.tokens) == len(row.positions) == len(row.labels) == len(different)
    assert [node for segment in row.segments for node in range(*segment.queries)] == list(range(len(row.tokens)))
    assert row.segments[0].queries[0] == 0 and row.labelled[0] == sorted(row.labelled[0])


def visible_nodes(batch):
    """For each node, the nodes it attends to, as the varlen kernels define it: causal, aligned bottom-right."""
    segments = batch.segments
    count = batch.input_ids.shape[1]
    index = list(range(count)) if segments.key_index is None else segments.key_index.tolist()
    sees = {}
    for number, (queries, keys) in enumerate(segments.lengths):
        first_query, first_key = int(segments.cu_seqlens_q[number]), int(segments.cu_seqlens_k[number])
        for query in range(queries):
            sees[first_query + query] = index[first_key : first_key + keys - queries + query + 1]
    assert sorted(sees) == list(range(count))
    return sees
