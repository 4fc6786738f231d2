"""A checkpoint by name or path -> the model and its processor."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor


@dataclass
class LoadedModel:
    """A model and what turns text and pictures into its inputs."""

    model: Any
    processor: Any


def load_model(
    name_or_path: str,
    *,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    min_tiles: int | None = None,
    max_tiles: int | None = None,
    trust_remote_code: bool = False,
    quantization_config: Any = None,
    seed: int = 0,
) -> LoadedModel:
    """Load a transformers-native checkpoint with its processor (or its tokenizer, for a text model).

    Args:
        name_or_path: a folder, or a name on the Hub such as ``OpenGVLab/InternVL3-1B-hf``.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"`` for what the checkpoint was saved in.
        attn_implementation: as in `from_pretrained`.
        min_tiles: the fewest tiles a picture is cut into (a thumbnail comes on top of more than one).
        max_tiles: the most tiles; 12 in the official MPO recipes. Both default to what the checkpoint says.
        trust_remote_code: run code that comes with the checkpoint.
        quantization_config: as in `from_pretrained`.
        seed: for weights that the checkpoint lacks.

    Raises:
        ValueError: for an unknown dtype, an official InternVL folder, which is of another form, or tiles for a processor that
            does not cut pictures.
    """
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"model.dtype is auto, float32, bfloat16 or float16; got {dtype!r}.")
    config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    if config.model_type == "internvl_chat":
        raise ValueError(
            f"{name_or_path} is an official InternVLChatModel checkpoint. Use its transformers form, whose name ends in -hf "
            f"(such as {name_or_path.rstrip('/')}-hf)."
        )
    loader = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    torch.manual_seed(seed)
    model = loader.from_pretrained(
        name_or_path,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        quantization_config=quantization_config,
    )
    processor = AutoProcessor.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    set_tiles(processor, min_tiles, max_tiles)
    return LoadedModel(model, processor)


def set_tiles(processor: Any, min_tiles: int | None, max_tiles: int | None) -> None:
    """Set how many tiles the processor may cut a picture into."""
    if min_tiles is None and max_tiles is None:
        return
    image_processor = getattr(processor, "image_processor", None)
    if not hasattr(image_processor, "max_patches"):
        raise ValueError(
            f"{type(processor).__name__} does not cut pictures into tiles, so model.min_tiles and model.max_tiles have no "
            "meaning here. Leave them out."
        )
    assert image_processor is not None
    if min_tiles is not None:
        image_processor.min_patches = min_tiles
    if max_tiles is not None:
        image_processor.max_patches = max_tiles
    if not 1 <= image_processor.min_patches <= image_processor.max_patches:
        raise ValueError(
            f"A picture is cut into 1 <= min_tiles <= max_tiles tiles; got min_tiles={image_processor.min_patches}, "
            f"max_tiles={image_processor.max_patches}."
        )
