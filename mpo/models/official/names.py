"""Names and layouts of tensors in the official format and in transformers'.

Two tensors also differ in layout. The official vision tower stacks queries, keys and values in one matrix, a third each; InternLM2
interleaves them in one matrix, for each key-value head its query heads, its key and its value.

In transformers' format the names are those that `save_pretrained` writes. `from_pretrained` reads others too: those of the model's
parameters (``model.language_model.*``), those of a base model, stacked experts. transformers' tables of conversions translate them
(transformers 5.17 to 5.24).
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key, revert_weight_conversion
from transformers.modeling_utils import set_zero3_state

from mpo.models.official.tensors import TensorFiles
from mpo.models.strict import Shape, check_shapes, misfits

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


class TensorNames:
    """Map tensor names between both formats, and split or join their tensors.

    `internlm2`: the official language model is InternLM2, which transformers loads as a Llama; for it alone, its numbers of heads.
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
            rows.append(("language_model.{rest}", "language_model.{rest}"))
        self._from_official = [(_pattern(official), ours) for official, *ours in rows]
        self._from_ours = [(_pattern(name), official) for official, *ours in rows for name in ours]

    def ours(self, official: str) -> list[str]:
        """The names on disk in transformers' format of an official tensor: one, or those of queries, keys and values."""
        names, found = _match(self._from_official, official, "InternVLChatModel")
        return [name.format(**found) for name in names]

    def official(self, ours: str) -> str:
        """The official name of a tensor of transformers' format, or of the tensor that it is a part of."""
        name, found = _match(self._from_ours, ours, "transformers' InternVL")
        return str(name.format(**found))

    def split(self, official: str, tensor: Tensor) -> list[Tensor]:
        """Split an official tensor into transformers' tensors, in the order of `ours`."""
        groups, sizes = self._layout(official)
        if len(sizes) == 1 or len(tensor) % (groups * sum(sizes)):  # of another shape than expected: the check lists it
            return list(tensor.chunk(len(sizes)))
        blocks: Tensor = tensor.unflatten(0, (groups, sum(sizes), -1))  # type: ignore[no-untyped-call]
        return [part.flatten(0, 2) for part in torch.split(blocks, sizes, dim=1)]

    def join(self, official: str, tensors: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`."""
        groups, sizes = self._layout(official)
        if len(sizes) == 1:
            return tensors[0]
        return torch.cat([part.unflatten(0, (groups, -1)) for part in tensors], dim=1).flatten(0, 1)  # type: ignore[no-untyped-call]

    def _layout(self, official: str) -> tuple[int, list[int]]:
        """The number of groups of blocks of rows, and how many blocks of a group each of transformers' tensors has."""
        if ".attn.qkv." in official:
            return 1, [1, 1, 1]
        return (self.key_value_heads, [self.heads // self.key_value_heads, 1, 1]) if ".wqkv." in official else (1, [1])


def _under(official: str, ours: str, rows: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    return [(official + first, *(ours + name for name in names)) for first, *names in rows]


def _match(rows: Sequence[tuple[re.Pattern[str], Any]], name: str, where: str) -> tuple[Any, dict[str, str]]:
    for pattern, other in rows:
        if match := pattern.fullmatch(name):
            return other, match.groupdict()
    raise ValueError(f"{where} has no tensor {name!r}.")


def _pattern(name: str) -> re.Pattern[str]:
    found = re.escape(name)
    for field, what in (("layer", r"\d+"), ("end", "weight|bias"), ("rest", ".+")):
        found = found.replace(re.escape("{" + field + "}"), f"(?P<{field}>{what})")
    return re.compile(found)


# Transformers' format

HEAD, EMBEDDINGS = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"


def expected_shapes(config: InternVLConfig, where: str = "config.json") -> dict[str, Shape]:
    """Names on disk in transformers' format and shapes for a model of this config; nothing is allocated."""
    return _standard_shapes(_empty(config, where))


def check_tied(read: Callable[[str], Tensor], names: Any, where: str) -> None:
    """Refuse an output head that differs from the embeddings, in a checkpoint whose config ties the two."""
    if HEAD in names and not torch.equal(read(HEAD), read(EMBEDDINGS)):
        raise ValueError(
            f"{where} holds {HEAD}, which differs from {EMBEDDINGS}, but its config.json ties the two (tie_word_embeddings=true). "
            "To keep both set tie_word_embeddings to false, for the language model too; otherwise remove the head from the weights."
        )


class TransformersFiles:
    """Tensors by their standard names, from a folder in transformers' format; a head that is tied is left out.

    Raises ValueError for tensors that are not those of the config, which are listed.
    """

    def __init__(self, folder: Path, config: InternVLConfig) -> None:
        self._files = TensorFiles(folder)
        self._model = _empty(config, str(folder / "config.json"))
        shapes, expected = self._files.shapes(), _standard_shapes(self._model)
        self._renamed = bool(misfits(shapes, expected))
        if self._renamed:
            self._state, transforms = self._model.state_dict(), get_model_conversion_mapping(self._model)
            self._renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
            conversions = get_model_conversion_mapping(self._model, add_legacy=False)
            self._model._weight_conversions = conversions  # private: or it is computed for every tensor
        self._last: tuple[str, dict[str, Tensor]] = ("", {})
        self._place: dict[str, str] = {}
        found: dict[str, Shape] = {}
        for name, shape in shapes.items():
            for standard, tensor in self._standard(name, torch.empty(shape, device="meta")).items():
                if standard in found:
                    raise ValueError(f"{folder} holds {standard} twice: as {self._place[standard]} and as {name}. Remove one.")
                self._place[standard], found[standard] = name, tuple(tensor.shape)
        if config.tie_word_embeddings and HEAD in found and EMBEDDINGS in found:
            check_tied(self.__getitem__, found, str(folder))
            del found[HEAD], self._place[HEAD]
        check_shapes(found, expected, str(folder))

    def names(self) -> list[str]:
        """Standard names of all tensors."""
        return list(self._place)

    def __getitem__(self, name: str) -> Tensor:
        place = self._place[name]
        if self._last[0] != place:  # stacked experts are split once
            self._last = (place, self._standard(place, self._files[place]))
        return self._last[1][name]

    def _standard(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        if not self._renamed:
            return {name: tensor}
        loaded, _ = rename_source_key(name, self._renamings, [], self._model.base_model_prefix, self._state)
        found: dict[str, Tensor] = revert_weight_conversion(self._model, {loaded: tensor})
        return found


def _empty(config: InternVLConfig, where: str) -> Any:
    try:
        with torch.device("meta"), set_zero3_state():  # or ZeRO-3 would shard the parameters
            return InternVLForConditionalGeneration(config)
    except Exception as error:  # of any kind: transformers' layers do not check the values of a config
        raise ValueError(f"{where} does not describe a model that transformers can build: {error}. Correct its sizes.") from error


def _standard_shapes(model: Any) -> dict[str, Shape]:
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, state).items()}
