"""The processor of an official checkpoint: its tokenizer, its tiling of images, the chat template of its training."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, InternVLProcessor, PreTrainedConfig, PreTrainedTokenizerFast

from mpo.models.control_tokens import added_text
from mpo.models.official.schema import Chat
from mpo.models.official.spm import read_sentencepiece
from mpo.models.small import CHAT_TEMPLATE, IMAGE_TOKENS, assemble_processor, token_names
from mpo.models.strict import read_json, shortened

logger = logging.getLogger(__name__)
OLD_SYSTEM = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
NEW_SYSTEM = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
TEMPLATES = {
    "Hermes-2": ("<|im_end|>", OLD_SYSTEM),
    "internlm2-chat": ("<|im_end|>", OLD_SYSTEM),
    "internvl2_5": ("<|im_end|>\n", NEW_SYSTEM),
}
"""The end of a turn and the default system message of each supported conversation template."""
SETTINGS = (
    *("do_convert_rgb", "do_normalize", "do_rescale", "do_resize", "image_mean", "image_std", "max_patches", "min_patches"),
    *("resample", "rescale_factor", "size", "use_thumbnail", "image_processor_type"),
)
"""What decides the tiles and pixels of an image processor."""
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
TURN = ("<|im_start|>", "<|im_end|>")
"""The tokens that begin and end a turn in all of them."""


def chat_template(name: str, *, bos: str = "") -> str:
    """The Jinja template of an official conversation template, ``template`` in config.json.

    `bos`: tokens before a conversation, as the tokenizer adds them in the official code, such as ``<s>`` (InternLM2) or
    ``<|begin_of_text|>`` (Llama-3); empty for Qwen.
    """
    if name not in TEMPLATES:
        raise ValueError(f"Expected a conversation template among {', '.join(TEMPLATES)}; got template={name!r}.")
    end, system = TEMPLATES[name]
    default = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n" + system + end + "' }}{% endif %}"
    return ("{{ '" + bos + "' }}" if bos else "") + default + CHAT_TEMPLATE.replace("<|im_end|>\n", end)


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of an official checkpoint, without running its code; None if there is none.

    Raises ValueError when it cannot be read, or lacks an image token.
    """
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.exists() else {}
    try:
        tokenizer = _tokenizer(folder, settings)
        if tokenizer is None:
            return None
        vocabulary = tokenizer.get_vocab()
        for name, number in _added(folder, settings):
            if vocabulary.get(name, number) != number:
                raise ValueError(f"{name} has the ids {vocabulary[name]} and {number}, in two of its files")
        if not (lacking := [token for token in (*IMAGE_TOKENS.values(), *TURN) if token not in vocabulary]):
            return _tokenizer(folder, settings, padding_side="left", extra_special_tokens=token_names(vocabulary))
    except Exception as error:  # of any kind: the libraries do not check the values of a file
        if isinstance(error, ValueError) and str(folder) in str(error):
            raise
        raise ValueError(f"The tokenizer in {folder} cannot be read ({error}). Copy its files from the original again.") from error
    raise ValueError(
        f"The tokenizer in {folder} has no {', '.join(lacking)}, which prompts with images need. Copy the tokenizer's "
        "files from the model's own checkpoint (added_tokens.json too)."
    )


def read_tokenizer(folder: Path) -> Any:
    """Read a tokenizer as it is, without running its code. Raises ValueError if there is none."""
    path = folder / "tokenizer_config.json"
    tokenizer = _tokenizer(folder, read_json(path) if path.exists() else {})
    if tokenizer is None:
        raise ValueError(f"{folder} has no tokenizer. Copy its files from the original checkpoint.")
    return tokenizer


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
    added = {str(number): {"content": token} for token, number in _added(folder, {})}
    added |= settings.get("added_tokens_decoder") or {}
    # ``legacy`` is true by default; InternLM's tokenizers do not have it.
    legacy = not kind.startswith("Llama") or settings.get("legacy") is not False
    tokenizer, special = read_sentencepiece(model, added, prefix_every_text=legacy)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**special, **options})


def _added(folder: Path, settings: Mapping[str, Any]) -> list[tuple[str, int]]:
    path = folder / "added_tokens.json"
    tokens = [(token["content"], int(number)) for number, token in (settings.get("added_tokens_decoder") or {}).items()]
    return [*(read_json(path) if path.exists() else {}).items(), *tokens]


def official_processor(tokenizer: Any, official: Chat[Any]) -> InternVLProcessor:
    """The processor for an official checkpoint, with its tokenizer (`load_tokenizer`).

    The official code tokenizes a rendered conversation with the tokenizer's default special tokens, so the template starts with
    them.
    """
    sizes = {"image_size": official.vision_config.image_size, "image_seq_length": official.tokens_per_tile}
    return templated_processor(tokenizer, official.template, _patches(official), official.use_thumbnail, **sizes)


def templated_processor(tokenizer: Any, template: str, tiles: tuple[int, int], thumbnail: bool, **sizes: int) -> InternVLProcessor:
    """`assemble_processor` with one of `TEMPLATES`, which the tokenizer gets too."""
    tokenizer.chat_template = chat_template(template, bos=added_text(tokenizer))
    return assemble_processor(tokenizer, tiles, thumbnail, chat_template=tokenizer.chat_template, **sizes)


def carried_settings(image_processor: Any, official: Chat[Any]) -> dict[str, Any]:
    """The keys of an official config.json that give it the tiles of an image processor; empty if it has them already."""
    given = tuple(getattr(image_processor, name, None) for name in ("min_patches", "max_patches", "use_thumbnail"))
    if None in given or given == (*_patches(official), official.use_thumbnail):
        return {}
    return dict(zip(("min_dynamic_patch", "max_dynamic_patch", "use_thumbnail"), given, strict=True), dynamic_image_size=True)


def _patches(official: Chat[Any]) -> tuple[int, int]:
    return (official.min_dynamic_patch, official.max_dynamic_patch) if official.dynamic_image_size else (1, 1)


def check_processors(processor: Any, official: InternVLProcessor, source: str, where: str) -> None:
    """Refuse a processor of an official folder that does not do what that of the model does; warn of another chat template."""
    given, ours = (
        {name: _plain(value) for name, value in kept.to_dict().items() if name in SETTINGS} | {"image_seq_length": tokens}
        for kept, tokens in ((one.image_processor, one.image_seq_length) for one in (official, processor))
    )
    names = sorted(name for name in given.keys() | ours if given.get(name) != ours.get(name))
    found = [f"{name}={ours.get(name)!r}, not {given.get(name)!r}" for name in names]
    theirs, video = official.tokenizer.get_vocab(), processor.video_token
    tokens = [token for token, number in processor.tokenizer.get_vocab().items() if theirs.get(token) != number and token != video]
    if tokens:
        found.append(f"the ids of the tokens {shortened(tokens, 5)}")
    if found:
        raise ValueError(f"{source} has settings of its processor that {where} lacks: {'; '.join(found)}. Correct either.")
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "A?"}]},
        {"role": "assistant", "content": "B"},
    ]
    for messages in (turns * 2, [{"role": "system", "content": "C"}, *turns * 2]):
        texts = [_rendered(one, messages) for one in (official, processor)]
        if texts[0] != texts[1] and processor.chat_template is not None:
            logger.warning(f"{where} has another chat template than {source}: {texts[0]!r} instead of {texts[1]!r}.")
            return


def _rendered(processor: Any, messages: Any) -> str:
    try:
        return str(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except Exception as error:  # of any kind: a template can refuse roles, or has mistakes
        return repr(error)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value
