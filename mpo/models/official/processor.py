"""The processor of an official checkpoint: its tokenizer, its tiling of images, the chat template of its training."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import (
    AutoTokenizer,
    InternVLProcessor,
    InternVLVideoProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from mpo.models.control_tokens import added_start
from mpo.models.official.spm import read_sentencepiece
from mpo.models.small import CHAT_TEMPLATE, IMAGENET_MEAN, IMAGENET_STD
from mpo.models.tiles import TileImageProcessor

IMAGE_TOKENS = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}

OLD_SYSTEM = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
NEW_SYSTEM = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
TEMPLATES = {
    "Hermes-2": ("<|im_end|>", OLD_SYSTEM),
    "internlm2-chat": ("<|im_end|>", OLD_SYSTEM),
    "internvl2_5": ("<|im_end|>\n", NEW_SYSTEM),
}
"""The end of a turn and the default system message of each supported conversation template."""


def chat_template(name: str, *, bos: str = "") -> str:
    """The Jinja template of an official conversation template.

    Args:
        name: ``template`` in config.json.
        bos: tokens before a conversation, as the tokenizer adds them in the official code, such as ``<s>`` (InternLM2) or
            ``<|begin_of_text|>`` (Llama-3); empty for Qwen.

    Raises:
        ValueError: for an unknown template.
    """
    if name not in TEMPLATES:
        raise ValueError(f"Expected a conversation template among {', '.join(TEMPLATES)}; got template={name!r}.")
    end, system = TEMPLATES[name]
    default = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n" + system + end + "' }}{% endif %}"
    return ("{{ '" + bos + "' }}" if bos else "") + default + CHAT_TEMPLATE.replace("<|im_end|>\n", end)


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of an official checkpoint, without running its code; None if there is none.

    Raises:
        ValueError: when it lacks an image token.
    """
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) if path.exists() else {}
    tokenizer = _tokenizer(folder, settings)
    if tokenizer is None:
        return None
    vocabulary = tokenizer.get_vocab()
    lacking = [token for token in IMAGE_TOKENS.values() if token not in vocabulary]
    if lacking:
        raise ValueError(
            f"The tokenizer in {folder} has no {', '.join(lacking)}, so prompts cannot contain images. Copy the tokenizer's "
            "files from the model's own checkpoint (added_tokens.json too)."
        )
    video = "<|video_pad|>" if "<|video_pad|>" in vocabulary else "<video>"
    return _tokenizer(folder, settings, padding_side="left", extra_special_tokens={**IMAGE_TOKENS, "video_token": video})


def _tokenizer(folder: Path, settings: Mapping[str, Any], **options: Any) -> Any:
    if not str(settings.get("tokenizer_class", "")).startswith("InternLM"):
        there = any((folder / name).exists() for name in ("tokenizer.json", "vocab.json"))
        return AutoTokenizer.from_pretrained(folder, config=PreTrainedConfig(), **options) if there else None
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    given = {name: settings[name] for name in names if settings.get(name)}
    options |= {name: value["content"] if isinstance(value, Mapping) else value for name, value in given.items()}
    # Defaults of InternLM2Tokenizer and InternLM3Tokenizer, fast or slow, regardless of tokenizer.json.
    options |= {"add_bos_token": settings.get("add_bos_token", True), "add_eos_token": settings.get("add_eos_token", False)}
    if (folder / "tokenizer.json").exists():
        return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **options)
    if not (folder / "tokenizer.model").exists():
        return None
    tokenizer = read_sentencepiece(folder / "tokenizer.model", settings.get("added_tokens_decoder") or {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def official_processor(tokenizer: Any, official: Mapping[str, Any]) -> InternVLProcessor:
    """The processor for an official checkpoint.

    The official code tokenizes a rendered conversation with the tokenizer's default special tokens, so the template starts with
    them.

    Args:
        tokenizer: from `load_tokenizer`.
        official: config.json of the checkpoint.
    """
    side = official.get("force_image_size") or official["vision_config"]["image_size"]
    patch = official["vision_config"].get("patch_size", 14)
    pixels: dict[str, Any] = {
        "size": {"height": side, "width": side},
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
    }
    bos = "".join(tokenizer.convert_ids_to_tokens(added_start(tokenizer)))
    template = chat_template(official.get("template", "internvl2_5"), bos=bos)
    tokenizer.chat_template = template
    return InternVLProcessor(
        image_processor=TileImageProcessor(
            crop_to_patches=official.get("dynamic_image_size", True),
            min_patches=official.get("min_dynamic_patch", 1),
            max_patches=official.get("max_dynamic_patch", 12),
            use_thumbnail=official.get("use_thumbnail", True),
            **pixels,
        ),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(**pixels),
        image_seq_length=int((side // patch) ** 2 * official.get("downsample_ratio", 0.5) ** 2),
        chat_template=template,
    )
