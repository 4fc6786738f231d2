"""LLaVA-1.5's conversation templates (arXiv 2310.03744), and its official checkpoints with an MMFuser (arXiv 2410.11829)."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaProcessor,
)

from mpo.models.control_tokens import added_text
from mpo.models.family import LLAVA
from mpo.models.fused import LlavaWithFuser, fused_config
from mpo.models.official.processor import read_tokenizer
from mpo.models.official.tensors import TensorFiles, write_shards
from mpo.models.strict import check_shapes, read_config_json

IMAGE = "<image>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite "
    "answers to the user's questions."
)
_TEXT = (
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}{% if part['type'] == 'image' %}"
    "{{ '<image>\n' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
)
TEMPLATES = {
    # A caption after its image, without a question, as LLaVA's first stage sees it: the text of the user is left out.
    "plain": (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        + _TEXT
        + "{{ '\n' }}{% elif m['role'] == 'user' and loop.first %}"
        "{% if m['content'] is not string %}{% for part in m['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
        "{% endif %}{% else %}{{ raise_exception('plain is for an image and its caption: use vicuna') }}{% endif %}{% endfor %}"
    ),
    # Vicuna's (v1), as in all later stages.
    "vicuna": (
        "{% if messages[0]['role'] == 'system' %}{% set m = messages[0] %}" + _TEXT + '{% else %}{{ "' + SYSTEM + '" }}{% endif %}'
        "{{ ' ' }}{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' }}" + _TEXT + "{{ ' ' }}"
        "{% elif m['role'] == 'assistant' %}{{ 'ASSISTANT: ' }}" + _TEXT + "{{ '</s>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
}
"""Name of a template of the official code -> Jinja, without the token that begins a text."""
CLIP_L_336 = {
    **{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    **{"image_size": 336, "patch_size": 14, "projection_dim": 768},
}
"""openai/clip-vit-large-patch14-336, the tower of all published LLaVA-1.5: official checkpoints name it without its config."""


def set_template(processor: Any, name: str | None) -> None:
    """Give a LLaVA processor, and its tokenizer, one of `TEMPLATES`; refuse another name, or a processor of another family.

    None keeps its own; but ``plain``, with which a first stage was saved, becomes ``vicuna``: it would leave out all questions.
    """
    if name is None:
        if not isinstance(processor, LlavaProcessor) or not str(processor.chat_template).endswith(TEMPLATES["plain"]):
            return
        name = "vicuna"
    if name not in TEMPLATES or not isinstance(processor, LlavaProcessor):
        raise ValueError(
            f"Expected model.chat_template to be {' or '.join(TEMPLATES)}, for a LLaVA-1.5; got {name!r} for a "
            f"{type(processor).__name__}. Leave it out to use the checkpoint's template."
        )
    start = added_text(processor.tokenizer)
    processor.chat_template = processor.tokenizer.chat_template = ("{{ '" + start + "' }}" if start else "") + TEMPLATES[name]


def is_official_llava(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of the official LLaVA code, with or without an MMFuser."""
    return "mm_vision_tower" in config and config.get("model_type") in ("llava", "llava_llama")


SETTINGS: dict[str, tuple[Any, ...]] = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_vision_select_feature": ("patch", None),
    "mm_use_im_start_end": (False, None),
    "mm_patch_merge_type": ("flat", None),
    "image_aspect_ratio": ("pad", "square", None),
}
"""Settings of an official config, and the values that LLaVA-1.5 has."""


def convert_llava(source: Path, target: Path, *, tower: Path | None = None, shard_bytes: int, progress: bool = True) -> int:
    """Write an official LLaVA-1.5 in transformers' format, with its processor; tensors are copied bit by bit.

    The placeholder of images gets a row in embeddings and head, the mean of the others, which is never read and never the largest.
    mm_vision_select_layer of the checkpoint in `source` says which layers its MMFuser reads. `target` is an empty folder, `tower`
    that of the CLIP vision tower, for a checkpoint without these weights, or of another size than CLIP_L_336, and `shard_bytes`
    the largest size of a weight file. Returns the number of tensors written.

    Raises ValueError for settings that transformers' LLaVA does not have, and tensors that are not those of the config.
    """
    where = source / "config.json"
    official, tokenizer = _official(where), read_tokenizer(source)
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    shapes = (files := TensorFiles(source)).shapes()
    given: Mapping[str, Any] = CLIP_L_336 if tower is None else read_config_json(tower / "config.json")
    vision, towers = given.get("vision_config", given), None if tower is None else TensorFiles(tower)
    levels = _levels(official.get("mm_vision_select_layer"), str(where))
    try:
        config = _config(official, vision, levels, tokenizer, shapes)
        with torch.device("meta"):
            model: Any = (LlavaWithFuser if len(levels) > 1 else LlavaForConditionalGeneration)(config)
    except (ArithmeticError, AttributeError, LookupError, TypeError, StrictDataclassError) as error:  # of whatever the file holds
        raise ValueError(f"{where} does not describe a LLaVA-1.5: {error!r}. Correct its values.") from error
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    inner = "vision_model." if any(".vision_model." in name for name in expected) else ""  # transformers 5.17 to 5.20
    ours = {_renamed(name, inner, len(levels) > 1): (files, name) for name in shapes}
    if not any(name.startswith(f"model.{LLAVA.vision}.") for name in ours):
        if towers is None:
            raise ValueError(f"{source} has no vision tower ({official['mm_vision_tower']}). Give its folder with --tower.")
        found = (name for name in towers.names() if name.startswith("vision_model."))
        ours |= {f"model.{LLAVA.vision}.{inner}{name.removeprefix('vision_model.')}": (towers, name) for name in found}
    old, rows = official["vocab_size"], config.text_config.vocab_size

    def read(name: str) -> Tensor:
        holder, theirs = ours[name]
        tensor = holder[theirs]
        if name in ("lm_head.weight", f"model.{LLAVA.language}.embed_tokens.weight"):
            mean = tensor.float().mean(dim=0, keepdim=True).to(tensor.dtype)
            tensor = torch.cat([tensor, mean.expand(rows - len(tensor), -1)])
        return tensor

    held = {name: holder.shapes()[theirs] for name, (holder, theirs) in ours.items()}
    held |= {
        name: (rows, *shape[1:]) for name, shape in held.items() if (shape[:1], expected.get(name, ())[:1]) == ((old,), (rows,))
    }
    check_shapes(held, expected, str(source) if tower else f"{source} with CLIP ViT-L/14-336 (--tower DIR gives another tower)")
    write_shards(target, ((name, read(name)) for name in ours), len(ours), shard_bytes=shard_bytes, progress=progress)
    config.architectures, config.dtype = [type(model).__name__], read("lm_head.weight").dtype
    config.save_pretrained(target)
    GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=config.text_config.pad_token_id).save_pretrained(target)
    _processor(official, config, tokenizer).save_pretrained(target)
    (target / "official_config.json").write_text(json.dumps(official, indent=2) + "\n")
    return len(ours)


def _official(path: Path) -> dict[str, Any]:
    official = read_config_json(path)
    for name, known in SETTINGS.items():
        if official.get(name) not in known:
            raise ValueError(f"{path}: expected {name} to be {known[0]!r}, as in LLaVA-1.5; got {official.get(name)!r}.")
    return official


def _processor(official: Mapping[str, Any], config: Any, tokenizer: Any) -> LlavaProcessor:
    size = config.vision_config.image_size
    square = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    images = LlavaImageProcessor(**square, do_pad=official.get("image_aspect_ratio") == "pad")
    sizes = {"patch_size": config.vision_config.patch_size, "num_additional_image_tokens": 1}
    tokenizer.padding_side = "left"
    processor = LlavaProcessor(images, tokenizer, vision_feature_select_strategy="default", image_token=IMAGE, **sizes)
    set_template(processor, "vicuna")
    return processor


def _levels(given: Any, where: str) -> list[int]:
    """``mm_vision_select_layer``: an index, a list of them, or their text as the scripts give it (``list-22/-17/-2``)."""
    if isinstance(given, str) and re.fullmatch(r"list-?\d+(/-?\d+)*", given):
        given = [int(index) for index in given.removeprefix("list").split("/")]
    found = given if isinstance(given, list) else [given]
    if not found or not all(isinstance(index, int) and not isinstance(index, bool) for index in found):
        raise ValueError(f"{where}: expected mm_vision_select_layer to be an index of a layer or a list of them; got {given!r}.")
    return found


def _config(official: Mapping[str, Any], vision: Mapping[str, Any], levels: list[int], tokenizer: Any, shapes: Any) -> Any:
    known = LlamaConfig().to_dict().keys() | {"rope_theta", "rope_scaling"}
    known -= {"model_type", "architectures", "transformers_version", "tie_word_embeddings"}  # no LLaVA ties its head
    text = {name: official[name] for name in known & official.keys()}
    text |= {"vocab_size": max(official["vocab_size"], len(tokenizer)), "pad_token_id": official.get("pad_token_id") or 0}
    clip = CLIPVisionConfig(**{name: vision[name] for name in vision if name not in ("model_type", "architectures")})
    config = LlavaConfig(
        vision_config=clip,
        text_config=LlamaConfig(**text),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(clip.image_size // clip.patch_size) ** 2,
        vision_feature_layer=levels[-1],
    )
    fuser = [name for name in shapes if re.search(r"mm_projector\.0\.cross_attn\.attention_weights\.bias$", name)]
    if len(levels) == 1 and not fuser:
        return config
    if len(levels) == 1 or not fuser:
        raise ValueError(f"Expected an MMFuser with several layers; got mm_vision_select_layer={levels} and {len(fuser)} MMFusers.")
    points = shapes[fuser[0].replace("cross_attn", "self_attn")][0] // 16  # all published models have 16 heads
    return fused_config(config, levels, num_points=points)


def _renamed(name: str, inner: str, fused: bool) -> str:
    """Transformers' name of an official tensor, in memory; an unknown one keeps its own, and is refused by it."""
    first = 1 if fused else 0  # the MMFuser is element 0 of the projector
    for theirs, ours in {
        r"model\.vision_tower\.vision_tower\.vision_model\.": f"model.{LLAVA.vision}.{inner}",
        rf"model\.mm_projector\.{first}\.(?=weight|bias)": f"model.{LLAVA.projector[0]}.linear_1.",
        rf"model\.mm_projector\.{first + 2}\.(?=weight|bias)": f"model.{LLAVA.projector[0]}.linear_2.",
        r"model\.mm_projector\.0\.(?=\w+\.|gamma)": "model.fuser.",
        r"model\.(?=embed_tokens\.|layers\.|norm\.)": f"model.{LLAVA.language}.",
    }.items():
        renamed, count = re.subn(rf"^{theirs}", ours, name)
        if count:
            return renamed
    return name
