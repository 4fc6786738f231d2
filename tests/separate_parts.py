"""Language models and vision towers on disk, as they are before `mpo.models.join`."""

import json
import re
from pathlib import Path

import torch
from support import TEXTS
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    InternVLVisionConfig,
    InternVLVisionModel,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from mpo.models.small import INTERNVL_TOKENS, VIDEO_TOKEN, small_processor

CONFIGS = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}


def plain_tokenizer(folder: Path, texts=TEXTS) -> None:
    """Save the tokenizer of a language model: without InternVL's tokens."""
    tokenizer = small_processor(texts, image_size=32, patch_size=8).tokenizer
    tokenizer.save_pretrained(folder)
    found = json.loads((folder / "tokenizer.json").read_text())
    added = {*INTERNVL_TOKENS, VIDEO_TOKEN}
    found["added_tokens"] = [token for token in found["added_tokens"] if token["content"] not in added]
    (folder / "tokenizer.json").write_text(json.dumps(found))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    kept = {
        name: value for name, value in settings.items() if not re.search("image_token|video_token|added|special|template", name)
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))


def write_language(folder: Path, kind: str = "qwen2", *, tied: bool = False, spare: int = 0) -> Path:
    """Save a small language model with `spare` rows in its embeddings beside those of its tokens."""
    folder.mkdir()
    plain_tokenizer(folder)
    tokens = len(AutoTokenizer.from_pretrained(folder))
    config = CONFIGS[kind](
        vocab_size=tokens + spare,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=tied,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def write_vision(folder: Path, **settings) -> Path:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": [32, 32], "patch_size": [8, 8]}
    torch.manual_seed(2)
    InternVLVisionModel(InternVLVisionConfig(**{**sizes, "intermediate_size": 64, **settings})).save_pretrained(folder)
    return folder
