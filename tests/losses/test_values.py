"""Every loss against numbers worked out by hand, and its gradient against finite differences."""

import pytest
import torch

from mpo.losses import (
    AOT,
    BCO,
    CDPO,
    DPO,
    EXO,
    IPO,
    NCA,
    ORPO,
    SFT,
    SPPO,
    AOTUnpaired,
    APODown,
    APOZero,
    DiscoPOP,
    Divergence,
    Hinge,
    Mixture,
    PairLogps,
    RobustDPO,
    SigmoidNorm,
)
from mpo.losses.pairs import LOSSES

ONE_PAIR = {
    "chosen": [-10.0],
    "rejected": [-20.0],
    "ref_chosen": [-12.0],
    "ref_rejected": [-17.0],
    "chosen_tokens": [4.0],
    "rejected_tokens": [5.0],
}


def pairs_of(dtype: torch.dtype = torch.float32, **fields: list[float]) -> PairLogps:
    return PairLogps(**{name: torch.tensor(values, dtype=dtype) for name, values in fields.items()})


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (DPO(0.1), 0.474077),  # ln(1 + e^-0.5)
        (Hinge(0.1), 0.5),  # 1 - 0.5
        (CDPO(0.1, 0.1), 0.524077),  # 0.9 * 0.474077 + 0.1 * 0.974077
        (RobustDPO(0.1, 0.1), 0.411577),  # (0.9 * 0.474077 - 0.1 * 0.974077) / 0.8
        (EXO(0.1, 0.1), 0.272055),  # 0.622459 (-0.474077 - ln 0.9) + 0.377541 (-0.974077 - ln 0.1)
        (IPO(0.1), 15.21),  # (2/4 + 3/5 - 5)^2
        (SigmoidNorm(0.1), 0.639659),  # ln(1 + e^-0.11), 0.11 = 0.1 (2/4 + 3/5)
        (NCA(0.1), 1.274386),  # 0.598139 + (0.798139 + 0.554355) / 2
        (BCO(0.1, "none"), 1.152494),  # 0.598139 + 0.554355
        (BCO(0.1), 1.151879),  # delta = (0.2 - 0.3) / 2 = -0.05: 2 ln(1 + e^-0.25)
        (SPPO(0.1), 13.0),  # (2 - 5)^2 + (-3 + 5)^2
        (APOZero(0.1), 0.875723),  # 1 - 0.549834 + 0.425557
        (APODown(0.1), 0.927375),  # 0.549834 + 1 - 0.622459
        (DiscoPOP(0.1, 0.05), 0.606525),  # w = sigma(10) = 0.9999546: (1 - w) 0.474077 + w e^-0.5
        (SFT(), 2.5),  # 10 / 4
        (ORPO(0.1), 0.018949),  # log odds -2.414349 and -3.981515: 0.1 ln(1 + e^-1.567166)
    ],
    ids=lambda value: value.name if hasattr(value, "name") else "",
)
def test_one_pair(loss, expected):
    """Log-ratios u_c = -10 + 12 = 2 and u_r = -20 + 17 = -3, beta 0.1: rewards 0.2 and -0.3, margin 0.5; 4 and 5 tokens.

    sigma(0.5) = 0.622459, log sigma(0.5) = -0.474077, log sigma(-0.5) = -0.974077; log sigma(0.2) = -0.598139,
    log sigma(-0.2) = -0.798139; log sigma(0.3) = -0.554355. BCO with delta: the rewards' mean is -0.05, so both arguments of sigma
    are 0.25: 2 ln(1 + e^-0.25).
    """
    assert loss(pairs_of(**ONE_PAIR)).tolist() == pytest.approx([expected], abs=2e-6)


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [
        # s = 1 - e^-u: 0.864665 and -19.085537, margin 1.995020
        (Divergence("forward_kl"), 0.127523),
        # s = ln 2 + log sigma(u): 0.566219 and -2.355440, margin 0.292166
        (Divergence("js_divergence"), 0.557697),
        # s = (e^(-u/2) - 1) / (-1/2): 1.264241 and -6.963378, margin 0.822762
        (Divergence("alpha_divergence", 0.5), 0.364099),
        # alpha = 1 is the reverse KL
        (Divergence("alpha_divergence", 1.0), 0.474077),
    ],
)
def test_divergences(divergence, expected):
    """DPO of scores under an f-divergence, for the log-ratios 2 and -3: -log sigma of the margin beta (s_c - s_r)."""
    assert DPO(0.1, divergence)(pairs_of(**ONE_PAIR)).item() == pytest.approx(expected, abs=2e-6)


def test_aot_sorts_log_ratios_of_the_batch():
    """Policy log-ratios 1 and 3, reference log-ratios 2 and 0. Sorted: (1, 3) - (0, 2) = (1, 1), -log sigma(0.1) = 0.644397.

    Unsorted they would be -1 and 3.
    """
    pairs = pairs_of(
        chosen=[-1.0, -1.0],
        rejected=[-2.0, -4.0],
        ref_chosen=[-1.0, -3.0],
        ref_rejected=[-3.0, -3.0],
        chosen_tokens=[1.0, 1.0],
        rejected_tokens=[1.0, 1.0],
    )
    assert AOT(0.1)(pairs).tolist() == pytest.approx([0.644397, 0.644397], abs=1e-6)


def test_aot_unpaired_sorts_chosen_against_rejected():
    """u_c = (2, -1), u_r = (0, 1). Sorted: (-1, 2) - (0, 1) = (-1, 1); -log sigma(-0.1) = 0.744397, -log sigma(0.1) = 0.644397."""
    pairs = pairs_of(
        chosen=[-1.0, -4.0],
        rejected=[-5.0, -4.0],
        ref_chosen=[-3.0, -3.0],
        ref_rejected=[-5.0, -5.0],
        chosen_tokens=[1.0, 1.0],
        rejected_tokens=[1.0, 1.0],
    )
    assert AOTUnpaired(0.1)(pairs).tolist() == pytest.approx([0.744397, 0.644397], abs=1e-6)


@pytest.mark.parametrize(
    ("average", "expected"),
    [
        ("completion", [2.5, 1.0]),  # 10/4 and 9/9
        ("token", [19 / 13, 19 / 13]),  # 19 over 13 tokens, for every pair
        ("square", [2.0, 1.2]),  # 10/2 and 9/3, over the mean of 2 and 3; their mean is (5 + 3) / (2 + 3)
    ],
)
def test_sft_averages(average, expected):
    """Completions of log-prob -10 with 4 tokens and -9 with 9 tokens."""
    fields = {name: values * 2 for name, values in ONE_PAIR.items()} | {"chosen": [-10.0, -9.0], "chosen_tokens": [4.0, 9.0]}
    assert SFT(average)(pairs_of(**fields)).tolist() == pytest.approx(expected)


def test_sft_square_over_a_whole_step():
    """With a mean of sqrt(tokens) of 5 over the step, 10 / sqrt(4) / 5 = 1."""
    pairs = pairs_of(**ONE_PAIR)
    pairs = PairLogps(**{**vars(pairs), "mean_sqrt_tokens": torch.tensor(5.0)})
    assert SFT("square")(pairs).item() == pytest.approx(1.0)


def test_sft_reads_the_whole_completion_where_ld_dpo_scales_its_tail():
    """`chosen` is -7 after scaling, the completion's log-prob -10 over 4 tokens: 2.5."""
    pairs = PairLogps(**{**vars(pairs_of(**ONE_PAIR)), "chosen": torch.tensor([-7.0]), "sft_chosen": torch.tensor([-10.0])})
    assert SFT()(pairs).item() == pytest.approx(2.5)


def test_start_of_a_run():
    """Policy = reference, delta = 0: L_p = ln 2, L_q = 2 ln 2, so 0.8 L_p + 0.2 L_q = 1.2 ln 2 = 0.831777; L_g = 10/4."""
    same = ONE_PAIR | {"ref_chosen": [-10.0], "ref_rejected": [-20.0]}
    output = Mixture([(0.8, DPO(0.1)), (0.2, BCO(0.1)), (1.0, SFT())])(pairs_of(**same))
    assert output.terms["sigmoid"].item() == pytest.approx(0.693147, abs=1e-6)
    assert output.terms["bco_pair"].item() == pytest.approx(1.386294, abs=1e-6)
    assert output.loss.item() == pytest.approx(0.831777 + 2.5, abs=1e-6)


def test_weights_multiply_each_pair():
    """Two pairs of DPO 0.474077 with weights 1 and 3: mean 0.948154."""
    doubled = {name: values * 2 for name, values in ONE_PAIR.items()}
    pairs = PairLogps(**{**vars(pairs_of(**doubled)), "weight": torch.tensor([1.0, 3.0])})
    output = Mixture([(1.0, DPO(0.1))])(pairs)
    assert output.loss.item() == pytest.approx(0.948154, abs=1e-6)
    assert output.terms["sigmoid"].item() == pytest.approx(0.948154, abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name):
    """Autograd against finite differences in float64, for every log-prob that a loss reads."""
    torch.manual_seed(0)
    smoothing = 0.1 if "label_smoothing" in LOSSES[name].takes else 0.0
    mixture = Mixture.from_trl(name, beta=0.3, label_smoothing=smoothing, reward_shift="none")
    logps = [(-5 * torch.rand(4, dtype=torch.float64) - 1).requires_grad_() for _ in range(4)]
    tokens = torch.tensor([3.0, 5.0, 2.0, 7.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *values: mixture(PairLogps(*values, tokens, tokens)).per_pair, logps)


def test_delta_has_no_gradient():
    """BCO's delta holds detached rewards: the gradient is that of BCO with the same delta as a constant."""
    chosen = torch.tensor([-10.0], dtype=torch.float64, requires_grad=True)
    fields = {name: torch.tensor(values, dtype=torch.float64) for name, values in ONE_PAIR.items()} | {"chosen": chosen}
    BCO(0.1)(PairLogps(**fields)).sum().backward()
    # d/du_c of -log sigma(0.1 u_c + 0.05) at u_c = 2: -0.1 sigma(-0.25) = -0.1 * 0.437823
    assert chosen.grad.item() == pytest.approx(-0.0437823, abs=1e-7)
