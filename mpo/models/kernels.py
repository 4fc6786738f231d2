"""Faster layers: `torch_compile`, and `use_liger_kernel`."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel

from mpo.models.packable import find_text_model
from mpo.models.tower import tower_layers


def compile_layers(model: nn.Module, *, backend: str | None = None, mode: str | None = None) -> None:
    """Compile the layers of a model's language model and vision tower in place, for rows of any length.

    Weights, names and hooks stay as they are. A model compiled as a whole would be recompiled for nearly every batch: packed rows
    differ in more than their length. The model may have adapters or be sharded; `backend` and `mode` are those of `torch.compile`.
    Raises ValueError for a model without a known stack of layers.
    """
    stack = getattr(find_text_model(model), "layers", None)
    layers = [*(stack if isinstance(stack, nn.ModuleList) else []), *tower_layers(model)]
    if not layers:
        raise ValueError(f"torch_compile: no known layers found in {type(model).__name__}. Leave torch_compile out.")
    options: dict[str, Any] = {"dynamic": True, **({"backend": backend} if backend else {}), **({"mode": mode} if mode else {})}
    for layer in layers:
        layer.compile(**options)


def use_liger_layers(model: nn.Module, kernels: dict[str, bool] | None = None) -> None:
    """Replace RMSNorm, LayerNorm, rotary positions and SwiGLU with Liger's Triton kernels (arXiv 2410.10989), in place.

    They work token by token, so packing does not affect them. The loss remains TRL's fused LM head. `kernels`: those to use
    (``liger_kernel_config``): ``rope``, ``rms_norm``, ``layer_norm``, ``swiglu``; None for all. Raises ValueError for a model that
    Liger does not support, which it would silently leave unchanged.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN  # type: ignore[import-not-found, unused-ignore]

    outer = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    for part in (outer, find_text_model(model)):
        config: Any = None if part is None else part.config
        kind = getattr(config, "model_type", None)
        if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
            raise ValueError(f"use_liger_kernel=True: Liger has no kernels for models of type {kind!r}. Leave it out.")
    apply_liger_kernel(model, {**(kernels or {}), "fused_linear_cross_entropy": False})
