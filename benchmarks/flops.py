"""Count the FLOPs of a training step: record the calls of its trainer to a very small model, and run them again at full shape.

How: the top of benchmarks/step.py.
"""

import contextlib
import copy
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any
from unittest import mock

import torch
from peft import get_peft_model
from step_cases import SHAPES, SIDES, Case, Shape, adapter, head_as_on_gpus, make_trainer, processor_of, quiet
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from trl.trainer.utils import add_fused_lm_head

from mpo.batching.attention import use_packed_attention
from mpo.batching.logits_to_keep import add_logits_to_keep, label_padded_rows
from mpo.models.features import KEYWORD, take_features, tile_shape
from mpo.models.parts import base_model
from mpo.models.tower import SharedTower, find_tower

PARTS = {"vision_tower": "vision tower", "multi_modal_projector": "projector", "language_model": "text model"}
LOGGED = ("log_probs", "entropy", "mean_logits", "is_top1")  # outputs of the policy's head that both trainers use


@dataclass
class Call:
    """A trainer's call to a model. ``tiles``: encoded by its vision tower; ``plays``: whether their features were replayed."""

    role: str
    inputs: dict[str, Any]
    tiles: int
    plays: bool


def record_calls(side: str, case: Case, shape: Shape) -> list[Call]:
    """Record the calls of one step of a trainer to its models, with a very small model instead of the shape's.

    It is the second step: in the first, MPOTrainer also compares the policy with its reference, once in a run.
    """
    stand_in = replace(shape, vision=(32, 32, 1, 1), text=(32, 32, 1, 2), kv_heads=1, vocabulary=512)
    calls: list[Call] = []

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        assert not args
        calls.append(Call("policy" if torch.is_grad_enabled() else "reference", dict(kwargs), 0, False))

    def encoded(module: nn.Module, args: Any, output: Any) -> None:
        calls[-1].tiles += len(output if isinstance(output, Tensor) else output[0])

    with tempfile.TemporaryDirectory() as folder, quiet():
        trainer, batch = make_trainer(side, replace(case, checkpointing=False), stand_in, folder)
        models = [trainer.model] + ([trainer.ref_model] if trainer.ref_model is not None else [])
        for model in models:
            model.register_forward_pre_hook(before, with_kwargs=True)
            # Hooks on the first part of the tower: a shared tower returns without running it.
            find_tower(model).embeddings.register_forward_hook(encoded)
        for _ in range(2):
            calls.clear()
            with torch.enable_grad():
                trainer.compute_loss(trainer.model, copy.copy(batch))
    for call in calls:
        call.plays = call.tiles == 0
    return calls


@contextlib.contextmanager
def flop_counter() -> Iterator[FlopCounterMode]:
    """Count FLOPs, with the formulas of the GPU's flash kernel for the CPU's, which torch does not count."""
    aten = torch.ops.aten
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
        aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[aten._scaled_dot_product_flash_attention_backward],
    }
    with mock.patch.dict(flop_registry, formulas), FlopCounterMode(display=False) as counter:
        yield counter


def _flash_on_meta(query: Tensor, key: Tensor, value: Tensor, *args: Any, is_causal: bool = False, **kwargs: Any) -> Tensor:
    """Attention on the meta device as in a flash kernel, instead of one that materialises its weights."""
    group = query.size(1) // key.size(1)
    if group > 1:
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal)[0]


def meta_model(case: Case, shape: Shape, image_token_id: int, logged: tuple[str, ...] = LOGGED) -> Any:
    """Create a model of the shape on the meta device, prepared as in both trainers."""
    model = shape.build(image_token_id, "meta")

    def placeholders(input_ids: Tensor, inputs_embeds: Tensor, **_: Any) -> Tensor:
        # The model's own method also compares the number of image tokens with that of features, which needs their values.
        return (input_ids == image_token_id).unsqueeze(-1).expand_as(inputs_embeds)

    model.model.get_placeholder_mask = placeholders
    if case.tower == "frozen":
        find_tower(model).requires_grad_(False)
    add_fused_lm_head(model, outputs=logged)
    return model


def _for_meta(inputs: dict[str, Any], features: tuple[int, int]) -> dict[str, Any]:
    inputs = dict(inputs)
    if KEYWORD in inputs:  # of a very small model; `features` is the shape of a tile's
        inputs[KEYWORD] = torch.empty(len(inputs[KEYWORD]), *features)
    labels = inputs.pop("labels", None)
    if labels is not None:  # labelled positions depend on values, which meta tensors do not have
        inputs["positions_to_keep"], inputs["shift_labels"], _ = label_padded_rows(inputs["input_ids"], labels != -100)
        del inputs["attention_mask"]  # also read by value; attention counts the same with a mask
    return {name: value.to("meta") if hasattr(value, "to") else value for name, value in inputs.items()}


def count_calls(calls: list[Call], case: Case, shape: Shape, image_token_id: int) -> dict[str, dict[str, int]]:
    """Count the FLOPs of recorded calls, by role and part of the model, with a model of the shape on the meta device."""
    policy = meta_model(case, shape, image_token_id)
    if case.tune == "lora":
        with torch.device("meta"):
            policy = get_peft_model(policy, adapter())
        reference = policy
    else:
        reference = meta_model(case, shape, image_token_id, ("log_probs",)).requires_grad_(False).eval()
    for model in (policy, reference):
        add_logits_to_keep(base_model(model).base_model)  # after the adapters, as in a trainer
    policy.train()
    if case.checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if case.tune == "lora":
            policy.enable_input_require_grads()
    packed = "segments" in calls[0].inputs
    if packed:
        for model in (policy, reference):
            use_packed_attention(model)
    projected = case.tune == "lora"
    stored = any(KEYWORD in call.inputs for call in calls)
    for model in (policy, reference) if stored else ():
        take_features(base_model(model).base_model, projected=projected)
    features = tile_shape(shape.config(image_token_id), projected=projected)
    tower = SharedTower(policy, reference) if not stored and packed and case.tower == "frozen" else None

    counts: dict[str, dict[str, int]] = {}
    patched = (
        mock.patch("torch.nn.functional.scaled_dot_product_attention", _flash_on_meta),
        mock.patch("mpo.batching.attention.scaled_dot_product_attention", _flash_on_meta),
        mock.patch("torch.is_autocast_enabled", lambda device_type=None: False),  # does not support the meta device
        # Whether positions restart inside a row is read from their values; in TRL's rows they do not.
        mock.patch("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None),
    )
    for call in calls:
        inputs = _for_meta(call.inputs, features)
        with contextlib.ExitStack() as stack:
            for patch in patched:
                stack.enter_context(patch)
            if call.role == "policy":
                model = policy
            else:
                model = reference
                stack.enter_context(torch.no_grad())
                if case.tune == "lora":
                    stack.enter_context(policy.disable_adapter())
                if call.plays and tower is not None:
                    stack.enter_context(tower.playing())
            with flop_counter() as counter:
                output = model(**inputs)
                if call.role == "policy":
                    output.log_probs.sum().backward()
        # The counter attributes parts of a backward pass to the wrong module, so the policy has a total only.
        counts[call.role] = {"whole": counter.get_total_flops()} if call.role == "policy" else _by_part(counter)
    return counts


def _by_part(counter: FlopCounterMode) -> dict[str, int]:
    parts = dict.fromkeys([*PARTS.values(), "LM head"], 0)
    for name, by_operator in counter.get_flop_counts().items():
        part = PARTS.get(name.split(".")[-1])
        if part is not None:
            parts[part] += sum(by_operator.values())
    parts["LM head"] = counter.get_total_flops() - sum(parts.values())
    return parts


def count_directly(side: str, case: Case, shape: Shape) -> int:
    """Count the FLOPs of a real step on the CPU, loss and backward, without recording calls."""
    with tempfile.TemporaryDirectory() as folder, quiet(), head_as_on_gpus():
        trainer, batch = make_trainer(side, case, shape, folder)
        trainer.compute_loss(trainer.model, copy.copy(batch))  # as in `record_calls`, the first step is not counted
        with flop_counter() as counter:
            trainer.compute_loss(trainer.model, copy.copy(batch)).backward()
    return counter.get_total_flops()


def count(case: Case, shape: Shape | None = None, sides: tuple[str, ...] = SIDES) -> dict[str, Any]:
    """Count FLOPs and tokens of one step of each side, per pair, and the ratio of TRL's to ours."""
    shape = shape or SHAPES[case.shape]
    image_token_id = processor_of(case, shape).image_token_id
    result: dict[str, Any] = {"case": asdict(case), "per_pair": {}, "TRL over": {}}
    if case.tower == "trained":  # it has no features to keep
        sides = tuple(side for side in sides if side != "cached features")
    for side in sides:
        calls = record_calls(side, case, shape)
        flops = count_calls(calls, case, shape, image_token_id)
        result["per_pair"][side] = {
            "flops": sum(sum(parts.values()) for parts in flops.values()) / case.pairs,
            "flops_by_part": {role: {part: n / case.pairs for part, n in parts.items()} for role, parts in flops.items()},
            "tiles_encoded": sum(call.tiles for call in calls) / case.pairs,
            "text_tokens": sum(call.inputs["input_ids"].numel() for call in calls) / case.pairs,
        }
    trl = result["per_pair"]["trl"]["flops"]
    result["TRL over"] = {side: trl / result["per_pair"][side]["flops"] for side in sides if side != "trl"}
    return result
