"""Packed rows on a GPU in bfloat16: against padded rows, before a generation, in compiled layers."""

import copy
import random

import pytest
import torch
from packed_and_padded import (
    FAMILIES,
    Models,
    batches_of,
    in_bfloat16,
    in_float64,
    internvl,
    random_batches,
    random_group,
    random_pairs,
    text_model,
    trained_sums,
    with_head,
)
from small_runs import small_run
from support import make_image, perturbed

from mpo.batching.attention import packed_attention
from mpo.models.kernels import compile_layers
from mpo.models.small import small_internvl

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="needs an NVIDIA GPU, Ampere or newer"
)
HALF_ULP = 2.0**-9  # how much of a bfloat16 number's size is lost, at most, when it is rounded once


def on_device(batch):
    return batch.to(DEVICE)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_err_no_more_than_padded_ones(processor, family):
    """Log-probs, losses and gradients over six batches: against float64 they err at most twice what padded rows err, by norm."""
    policy = internvl(processor, family)
    reference = perturbed(copy.deepcopy(policy), scale=0.02, seed=7)
    both = Models(in_bfloat16(policy).to(DEVICE), in_bfloat16(reference).to(DEVICE))
    squares = {name: torch.zeros(3, dtype=torch.float64, device=DEVICE) for name in ("sums", "losses", "gradients")}
    for seed in range(6):
        results = both.results(*map(on_device, random_batches(processor, seed)))
        for name, sums in squares.items():
            found = [getattr(result, name) for result in results]
            if name == "gradients":
                found = [torch.cat([gradients[key].flatten().double() for key in found[2]]) for gradients in found]
            packed, padded, exact = (value.double() for value in found)
            sums += torch.stack([(packed - exact).square().sum(), (padded - exact).square().sum(), exact.square().sum()])
    for name, sums in squares.items():
        packed, padded, size = sums.sqrt().tolist()
        assert packed <= 2 * max(padded, HALF_ULP * size), (name, packed, padded)


def test_generation_after_packed_training(processor, tmp_path):
    """A trained model generates what a new one with its weights generates, and training changed the weights."""
    trainer = small_run(tmp_path, use_cpu=DEVICE == "cpu", bf16=True, max_steps=3)
    assert trainer.layout == "packed"
    start = trainer.model.lm_head.weight.detach().clone()
    trainer.train()
    assert not torch.equal(trainer.model.lm_head.weight, start)
    fresh = small_internvl(processor, hidden_size=32, layers=2, vision_hidden_size=32, vision_layers=2)
    fresh.load_state_dict(trainer.model.state_dict())
    inputs = processor(text="<IMG_CONTEXT>\nWhich number is it?", images=[make_image(0)], return_tensors="pt").to(DEVICE)
    said = [m.to(DEVICE).eval().generate(**inputs, do_sample=False, max_new_tokens=12) for m in (trainer.model, fresh)]
    assert torch.equal(*said)


def test_compiled_layers_err_no_more_than_others():
    """Log-probs and gradients of packed rows in bfloat16; float64 is the measure, as above. A text model: one kind of layer."""
    torch._dynamo.reset()
    compiled = in_bfloat16(text_model().to(DEVICE))
    plain, exact = copy.deepcopy(compiled), in_float64(compiled)
    compile_layers(compiled)
    draw = random.Random(0)
    groups = [random_group(draw, completions) for completions in (3, 8)]
    batch = on_device(batches_of(groups, random_pairs(groups, draw))[0])
    found = []
    for one in map(with_head, (exact, plain, compiled)):
        with packed_attention(one):
            sums = trained_sums(one, batch)
            sums.sum().backward()
        gradients = [parameter.grad.flatten().double() for parameter in one.parameters() if parameter.grad is not None]
        found.append((sums.detach().double(), torch.cat(gradients)))
    for right, reference, value in zip(*found, strict=True):
        assert (value - right).norm() <= 2 * max((reference - right).norm(), HALF_ULP * right.norm())
