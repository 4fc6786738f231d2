"""Open the folder of an official checkpoint: its config, its tokenizer, its tensors under either name."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, InternVLConfig, InternVLProcessor

from mpo.io import read_json_object
from mpo.models.official.config import is_official, tensor_names, text_model, transformers_config
from mpo.models.official.expected import Shape, check_shapes, expected_shapes
from mpo.models.official.names import TensorNames
from mpo.models.official.processor import load_tokenizer, official_processor
from mpo.models.official.tensors import TensorFiles

IMAGE_TOKEN_IDS = {"internlm2": 92_546, "qwen2": 151_667, "qwen3": 151_671, "qwen3_moe": 151_671}
"""Ids of ``<IMG_CONTEXT>`` in the published checkpoints, for folders without a tokenizer."""


@dataclass(frozen=True)
class OfficialCheckpoint:
    """The contents of the folder.

    Attributes:
        folder: folder of the checkpoint.
        official: its config.json.
        config: transformers' config of the same model.
        generation_config: with the tokens that end generation.
        processor: the processor; None for a folder without a tokenizer.
        names: the names of its tensors in both formats.
    """

    folder: Path
    official: dict[str, Any]
    config: InternVLConfig
    generation_config: GenerationConfig
    processor: InternVLProcessor | None
    names: TensorNames

    @cached_property
    def files(self) -> TensorFiles:
        """Its tensors."""
        return TensorFiles(self.folder)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over names on disk in transformers' format and tensors."""
        for name in self._kept():
            yield from zip(self.names.ours(name), self.names.split(name, self.files[name]), strict=True)

    def shapes(self) -> dict[str, Shape]:
        """Names on disk in transformers' format and shapes; no tensor is read."""
        found: dict[str, Shape] = {}
        for name in self._kept():
            tensors = self.names.split(name, torch.empty(self.files.shape(name), device="meta"))
            found |= {ours: tuple(tensor.shape) for ours, tensor in zip(self.names.ours(name), tensors, strict=True)}
        return found

    def check(self) -> None:
        """Check that its tensors are those of its config.

        Raises:
            ValueError: listing those that differ.
        """
        check_shapes(self.shapes(), expected_shapes(self.config), str(self.folder))

    def _kept(self) -> list[str]:
        """All tensors except a tied output head, which is the same matrix as the embeddings."""
        head = "language_model.lm_head.weight"
        return [name for name in self.files.names() if not (name == head and self.config.tie_word_embeddings)]


def open_official(folder: Path, *, weights: bool = True) -> OfficialCheckpoint:
    """Open the folder of an official checkpoint, without running its code or reading tensors.

    Args:
        folder: the folder.
        weights: whether it must have its weights.

    Raises:
        ValueError: for a checkpoint that cannot be loaded, saying why.
    """
    official = read_config(folder)
    if not is_official(official):
        raise ValueError(
            f"{folder} is not an InternVLChatModel: expected model_type='internvl_chat', got {official.get('model_type')!r}."
        )
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
