"""Bytes that a layer of InternVL's vision tower keeps for the backward pass: InternViT-300M and -6B."""

from __future__ import annotations

from typing import Any

from torch import nn

from mpo.preflight.dry_run.kept import after_layer_norm, layer_norm, linear_inputs, rms_norm
from mpo.preflight.dry_run.precision import Precision


def vision_layer(layer: nn.Module, patches: int, tiles: int, precision: Precision) -> int:
    """Bytes that one layer of the tower keeps.

    For n = patches x tiles rows of width d, MLP width m and h heads, all trained, with b bytes per element and no autocast:

        2 norms                    b n d, 2 b n each     input, mean and reciprocal
        2 linear inputs            b n d each
        attention                  4 b n d + 4 h n       queries, keys, values, output (also the projection's input), log-sum-exp
        2 layer scales             b n d each            their inputs
        MLP                        2 b n m               before and after GELU

    In total about 10 b n d + 2 b n m. The 6B tower also normalizes queries and keys in float32, and its norms are RMSNorms.

    Args:
        layer: an `InternVLVisionLayer`; parameters may be on the meta device.
        patches: rows per tile, with the class token.
        tiles: number of tiles, with thumbnails.
        precision: precision of the run.
    """
    rows = patches * tiles
    parts: Any = layer
    width = parts.lambda_1.numel()
    b, s = precision.compute, precision.stream
    total = 0
    normed = s
    for norm in (parts.layernorm_before, parts.layernorm_after):
        if isinstance(norm, nn.LayerNorm):
            total += layer_norm(rows, width, precision)
            normed = after_layer_norm(precision)
        else:
            total += rms_norm(norm, rows, width, s)
    attention: Any = parts.attention
    total += linear_inputs([attention.q_proj, attention.k_proj, attention.v_proj], rows, precision, of=normed)
    for norm in (attention.q_norm, attention.k_norm):
        if not isinstance(norm, nn.Identity):
            total += rms_norm(norm, rows, width, b)
    total += rows * (4 * b * width + 4 * attention.num_heads)
    total += max(linear_inputs([attention.projection_layer], rows, precision, of=b) - rows * width * b, 0)
    total += sum(rows * width * b for scale in (parts.lambda_1, parts.lambda_2) if scale.requires_grad)
    total += linear_inputs([parts.mlp.fc1], rows, precision, of=normed)
    inner = mlp_width(layer)
    return total + b * rows * inner + linear_inputs([parts.mlp.fc2], rows, precision, of=b)


def working(layer: nn.Module, patches: int, tiles: int, precision: Precision) -> tuple[int, int]:
    """Temporary bytes of a layer in a forward pass without gradients and in the backward pass.

    Forward pass: input and output of GELU, the residual stream and the normed input. Backward pass: two gradients of the MLP's
    width and three of the stream's width.
    """
    rows, width, inner = patches * tiles, layer.lambda_1.numel(), mlp_width(layer)
    b, s = precision.compute, precision.stream
    return rows * (2 * b * inner + 2 * s * width), rows * (2 * b * inner + 3 * s * width)


def projector(module: Any, tokens: int, precision: Precision) -> int:
    """Bytes that the projector keeps: input and output of its norm, input and output of GELU.

    Args:
        module: the projector: LayerNorm, linear, GELU, linear.
        tokens: number of image tokens.
        precision: precision of the run.
    """
    wide = module.layer_norm.weight.numel()
    narrow = getattr(module.linear_1, "base_layer", module.linear_1).out_features
    b = precision.compute
    total = layer_norm(tokens, wide, precision)
    total += linear_inputs([module.linear_1], tokens, precision, of=after_layer_norm(precision))
    return total + tokens * narrow * b + linear_inputs([module.linear_2], tokens, precision, of=b)


def mlp_width(layer: Any) -> int:
    """The tower's MLP width."""
    return int(getattr(layer.mlp.fc1, "base_layer", layer.mlp.fc1).out_features)
