"""Load a model and its processor from a checkpoint, by name or path."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import constants, snapshot_download
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GotOcr2ImageProcessor, InternVLForConditionalGeneration
from transformers.utils import cached_file, is_flash_attn_2_available, is_flash_attn_3_available

from mpo.models.family import takes_images
from mpo.models.fit import open_processor
from mpo.models.fused import add_fuser, fused_config
from mpo.models.llava import set_template
from mpo.models.official.checkpoint import NO_TOKENIZER, open_official
from mpo.models.official.config import is_official
from mpo.models.strict import load_strictly, read_hf_config, read_json, refuse_adapter
from mpo.models.tiles import TileImageProcessor


class NotOpened(ValueError):
    """A checkpoint that is neither a folder with the files it needs nor a name that can be loaded from the Hub."""


@dataclass
class LoadedModel:
    """A model and its processor, or tokenizer."""

    model: Any
    processor: Any


def load_model(
    name_or_path: str,
    *,
    dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    min_tiles: int | None = None,
    max_tiles: int | None = None,
    thumbnail: bool | None = None,
    trust_remote_code: bool = False,
    quantization_config: Any = None,
    fuser: Mapping[str, Any] | None = None,
    chat_template: str | None = None,
) -> LoadedModel:
    """Load a checkpoint with its processor (or its tokenizer, for a text model).

    Args:
        name_or_path: a folder, or a name on the Hub such as ``OpenGVLab/InternVL3-1B-hf``. An InternVL in the official format
            (``OpenGVLab/InternVL3-1B``) is converted in memory, without running its code.
        dtype: `torch.float32`, `torch.bfloat16`, `torch.float16` or its name, or ``"auto"`` for that of the checkpoint.
        attn_implementation: as in `from_pretrained`.
        min_tiles: the smallest number of tiles per image, without the thumbnail.
        max_tiles: the largest number of tiles per image; 12 in the official MPO recipes.
        thumbnail: append the whole image as a thumbnail tile when there are several tiles. All three default to the
            checkpoint's settings; a record may override them (`mpo.encoding.tiles`).
        trust_remote_code: run the code of a checkpoint that is not an InternVL.
        quantization_config: as in `from_pretrained`.
        fuser: arguments of `mpo.models.add_fuser`, which adds one.
        chat_template: name of one of LLaVA's templates, ``"plain"`` or ``"vicuna"``; None for the checkpoint's (``"vicuna"``
            after a stage with ``"plain"``).

    Raises:
        ValueError: for an unknown dtype, an adapter, a checkpoint whose tensors are not those of its config, tile settings for
            a processor without tiling, or a fuser that cannot be added.
    """
    options: dict[str, Any] = {"attn_implementation": attn_implementation, "quantization_config": quantization_config}
    tiles: dict[str, Any] = {"min_tiles": min_tiles, "max_tiles": max_tiles, "thumbnail": thumbnail}
    if fuser is not None:
        model_config(name_or_path, trust_remote_code, fuser)  # refuses before the weights are read
    model = load_internvl(name_or_path, dtype=dtype, trust_remote_code=trust_remote_code, **options)
    processor = load_processor(name_or_path, trust_remote_code=trust_remote_code, chat_template=chat_template, **tiles)
    return LoadedModel(model if fuser is None else add_fuser(model, **fuser), processor)


def load_internvl(name_or_path: str, *, dtype: str | torch.dtype = "auto", trust_remote_code: bool = False, **options: Any) -> Any:
    """Load a model: an InternVL in either format, or any other text or image-text model of transformers, by its own class.

    Args:
        name_or_path, dtype, trust_remote_code: as in `load_model`.
        options: further arguments of `from_pretrained`; those that are None are ignored.

    Raises:
        ValueError: for an unknown dtype, flash-attention that is not installed, an adapter, or a checkpoint whose tensors are
            not those of its config, which are listed.
    """
    given = {name: value for name, value in options.items() if value is not None}
    given["dtype"] = as_dtype(dtype)
    check_attention(given.get("attn_implementation"))
    if (folder := official_folder(name_or_path)) is not None:
        model = _load_official(folder, given)
        model.name_or_path = str(name_or_path)  # an adapter's config names its base by it
        return model
    config = read_hf_config(name_or_path, trust_remote_code=trust_remote_code)
    loader = AutoModelForImageTextToText if takes_images(config) else AutoModelForCausalLM
    return load_strictly(loader.from_pretrained, name_or_path, trust_remote_code=trust_remote_code, **given)


def load_processor(
    name_or_path: str,
    *,
    min_tiles: int | None = None,
    max_tiles: int | None = None,
    thumbnail: bool | None = None,
    trust_remote_code: bool = False,
    chat_template: str | None = None,
) -> Any:
    """Load the processor of a checkpoint in either format, or the tokenizer of a text model; arguments as of `load_model`.

    Raises:
        ValueError: for an adapter, a checkpoint without a tokenizer, a tokenizer without the image tokens, or tile
            settings for a processor without tiling.
    """
    folder = official_folder(name_or_path, weights=False)
    if folder is None:
        with opening(name_or_path):
            processor = open_processor(name_or_path, trust_remote_code=trust_remote_code)
    else:
        processor = open_official(folder, weights=False).processor
        if processor is None:
            raise ValueError(f"{name_or_path} has no {NO_TOKENIZER}. Copy the tokenizer's files from the original.")
    set_tiles(processor, min_tiles, max_tiles, thumbnail)
    set_template(processor, chat_template)
    return processor


def as_dtype(dtype: Any) -> torch.dtype | Literal["auto"]:
    """Convert the name of a dtype to the dtype; a dtype and ``"auto"`` are returned unchanged, anything else is a ValueError.

    >>> as_dtype("bfloat16"), as_dtype(torch.float16), as_dtype("torch.float32"), as_dtype("auto")
    (torch.bfloat16, torch.float16, torch.float32, 'auto')
    """
    if dtype == "auto":
        return "auto"
    for known in (torch.float32, torch.bfloat16, torch.float16):
        if dtype == known or dtype in (str(known), str(known).removeprefix("torch.")):
            return known
    raise ValueError(f"Expected model.dtype to be auto, float32, bfloat16 or float16, or such a torch.dtype; got {dtype!r}.")


def official_folder(name_or_path: str, *, weights: bool = True) -> Path | None:
    """The folder of an InternVLChatModel, downloaded if it is a name on the Hub; None for a checkpoint in another format.

    Without `weights` those are not downloaded. Raises NotOpened for a checkpoint that cannot be found, ValueError for an adapter.
    """
    refuse_adapter(name_or_path)
    with opening(name_or_path):
        path = cached_file(name_or_path, "config.json")
        if path is None or not is_official(read_json(path)):
            return None
        if Path(name_or_path).is_dir():
            return Path(name_or_path)
        files = ["*.json", "*.model", "*.txt", *(["*.safetensors"] if weights else [])]
        return Path(snapshot_download(name_or_path, allow_patterns=files))


@contextmanager
def opening(name_or_path: str) -> Iterator[None]:
    """Turn the errors of transformers and the Hub for a checkpoint into `NotOpened`, which names it and what to do."""
    try:
        yield
    except OSError as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        if Path(name_or_path).is_dir():
            raise NotOpened(f"{name_or_path} cannot be loaded ({reason}). Give the folder of a checkpoint.") from error
        if Path(name_or_path).exists() or str(name_or_path).startswith(("/", ".", "~")) or str(name_or_path).count("/") > 1:
            raise NotOpened(
                f"{name_or_path} is not a folder. Give the folder of a checkpoint, or a model id on the Hub."
            ) from error
        offline = " HF_HUB_OFFLINE is set: unset it to download." if constants.HF_HUB_OFFLINE else ""
        raise NotOpened(
            f"{name_or_path} is not a folder, and no model of this name is in the cache or can be downloaded from the Hub "
            f"({reason}).{offline} Check the name, run `hf download {name_or_path}` with network access, or give a folder."
        ) from error


def model_config(name_or_path: str, trust_remote_code: bool = False, fuser: Mapping[str, Any] | None = None) -> Any:
    """Load the config of a checkpoint in either format, without its weights; with a fuser, as `load_model` adds it."""
    if (folder := official_folder(name_or_path, weights=False)) is not None:
        config = open_official(folder, weights=False).config
    else:
        config = read_hf_config(name_or_path, trust_remote_code=trust_remote_code)
    return config if fuser is None else fused_config(config, **fuser)


def check_attention(name: str | None) -> None:
    """Refuse flash-attention where it is not installed, saying what to install or to use instead."""
    installed = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
    if name in installed and not installed[name]():
        raise ValueError(
            f"model.attn_implementation={name} needs flash-attention and a supported GPU, which are not available. Install "
            "flash-attention 2 with pip install 'mpo-trainer[flash]', or leave it at null: sdpa needs no package, and packed rows "
            "have their own kernels (trainer.packed_attention)."
        )


def _load_official(folder: Path, options: dict[str, Any]) -> Any:
    checkpoint = open_official(folder)
    checkpoint.check()
    if options["dtype"] == "auto":
        options["dtype"] = checkpoint.config.dtype or "auto"
    model = InternVLForConditionalGeneration.from_pretrained(
        None, config=checkpoint.config, state_dict=dict(checkpoint.tensors()), **options
    )
    model.generation_config = checkpoint.generation_config
    model.config._name_or_path = str(folder)
    return model


def set_tiles(processor: Any, min_tiles: int | None, max_tiles: int | None, thumbnail: bool | None = None) -> None:
    """Set how the processor splits images into tiles; settings that are None are unchanged."""
    image_processor: Any = getattr(processor, "image_processor", None)
    if type(image_processor) is GotOcr2ImageProcessor:
        image_processor = processor.image_processor = TileImageProcessor.of(image_processor)
    given = {"min_patches": min_tiles, "max_patches": max_tiles, "use_thumbnail": thumbnail}
    given = {name: value for name, value in given.items() if value is not None}
    if any(not hasattr(image_processor, name) for name in given):
        raise ValueError(
            f"{type(processor).__name__} does not split images into tiles, so model.min_tiles, model.max_tiles and "
            "model.thumbnail have no effect. Leave them out."
        )
    for name, value in given.items():
        setattr(image_processor, name, value)
    if given and not 1 <= image_processor.min_patches <= image_processor.max_patches:
        raise ValueError(
            f"Expected 1 <= min_tiles <= max_tiles; got min_tiles={image_processor.min_patches}, "
            f"max_tiles={image_processor.max_patches}."
        )
