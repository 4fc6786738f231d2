"""Edge cases that a naive implementation gets wrong: overflow, casts, devices, and settings without effect."""

import pytest
import torch

from mpo.losses import AOT, BCO, DPO, IPO, ORPO, SFT, DiscoPOP, Divergence, Mixture, PairLogps, RewardShift, SigmoidNorm
from mpo.losses.pairs import LOSSES

NAMES = ("chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_tokens", "rejected_tokens")
GOOD = {name: torch.zeros(2) for name in NAMES}


@pytest.mark.parametrize("loss", [IPO(), SigmoidNorm(), ORPO(), SFT(), DPO(), BCO()], ids=lambda loss: loss.name)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.float64])
def test_token_counts_do_not_change_the_dtype(loss, dtype):
    logps, tokens = torch.tensor([-3.0]), torch.tensor([4], dtype=dtype)
    assert loss(PairLogps(logps, logps, logps, logps, tokens, tokens)).dtype == torch.float32


def test_discopop_far_below_zero_is_finite():
    """Margin -985: w = sigma(-985 / 0.05) = 0, so the loss is -log sigma(-985) = 985, with slope -1. e^985 alone overflows."""
    chosen = torch.tensor([-1000.0], requires_grad=True)
    other, zero = torch.tensor([-20.0]), torch.tensor([-5.0])
    value = DiscoPOP(1.0, 0.05)(PairLogps(chosen, other + 5, zero - 5, zero - 5, zero + 6, zero + 6))
    value.backward()
    assert value.item() == pytest.approx(985.0)
    assert chosen.grad.item() == pytest.approx(-1.0)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_a_cast_leaves_delta_on_its_device(cast):
    shift = RewardShift().to("meta")
    assert getattr(shift, cast)().total.device.type == "meta"
    assert shift.total.dtype == torch.float64


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_pair_weights_and_sorted_batches_exclude_each_other(name):
    with pytest.raises(ValueError, match=f"PairLogps.weight.*{name}"):
        Mixture.from_trl(["sigmoid", name])(PairLogps(**GOOD, weight=torch.ones(2)))
    assert not AOT.takes_weight


@pytest.mark.parametrize("name", [name for name, kind in LOSSES.items() if kind.takes_weight])
def test_weights_multiply_the_values(name):
    torch.manual_seed(0)
    fields = {key: -torch.rand(3) - 1 for key in NAMES} | {key: torch.tensor([3, 1, 5]) for key in NAMES[4:]}
    mixture = Mixture.from_trl(name, label_smoothing=0.1 if "label_smoothing" in LOSSES[name].takes else 0.0).eval()
    weight = torch.tensor([0.5, 2.0, 0.0])
    torch.testing.assert_close(mixture(PairLogps(**fields, weight=weight)).per_pair, mixture(PairLogps(**fields)).per_pair * weight)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("chosen", torch.zeros(2, dtype=torch.float64), r"rejected must be float64.*got torch.float32"),
        ("ref_chosen", torch.zeros(2, device="meta"), r"ref_chosen must be on cpu"),
        ("chosen_tokens", torch.ones(2, dtype=torch.bool), r"chosen_tokens must be numbers"),
        ("mean_sqrt_tokens", torch.ones(2), r"mean_sqrt_tokens .*shape \(\)"),
    ],
)
def test_pair_logps_says_what_is_wrong(field, value, message):
    with pytest.raises(ValueError, match=message):
        PairLogps(**{**GOOD, field: value})


def test_pairs_can_be_compared():
    pairs = PairLogps(**GOOD)
    assert pairs == pairs
    assert pairs != PairLogps(**GOOD)


@pytest.mark.parametrize("beta", [0.0, -1.0, float("inf"), float("nan"), "0.1", True])
def test_beta_is_a_positive_finite_number(beta):
    with pytest.raises(ValueError, match="beta must be above 0"):
        DPO(beta)


@pytest.mark.parametrize("weighted", [[("1", DPO())], [(None, DPO())], [(DPO(), 1.0)], [(1.0, torch.nn.Linear(1, 1))]])
def test_a_mixture_takes_numbers_and_losses(weighted):
    with pytest.raises(ValueError, match="\\(weight, loss\\)"):
        Mixture(weighted)


@pytest.mark.parametrize(
    ("name", "meant"), [("dpo", "sigmoid"), ("DPO", "sigmoid"), ("bco", "bco_pair"), ("sppo", "sppo_hard"), ("sigmoyd", "sigmoid")]
)
def test_unknown_names_get_the_right_hint(name, meant):
    with pytest.raises(ValueError, match=f"Did you mean '{meant}'"):
        Mixture.from_trl(name)


def test_alpha_is_finite():
    with pytest.raises(ValueError, match="f_alpha_divergence_coef.*nan"):
        Divergence("alpha_divergence", float("nan"))
