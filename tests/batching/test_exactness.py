"""Packed rows give what padded rows give, to rounding: log-probs, MPO's loss, and every parameter's gradient.

First that nothing but rounding parts them: in float64 they agree to 1e-12 for any shape. Then that packed rows round no worse: in
float32, bfloat16 and autocast both are compared with padded rows in float64 (of the same weights, so of rounded ones in bfloat16),
and whatever they give may err by norm at most twice what padded rows err. One batch alone would leave that to chance, for the
gradient of a bias is one small vector; norms are over all batches of a case.

Log-probs in float32 are held to 2 units in the last place (ulp) of the completion's sum. A single token's log-prob is the
exception: it has a whole network's rounding in one number, and padded rows themselves are up to 5 ulp from float64 there. It may be
further than 2 ulp from padded rows, but not more than 2 ulp further from float64 than they get at worst.
"""

import copy
import random
from collections import defaultdict
from functools import lru_cache

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_and_padded import (
    FAMILIES,
    Group,
    Models,
    batches_of,
    exact_sums,
    in_bfloat16,
    in_float64,
    internvl,
    random_batches,
    random_group,
    random_pairs,
    random_records,
    text_model,
)
from peft import LoraConfig, get_peft_model
from support import make_image, perturbed
from transformers import TrainerCallback

from mpo import MPOConfig, MPOTrainer
from mpo.batching.attention import packed_attention
from mpo.encoding.labels import Completion

pytestmark = pytest.mark.slow

HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float64: 2.0**-53}
"""How much of a number's size is lost, at most, when it is rounded once."""

PRECISIONS = ["float32", "bfloat16", "autocast"]
TRAINED = ["full", "frozen tower", "frozen tower and projector", "lora", "lora, tower too"]


# Nothing but rounding


@lru_cache
def exact_model(processor, family):
    return in_float64(internvl(processor, family))


@lru_cache
def prompt_of(processor, image_count):
    """Ids and tiles of a prompt with `image_count` images before its text."""
    images = [make_image(seed, width=32 + 32 * (seed % 2)) for seed in range(image_count)]
    inputs = processor(text="<IMG_CONTEXT>\n" * image_count, images=images, return_tensors="pt")
    return inputs["input_ids"][0].tolist(), inputs["pixel_values"]


def exact_packed_sums(exact, packed):
    """`exact_sums` of packed rows: all logits, and and each completion's positions selected from them."""
    names = ("input_ids", "position_ids", "segments", "pixel_values")
    logits = exact(**{name: packed[name] for name in names if name in packed}, use_cache=False).logits[0]
    logps = logits.log_softmax(-1)[packed.positions_to_keep.index].gather(-1, packed.shift_labels[0, :, None])[:, 0]
    labelled = packed.labelled
    return torch.zeros(len(labelled.lengths), dtype=logps.dtype).index_add(0, labelled.completion, logps[labelled.node])


tokens = st.integers(3, 5)  # few different ones, so that completions share much
completions = st.lists(st.tuples(tokens, st.booleans()), min_size=1, max_size=6).map(
    lambda pairs: Completion([token for token, _ in pairs], [labelled for _, labelled in pairs[1:]] + [True])
)
groups = st.lists(
    st.tuples(st.integers(0, 3), st.lists(tokens, max_size=4), st.lists(completions, min_size=1, max_size=8)),
    min_size=1,
    max_size=3,
)


def predicts(group):
    """Whether any completion's token has a predecessor: an empty prompt predicts no first token."""
    images, text, its_completions = group
    return images or text or any(len(completion.ids) > 1 for completion in its_completions)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=30, derandomize=True)
@given(groups.filter(lambda drawn: all(map(predicts, drawn))), st.integers(0, 1000))
def test_in_float64_they_are_the_same(processor, family, drawn, seed):
    """Sums and gradients to 1e-12: for no text before the completions too, for completions of one token, equal and nested ones.

    Float64 rounds by 1e-16, and a few hundred roundings are between the tokens and a gradient.
    """
    given_groups = []
    for images, text, its_completions in drawn:
        ids, tiles = prompt_of(processor, images) if images else ([], None)
        given_groups.append(Group(ids + text, tiles, its_completions))
    packed, padded = batches_of(given_groups, random_pairs(given_groups, random.Random(seed)))
    model = exact_model(processor, family)
    with packed_attention(model):
        found = exact_packed_sums(model, packed)
    expected = exact_sums(model, padded)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.linspace(-1, 1.5, len(expected), dtype=torch.float64)  # every completion counts differently
    with packed_attention(model):
        mine = torch.autograd.grad(found @ weights, list(model.parameters()), allow_unused=True)
    theirs = torch.autograd.grad(expected @ weights, list(model.parameters()), allow_unused=True)
    whole = torch.stack([gradient.norm() for gradient in theirs if gradient is not None]).norm()
    for (name, _), first, second in zip(model.named_parameters(), mine, theirs, strict=True):
        assert (first is None) == (second is None), name
        assert first is None or (first - second).norm() <= 1e-12 * whole, name


# Rounding


class Errors:
    """How far packed and padded rows are from float64 rows, by quantity, over all batches that were added."""

    def __init__(self):
        self._squares = defaultdict(lambda: torch.zeros(3, dtype=torch.float64))
        self._half_ulp = {}

    def add(self, name, packed, padded, exact):
        first, second, third = packed.double(), padded.double(), exact.double()
        self._half_ulp[name] = HALF_ULP[packed.dtype]
        self._squares[name] += torch.stack([(first - third).square().sum(), (second - third).square().sum(), third.square().sum()])

    def add_results(self, packed, padded, exact):
        self.add("log-probs", packed.sums, padded.sums, exact.sums)
        self.add("losses", packed.losses, padded.losses, exact.losses)
        assert packed.gradients.keys() == padded.gradients.keys() == exact.gradients.keys()
        for name, gradient in exact.gradients.items():
            self.add(name, packed.gradients[name], padded.gradients[name], gradient)

    def ratios(self):
        """The error of packed rows over that of padded rows, which is at least the error of rounding the exact value once."""
        ratios = {}
        for name, squares in self._squares.items():
            packed, padded, size = squares.sqrt().tolist()
            ratios[name] = packed / max(padded, self._half_ulp[name] * size, 1e-300)
        return ratios


def assert_no_worse(errors, what, record_property):
    ratios = errors.ratios()
    record_property("difference", (f"error of packed rows by that of padded rows, {what}", max(ratios.values())))
    assert max(ratios.values()) <= 2, {name: ratio for name, ratio in ratios.items() if ratio > 2}


class Ulps:
    """How far log-prob sums are from each other, in units of the last place of a float32 of their size."""

    def __init__(self):
        self.apart = 0.0  # of completions of two and more labelled tokens
        self.single = [0.0, 0.0]  # of completions of one: how far packed and padded rows are from float64, if more than 2 ulp apart

    def add(self, packed, padded, exact, lengths):
        size = exact.float().abs()
        ulp = torch.nextafter(size, torch.tensor(torch.inf)) - size
        apart = (packed.double() - padded.double()).abs() / ulp
        several = lengths > 1
        self.apart = max(self.apart, apart[several].max().item() if several.any() else 0.0)
        errors = [((sums.double() - exact).abs() / ulp) for sums in (packed, padded)]
        if not several.all():
            self.single[1] = max(self.single[1], errors[1][~several].max().item())
        far = (apart > 2) & ~several
        if far.any():
            self.single[0] = max(self.single[0], errors[0][far].max().item())


def models(processor, family="qwen2", precision="float32", trained="full", checkpointing=None):
    """A policy with noise against its reference, set up as a training run would."""
    policy = internvl(processor, family)
    reference = perturbed(copy.deepcopy(policy), scale=0.02, seed=7)
    if precision == "bfloat16":
        policy, reference = in_bfloat16(policy), in_bfloat16(reference)
    if trained.startswith("frozen"):
        policy.model.vision_tower.requires_grad_(False)
        policy.model.multi_modal_projector.requires_grad_("projector" not in trained)
    if trained.startswith("lora"):
        torch.manual_seed(0)
        where = "" if "tower" in trained else ".*language_model"
        policy = get_peft_model(
            policy, LoraConfig(r=4, target_modules=rf"{where}.*\.(q_proj|v_proj)", init_lora_weights=False, lora_dropout=0.0)
        )
    both = Models(policy, reference, autocast=precision == "autocast")
    if checkpointing is not None:  # after the copies in float64, which need none
        policy.train()
        policy.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        policy.enable_input_require_grads()
    return both


def check(both, batches, precision, record_property):
    errors, ulps = Errors(), Ulps()
    for packed, padded in batches:
        results = both.results(packed, padded)
        errors.add_results(*results)
        ulps.add(*(result.sums for result in results), packed.labelled.lengths)
    if precision == "float32":
        record_property("difference", ("ulp between the log-probs of packed and padded rows", ulps.apart))
        assert ulps.apart <= 2
        assert ulps.single[0] <= ulps.single[1] + 2
    assert_no_worse(errors, precision, record_property)


CASES = [
    *[(family, precision, "full", None) for family in FAMILIES for precision in PRECISIONS],
    *[("qwen2", "float32", trained, "not reentrant") for trained in TRAINED],
    ("llama", "float32", "full", "reentrant"),
    ("qwen3", "float32", "frozen tower", "reentrant"),
    ("llama", "float32", "lora", "reentrant"),
    ("qwen3", "float32", "frozen tower", None),
    ("qwen3", "bfloat16", "frozen tower and projector", None),
    ("llama", "float32", "lora", None),
    ("qwen2", "autocast", "lora", None),
    ("llama", "bfloat16", "lora, tower too", None),
    ("qwen3", "bfloat16", "full", "not reentrant"),
    ("qwen2", "bfloat16", "lora", "reentrant"),
    ("llama", "autocast", "frozen tower", "not reentrant"),
]


@pytest.mark.parametrize(("family", "precision", "trained", "checkpointing"), CASES)
def test_random_batches(processor, family, precision, trained, checkpointing, record_property):
    """Six batches of one to three prompts, with 1 to 8 completions and 0 to 3 images each; half of them of records."""
    both = models(processor, family, precision, trained, checkpointing)
    batches = (random_batches(processor, seed) for seed in range(6))
    check(both, batches, precision, record_property)


@pytest.mark.parametrize(("family", "precision"), [*[(family, "float32") for family in FAMILIES], ("qwen2", "bfloat16")])
def test_every_shape(processor, family, precision, record_property):
    """1 to 8 completions a prompt, each with 0 to 3 images."""

    def batches():
        for count in range(1, 9):
            for images in range(4):
                draw = random.Random(10 * count + images)
                groups = [random_group(draw, count, images, processor)]
                yield batches_of(groups, random_pairs(groups, draw))

    check(models(processor, family, precision), batches(), precision, record_property)


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (14, 2), (28, 4)], ids=lambda heads: f"{heads[0]} on {heads[1]}")
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_that_share_keys(family, heads, record_property):
    """Text models: as many query heads as key-value heads, one for all, and those of InternVL3-1B and InternVL3-8B."""
    sizes = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    sizes |= {"hidden_size": 112 if heads[0] > 4 else 64}
    sizes |= {"head_dim": sizes["hidden_size"] // heads[0]} if family != "qwen2" else {}
    policy = text_model(family, **sizes)
    both = Models(policy, perturbed(copy.deepcopy(policy), scale=0.02, seed=7))

    def batches():
        for seed in range(6):
            draw = random.Random(seed)
            groups = [random_group(draw, draw.randint(1, 8)) for _ in range(draw.randint(1, 3))]
            yield batches_of(groups, random_pairs(groups, draw))

    check(both, batches(), "float32", record_property)


# A training run in bfloat16


class KeepGradients(TrainerCallback):
    """Each step's gradients, by step and parameter."""

    def __init__(self):
        self.gradients = {}

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                self.gradients[state.global_step + 1, name] = parameter.grad.clone()


def two_steps(folder, processor, records, *, rows, weights=torch.float32, rounded=False, autocast=False):
    """Gradients by step and parameter, and the logged losses, of two steps of SGD.

    Args:
        folder: of the run.
        processor: of the model.
        records: half of them for each step.
        rows: packed or padded.
        weights: the dtype they are held in.
        rounded: whether they start from values that bfloat16 can hold.
        autocast: to bfloat16.
    """
    policy = internvl(processor)
    reference = perturbed(copy.deepcopy(policy), scale=0.02, seed=7)
    if rounded:
        policy, reference = in_bfloat16(policy).to(weights), in_bfloat16(reference).to(weights)
    kept = KeepGradients()
    trainer = MPOTrainer(
        model=policy,
        ref_model=reference,
        args=MPOConfig(
            str(folder),
            use_cpu=True,
            bf16=autocast,
            rows=rows,
            per_device_train_batch_size=len(records) // 2,
            max_steps=2,
            optim="sgd",
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,  # one norm would put its error into every gradient
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(records),
        processing_class=processor,
        callbacks=[kept],
    )
    trainer.train()
    assert trainer.layout == rows and policy.dtype == weights
    losses = [value for log in trainer.state.log_history for name, value in log.items() if name.split("/")[0] == "loss"]
    return kept.gradients, torch.tensor(losses)


@pytest.mark.parametrize(
    "run",
    [{"weights": torch.bfloat16, "rounded": True}, {"autocast": True}],
    ids=["weights in bfloat16", "weights in float32 under autocast"],
)
def test_training_in_bfloat16(processor, tmp_path, run, record_property):
    """Two steps of `MPOTrainer` on three data sets, against padded rows of the same start in float32."""
    errors = Errors()
    for seed in range(3):
        records = random_records(random.Random(seed), 3, plain_share=0)
        exact, exact_losses = two_steps(tmp_path, processor, records, rows="padded", rounded=run.get("rounded", False))
        packed, packed_losses = two_steps(tmp_path, processor, records, rows="packed", **run)
        padded, padded_losses = two_steps(tmp_path, processor, records, rows="padded", **run)
        errors.add("losses", packed_losses, padded_losses, exact_losses)
        assert packed.keys() == padded.keys() == exact.keys() and {step for step, _ in exact} == {1, 2}
        for step, name in exact:
            errors.add(name, packed[step, name], padded[step, name], exact[step, name])
    assert_no_worse(errors, "two steps of MPOTrainer in bfloat16", record_property)
