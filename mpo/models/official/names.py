"""Map names and layouts of tensors between the official format and transformers'.

Two tensors also differ in layout. The official vision tower stacks queries, keys and values in one matrix, a third each; InternLM2
interleaves them in one matrix, for each key-value head its query heads, its key and its value.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

VISION = (
    ("embeddings.class_embedding", "embeddings.cls_token"),
    ("embeddings.patch_embedding.{end}", "embeddings.patch_embeddings.projection.{end}"),
    ("embeddings.position_embedding", "embeddings.position_embeddings"),
)
VISION_LAYER = (
    ("attn.qkv.{end}", "attention.q_proj.{end}", "attention.k_proj.{end}", "attention.v_proj.{end}"),
    ("attn.proj.{end}", "attention.projection_layer.{end}"),
    ("attn.q_norm.weight", "attention.q_norm.weight"),
    ("attn.k_norm.weight", "attention.k_norm.weight"),
    ("norm1.{end}", "layernorm_before.{end}"),
    ("norm2.{end}", "layernorm_after.{end}"),
    ("ls1", "lambda_1"),
    ("ls2", "lambda_2"),
    ("mlp.fc1.{end}", "mlp.fc1.{end}"),
    ("mlp.fc2.{end}", "mlp.fc2.{end}"),
)
PROJECTOR = (("0.{end}", "layer_norm.{end}"), ("1.{end}", "linear_1.{end}"), ("3.{end}", "linear_2.{end}"))
INTERNLM2 = (
    ("output.weight", "lm_head.weight"),
    ("model.tok_embeddings.weight", "model.embed_tokens.weight"),
    ("model.norm.weight", "model.norm.weight"),
)
INTERNLM2_LAYER = (
    ("attention.wqkv.{end}", "self_attn.q_proj.{end}", "self_attn.k_proj.{end}", "self_attn.v_proj.{end}"),
    ("attention.wo.{end}", "self_attn.o_proj.{end}"),
    ("attention_norm.weight", "input_layernorm.weight"),
    ("ffn_norm.weight", "post_attention_layernorm.weight"),
    ("feed_forward.w1.weight", "mlp.gate_proj.weight"),
    ("feed_forward.w3.weight", "mlp.up_proj.weight"),
    ("feed_forward.w2.weight", "mlp.down_proj.weight"),
)
OTHER_LANGUAGE = (("{rest}", "{rest}"),)


class TensorNames:
    """Map tensor names between both formats, and split or join their tensors.

    Args:
        internlm2: whether the official language model is InternLM2, which transformers loads as a Llama.
        heads: number of query heads of the language model; used for InternLM2 only.
        key_value_heads: number of key-value heads; used for InternLM2 only.
    """

    def __init__(self, *, internlm2: bool = False, heads: int = 1, key_value_heads: int = 1) -> None:
        self.heads, self.key_value_heads = heads, key_value_heads
        rows = _under("vision_model.", "vision_tower.", VISION)
        rows += _under("vision_model.encoder.layers.{layer}.", "vision_tower.encoder.layer.{layer}.", VISION_LAYER)
        rows += _under("mlp1.", "multi_modal_projector.", PROJECTOR)
        if internlm2:
            rows += _under("language_model.", "language_model.", INTERNLM2)
            rows += _under("language_model.model.layers.{layer}.", "language_model.model.layers.{layer}.", INTERNLM2_LAYER)
        else:
            rows += _under("language_model.", "language_model.", OTHER_LANGUAGE)
        self._from_official = [(_pattern(official), ours) for official, *ours in rows]
        self._from_ours = [(_pattern(name), official) for official, *ours in rows for name in ours]

    def ours(self, official: str) -> list[str]:
        """The names on disk in transformers' format of an official tensor: one, or those of queries, keys and values.

        Raises:
            ValueError: for a name that InternVLChatModel does not have.
        """
        for pattern, names in self._from_official:
            if match := pattern.fullmatch(official):
                return [name.format(**match.groupdict()) for name in names]
        raise ValueError(f"An InternVLChatModel has no tensor {official!r}.")

    def official(self, ours: str) -> str:
        """The official name of a tensor of transformers' format, or of the tensor that it is a part of.

        Raises:
            ValueError: for a name that transformers' InternVL does not have.
        """
        for pattern, name in self._from_ours:
            if match := pattern.fullmatch(ours):
                return name.format(**match.groupdict())
        raise ValueError(f"transformers' InternVL has no tensor {ours!r}.")

    def split(self, official: str, tensor: Tensor) -> list[Tensor]:
        """Split an official tensor into transformers' tensors, in the order of `ours`."""
        if ".attn.qkv." in official:
            return list(tensor.chunk(3))
        if ".attention.wqkv." in official:
            group = self.heads // self.key_value_heads
            by_head = tensor.unflatten(0, (self.key_value_heads, group + 2, -1))  # type: ignore[no-untyped-call]
            return [by_head[:, :group].flatten(0, 2), by_head[:, group].flatten(0, 1), by_head[:, group + 1].flatten(0, 1)]
        return [tensor]

    def join(self, official: str, tensors: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`."""
        if ".attn.qkv." in official:
            return torch.cat(list(tensors))
        if ".attention.wqkv." in official:
            by_head = (tensor.unflatten(0, (self.key_value_heads, -1)) for tensor in tensors)  # type: ignore[no-untyped-call]
            query, key, value = by_head
            return torch.cat([query, key, value], dim=1).flatten(0, 1)
        (tensor,) = tensors
        return tensor


def _under(official: str, ours: str, rows: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    return [(official + first, *(ours + name for name in names)) for first, *names in rows]


def _pattern(name: str) -> re.Pattern[str]:
    found = re.escape(name)
    for field, what in (("layer", r"\d+"), ("end", "weight|bias"), ("rest", ".+")):
        found = found.replace(re.escape("{" + field + "}"), f"(?P<{field}>{what})")
    return re.compile(found)
