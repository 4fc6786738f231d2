"""Open the folder of an official checkpoint: its config, its tokenizer, its tensors under either name."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, InternVLConfig, InternVLForConditionalGeneration, InternVLProcessor
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import set_zero3_state

from mpo.io import read_json_object
from mpo.models.official.config import is_official, tensor_names, text_model, transformers_config
from mpo.models.official.names import TensorNames
from mpo.models.official.processor import load_tokenizer, official_processor
from mpo.models.official.tensors import TensorFiles
from mpo.models.strict import Shape, check_shapes

IMAGE_TOKEN_IDS = {"internlm2": 92_546, "qwen2": 151_667, "qwen3": 151_671, "qwen3_moe": 151_671}
"""Ids of ``<IMG_CONTEXT>`` in the published checkpoints, for folders without a tokenizer."""


@dataclass(frozen=True)
class OfficialCheckpoint:
    """The contents of the folder."""

    folder: Path  # folder of the checkpoint
    official: dict[str, Any]  # its config.json
    config: InternVLConfig  # transformers' config of the same model
    generation_config: GenerationConfig  # with the tokens that end generation
    processor: InternVLProcessor | None  # the processor; None for a folder without a tokenizer
    names: TensorNames  # the names of its tensors in both formats

    @cached_property
    def files(self) -> TensorFiles:
        """Its tensors."""
        return TensorFiles(self.folder)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over names on disk in transformers' format and tensors."""
        return self._renamed(self.files.__getitem__)

    def check(self) -> int:
        """Check that its tensors are those of its config, without reading them, and return their number in transformers' format.

        Raises:
            ValueError: listing those that differ.
        """
        shapes = self.files.shapes()
        found = {name: tuple(tensor.shape) for name, tensor in self._renamed(lambda name: torch.empty(shapes[name], device="meta"))}
        check_shapes(found, expected_shapes(self.config), str(self.folder))
        return len(found)

    def _renamed(self, read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name in self.files.names():
            if name == "language_model.lm_head.weight" and self.config.tie_word_embeddings:
                continue  # the same matrix as the embeddings
            yield from zip(self.names.ours(name), self.names.split(name, read(name)), strict=True)


def expected_shapes(config: InternVLConfig) -> dict[str, Shape]:
    """Names on disk in transformers' format and shapes for a model of this config; nothing is allocated."""
    with torch.device("meta"), set_zero3_state():  # or ZeRO-3 would shard the parameters
        model = InternVLForConditionalGeneration(config)
    state = model.state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, state).items()}


def open_official(folder: Path, *, weights: bool = True) -> OfficialCheckpoint:
    """Open the folder of an official checkpoint, without running its code or reading tensors.

    Args:
        folder: the folder.
        weights: whether it must have its weights.

    Raises:
        ValueError: for a checkpoint that cannot be loaded, saying why.
    """
    official = read_official(folder)
    kind = text_model(official)
    tokenizer = load_tokenizer(folder)
    end = None
    processor = None
    if tokenizer is None:
        token = IMAGE_TOKEN_IDS.get(kind)
        if token is None or token >= official["llm_config"]["vocab_size"]:
            raise ValueError(
                f"{folder} has no tokenizer, and the id of <IMG_CONTEXT> in its {kind} vocabulary is unknown. Copy "
                "tokenizer_config.json and the other tokenizer files from the original checkpoint."
            )
    else:
        token, end = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), tokenizer.get_vocab().get("<|im_end|>")
        processor = official_processor(tokenizer, official)
    config = transformers_config(official, image_token_id=token, eos_token_id=end)
    text: Any = config.text_config
    generation = GenerationConfig(
        eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id if tokenizer is None else tokenizer.pad_token_id
    )
    checkpoint = OfficialCheckpoint(folder, official, config, generation, processor, tensor_names(official))
    if weights:
        _ = checkpoint.files  # raises
    return checkpoint


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a checkpoint's folder.

    Raises:
        ValueError: when there is none, or it holds no JSON object.
    """
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"Expected a checkpoint in {folder}, and found no config.json. Give the folder that contains it.")
    return read_json_object(path)


def read_official(folder: Path, setting: str = "") -> dict[str, Any]:
    """Read config.json of a folder in the official format; `setting` is what named it, for the error.

    Raises:
        ValueError: when there is none, or it is of another format.
    """
    config = read_config(folder)
    if not is_official(config):
        raise ValueError(
            f"{setting}{folder} is not an InternVLChatModel: expected model_type='internvl_chat', got {config.get('model_type')!r}."
        )
    return config
