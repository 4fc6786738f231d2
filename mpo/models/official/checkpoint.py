"""Open the folder of an official checkpoint: its config, its tokenizer, its tensors under either name."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, InternVLConfig, InternVLProcessor

from mpo.models.official.config import is_official, tensor_names, transformers_config
from mpo.models.official.names import HEAD, TensorNames, check_tied, expected_shapes
from mpo.models.official.processor import load_tokenizer, official_processor
from mpo.models.official.schema import Chat, parse, text_model
from mpo.models.official.tensors import TensorFiles
from mpo.models.strict import check_shapes, read_config_json, shortened

IMAGE_TOKEN_IDS = {
    ("internlm2", 92_553): 92_546,
    ("qwen2", 151_674): 151_667,
    ("qwen3", 151_936): 151_671,
    ("qwen3_moe", 151_936): 151_671,
}
"""Language model and vocabulary size -> id of ``<IMG_CONTEXT>`` in the published checkpoints, for folders without a tokenizer."""

NO_TOKENIZER = "tokenizer.json, vocab.json or tokenizer.model"


@dataclass(frozen=True)
class OfficialCheckpoint:
    """The contents of the folder."""

    folder: Path  # folder of the checkpoint
    official: Chat[Any]  # its config.json
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

        Raises ValueError listing those that differ; for unmerged LoRA adapters, and a head that should be tied and differs.
        """
        shapes = self.files.shapes()
        if adapters := [name for name in shapes if "base_model.model." in name or ".lora_" in name]:
            raise ValueError(
                f"{self.folder} holds LoRA adapters that are not merged ({shortened(adapters, 2)}). Merge them with the official "
                "tools/merge_lora.py."
            )
        found = {name: tuple(tensor.shape) for name, tensor in self._renamed(lambda name: torch.empty(shapes[name], device="meta"))}
        check_shapes(found, expected_shapes(self.config, str(self.folder / "config.json")), str(self.folder))
        if self.config.tie_word_embeddings:
            check_tied(self.files.__getitem__, shapes, str(self.folder))
        return len(found)

    def _renamed(self, read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name in self.files.names():
            if name == HEAD and self.config.tie_word_embeddings:
                continue  # the same matrix as the embeddings
            yield from zip(self.names.ours(name), self.names.split(name, read(name)), strict=True)


def open_official(folder: Path, *, weights: bool = True) -> OfficialCheckpoint:
    """Open the folder of an official checkpoint, without running its code or reading tensors; with `weights` it must have them.

    Raises ValueError for a checkpoint that cannot be loaded, saying why.
    """
    where = str(folder / "config.json")
    official = parse(read_official(folder), where)
    tokenizer = load_tokenizer(folder)
    end = None
    processor = None
    if tokenizer is None:
        kind, words = text_model(official.llm_config), official.llm_config.vocab_size
        token = IMAGE_TOKEN_IDS.get((kind, words))
        if token is None:
            raise ValueError(
                f"{folder} has no {NO_TOKENIZER}, and the id of <IMG_CONTEXT> in a {kind} vocabulary of {words} is unknown. Copy "
                "the tokenizer's files from the original checkpoint."
            )
    else:
        token, end = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), tokenizer.get_vocab().get("<|im_end|>")
        processor = official_processor(tokenizer, official)
    config = transformers_config(official, image_token_id=token, eos_token_id=end, where=where)
    text: Any = config.text_config
    generation = GenerationConfig(
        eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id if tokenizer is None else tokenizer.pad_token_id
    )
    checkpoint = OfficialCheckpoint(folder, official, config, generation, processor, tensor_names(official))
    if weights:
        _ = checkpoint.files  # raises
    return checkpoint


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a checkpoint's folder; a ValueError when there is none, or it holds no JSON object."""
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"Expected a checkpoint in {folder}, and found no config.json. Give the folder that contains it.")
    return read_config_json(path)


def read_official(folder: Path, setting: str = "") -> dict[str, Any]:
    """Read config.json of a folder in the official format; `setting` is what named it, for the error of one in another format."""
    config = read_config(folder)
    if not is_official(config):
        raise ValueError(
            f"{setting}{folder} is not an InternVLChatModel: expected model_type='internvl_chat', got {config.get('model_type')!r}."
        )
    return config
