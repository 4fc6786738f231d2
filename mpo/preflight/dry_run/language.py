"""Bytes that a decoder layer keeps for the backward pass: Qwen2, Qwen3 (dense and MoE), Llama and similar models."""

from __future__ import annotations

from typing import Any

from torch import nn

from mpo.batching.attention import VARLEN_TAKES_GROUPS
from mpo.preflight.dry_run.batch import BatchShape
from mpo.preflight.dry_run.kept import linear_inputs, rms_norm
from mpo.preflight.dry_run.precision import Precision


def decoder_layer(layer: nn.Module, batch: BatchShape, precision: Precision, *, liger: bool = False) -> int:
    """Bytes that one layer keeps.

    For N tokens of width d, attention width q and MLP width m, all trained, with b bytes per element, no autocast, no GPU kernels:

        2 norms                4 N (d + 1) + b N d each        input as float32, reciprocals, normed input
        2 linear inputs        b N d each
        attention              see `attention`
        its output             b N q                           input of the output projection
        MLP                    4 b N m                         gate, activated gate, up, their product

    Args:
        layer: a decoder layer of transformers; parameters may be on the meta device.
        batch: the micro-batch.
        precision: precision of the run.
        liger: use Liger's RMSNorm and SwiGLU kernels.
    """
    tokens = batch.tokens
    parts: Any = layer
    width = parts.input_layernorm.weight.numel()
    total = sum(
        rms_norm(norm, tokens, width, precision.stream, fused=liger)
        for norm in (parts.input_layernorm, parts.post_attention_layernorm)
    )
    attention_ = parts.self_attn
    total += linear_inputs([attention_.q_proj, attention_.k_proj, attention_.v_proj], tokens, precision)
    total += attention(attention_, batch, precision)
    return total + _mlp(parts.mlp, tokens, precision, liger)


def attention(module: Any, batch: BatchShape, precision: Precision) -> int:
    """Bytes that attention keeps, with the input of its output projection.

    For N queries of width q, K keys of width k in all segments together, and h heads:

        varlen kernels    b (2 N q + 2 K k) + 4 h N             queries, output, keys, values, log-sum-exp
        by segment        b (3 N q + 2 K k) + 4 h N + b masks   output per segment and concatenated; q instead of k on GPUs

    `_scaled_dot_product_flash_attention` and the varlen kernels save these. Rotary embeddings keep only cosines and sines, which
    all layers share. Qwen3's norms of queries and keys are added.
    """
    queries = _out_features(module.q_proj)
    keys = _out_features(module.k_proj)
    heads = queries // module.head_dim
    b, tokens = precision.compute, batch.tokens
    total = 4 * heads * tokens
    for name, norm_width in (("q_norm", queries), ("k_norm", keys)):
        norm = getattr(module, name, None)
        if norm is not None:
            total += rms_norm(norm, tokens * norm_width // module.head_dim, module.head_dim, b)
    keeps_output = linear_inputs([module.o_proj], tokens, precision, of=b)
    if batch.packed and takes_varlen(precision):
        grouped = keys if VARLEN_TAKES_GROUPS else queries
        return total + b * (tokens * 2 * queries + 2 * batch.keys * grouped) + max(keeps_output - b * tokens * queries, 0)
    grouped = keys if batch.packed and not precision.gpu else queries
    if batch.packed and not batch.shared and keys == grouped:
        return total + b * (2 * tokens * queries + 2 * tokens * keys) + keeps_output
    return total + b * (2 * tokens * queries + 2 * batch.keys * grouped + batch.masks) + keeps_output


def takes_varlen(precision: Precision) -> bool:
    """Whether packed rows run through a varlen kernel: half precision on a GPU (`mpo.batching.attention`)."""
    return precision.gpu and precision.compute == 2


def working(layer: nn.Module, batch: BatchShape, precision: Precision) -> tuple[int, int]:
    """Temporary bytes of a layer in a forward pass without gradients and in the backward pass.

    The peak of the forward pass is in the MLP: gate, up and their activation, with the residual stream, the normed input and its
    copy. Backward pass: the gradients of gate, up and product, with the activation's derivative, and the stream's gradient twice.
    """
    width = layer.input_layernorm.weight.numel()
    inner = _mlp_width(layer.mlp)
    b, s, tokens = precision.compute, precision.stream, batch.tokens
    return tokens * (3 * b * inner + 3 * s * width), tokens * (3 * b * inner + 2 * s * width)


def rotary(text_config: Any, batch: BatchShape, precision: Precision) -> int:
    """Bytes of cosines and sines, and of the index of shared keys, that all layers share."""
    head = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    return 2 * batch.tokens * head * precision.stream + (8 * batch.keys if batch.shared else 0)


def _mlp(mlp: Any, tokens: int, precision: Precision, liger: bool) -> int:
    b = precision.compute
    if hasattr(mlp, "experts"):
        return _experts(mlp, tokens, precision)
    inner = _out_features(mlp.gate_proj)
    kept = (2 if liger else 3) * b * tokens * inner  # Liger recomputes the activation
    return (
        kept
        + linear_inputs([mlp.gate_proj, mlp.up_proj], tokens, precision)
        + linear_inputs([mlp.down_proj], tokens, precision, of=b)
    )


def _experts(mlp: Any, tokens: int, precision: Precision) -> int:
    """Each token passes k experts: their inputs, gates, ups, products and outputs, sorted by expert. An approximation."""
    b, chosen = precision.compute, _experts_per_token(mlp)
    width, inner = mlp.experts.down_proj.shape[-2:]
    router = tokens * (width * precision.stream + 2 * 4 * mlp.experts.gate_up_proj.shape[0])
    return router + chosen * tokens * b * (4 * inner + 2 * width)


def _experts_per_token(mlp: Any) -> int:
    return int(mlp.gate.top_k)


def _mlp_width(mlp: Any) -> int:
    """MLP width per token, summed over its experts."""
    if hasattr(mlp, "experts"):
        return int(mlp.experts.down_proj.shape[-1]) * _experts_per_token(mlp)
    return _out_features(mlp.gate_proj)


def _out_features(linear: Any) -> int:
    return int(getattr(linear, "base_layer", linear).out_features)
