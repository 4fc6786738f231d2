"""Arguments that the losses refuse, and their error messages."""

import pytest
import torch

from mpo.losses import BCO, DPO, SFT, Divergence, Hinge, Mixture, PairLogps, PairLoss
from mpo.losses.pairs import LOSSES

GOOD = {name: torch.zeros(3) for name in ("chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_tokens", "rejected_tokens")}


@pytest.mark.parametrize("field", GOOD)
@pytest.mark.parametrize("value", [torch.zeros(2), torch.zeros(3, 1), 1.0, [0.0, 0.0, 0.0]], ids=["short", "2d", "float", "list"])
def test_pair_logps_names_the_field(field, value):
    # With another number of chosen log-probs, it is the others that do not match it.
    named = "rejected" if field == "chosen" and isinstance(value, torch.Tensor) and value.shape == (2,) else field
    with pytest.raises(ValueError, match=rf"PairLogps\.{named} "):
        PairLogps(**{**GOOD, field: value})


@pytest.mark.parametrize("field", ["chosen", "rejected", "ref_chosen", "ref_rejected", "weight", "sft_chosen"])
def test_pair_logps_wants_float32(field):
    with pytest.raises(ValueError, match="must be float32"):
        PairLogps(**{**GOOD, field: torch.zeros(3, dtype=torch.bfloat16)})


def test_pair_logps_wants_pairs():
    with pytest.raises(ValueError, match="at least one pair"):
        PairLogps(**{name: torch.zeros(0) for name in GOOD})


def test_half_a_reference():
    with pytest.raises(ValueError, match="ref_rejected is missing"):
        PairLogps(**{**GOOD, "ref_rejected": None})


def test_a_loss_without_the_reference_it_needs():
    pairs = PairLogps(**{**GOOD, "ref_rejected": None, "ref_chosen": None})
    with pytest.raises(ValueError, match="needs reference log-probs"):
        DPO()(pairs)
    assert SFT()(pairs).shape == (3,)
    assert not Mixture.from_trl(["orpo", "sft"]).needs_reference
    assert Mixture.from_trl(["orpo", "sft", "bco_pair"]).needs_reference


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "sigmoyd"}, "'sigmoyd'.*'sigmoid'"),
        ({"loss_type": ["sigmoid", "bco"]}, "Did you mean 'bco_pair'"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "1 numbers for the 2 losses"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, -0.1]}, "'sft' must be 0"),
        ({"loss_type": "sigmoid", "loss_weights": [float("nan")]}, "must be 0 or more"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [0.0, 0.0]}, "All weights are 0"),
        ({"loss_type": ["sigmoid", "sigmoid"]}, "'sigmoid' .*twice"),
        ({"loss_type": []}, "at least one loss"),
        ({"loss_type": "sigmoid", "label_smoothing": 0.1}, "no effect on sigmoid.*'cdpo'"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, r"\[0, 0.5\)"),
        ({"loss_type": "exo_pair"}, r"\(0, 0.5\)"),
        ({"loss_type": "sigmoid", "beta": 0.0}, "beta must be above 0"),
        ({"loss_type": "discopop", "discopop_tau": -1.0}, "discopop_tau must be above 0"),
        ({"loss_type": "bco_pair", "f_divergence_type": "js_divergence"}, "js_divergence.*'bco_pair'"),
        ({"loss_type": "sft", "f_divergence_type": "js_divergence"}, "no effect .*sft"),
        ({"loss_type": "sigmoid", "f_alpha_divergence_coef": 0.7}, "no effect with f_divergence_type='reverse_kl'"),
        ({"loss_type": "sigmoid", "discopop_tau": 0.1}, "no effect on sigmoid"),
        ({"loss_type": "sigmoid", "f_divergence_type": "kl"}, "f_divergence_type.*'kl'"),
        ({"loss_type": "bco_pair", "reward_shift": "ema"}, "reward_shift.*'ema'"),
        ({"loss_type": "sft", "sft_average": "mean"}, "sft_average.*'mean'"),
    ],
)
def test_from_trl_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        Mixture.from_trl(**settings)


def test_smoothing_goes_to_the_losses_that_have_it():
    mixture = Mixture.from_trl(["sigmoid", "robust"], label_smoothing=0.1)
    assert [getattr(loss, "label_smoothing", None) for loss in mixture.losses] == [None, 0.1]


def test_prints_as_a_formula():
    assert repr(Mixture([(0.8, DPO()), (0.2, BCO()), (1.0, SFT())])) == "Mixture(0.8 sigmoid + 0.2 bco_pair + 1 sft)"
    assert "beta=0.3" in repr(Hinge(0.3, Divergence()))


def test_bare_name_is_refused(monkeypatch):
    """The folder must not load a second time under its bare name."""
    import importlib.util

    import mpo.losses

    spec = importlib.util.spec_from_file_location("losses", mpo.losses.__file__)
    with pytest.raises(ImportError, match="mpo.losses"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize("takes", ["beta", ("beta", "gamma")])
def test_a_loss_takes_settings_that_there_are(takes):
    with pytest.raises(ValueError, match="Own.takes to be a tuple of some of beta, .*got.*beta"):
        type("Own", (PairLoss,), {"name": "own", "takes": takes})
    assert "own" not in LOSSES


def test_a_name_belongs_to_one_loss():
    """The class of a loss enters it under its name; to define the same one again, as a notebook does, is no mistake."""
    with pytest.raises(ValueError, match="'sigmoid' is the name of mpo.losses.preference.DPO"):
        type("Other", (PairLoss,), {"name": "sigmoid"})
    try:
        first, second = (type("Own", (PairLoss,), {"name": "own", "takes": ("beta",)}) for _ in range(2))
        assert LOSSES["own"] is second is not first
    finally:
        LOSSES.pop("own", None)
    assert LOSSES["sigmoid"] is DPO and "own" not in LOSSES


class Unnamed(PairLoss):
    def forward(self, pairs):
        return pairs.chosen


def test_a_loss_without_a_name():
    with pytest.raises(ValueError, match="Unnamed has no name"):
        Mixture([(1.0, Unnamed())])
    for name in ("", 5, property(lambda loss: "lazy")):
        with pytest.raises(ValueError, match="Mute.name to be a text"):
            type("Mute", (Unnamed,), {"name": name})


def test_a_loss_returns_a_value_per_pair(monkeypatch):
    """A value of shape (3, 1) or () would be spread over the pairs, which are then weighted wrongly."""
    monkeypatch.setattr("mpo.losses.pairs.LOSSES", {})
    for value in (torch.zeros(3, 1), torch.zeros(()), (torch.zeros(3),)):
        loss = type("Spread", (PairLoss,), {"name": "spread", "forward": lambda self, pairs, value=value: value})()
        with pytest.raises(ValueError, match=r"'spread' must return a value per pair, shape \(3,\)"):
            Mixture([(1.0, loss)])(PairLogps(**GOOD))


def test_a_constructor_that_does_not_fit_what_is_taken(monkeypatch):
    monkeypatch.setitem(LOSSES, "eager", type("Eager", (Unnamed,), {"takes": ("tau",), "__init__": lambda self: None}))
    with pytest.raises(ValueError, match="Eager does not fit its takes"):
        Mixture.from_trl("eager")


def test_a_loss_where_it_is(monkeypatch, tmp_path):
    """By its module, so that a recipe finds it, and a process that has not imported it; any loss may take `discopop_tau`."""
    monkeypatch.setattr("mpo.losses.pairs.LOSSES", {})
    (tmp_path / "far_losses.py").write_text(
        "from mpo.losses import DiscoPOP\nclass Far(DiscoPOP):\n    name = 'far'\nclass Other:\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    mixture = Mixture.from_trl(["far_losses.Far", "sft"], discopop_tau=0.2)
    assert mixture.names == ["far", "sft"] and mixture.losses[0].tau == 0.2
    for name, message in {
        "far_losses.Near": "has no attribute",
        "near_losses.Far": "PYTHONPATH",
        "far_losses.Other": "subclass",
    }.items():
        with pytest.raises(ValueError, match=message):
            Mixture.from_trl(name)
