"""Identities that hold for all numbers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpo.losses import DPO, Mixture, PairLogps
from mpo.losses.pairs import LOSSES

logp = st.floats(-200, -0.1)
four_logps = st.tuples(logp, logp, logp, logp)


def pairs_of(rows: list[tuple[float, float, float, float]]) -> PairLogps:
    columns = torch.tensor(rows, dtype=torch.float64).T
    tokens = torch.arange(1, len(rows) + 1)
    return PairLogps(*columns, tokens, tokens.flip(0))


@given(four_logps)
def test_swapping_chosen_and_rejected(logps):
    """-log sigma(m) + log sigma(-m) = -m, with m = 0.1 ((c - ref_c) - (r - ref_r))."""
    chosen, rejected, ref_chosen, ref_rejected = logps
    forward = DPO(0.1)(pairs_of([logps])).item()
    swapped = DPO(0.1)(pairs_of([(rejected, chosen, ref_rejected, ref_chosen)])).item()
    margin = 0.1 * ((chosen - ref_chosen) - (rejected - ref_rejected))
    assert forward - swapped == pytest.approx(-margin, abs=1e-9)


@given(four_logps, st.floats(-50, 50))
def test_dpo_sees_differences_only(logps, shift):
    """Adding a number to both completions' log-probs does not change DPO."""
    chosen, rejected, ref_chosen, ref_rejected = logps
    moved = (chosen + shift, rejected + shift, ref_chosen, ref_rejected)
    assert DPO(0.1)(pairs_of([moved])).item() == pytest.approx(DPO(0.1)(pairs_of([logps])).item(), abs=1e-9)


@given(four_logps)
def test_swap_within_bco_mirrors_rewards(logps):
    """Without shift, L_q(r_c, r_r) = L_q(-r_r, -r_c): swap the completions, and policy and reference."""
    chosen, rejected, ref_chosen, ref_rejected = logps
    loss = Mixture.from_trl("bco_pair", reward_shift="none")
    mirrored = (ref_rejected, ref_chosen, rejected, chosen)
    assert loss(pairs_of([logps])).loss.item() == pytest.approx(loss(pairs_of([mirrored])).loss.item(), abs=1e-9)


@pytest.mark.parametrize("name", LOSSES)
@given(rows=st.lists(four_logps, min_size=2, max_size=5), data=st.data())
def test_order_of_pairs(name, rows, data):
    """The loss is the same in any order; so are the pairs' own values where the scope is the pair."""
    order = data.draw(st.permutations(range(len(rows))))
    smoothing = 0.1 if "label_smoothing" in LOSSES[name].takes else 0.0
    values = []
    for indices in (range(len(rows)), order):
        mixture = Mixture.from_trl(name, label_smoothing=smoothing)
        pairs = pairs_of(rows)
        selected = {k: v[list(indices)] for k, v in vars(pairs).items() if v is not None}
        values.append(mixture(PairLogps(**selected)).per_pair)
    assert values[0].mean().item() == pytest.approx(values[1].mean().item(), rel=1e-9)
    if mixture.losses[0].scope == "pair":
        torch.testing.assert_close(values[0][list(order)], values[1])


@given(st.lists(four_logps, min_size=1, max_size=4), st.lists(st.floats(0.1, 3), min_size=3, max_size=3))
def test_a_mixture_is_the_weighted_sum_of_its_terms(rows, weights):
    output = Mixture.from_trl(["sigmoid", "bco_pair", "sft"], weights)(pairs_of(rows))
    total = sum(weight * term.item() for weight, term in zip(weights, output.terms.values(), strict=True))
    assert math.isclose(output.loss.item(), total, rel_tol=1e-9)
    assert math.isclose(output.per_pair.mean().item(), total, rel_tol=1e-9)
