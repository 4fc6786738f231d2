"""Every loss type of TRL's DPOTrainer, against what that trainer computes on the same model and batch."""

import pytest
import torch
from support import perturbed, text_pairs
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl import DPOConfig, DPOTrainer

from mpo.losses import Mixture, PairLogps
from mpo.losses.pairs import LOSSES

TRL_TYPES = [
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero"),
    *("apo_down", "discopop", "sft", "sigmoid_norm"),
]
WITH_SMOOTHING = [name for name in TRL_TYPES if "label_smoothing" in LOSSES[name].takes]
WITH_DIVERGENCE = ["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"]


@pytest.fixture(scope="module")
def trl(processor, tmp_path_factory):
    """A TRL trainer whose policy is not its reference, and a batch of four pairs of unequal lengths."""
    config = Qwen2Config(
        vocab_size=len(processor.tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    reference = Qwen2ForCausalLM(config)
    reference.load_state_dict(model.state_dict())
    trainer = DPOTrainer(
        model=model,
        ref_model=perturbed(reference),
        args=DPOConfig(
            str(tmp_path_factory.mktemp("trl")),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            max_length=None,
            use_weighting=True,  # so that the fused head returns what WPO needs; switched per test
        ),
        train_dataset=text_pairs(4),
        processing_class=processor.tokenizer,
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    return trainer, batch


def pair_logps(trainer, batch, weighted=False) -> PairLogps:
    """Sums of token log-probs from plain logits, and WPO's weights from their definition."""
    loss_mask = batch["completion_mask"][:, 1:].float()
    sums, policy = [], None
    for model in (trainer.model, trainer.ref_model):
        with torch.no_grad():
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
        logps = logits.log_softmax(-1)
        tokens = logps.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
        sums += list((tokens * loss_mask).sum(1).chunk(2))
        policy = policy or (logps, tokens)
    weight = None
    if weighted:
        logps, tokens = policy
        aligned = ((tokens - logps.exp().square().sum(-1).log()) * loss_mask).sum(1) / loss_mask.sum(1)
        chosen, rejected = aligned.exp().chunk(2)
        weight = chosen * rejected
    chosen_tokens, rejected_tokens = loss_mask.sum(1).chunk(2)
    return PairLogps(*sums, chosen_tokens, rejected_tokens, weight)


def trl_loss(trainer, batch, **settings) -> float:
    before = {name: getattr(trainer, name) for name in settings}
    for name, value in settings.items():
        setattr(trainer, name, value)
    try:
        with torch.no_grad():
            return trainer._compute_loss(trainer.model, batch, return_outputs=False).item()
    finally:
        for name, value in before.items():
            setattr(trainer, name, value)


def ours(pairs, names, weights=None, **settings) -> float:
    return Mixture.from_trl(names, weights, reward_shift="none", sft_average="token", **settings)(pairs).loss.item()


@pytest.mark.parametrize("name", TRL_TYPES)
def test_every_type(trl, name):
    smoothing = 0.1 if name in ("exo_pair", "robust") else 0.0
    theirs = trl_loss(*trl, loss_types=[name], loss_weights=[1.0], use_weighting=False, label_smoothing=smoothing)
    assert ours(pair_logps(*trl), name, label_smoothing=smoothing) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("name", WITH_SMOOTHING)
def test_label_smoothing(trl, name):
    theirs = trl_loss(*trl, loss_types=[name], loss_weights=[1.0], use_weighting=False, label_smoothing=0.2)
    assert ours(pair_logps(*trl), name, label_smoothing=0.2) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("name", [name for name in WITH_DIVERGENCE if name != "sft"])
def test_f_divergences(trl, name, divergence):
    settings = {"label_smoothing": 0.1 if name in ("exo_pair", "robust") else 0.0, "f_divergence_type": divergence}
    if divergence == "alpha_divergence":
        settings["f_alpha_divergence_coef"] = 0.7
    theirs = trl_loss(*trl, loss_types=[name], loss_weights=[1.0], use_weighting=False, **settings)
    assert ours(pair_logps(*trl), name, **settings) == pytest.approx(theirs, rel=1e-6)


# TRL has no weights for the sorting losses, and fails in place on the expanded sft value.
@pytest.mark.parametrize("name", [name for name in TRL_TYPES if name not in ("aot", "aot_unpaired", "sft")])
def test_wpo_weights(trl, name):
    smoothing = 0.1 if name in ("exo_pair", "robust") else 0.0
    theirs = trl_loss(*trl, loss_types=[name], loss_weights=[1.0], use_weighting=True, label_smoothing=smoothing)
    assert ours(pair_logps(*trl, weighted=True), name, label_smoothing=smoothing) == pytest.approx(theirs, rel=1e-5)


def test_mpo_in_trls_form(trl):
    names, weights = ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]
    theirs = trl_loss(*trl, loss_types=names, loss_weights=weights, use_weighting=False)
    assert ours(pair_logps(*trl), names, weights) == pytest.approx(theirs, rel=1e-6)


def test_beta_and_tau(trl):
    theirs = trl_loss(*trl, loss_types=["sigmoid", "ipo"], loss_weights=[1.0, 0.5], use_weighting=False, beta=0.5)
    assert ours(pair_logps(*trl), ["sigmoid", "ipo"], [1.0, 0.5], beta=0.5) == pytest.approx(theirs, rel=1e-6)


def test_the_comparison_is_not_empty(trl):
    """Policy and reference differ, and so do the losses' values."""
    pairs = pair_logps(*trl)
    assert pairs.chosen_logratio.abs().min() > 0.01
    values = [ours(pairs, name, label_smoothing=0.1 if name in ("exo_pair", "robust") else 0.0) for name in TRL_TYPES]
    assert len({round(value, 4) for value in values}) >= len(TRL_TYPES) - 1  # aot equals aot_unpaired at times


def test_ld_alpha(trl):
    """LD-DPO scales the tail after the shorter completion's length; SFT still sees the whole chosen completion."""
    trainer, batch = trl
    theirs = trl_loss(*trl, loss_types=["sigmoid", "sft"], loss_weights=[1.0, 1.0], use_weighting=False, ld_alpha=0.3)
    loss_mask = batch["completion_mask"][:, 1:]
    position, lengths = loss_mask.cumsum(1), loss_mask.sum(1)
    shared = torch.minimum(*lengths.chunk(2)).repeat(2)[:, None]
    factor = loss_mask * torch.where(position <= shared, 1.0, 0.3)
    labels = batch["input_ids"][:, 1:, None]
    with torch.no_grad():
        policy, reference = (
            model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1).gather(-1, labels)
            for model in (trainer.model, trainer.ref_model)
        )
    sums = [part for logps in (policy, reference) for part in (logps.squeeze(-1) * factor).sum(1).chunk(2)]
    pairs = PairLogps(*sums, *lengths.chunk(2), sft_chosen=(policy.squeeze(-1) * loss_mask).sum(1).chunk(2)[0])
    assert (factor != loss_mask).any()
    assert ours(pairs, ["sigmoid", "sft"]) == pytest.approx(theirs, rel=1e-6)
