"""Check before training that processor, adapter and model fit together."""

import re
from typing import Any

from torch import nn
from transformers import AutoProcessor

from mpo.models.family import takes_images

IMAGE_TOKENS = ("start_image_token", "end_image_token", "image_token")
"""The names in InternVL's processor of the tokens for an image: ``<img>``, ``</img>`` and ``<IMG_CONTEXT>``."""


def open_processor(name_or_path: str, **options: Any) -> Any:
    """`AutoProcessor.from_pretrained`; a ValueError for a tokenizer without image tokens, and for files that cannot be read."""
    try:
        return AutoProcessor.from_pretrained(name_or_path, **options)
    except OSError:
        raise
    except Exception as error:  # of any kind: the libraries do not check the values of a file
        if "image_token" not in str(error):
            raise ValueError(
                f"The tokenizer or processor of {name_or_path} cannot be read ({error!r}). Copy its files from the original again."
            ) from error
        raise ValueError(
            f"The tokenizer of {name_or_path} has no image tokens ({error}). It needs <img>, </img>, <IMG_CONTEXT> and their names "
            "(extra_special_tokens: start_image_token, end_image_token, context_image_token). Copy the files of the original."
        ) from error


def check_fit(model: Any, processing_class: Any) -> None:
    """Refuse a tokenizer or processor that does not fit a model: its vocabulary, its image tokens, the size of its tiles."""
    config = model.config
    name = type(processing_class).__name__
    fix = "Load both from the same checkpoint (AutoProcessor.from_pretrained with the model's name)."
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if missing := missing_rows(model, processing_class):
        raise ValueError(f"{missing}. {fix} If tokens were added, call model.resize_token_embeddings(len(tokenizer)).")
    if not hasattr(processing_class, "image_processor"):
        return
    if not takes_images(config):
        raise ValueError(f"{name} processes images, but {type(model).__name__} has no vision tower. Pass the tokenizer alone.")
    for token in filter(None, (getattr(processing_class, name, None) for name in IMAGE_TOKENS)):
        ids = tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == getattr(tokenizer, "unk_token_id", None):
            raise ValueError(
                f"The tokenizer does not have the image token {token}: it encodes it as {len(ids)} tokens "
                f"({', '.join(map(repr, tokenizer.convert_ids_to_tokens(ids)))}). {fix}"
            )
    vision_size = getattr(config.vision_config, "image_size", None)
    if isinstance(vision_size, (list, tuple)):
        vision_size = vision_size[0]
    size = processing_class.image_processor.size
    compared = {
        "image token id": (getattr(processing_class, "image_token_id", None), getattr(config, "image_token_id", None)),
        "tokens per tile": (getattr(processing_class, "image_seq_length", None), getattr(config, "image_seq_length", None)),
        "tile size in pixels": (size.get("height") if hasattr(size, "get") else None, vision_size),
    }
    for what, (given, needed) in compared.items():
        if given is not None and needed is not None and given != needed:
            raise ValueError(f"{name} does not belong to this model: its {what} is {given}, the model's is {needed}. {fix}")


def missing_rows(model: Any, processing_class: Any) -> str | None:
    """Describe token ids without a row in the model's embeddings or head; None when there are none.

    More rows than ids are allowed: InternVL pads its vocabulary.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    spare = getattr(processing_class, "video_token", None)  # replaced by its frames before tokenization
    last, token = max(((number, token) for token, number in tokenizer.get_vocab().items() if token != spare), default=(-1, ""))
    for name, module in (("embedding", model.get_input_embeddings()), ("output head", model.get_output_embeddings())):
        weight = getattr(module, "weight", None)
        if weight is not None and weight.ndim == 2 and last >= len(weight):
            return (
                f"The tokenizer has {len(tokenizer)} tokens and the model's {name} {len(weight)} rows, too few for all ids "
                f"({token!r} has id {last})"
            )
    return None


def check_targets(model: nn.Module, peft_config: Any) -> None:
    """Refuse an adapter with a target that matches no layer; peft requires only one match."""
    targets = getattr(peft_config, "target_modules", None)
    if not targets or targets == "all-linear":
        return
    names = [name for name, _ in model.named_modules() if name]
    for target in [targets] if isinstance(targets, str) else sorted(targets):
        pattern = target if isinstance(targets, str) else rf"(.*\.)?{re.escape(target)}"
        if not any(re.fullmatch(pattern, name) for name in names):
            linear = sorted({name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)})
            raise ValueError(
                f"target_modules={target!r} matches no layer of {type(model).__name__}, so no adapter would be added. Give the "
                "last parts of layer names, or one regular expression over full names; its linear layers end in "
                f"{', '.join(linear)}."
            )
