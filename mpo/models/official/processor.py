"""The processor of an official checkpoint: its tokenizer, its tiling of images, the chat template of its training."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, InternVLProcessor, PreTrainedConfig, PreTrainedTokenizerFast

from mpo.models.control_tokens import added_start
from mpo.models.small import CHAT_TEMPLATE, IMAGE_TOKENS, assemble_processor
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
    tiles = partial(
        TileImageProcessor,
        crop_to_patches=official.get("dynamic_image_size", True),
        min_patches=official.get("min_dynamic_patch", 1),
        max_patches=official.get("max_dynamic_patch", 12),
        use_thumbnail=official.get("use_thumbnail", True),
    )
    bos = "".join(tokenizer.convert_ids_to_tokens(added_start(tokenizer)))
    tokenizer.chat_template = chat_template(official.get("template", "internvl2_5"), bos=bos)
    tokens = int((side // patch) ** 2 * official.get("downsample_ratio", 0.5) ** 2)
    return assemble_processor(tokenizer, tiles, image_size=side, image_seq_length=tokens, chat_template=tokenizer.chat_template)


def read_sentencepiece(path: Path, added: Mapping[str, Mapping[str, Any]]) -> Tokenizer:
    """Read a SentencePiece model of type BPE, as InternLM2's, as a fast tokenizer.

    Args:
        path: path of tokenizer.model.
        added: ``added_tokens_decoder`` of tokenizer_config.json: id -> content and flags. Those within the vocabulary replace the
            piece with that id.

    Raises:
        ValueError: when the sentencepiece package is missing, or the model is of another type.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise ValueError(f"{path} needs SentencePiece, which is not installed: pip install 'mpo-trainer[internlm2]'") from error
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(path.read_bytes())
    if proto.trainer_spec.model_type != 2:
        raise ValueError(f"Expected a SentencePiece model of type BPE (2); {path} has type {proto.trainer_spec.model_type}.")
    pieces = [piece.piece for piece in proto.pieces]
    pieces[:3] = ["<unk>", "<s>", "</s>"]
    for number, token in added.items():
        if int(number) < len(pieces):
            pieces[int(number)] = token["content"]
    ids = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(ids, _spm_merges(pieces), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    space = normalizers.Replace(" ", "▁")
    prefix = proto.normalizer_spec.add_dummy_prefix
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if prefix else space
    end = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *end])
    tokenizer.add_special_tokens(
        [
            AddedToken(token["content"], special=token.get("special", True), normalized=False)
            for _, token in sorted(added.items(), key=lambda item: int(item[0]))
        ]
    )
    return tokenizer


def _spm_merges(pieces: list[str]) -> list[tuple[str, str]]:
    """Merges in the order of the pieces that they create."""
    rank = {piece: number for number, piece in enumerate(pieces)}
    merges = []
    for piece in pieces:
        parts = [(piece[:at], piece[at:]) for at in range(1, len(piece)) if piece[:at] in rank and piece[at:] in rank]
        merges += sorted(parts, key=lambda pair: (rank[pair[0]], rank[pair[1]]))
    return merges
