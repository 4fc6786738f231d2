"""The activations of a step without memory against the tensors that autograd saves in a real one."""

import contextlib
import copy
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import TEXTS, make_image, messages
from transformers import Qwen3MoeConfig
from trl.trainer.utils import add_fused_lm_head

from mpo import MPOConfig
from mpo.batching.attention import use_packed_attention
from mpo.batching.collator import PairCollator
from mpo.batching.layout import concatenate, lay_out
from mpo.batching.logits_to_keep import LogitsToKeep, add_logits_to_keep
from mpo.models import add_fuser
from mpo.models.small import small_internvl, small_processor
from mpo.models.tower import SharedTower, find_tower
from mpo.preflight.structure import titles
from mpo.preflight.trace import CASTS, trace_step


@pytest.fixture(scope="module")
def small():
    return small_processor(TEXTS, image_size=64, patch_size=8, max_patches=4)


def build(processor, text="qwen2", **sizes):
    settings = {"hidden_size": 64, "layers": 3, "heads": 4, "vision_hidden_size": 48, "vision_layers": 2}
    return small_internvl(processor, text=text, **{**settings, **sizes})


def batch_of(processor, layout="packed"):
    record = {
        "prompt": messages("How many are there? " * 8, "user"),
        "chosen": messages("There are 5. " * 6, "assistant"),
        "rejected": messages("None at all " * 5, "assistant"),
        "images": [make_image(0, 128, 64)],
    }
    return PairCollator(processor, layout=layout)([record])


def saved_bytes(model, batch, *, autocast=False, checkpointing=False):
    """Bytes of all storages that autograd saves in a forward pass, and of masks, without parameters and the batch."""
    model.train()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    add_logits_to_keep(model.base_model)
    use_packed_attention(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    given = [
        tensor
        for value in (*batch.model_inputs.values(), batch.positions_to_keep, batch.shift_labels)
        for tensor in (value, *getattr(value, "__dict__", {}).values())
    ]
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *given) if isinstance(tensor, torch.Tensor)}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and not (autocast and is_weight(tensor)):
            kept[storage.data_ptr()] = storage
        return tensor

    shapes = {tuple(p.shape) for p in model.parameters() if p.dim() == 2} | {
        tuple(p.T.shape) for p in model.parameters() if p.dim() == 2
    }

    def is_weight(tensor):  # a copy that autocast made of a weight
        return tuple(tensor.shape) in shapes and tensor.dtype == torch.bfloat16

    labels = {"positions_to_keep": batch.positions_to_keep, "shift_labels": batch.shift_labels}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            output = model(**batch.model_inputs, **labels, use_cache=False, fused_lm_head=True)
    assert output.log_probs.requires_grad
    for segments in (batch.model_inputs.get("segments"), getattr(batch.positions_to_keep, "segments", None)):
        for mask in segments.__dict__.get("_masks", ()) if segments is not None else ():  # which the batch keeps for all layers
            keep(mask) if mask is not None else None
    return sum(storage.nbytes() for storage in kept.values())


def estimated(model, batch, *, autocast=False, checkpointing=False, **more):
    """Bytes of the activations at the end of the forward pass, casts of weights left out."""
    kept = traced(model, batch, autocast=autocast, checkpointing=checkpointing, **more).kept
    return sum(size for part, size in kept.items() if part != CASTS)


def traced(model, batch, *, autocast=False, checkpointing=False, gpu=False, layers=2):
    args = MPOConfig("unused", use_cpu=True, bf16=autocast, gradient_checkpointing=checkpointing, report_to="none")
    options = {"gpu": gpu, "reference": False, "gradients": lambda weight: weight.nbytes, "layers": layers}
    return trace_step(copy.deepcopy(model).to("meta"), batch, args, titles(model), **options)


@pytest.mark.parametrize("text", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("tower", ["trained", "frozen"])
def test_full_fine_tuning(small, text, tower):
    """A frozen tower's output is kept for the reference, beside what autograd saves."""
    model, batch = build(small, text), batch_of(small)
    if tower == "frozen":
        find_tower(model).requires_grad_(False)
    expected = estimated(model, batch)
    if tower == "frozen":
        SharedTower(model, model)
    assert expected == pytest.approx(saved_bytes(model, batch), rel=0.02)


def test_bfloat16(small):
    model, batch = build(small).bfloat16(), batch_of(small)
    assert estimated(model, batch) == pytest.approx(saved_bytes(model, batch), rel=0.01)


def test_autocast(small):
    model, batch = build(small), batch_of(small)
    assert estimated(model, batch, autocast=True) == pytest.approx(saved_bytes(model, batch, autocast=True), rel=0.01)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("autocast", [False, True])
def test_lora(small, dropout, autocast):
    model, batch = build(small), batch_of(small)
    targets = r"^(?!.*vision_tower).*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)$"
    adapted = get_peft_model(model, LoraConfig(r=4, lora_dropout=dropout, target_modules=targets))
    expected = estimated(adapted, batch, autocast=autocast)
    SharedTower(model, model)
    assert expected == pytest.approx(saved_bytes(model, batch, autocast=autocast), rel=0.02)


def test_unfreezing_the_last_layers_of_the_tower(small):
    model, batch = build(small, vision_layers=3), batch_of(small)
    tower = find_tower(model)
    tower.requires_grad_(False)
    tower.encoder.layer[-1].requires_grad_(True)
    assert estimated(model, batch) == pytest.approx(saved_bytes(model, batch), rel=0.01)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("tower", ["trained", "frozen"])
@pytest.mark.parametrize("fusion", ["mmfuser", "concat"])
def test_several_layers_of_the_tower_are_read(small, fusion, tower, autocast):
    """The layers of a frozen tower are kept for the reference too, as in `test_full_fine_tuning`."""
    model, batch = add_fuser(build(small, vision_layers=6), [1, 3, 6], fusion=fusion, num_heads=4), batch_of(small)
    if tower == "frozen":
        find_tower(model).requires_grad_(False)
    expected = estimated(model, batch, autocast=autocast)
    assert expected == pytest.approx(saved_bytes(model, batch, autocast=autocast), rel=0.05 if tower == "frozen" else 0.02)


def test_the_tower_with_normed_queries(small):
    """InternViT-6B: RMSNorm, and queries and keys normalized over all heads."""
    model = build(small)
    config = model.config
    config.vision_config.use_qk_norm = True
    config.vision_config.norm_type = "rms_norm"
    model, batch = type(model)(config), batch_of(small)
    assert estimated(model, batch) == pytest.approx(saved_bytes(model, batch), rel=0.01)


def test_a_row_without_a_shared_prompt(small):
    """A row with a single completion: one segment, no key index."""
    record = {
        "prompt": messages("What is it? " * 9, "user"),
        "chosen": messages("A cat on a chair", "assistant"),
        "rejected": messages("A dog", "assistant"),
        "images": [make_image(0)],
    }
    encoded = PairCollator(small, layout="packed")
    batch = encoded([record])
    assert batch["segments"].key_index is not None
    prompt = encoded._encode([record])[0][0]
    rows = concatenate([lay_out(prompt.prompt_ids, [prompt.completions[0]])])
    positions = rows.labelled_positions
    batch = replace(
        batch,
        model_inputs=batch.model_inputs | {name: getattr(rows, name) for name in ("input_ids", "position_ids", "segments")},
        positions_to_keep=LogitsToKeep(positions, rows.input_ids.size(1)),
        shift_labels=rows.shift_labels[:, positions],
    )
    assert batch["segments"].key_index is None
    model = build(small)
    assert estimated(model, batch) == pytest.approx(saved_bytes(model, batch), rel=0.01)


@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointing(small, autocast):
    """Every layer keeps only its input. Cosines and sines are kept as its arguments, which autograd's hooks do not see."""
    model, batch = build(small, layers=6), batch_of(small)
    arguments = 2 * 4 * batch["input_ids"].numel() * 16
    expected = estimated(model, batch, checkpointing=True, autocast=autocast)
    assert expected == pytest.approx(saved_bytes(model, batch, checkpointing=True, autocast=autocast) + arguments, rel=0.02)


def test_experts_are_close(small):
    model, batch = build(small), batch_of(small)
    text = Qwen3MoeConfig(
        vocab_size=model.config.text_config.vocab_size,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=16,
        num_key_value_heads=2,
        moe_intermediate_size=48,
        num_experts=8,
        num_experts_per_tok=2,
        intermediate_size=96,
    )
    config = model.config
    config.text_config = text
    model = type(model)(config)
    assert estimated(model, batch) == pytest.approx(saved_bytes(model, batch), rel=0.15)
