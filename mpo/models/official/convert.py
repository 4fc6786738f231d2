"""Convert a checkpoint between the official and transformers' format, tensor by tensor."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLProcessor

from mpo.io import atomic_folder
from mpo.models.family import INTERNVL
from mpo.models.llava import convert_llava, is_official_llava
from mpo.models.loading import load_internvl, load_processor
from mpo.models.official.checkpoint import open_official, read_config, read_official
from mpo.models.official.config import differences, is_official, official_config, transformers_config
from mpo.models.official.forward import official_logits
from mpo.models.official.names import EMBEDDINGS, HEAD, TransformersFiles
from mpo.models.official.processor import PROCESSOR_FILES, carried_settings, check_processors, load_tokenizer
from mpo.models.official.schema import parse
from mpo.models.official.tensors import bytes_of, write_shards
from mpo.models.strict import read_config_json, read_hf_config

ORIGINAL = "official_config.json"
"""The official config.json, kept in a converted checkpoint: transformers' config lacks some of its keys."""

TOLERANCE = 1e-4
"""The largest allowed difference of the logits of two forms of a model in float32, relative to the largest logit."""

TOKENIZER_FILES = ("*token*", "vocab.json", "merges.txt", "generation_config.json")


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion; ``difference`` is the largest difference of logits, None if not compared."""

    folder: Path
    form: Literal["official", "transformers"]
    tensors: int
    difference: float | None
    llava: bool = False


def convert(
    source: Path,
    target: Path,
    *,
    like: Path | None = None,
    shard_gb: float = 5.0,
    compare: bool | None = None,
    progress: bool = True,
    tower: Path | None = None,
) -> Conversion:
    """Convert a checkpoint to the other format.

    Names and shapes of all tensors are checked against the config before anything is written; tensors are copied bit by bit. The
    target folder appears only when it is complete.

    Args:
        source: folder of an InternVLChatModel, of transformers' InternVL, or of an official LLaVA-1.5, with or without an MMFuser.
        target: a new folder.
        like: for the official format: an official folder whose config, tokenizer and Python files are copied. Its config must
            describe the model; settings of tiles and tokens that were added are the model's own.
        shard_gb: the largest size of a weight file in gigabytes, and of the tensors in memory.
        compare: compare the logits of both formats on a random input; by default if memory allows.
        tower: folder of a LLaVA's vision tower, as in `convert_llava`.

    Raises ValueError for a checkpoint that cannot be converted, or logits that differ.
    """
    shard_bytes = bytes_of(shard_gb)
    if is_official_llava(read_config(source)):
        if like is not None or compare:
            raise ValueError(f"--like and --check are for InternVL, and {source} is a LLaVA. Leave them out.")
        with atomic_folder(target) as partial:
            count = convert_llava(source, partial, tower=tower, shard_bytes=shard_bytes, progress=progress)
        return Conversion(target, "transformers", count, None, llava=True)
    if tower is not None:
        raise ValueError(f"--tower={tower} is for an official LLaVA, and {source} is none. Leave it out.")
    form: Literal["official", "transformers"] = "transformers" if is_official(read_config(source)) else "official"
    write = _to_transformers if form == "transformers" else to_official
    with atomic_folder(target) as partial:
        count = write(source, partial, like, shard_bytes, progress)
        official, ours = (source, partial) if form == "transformers" else (partial, source)
        difference = checked_difference(official, ours, compare)
    return Conversion(target, form, count, difference)


def _to_transformers(source: Path, target: Path, like: Path | None, shard_bytes: int, progress: bool) -> int:
    if like is not None:
        raise ValueError(f"--like={like} is for conversion to the official format, and this is to transformers'. Leave it out.")
    checkpoint = open_official(source)
    count = checkpoint.check()
    write_shards(target, checkpoint.tensors(), count, shard_bytes=shard_bytes, progress=progress)
    config = checkpoint.config
    config.architectures = [InternVLForConditionalGeneration.__name__]
    config.save_pretrained(target)
    checkpoint.generation_config.save_pretrained(target)
    if checkpoint.processor is not None:
        checkpoint.processor.save_pretrained(target)
    shutil.copyfile(source / "config.json", target / ORIGINAL)
    return count


def to_official(source: Path, target: Path, like: Path | None, shard_bytes: int, progress: bool) -> int:
    """Write a checkpoint in the official format, without comparing its logits, and return the number of its tensors.

    The files beside the weights are written first, and read again: they describe the same model and processor, or are refused.
    `source` is a folder in transformers' format, `target` an existing, empty one, `like` as in `convert`.
    """
    config = read_hf_config(source)
    if config.model_type not in INTERNVL.types:  # a fused one is a kind of InternVLConfig
        raise ValueError(f"{source} is a {config.model_type!r}: only InternVL has an official format.")
    files = TransformersFiles(source, config)
    official = _official_of(source, like, config)
    processor = load_processor(str(source)) if any((source / name).exists() for name in PROCESSOR_FILES) else None
    if not isinstance(processor, InternVLProcessor | None):
        raise ValueError(f"Expected an InternVLProcessor in {source}; got {type(processor).__name__}. Copy the original's files.")
    tokens = _with_tokenizer(source, like, processor)
    for path in [*(path for name in TOKENIZER_FILES for path in tokens.glob(name)), *([] if like is None else like.glob("*.py"))]:
        shutil.copyfile(path, target / path.name)
    if processor is not None:
        official |= carried_settings(processor.image_processor, parse(official, str(source / ORIGINAL)))
        parse(official, f"the processor of {source}")
    (target / "config.json").write_text(json.dumps(official, indent=2, ensure_ascii=False) + "\n")
    try:
        written = open_official(target, weights=False)
    except ValueError as error:
        raise ValueError(str(error).replace(str(target), str(tokens))) from error
    if written.config.image_token_id != config.image_token_id:
        raise ValueError(
            f"<IMG_CONTEXT> has the id {written.config.image_token_id} in the tokenizer of {tokens}, and image_token_id is "
            f"{config.image_token_id} in the config.json of {source}. Give the model's own tokenizer."
        )
    if processor is not None and written.processor is not None:
        check_processors(processor, written.processor, str(source), str(like or "the official format"))
    parts = {name: written.names.ours(name) for name in dict.fromkeys(written.names.official(ours) for ours in files.names())}
    if config.tie_word_embeddings and not written.config.tie_word_embeddings:  # official code up to InternVL3 never ties
        parts[written.names.official(HEAD)] = [EMBEDDINGS]
    joined = ((name, written.names.join(name, [files[part] for part in ours])) for name, ours in parts.items())
    write_shards(target, joined, len(parts), shard_bytes=shard_bytes, progress=progress)
    open_official(target).check()
    return len(parts)


def _with_tokenizer(source: Path, like: Path | None, processor: Any) -> Path:
    """The folder whose tokenizer is copied: `like`, unless it lacks tokens that were added to the model's."""
    if like is None or processor is None:
        return like or source
    theirs = load_tokenizer(like)
    lacks = theirs is None or processor.tokenizer.get_vocab().keys() - {*theirs.get_vocab(), processor.video_token}
    return source if lacks else like


def _official_of(source: Path, like: Path | None, config: InternVLConfig) -> dict[str, Any]:
    """The official config.json: of `like`, of the checkpoint that this one was converted from, or created from its config."""
    if like is not None:
        official, where = read_official(like, "--like="), f"--like={like}"
    elif (kept := source / ORIGINAL).exists():
        official, where = read_config_json(kept), str(kept)
    else:
        official, where = official_config(config), "the official format"
    read = check_same_model(official, config, where, str(source))
    llm = official["llm_config"]
    llm["vocab_size"] = config.text_config.vocab_size  # tokens may have been added
    if config.tie_word_embeddings != read.tie_word_embeddings:  # the head was trained untied, or will be written
        official["tie_word_embeddings"] = llm["tie_word_embeddings"] = False
    if config.dtype is not None and read.dtype != config.dtype:  # it was cast
        name = str(config.dtype).removeprefix("torch.")
        for part in (official, llm):
            part["dtype" if "dtype" in part else "torch_dtype"] = name
    return official


def check_same_model(official: Mapping[str, Any], config: InternVLConfig, where: str, source: str) -> InternVLConfig:
    """Refuse an official config.json of another model than a transformers config's; its vocabulary may be smaller.

    `where` and `source` are their origins, for errors. Returns transformers' config of `official`.
    """
    described = transformers_config(parse(official, where), image_token_id=config.image_token_id, where=where)
    if found := differences(config, described):
        raise ValueError(f"{where} describes another model than {source}: {'; '.join(found)}. Correct the one that is wrong.")
    return described


def checked_difference(official: Path, ours: Path, compare: bool | None) -> float | None:
    """`largest_difference` of a folder in the official and one in transformers' format; None if not compared.

    `compare`: None to compare if memory allows. A difference above `TOLERANCE` is an error, as are weights that are not finite.
    """
    if compare is None:
        import psutil

        size = sum(path.stat().st_size for path in ours.glob("*.safetensors"))
        compare = 4 * size < psutil.virtual_memory().available  # two float32 models from bfloat16 files
    if not compare:
        return None
    difference = largest_difference(official, ours)
    if not difference <= TOLERANCE:  # NaN is not
        raise ValueError(f"The logits of {official} and {ours} differ by {difference:.1e} of the largest: a bug. Report it.")
    return difference


def largest_difference(official: Path, ours: Path) -> float:
    """The largest difference of logits between a folder in the official and one in transformers' format, relative to the largest.

    The input is a random tile and random tokens, in float32. Each is read from its folder alone, as `load_internvl` does.
    """
    checkpoint = open_official(official)
    checkpoint.check()
    checkpoint.files.check_finite()
    model: Any = load_internvl(str(ours), dtype=torch.float32).eval()
    config: Any = model.config
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, *config.vision_config.image_size, generator=generator)
    words = torch.randint(0, config.text_config.vocab_size, (2, 8), generator=generator)
    words[words == config.image_token_id] = 0
    ids = torch.cat([words[0], torch.full((config.image_seq_length,), config.image_token_id), words[1]]).unsqueeze(0)
    with torch.no_grad():
        computed = model(input_ids=ids, pixel_values=pixels).logits
    del model
    return distance(computed, official_logits(checkpoint.files, checkpoint.official, checkpoint.config, ids, pixels))


def distance(logits: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected logit."""
    return float((logits - expected).abs().max() / expected.abs().max())
