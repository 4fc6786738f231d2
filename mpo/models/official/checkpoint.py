"""An official checkpoint's folder, opened: its config, its tokenizer, its tensors under either name."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, InternVLConfig, InternVLProcessor

from mpo.models.official.config import is_official, tensor_names, text_model, transformers_config
from mpo.models.official.expected import Shape, check_shapes, expected_shapes
from mpo.models.official.names import TensorNames
from mpo.models.official.processor import load_tokenizer, official_processor
from mpo.models.official.tensors import TensorFiles

IMAGE_TOKEN_IDS = {"internlm2": 92_546, "qwen2": 151_667, "qwen3": 151_671, "qwen3_moe": 151_671}
"""Ids of ``<IMG_CONTEXT>`` in the published checkpoints, for folders without a tokenizer."""


@dataclass(frozen=True)
class OfficialCheckpoint:
    """What is in the folder.

    Attributes:
        folder: of the checkpoint.
        official: its config.json.
        config: transformers' config of the same model.
        generation_config: what ends generation.
        processor: None for a folder without a tokenizer.
        files: its tensors.
        names: of its tensors.
    """

    folder: Path
    official: dict[str, Any]
    config: InternVLConfig
    generation_config: GenerationConfig
    processor: InternVLProcessor | None
    files: TensorFiles
    names: TensorNames

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name in transformers' files and tensor, one after the other."""
        for name in self._kept():
            yield from zip(self.names.ours(name), self.names.cut(name, self.files[name]), strict=True)

    def shapes(self) -> dict[str, Shape]:
        """Names in transformers' files and shapes; no tensor is read."""
        found: dict[str, Shape] = {}
        for name in self._kept():
            tensors = self.names.cut(name, torch.empty(self.files.shape(name), device="meta"))
            found |= {ours: tuple(tensor.shape) for ours, tensor in zip(self.names.ours(name), tensors, strict=True)}
        return found

    def check(self) -> None:
        """Check that its tensors are those of its config.

        Raises:
            ValueError: listing those that are not.
        """
        check_shapes(self.shapes(), expected_shapes(self.config), str(self.folder))

    def _kept(self) -> list[str]:
        """All tensors, but for an output head that the config ties to the embeddings: it is the same matrix."""
        head = "language_model.lm_head.weight"
        return [name for name in self.files.names() if not (name == head and self.config.tie_word_embeddings)]


def open_official(folder: Path) -> OfficialCheckpoint:
    """Open an official checkpoint's folder. Nothing that comes with it is run, and no tensor is read.

    Raises:
        ValueError: for what cannot be loaded, saying why.
    """
    official = read_config(folder)
    if not is_official(official):
        raise ValueError(f"{folder} is not an InternVLChatModel: its config.json says {official.get('model_type')!r}.")
    kind = text_model(official)
    tokenizer = load_tokenizer(folder)
    end = None
    processor = None
    if tokenizer is None:
        token = IMAGE_TOKEN_IDS.get(kind)
        if token is None or token >= official["llm_config"]["vocab_size"]:
            raise ValueError(
                f"{folder} has no tokenizer, and which id <IMG_CONTEXT> has in its {kind} vocabulary is not known. Copy "
                "tokenizer_config.json and its companions from the original checkpoint."
            )
    else:
        token, end = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), tokenizer.get_vocab().get("<|im_end|>")
        processor = official_processor(tokenizer, official)
    config = transformers_config(official, image_token_id=token, eos_token_id=end)
    text: Any = config.text_config
    generation = GenerationConfig(
        eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id if tokenizer is None else tokenizer.pad_token_id
    )
    return OfficialCheckpoint(folder, official, config, generation, processor, TensorFiles(folder), tensor_names(official))


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint's folder.

    Raises:
        ValueError: when there is none.
    """
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"{folder} has no config.json, so it is not a checkpoint. Give the folder that holds it.")
    found: dict[str, Any] = json.loads(path.read_text())
    return found
