"""Bytes that autograd keeps for the backward pass of the modules of every transformer layer.

Derived from what each operator saves: a linear layer saves its input if its weight (or its LoRA matrix A) is trained; a product of
two tensors saves each factor whose other factor needs a gradient; attention saves its queries, keys, values and output. A tensor
that several operators save counts once. `tests/preflight/dry_run` compares the sums with
`torch.autograd.graph.saved_tensors_hooks` on real models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from mpo.preflight.dry_run.precision import Precision


def linear_inputs(linears: Sequence[nn.Module], rows: int, precision: Precision, of: int | None = None) -> int:
    """Bytes kept of one input that several linear layers share.

    Under autocast with float32 weights each layer casts the input itself, so each keeps a copy. LoRA (arXiv 2106.09685) keeps the
    input of A and the output of A. Dropout makes the input of A a separate tensor and adds a mask (one byte per element on GPUs,
    one number elsewhere).

    Args:
        linears: the layers, plain or wrapped by LoRA, with the same input width.
        rows: number of tokens.
        precision: precision of the run.
        of: bytes per element of the input; None: as the residual stream.
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
            own = down.weight.element_size()  # the input is cast to the adapter's dtype, and autocast casts it back
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
    """Bytes kept by transformers' RMSNorm: its input as float32, a reciprocal per row, and, if trained, the normed input.

    Args:
        norm: the module.
        rows: number of rows of the input.
        width: width of a row.
        of: bytes per element of the input.
        fused: use Liger's kernel, which keeps only the input in its own dtype and the reciprocals.
    """
    if fused:
        return rows * (width * of + 4)
    return rows * (4 * width + 4) + (rows * width * of if _trained(norm) else 0)


def layer_norm(rows: int, width: int, precision: Precision) -> int:
    """Bytes kept by PyTorch's LayerNorm: its input, and a mean and a reciprocal per row; float32 under autocast on a GPU."""
    in_float32 = precision.gpu and precision.autocast
    return rows * (width * (4 if in_float32 else precision.stream) + 2 * (4 if in_float32 else precision.stream))


def after_layer_norm(precision: Precision) -> int:
    """Bytes per element of the output of LayerNorm: float32 under autocast on a GPU."""
    return 4 if precision.gpu and precision.autocast else precision.stream


def is_trained(module: nn.Module) -> bool:
    """Whether any parameter of the module is trained."""
    return any(parameter.requires_grad for parameter in module.parameters())


def _trained(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and bool(weight.requires_grad)
