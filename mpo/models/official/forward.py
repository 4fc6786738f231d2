"""Reference forward pass of an official checkpoint, from its tensors under their official names, to check conversions.

Written from the definition of InternVLChatModel, in float32, independent of the table of names: a tensor that was confused with
another, or split in the wrong place, gives other logits.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, InternVLConfig
from transformers.activations import ACT2FN

from mpo.models.official.schema import Chat, Language, text_model
from mpo.models.official.tensors import TensorFiles


@torch.no_grad()
def official_logits(
    files: TensorFiles, official: Chat[Any], config: InternVLConfig, input_ids: Tensor, pixel_values: Tensor
) -> Tensor:
    """Logits of one row, (1, N, vocabulary) in float32, from the official checkpoint's tensors.

    `config` is transformers' config of it, for language models that transformers supports. `input_ids`: (1, N), with
    `image_token_id` at the positions of image tokens; `pixel_values`: (tiles, 3, height, width).
    """
    images = _Weights(files, "vision_model.").tower(pixel_values, official)
    mlp = _Weights(files, "mlp1.")
    images = mlp.linear(F.gelu(mlp.linear(mlp.norm(images, "0", 1e-5), "1")), "3")
    language = _Weights(files, "language_model.")
    internlm2 = text_model(official.llm_config) == "internlm2"
    name = "model.tok_embeddings.weight" if internlm2 else "model.embed_tokens.weight"
    embeddings = F.embedding(input_ids, language(name))
    embeddings[input_ids == config.image_token_id] = images.flatten(0, 1)
    if internlm2:
        return _internlm2(language, official.llm_config, embeddings)
    weights = {name.removeprefix("language_model."): files[name] for name in files.names() if name.startswith("language_model.")}
    text_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config.text_config)]
    model = text_class.from_pretrained(None, config=config.text_config, state_dict=weights, dtype=torch.float32).eval()
    logits: Tensor = model(inputs_embeds=embeddings).logits
    return logits


class _Weights:
    """Tensors under a prefix, as float32."""

    def __init__(self, files: TensorFiles, prefix: str) -> None:
        self.files, self.prefix = files, prefix
        self._names = set(files.names())

    def __call__(self, name: str) -> Tensor:
        return self.files[self.prefix + name].float()

    def optional(self, name: str) -> Tensor | None:
        return self(name) if self.prefix + name in self._names else None

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self(f"{name}.weight"), self.optional(f"{name}.bias"))

    def norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        """LayerNorm where there is a bias, RMSNorm where there is none."""
        weight, bias = self(f"{name}.weight"), self.optional(f"{name}.bias")
        if bias is not None:
            return F.layer_norm(x, weight.shape, weight, bias, eps)
        return F.rms_norm(x, weight.shape, weight, eps)

    def tower(self, pixels: Tensor, official: Chat[Any]) -> Tensor:
        """(tiles, 3, height, width) -> (tiles, patches / k^2, k^2 * width): the selected layer's patches, joined k by k."""
        vision = official.vision_config
        eps, heads, act = vision.layer_norm_eps, vision.num_attention_heads, ACT2FN[vision.hidden_act]
        weight, bias = self("embeddings.patch_embedding.weight"), self("embeddings.patch_embedding.bias")
        x = F.conv2d(pixels, weight, bias, stride=vision.patch_size).flatten(2).mT
        x = torch.cat([self("embeddings.class_embedding").expand(len(x), 1, -1), x], dim=1)
        x = x + self("embeddings.position_embedding")
        for number in range(range(vision.num_hidden_layers + 1)[official.select_layer]):
            at = f"encoder.layers.{number}."
            query, key, value = self.linear(self.norm(x, f"{at}norm1", eps), f"{at}attn.qkv").chunk(3, dim=-1)
            if vision.qk_normalization:
                query, key = self.norm(query, f"{at}attn.q_norm", eps), self.norm(key, f"{at}attn.k_norm", eps)
            parts = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value))
            attended = F.scaled_dot_product_attention(*parts)
            x = x + self(f"{at}ls1") * self.linear(attended.transpose(1, 2).flatten(2), f"{at}attn.proj")
            inner = act(self.linear(self.norm(x, f"{at}norm2", eps), f"{at}mlp.fc1"))
            x = x + self(f"{at}ls2") * self.linear(inner, f"{at}mlp.fc2")
        side, k = round((x.shape[1] - 1) ** 0.5), round(1 / official.downsample_ratio)
        blocks = x[:, 1:].unflatten(1, (side // k, k, side // k, k))  # rows of blocks, row in a block, columns, column in a block
        return blocks.transpose(2, 3).flatten(3).flatten(1, 2)


def _internlm2(weights: _Weights, llm: Language, x: Tensor) -> Tensor:
    heads, eps, act = llm.num_attention_heads, llm.rms_norm_eps, ACT2FN[llm.hidden_act]
    shared, size = llm.num_key_value_heads or heads, llm.head_dim or llm.hidden_size // heads
    frequencies = llm.rope_theta ** -(torch.arange(0, size, 2) / size)
    if llm.rope_scaling is not None and llm.rope_scaling.get("type") == "linear":  # "dynamic" is for longer rows
        frequencies = frequencies / llm.rope_scaling["factor"]
    angles = torch.outer(torch.arange(x.shape[1]).float(), frequencies)
    cosine, sine = angles.cos(), angles.sin()
    for number in range(llm.num_hidden_layers):
        at = f"model.layers.{number}."
        joint = weights.linear(weights.norm(x, f"{at}attention_norm", eps), f"{at}attention.wqkv")
        joint = joint.unflatten(-1, (shared, heads // shared + 2, size))  # per key-value head: its queries, its key, its value
        query, key, value = joint[..., :-2, :].flatten(2, 3), joint[..., -2, :], joint[..., -1, :]
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        attended = F.scaled_dot_product_attention(
            _rotate(query, cosine, sine), _rotate(key, cosine, sine), value, is_causal=True, enable_gqa=True
        )
        x = x + weights.linear(attended.transpose(1, 2).flatten(2), f"{at}attention.wo")
        normed = weights.norm(x, f"{at}ffn_norm", eps)
        inner = act(weights.linear(normed, f"{at}feed_forward.w1")) * weights.linear(normed, f"{at}feed_forward.w3")
        x = x + weights.linear(inner, f"{at}feed_forward.w2")
    return weights.linear(weights.norm(x, "model.norm", eps), "output")


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
