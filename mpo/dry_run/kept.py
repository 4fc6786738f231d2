"""What autograd keeps for the backward pass of the modules that every transformer layer is made of.

Derived from what each operator saves: a matrix product keeps its input if its weight (or its LoRA matrix A) is trained, a product
of two tensors each factor whose other factor needs a gradient, attention its queries, keys, values and output. Tensors that
several operators keep count once. `tests/dry_run` compares the sums with `torch.autograd.graph.saved_tensors_hooks` on real
models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from mpo.dry_run.precision import Precision


def linear_inputs(linears: Sequence[nn.Module], rows: int, precision: Precision, of: int | None = None) -> int:
    """Bytes kept of one input that some linear layers read.

    Under autocast with float32 weights each layer casts the input for itself, so each keeps a copy. LoRA (arXiv 2106.09685) keeps
    the input of A, which dropout makes a tensor of its own with a mask (bytes on GPUs, numbers elsewhere), and A's output for B.

    Args:
        linears: the layers, plain or wrapped by LoRA, all of one input width.
        rows: tokens.
        precision: of the run.
        of: bytes of a number of the input; by default the residual stream's.
    """
    given = precision.stream if of is None else of
    product = precision.compute if precision.autocast else given
    shared = False
    total = 0
    for layer in linears:
        base = getattr(layer, "base_layer", layer)
        width = base.in_features
        if base.weight.requires_grad:
            shared = shared or given == product
            total += 0 if given == product else rows * width * product
        for name, down in getattr(layer, "lora_A", {}).items():
            if not down.weight.requires_grad:
                continue
            own = down.weight.element_size()  # the input is cast to the adapter's dtype, and by autocast back
            ends = precision.compute if precision.autocast else own
            if isinstance(layer.lora_dropout[name], nn.Dropout) and layer.lora_dropout[name].p:
                total += rows * width * (ends + (1 if precision.gpu else own))
            elif own == given == ends:
                shared = True
            else:
                total += rows * width * ends
            total += rows * down.out_features * ends
    return total + (rows * width * given if shared else 0)


def rms_norm(norm: nn.Module, rows: int, width: int, of: int, *, fused: bool = False) -> int:
    """Bytes kept by transformers' RMSNorm, its input included: that as float32, a reciprocal a row, and what the weight multiplies.

    Args:
        norm: the module.
        rows: of the input.
        width: of a row.
        of: bytes of a number of the input.
        fused: Liger's kernel keeps the input as it is and the reciprocals alone.
    """
    if fused:
        return rows * (width * of + 4)
    return rows * (4 * width + 4) + (rows * width * of if _trained(norm) else 0)


def layer_norm(rows: int, width: int, precision: Precision) -> int:
    """Bytes kept by PyTorch's LayerNorm: its input, and a mean and a reciprocal a row, float32 where autocast says so."""
    in_float32 = precision.gpu and precision.autocast
    return rows * (width * (4 if in_float32 else precision.stream) + 2 * (4 if in_float32 else precision.stream))


def after_layer_norm(precision: Precision) -> int:
    """Bytes of a number that LayerNorm gives: float32 under autocast on a GPU."""
    return 4 if precision.gpu and precision.autocast else precision.stream


def is_trained(module: nn.Module) -> bool:
    """Whether any of its parameters is."""
    return any(parameter.requires_grad for parameter in module.parameters())


def _trained(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and bool(weight.requires_grad)
