"""The tensors of InternVL in transformers' format, under the names that `save_pretrained` writes.

`from_pretrained` reads other names too: those of the model's parameters (``model.language_model.*``), those of a base model,
stacked experts. transformers' tables of conversions translate them (transformers 5.17 to 5.24).
"""

from collections.abc import Callable
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

    Raises:
        ValueError: for tensors that are not those of the config, which are listed.
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
