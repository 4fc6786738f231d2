"""Build small InternVL models with their own tokenizer, in a second and without downloads.

Every part is a transformers class: `InternVLForConditionalGeneration`, `InternVLProcessor`, the GOT-OCR2 image processor with
its dynamic tiling, the InternVL video processor and a Qwen2-style tokenizer. Only the sizes, the vocabulary and the weights differ
from a published checkpoint, so code that runs on these models runs on the published ones.
"""

import json
import math
from collections.abc import Container, Iterable
from functools import partial
from typing import Any, Literal, get_args

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CONFIG_MAPPING,
    GenerationConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    Qwen2Tokenizer,
)

from mpo.models.tiles import TileImageProcessor

TextFamily = Literal["qwen2", "qwen3", "llama"]

DOWNSAMPLE_RATIO = 0.5
"""Pixel shuffle: four neighbouring patches become one token, as in every published InternVL."""

CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
INTERNVL_TOKENS = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]
VIDEO_TOKEN = "<video>"
IMAGE_TOKENS = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
"""The tokens of an image, by their names in the processor's tokenizer."""


def token_names(vocabulary: Container[str] = ()) -> dict[str, str]:
    """The names of a tokenizer's tokens for images and videos; Qwen's vocabularies have their own for videos."""
    return {**IMAGE_TOKENS, "video_token": "<|video_pad|>" if "<|video_pad|>" in vocabulary else VIDEO_TOKEN}


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% elif part['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""InternVL's ChatML as in its transformers checkpoints: no default system message, one placeholder per image."""


def small_processor(
    texts: Iterable[str],
    *,
    image_size: int = 32,
    patch_size: int = 8,
    max_patches: int = 12,
    vocab_size: int = 512,
    eos_token: str = "<|im_end|>",
) -> InternVLProcessor:
    """Build an InternVL processor with a tokenizer trained on given texts.

    Args:
        texts: training texts of the byte-pair merges; other texts fall back to bytes. Digits are single tokens.
        image_size: height and width of one tile, in pixels; an even multiple of `patch_size`.
        patch_size: height and width of one vision-tower patch, in pixels.
        max_patches: the largest number of tiles per image. An image with more than one tile always gets a thumbnail tile after
            them: transformers' image processor has no setting for it.
        vocab_size: the largest number of tokens, at least 256 bytes and 13 special tokens. Few texts give fewer.
        eos_token: the tokenizer's end-of-sequence token. Published InternVLs have `<|im_end|>`; in some chat models it is not the
            token that ends a turn.

    Raises:
        ValueError: for sizes that do not divide, or a vocabulary smaller than the bytes and special tokens.
    """
    tokenizer = _train_tokenizer(texts, vocab_size=vocab_size, eos_token=eos_token)
    return processor_around(tokenizer, image_size=image_size, patch_size=patch_size, max_patches=max_patches)


def processor_around(tokenizer: Any, *, image_size: int, patch_size: int, max_patches: int = 12) -> InternVLProcessor:
    """Build an InternVL processor around a tokenizer that has InternVL's tokens; arguments as in `small_processor`."""
    image_seq_length = _tokens_per_tile(image_size, patch_size)
    if max_patches < 1:
        raise ValueError(f"max_patches, the largest number of tiles per image, must be 1 or more; got max_patches={max_patches}.")
    return assemble_processor(tokenizer, (1, max_patches), None, image_size=image_size, image_seq_length=image_seq_length)


def assemble_processor(
    tokenizer: Any,
    tiles: tuple[int, int],
    thumbnail: bool | None,
    *,
    image_size: int,
    image_seq_length: int,
    chat_template: str = CHAT_TEMPLATE,
) -> InternVLProcessor:
    """Put an InternVL processor together around a tokenizer with InternVL's tokens; pixels are normalized as in every InternVL.

    `tiles` are the smallest and the largest number of tiles per image, of `image_size` pixels and `image_seq_length` tokens each;
    `thumbnail` is ``use_thumbnail`` of `TileImageProcessor`, or None for transformers' class, which always adds one.
    """
    pixels: dict[str, Any] = {"size": {"height": image_size, "width": image_size}}
    pixels |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}  # of ImageNet
    split = {"crop_to_patches": True, "min_patches": tiles[0], "max_patches": tiles[1]}  # InternVLProcessor overrides the first
    plain = thumbnail is None
    image_processor = GotOcr2ImageProcessor if plain else partial(TileImageProcessor, use_thumbnail=thumbnail)
    return InternVLProcessor(
        image_processor=image_processor(**pixels, **split),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(**pixels),
        image_seq_length=image_seq_length,
        chat_template=chat_template,
    )


def small_internvl(
    processor: InternVLProcessor,
    *,
    text: TextFamily = "qwen2",
    hidden_size: int = 64,
    layers: int = 2,
    heads: int | None = None,
    vision_hidden_size: int = 64,
    vision_layers: int = 2,
    max_position_embeddings: int = 8192,
    tie_word_embeddings: bool = False,
    layer_scale_init_value: float = 0.1,
    seed: int = 0,
) -> InternVLForConditionalGeneration:
    """Build a randomly initialized InternVL that fits a processor.

    Args:
        processor: from `small_processor`, or any InternVL processor: vocabulary, image token and tile size are taken from it.
        text: the language model's architecture.
        hidden_size: width of the language model; its MLP is three times as wide.
        layers: layers of the language model.
        heads: attention heads of the language model, by default one per 32 channels (at least 2); half as many key-value heads.
        vision_hidden_size: width of the vision tower, with a head per 32 channels (at least 2); its MLP is four times as wide.
        vision_layers: layers of the vision tower.
        max_position_embeddings: the longest sequence, in tokens.
        tie_word_embeddings: one matrix for input embeddings and output head. Published InternVLs up to 3.0 have two.
        layer_scale_init_value: initial scale of the vision tower's residual branches.
        seed: random seed of the initial weights. The caller's random state is restored.

    Returns:
        The model in float32 and eval mode. `generate` stops at `<|im_end|>`.

    Raises:
        ValueError: for an unknown family, or sizes that do not fit each other or the processor.
    """
    tile, tokens = processor.image_processor.size["height"], processor.image_seq_length
    patch = max(1, tile // round(math.sqrt(tokens) / DOWNSAMPLE_RATIO))
    if _tokens_per_tile(tile, patch) != tokens:
        raise ValueError(f"No size of patches gives {tokens} tokens per {tile}-pixel tile, which the processor writes.")
    settings = {"max_position_embeddings": max_position_embeddings, "tie_word_embeddings": tie_word_embeddings}
    text_config = _text_config(text, processor.tokenizer, hidden_size, heads, num_hidden_layers=layers, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = untrained_internvl(
            processor,
            text_config,
            hidden_size=vision_hidden_size,
            num_hidden_layers=vision_layers,
            num_attention_heads=_heads(vision_hidden_size, name="vision_"),
            image_size=[tile, tile],
            patch_size=[patch, patch],
            layer_scale_init_value=layer_scale_init_value,
        )
    model.generation_config = GenerationConfig(eos_token_id=text_config.eos_token_id, pad_token_id=text_config.pad_token_id)
    return model.eval()


def _text_config(text: str, tokenizer: Any, hidden_size: int, heads: int | None, **settings: Any) -> Any:
    if text not in get_args(TextFamily):
        raise ValueError(f"text must be 'qwen2', 'qwen3' or 'llama'; got text={text!r}.")
    heads = _heads(hidden_size, heads)
    return CONFIG_MAPPING[text](
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2 if heads % 2 == 0 else heads,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.pad_token_id,
        **settings,
        **({} if text == "qwen2" else {"head_dim": hidden_size // heads}),
    )


def _heads(size: int, count: int | None = None, name: str = "") -> int:
    """The number of attention heads, by default one per 32 channels (at least 2); their width must be even."""
    count = count or max(2, size // 32)
    if size % count or size // count % 2:
        raise ValueError(f"{name}hidden_size / {name}heads must be an even number, but {size} / {count} is {size / count:g}.")
    return count


def untrained_internvl(processor: InternVLProcessor, text_config: Any, **vision: Any) -> InternVLForConditionalGeneration:
    """An InternVL for a processor around a language model of given config; `vision` are settings of `InternVLVisionConfig`."""
    return InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config=InternVLVisionConfig(attention_bias=True, intermediate_size=4 * vision["hidden_size"], **vision),
            text_config=text_config,
            image_token_id=processor.image_token_id,
            image_seq_length=processor.image_seq_length,
            downsample_ratio=DOWNSAMPLE_RATIO,
            tie_word_embeddings=text_config.tie_word_embeddings,
        )
    )


def _train_tokenizer(texts: Iterable[str], *, vocab_size: int, eos_token: str) -> Qwen2Tokenizer:
    special = [*CONTROL_TOKENS, *INTERNVL_TOKENS, VIDEO_TOKEN]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + len(special):
        raise ValueError(
            f"vocab_size must be at least {len(alphabet) + len(special)} (256 bytes and {len(special)} special tokens); got "
            f"vocab_size={vocab_size}."
        )
    if eos_token not in special:
        raise ValueError(f"eos_token must be one of {', '.join(special)}; got eos_token={eos_token!r}.")
    qwen, bpe = Qwen2Tokenizer().backend_tokenizer, Tokenizer(models.BPE())
    bpe.normalizer, bpe.pre_tokenizer, bpe.decoder = qwen.normalizer, qwen.pre_tokenizer, qwen.decoder
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special), initial_alphabet=alphabet, show_progress=False, special_tokens=[]
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = Qwen2Tokenizer(
        vocab=bpe.get_vocab(),
        merges=[tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]],
        unk_token=None,
        eos_token=eos_token,
        pad_token="<|endoftext|>",
        padding_side="left",
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
        extra_special_tokens=token_names(),
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special], special_tokens=True)
    return tokenizer


def _tokens_per_tile(image_size: int, patch_size: int) -> int:
    if image_size < 1 or patch_size < 1 or image_size % (2 * patch_size):
        raise ValueError(
            f"image_size must be an even multiple of patch_size (pixel shuffle joins 2 x 2 patches), but {image_size} / "
            f"{patch_size} is {image_size / max(patch_size, 1):g}."
        )
    return int((image_size // patch_size) ** 2 * DOWNSAMPLE_RATIO**2)
