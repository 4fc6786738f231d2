"""The processor of an official checkpoint: its tokenizer, its tiling of images, the chat template of its training."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, InternVLProcessor, PreTrainedConfig, PreTrainedTokenizerFast

from mpo.models.control_tokens import added_start
from mpo.models.official.schema import Chat
from mpo.models.official.spm import read_sentencepiece
from mpo.models.small import CHAT_TEMPLATE, IMAGE_TOKENS, assemble_processor
from mpo.models.strict import read_json
from mpo.models.tiles import TileImageProcessor

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
        ValueError: when it cannot be read, or lacks an image token.
    """
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.exists() else {}
    try:
        tokenizer = _tokenizer(folder, settings)
        if tokenizer is None:
            return None
        vocabulary = tokenizer.get_vocab()
        if not (lacking := [token for token in IMAGE_TOKENS.values() if token not in vocabulary]):
            video = "<|video_pad|>" if "<|video_pad|>" in vocabulary else "<video>"
            return _tokenizer(folder, settings, padding_side="left", extra_special_tokens={**IMAGE_TOKENS, "video_token": video})
    except Exception as error:  # of any kind: the libraries do not check the values of a file
        if isinstance(error, ValueError) and str(folder) in str(error):
            raise
        raise ValueError(f"The tokenizer in {folder} cannot be read ({error}). Copy its files from the original again.") from error
    raise ValueError(
        f"The tokenizer in {folder} has no {', '.join(lacking)}, so prompts cannot contain images. Copy the tokenizer's "
        "files from the model's own checkpoint (added_tokens.json too)."
    )


def _tokenizer(folder: Path, settings: Mapping[str, Any], **options: Any) -> Any:
    kind, fast, model = str(settings.get("tokenizer_class", "")), folder / "tokenizer.json", folder / "tokenizer.model"
    if not kind.startswith(("InternLM", "Llama")) and (fast.exists() or (folder / "vocab.json").exists()):
        return AutoTokenizer.from_pretrained(folder, config=PreTrainedConfig(), **options)
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    given = {name: settings[name] for name in names if settings.get(name)}
    options |= {name: value["content"] if isinstance(value, Mapping) else value for name, value in given.items()}
    # Defaults of the tokenizers of InternLM2, InternLM3 and Llama, fast or slow, regardless of tokenizer.json.
    options |= {"add_bos_token": settings.get("add_bos_token", True), "add_eos_token": settings.get("add_eos_token", False)}
    if fast.exists():
        return PreTrainedTokenizerFast(tokenizer_file=str(fast), **options)
    if not model.exists():
        return None
    more = folder / "added_tokens.json"
    added = {str(number): {"content": token} for token, number in (read_json(more) if more.exists() else {}).items()}
    added |= settings.get("added_tokens_decoder") or {}
    # ``legacy`` is true by default; InternLM's tokenizers do not have it.
    legacy = not kind.startswith("Llama") or settings.get("legacy") is not False
    tokenizer, special = read_sentencepiece(model, added, prefix_every_text=legacy)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**special, **options})


def official_processor(tokenizer: Any, official: Chat[Any]) -> InternVLProcessor:
    """The processor for an official checkpoint.

    The official code tokenizes a rendered conversation with the tokenizer's default special tokens, so the template starts with
    them.

    Args:
        tokenizer: from `load_tokenizer`.
        official: config.json of the checkpoint.
    """
    tiles = partial(
        TileImageProcessor,
        crop_to_patches=True,  # InternVLProcessor overrides it
        min_patches=official.min_dynamic_patch if official.dynamic_image_size else 1,
        max_patches=official.max_dynamic_patch if official.dynamic_image_size else 1,
        use_thumbnail=official.use_thumbnail,
    )
    bos = "".join(tokenizer.convert_ids_to_tokens(added_start(tokenizer)))
    tokenizer.chat_template = chat_template(official.template, bos=bos)
    return assemble_processor(
        tokenizer,
        tiles,
        image_size=official.vision_config.image_size,
        image_seq_length=official.tokens_per_tile,
        chat_template=tokenizer.chat_template,
    )
