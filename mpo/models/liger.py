"""`use_liger_kernel`: Liger's Triton kernels for RMSNorm, LayerNorm, rotary positions and SwiGLU (arXiv 2410.10989).

They work token by token, so packing does not affect them. The loss remains TRL's fused LM head.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel

from mpo.models.packable import find_text_model


def use_liger_layers(model: nn.Module, kernels: dict[str, bool] | None = None) -> None:
    """Replace a model's layers with Liger's kernels, in place.

    Args:
        model: the model, with or without adapters.
        kernels: the kernels to use (``liger_kernel_config``): ``rope``, ``rms_norm``, ``layer_norm``, ``swiglu``; None for all.

    Raises:
        ValueError: for a model that Liger does not support, which it would silently leave unchanged.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN  # type: ignore[import-not-found, unused-ignore]

    outer = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    for part in (outer, find_text_model(model)):
        config: Any = None if part is None else part.config
        kind = getattr(config, "model_type", None)
        if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
            raise ValueError(f"use_liger_kernel=True: Liger has no kernels for models of type {kind!r}. Leave it out.")
    apply_liger_kernel(model, {**(kernels or {}), "fused_linear_cross_entropy": False})
