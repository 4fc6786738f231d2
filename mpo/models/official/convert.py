"""A checkpoint's folder of one form -> a folder of the other, tensor by tensor."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import InternVLConfig, InternVLForConditionalGeneration

from mpo.models.official.checkpoint import open_official, read_config
from mpo.models.official.config import is_official, official_config, tensor_names
from mpo.models.official.expected import check_shapes, expected_shapes
from mpo.models.official.forward import official_logits
from mpo.models.official.tensors import TensorFiles, write_shards

ORIGINAL = "official_config.json"
"""The official config.json, kept beside a converted checkpoint: transformers' config has no place for all that it says."""

TOLERANCE = 1e-4
"""Logits of both forms may differ by this share of the largest one; both are computed in float32."""

TOKENIZER_FILES = ("*token*", "vocab.json", "merges.txt", "generation_config.json")


@dataclass(frozen=True)
class Conversion:
    """What was written: where, how many tensors, and the largest difference of logits (None: not compared)."""

    folder: Path
    form: Literal["official", "transformers"]
    tensors: int
    difference: float | None


def convert(
    source: Path,
    target: Path,
    *,
    like: Path | None = None,
    shard_gb: float = 5.0,
    compare: bool | None = None,
    progress: bool = True,
) -> Conversion:
    """Convert a checkpoint to the form that it is not in.

    Every tensor's name and shape is checked against the config, before anything is written; tensors keep their dtype and every
    bit. A folder appears under its name only when it is whole.

    Args:
        source: folder of an InternVLChatModel, or one that transformers' InternVL loads.
        target: a new folder.
        like: for the official form: a folder of it, whose config, tokenizer and Python files are copied.
        shard_gb: most gigabytes of a file. No more than this is in memory at once.
        compare: compare the logits of both forms on a random input; by default where memory allows.
        progress: show a bar.

    Raises:
        ValueError: for what cannot be converted, or logits that differ.
    """
    if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
        raise ValueError(f"{target} is already there. Remove it, or give another folder.")
    form: Literal["official", "transformers"] = "transformers" if is_official(read_config(source)) else "official"
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write = _to_transformers if form == "transformers" else _to_official
    count = write(source, partial, like, int(shard_gb * 1e9), progress)
    official, ours = (source, partial) if form == "transformers" else (partial, source)
    size = 4 * sum(path.stat().st_size for path in source.glob("*.safetensors"))  # two models as float32, of bfloat16 files
    difference = None
    if compare or (compare is None and size < _free_memory()):
        difference = largest_difference(official, ours)
        if difference > TOLERANCE:
            raise ValueError(
                f"The logits of {source} and of what was written to {partial} differ by {difference:.1e} of the largest. That is "
                "a bug of the conversion: please report it, with the checkpoint's config.json."
            )
    if target.exists():
        target.rmdir()
    partial.rename(target)
    return Conversion(target, form, count, difference)


def _to_transformers(source: Path, target: Path, like: Path | None, shard_bytes: int, progress: bool) -> int:
    if like is not None:
        raise ValueError("--like is for conversions to the official form; this one is to transformers'.")
    checkpoint = open_official(source)
    checkpoint.check()
    shapes = checkpoint.shapes()
    write_shards(target, _shown(checkpoint.tensors(), len(shapes), progress), shard_bytes=shard_bytes)
    config = checkpoint.config
    config.architectures = [InternVLForConditionalGeneration.__name__]
    config.save_pretrained(target)
    checkpoint.generation_config.save_pretrained(target)
    if checkpoint.processor is not None:
        checkpoint.processor.save_pretrained(target)
    shutil.copyfile(source / "config.json", target / ORIGINAL)
    return len(shapes)


def _to_official(source: Path, target: Path, like: Path | None, shard_bytes: int, progress: bool) -> int:
    config = InternVLConfig.from_pretrained(source)
    files = TensorFiles(source)
    check_shapes({name: files.shape(name) for name in files.names()}, expected_shapes(config), str(source))
    official = _official_of(source, like, config)
    names = tensor_names(official)
    parts = {name: names.ours(name) for name in dict.fromkeys(names.official(ours) for ours in files.names())}

    def joined() -> Iterator[tuple[str, Tensor]]:
        for name, ours in parts.items():
            yield name, names.join(name, [files[part] for part in ours])

    write_shards(target, _shown(joined(), len(parts), progress), shard_bytes=shard_bytes)
    for pattern in TOKENIZER_FILES if like is None else ("*.py", *TOKENIZER_FILES):
        for path in (source if like is None else like).glob(pattern):
            shutil.copyfile(path, target / path.name)
    (target / "config.json").write_text(json.dumps(official, indent=2, ensure_ascii=False) + "\n")
    return len(parts)


def _official_of(source: Path, like: Path | None, config: InternVLConfig) -> dict[str, Any]:
    """The official config.json: of `like`, of the checkpoint this one was converted from, or made from its config."""
    if like is not None:
        official = read_config(like)
        if not is_official(official):
            raise ValueError(f"{like} is not an InternVLChatModel; --like takes a folder of the official form.")
    elif (source / ORIGINAL).exists():
        official = json.loads((source / ORIGINAL).read_text())
    else:
        official = official_config(config)
    text: Any = config.text_config
    if official["llm_config"]["vocab_size"] != text.vocab_size:  # tokens were added since
        official["llm_config"]["vocab_size"] = text.vocab_size
    return official


def _shown(tensors: Iterator[tuple[str, Tensor]], count: int, progress: bool) -> Iterator[tuple[str, Tensor]]:
    return iter(tqdm(tensors, total=count, unit="tensor", desc="converting", disable=not progress))


def largest_difference(official: Path, ours: Path) -> float:
    """The largest difference of logits between a folder of the official form and one of transformers', of the largest logit.

    One random tile and some random tokens, in float32.
    """
    model: Any = InternVLForConditionalGeneration.from_pretrained(ours, dtype=torch.float32).eval()
    config: Any = model.config
    generator = torch.Generator().manual_seed(0)
    side = config.vision_config.image_size
    pixels = torch.randn(1, 3, *side, generator=generator)
    words = torch.randint(0, config.text_config.vocab_size, (2, 8), generator=generator)
    words[words == config.image_token_id] = 0
    ids = torch.cat([words[0], torch.full((config.image_seq_length,), config.image_token_id), words[1]]).unsqueeze(0)
    with torch.no_grad():
        computed = model(input_ids=ids, pixel_values=pixels).logits
    del model
    expected = official_logits(TensorFiles(official), read_config(official), config, ids, pixels)
    return float((computed - expected).abs().max() / expected.abs().max())


def _free_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().available)
