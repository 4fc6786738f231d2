"""Configs of the published InternVLs, by the name of the checkpoint; sizes of arXiv 2412.05271, table 1."""

import re
from pathlib import Path

from transformers import InternVLConfig, InternVLVisionConfig, LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from mpo.models.small import small_processor

# hidden, MLP, layers, heads, key-value heads
QWEN2 = {
    "0.5B": (896, 4864, 24, 14, 2),
    "1.5B": (1536, 8960, 28, 12, 2),
    "3B": (2048, 11008, 36, 16, 2),
    "7B": (3584, 18944, 28, 28, 4),
    "14B": (5120, 13824, 48, 40, 8),
    "32B": (5120, 27648, 64, 40, 8),
    "72B": (8192, 29568, 80, 64, 8),
}
INTERNLM2 = {"1.8B": (2048, 8192, 24, 16, 8), "7B": (4096, 14336, 32, 32, 8), "20B": (6144, 16384, 48, 48, 8)}
INTERNLM3 = {"8B": (4096, 10240, 48, 32, 2)}
QWEN3 = {
    "0.6B": (1024, 3072, 28, 16, 8),
    "1.7B": (2048, 6144, 28, 16, 8),
    "4B": (2560, 9728, 36, 32, 8),
    "8B": (4096, 12288, 36, 32, 8),
    "14B": (5120, 17408, 40, 40, 8),
    "32B": (5120, 25600, 64, 64, 8),
}
QWEN3_MOE = {"30B-A3B": (2048, 768, 48, 32, 4), "235B-A22B": (4096, 1536, 94, 64, 4)}
FAMILIES = {
    "internlm2": (LlamaConfig, INTERNLM2, {"vocab_size": 92_553, "max_position_embeddings": 32_768}),
    "internlm3": (LlamaConfig, INTERNLM3, {"vocab_size": 128_512, "max_position_embeddings": 32_768}),
    "qwen2": (Qwen2Config, QWEN2, {"vocab_size": 151_674, "max_position_embeddings": 32_768}),
    "qwen3": (Qwen3Config, QWEN3, {"vocab_size": 151_936, "max_position_embeddings": 40_960, "head_dim": 128}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        QWEN3_MOE,
        {"vocab_size": 151_936, "max_position_embeddings": 40_960, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8},
    ),
}
CHECKPOINTS = {
    **{f"2-{size}": ("internlm2", text) for size, text in {"2B": "1.8B", "8B": "7B", "26B": "20B"}.items()},
    "2-1B": ("qwen2", "0.5B"),
    **{f"2_5-{size}": ("internlm2", text) for size, text in {"2B": "1.8B", "8B": "7B", "26B": "20B"}.items()},
    **{f"2_5-{size}": ("qwen2", text) for size, text in {"1B": "0.5B", "4B": "3B", "38B": "32B", "78B": "72B"}.items()},
    **{
        f"3-{size}": ("qwen2", text)
        for size, text in {"1B": "0.5B", "2B": "1.5B", "8B": "7B", "14B": "14B", "38B": "32B", "78B": "72B"}.items()
    },
    "3-9B": ("internlm3", "8B"),
    **{
        f"3_5-{size}": ("qwen3", text)
        for size, text in {"1B": "0.6B", "2B": "1.7B", "4B": "4B", "8B": "8B", "14B": "14B", "38B": "32B"}.items()
    },
    "3_5-30B-A3B": ("qwen3_moe", "30B-A3B"),
    "3_5-241B-A28B": ("qwen3_moe", "235B-A22B"),
}
LARGE_TOWER = {"26B", "38B", "78B", "241B-A28B"}


def config_of(name: str, image_token_id: int, layers: int | None = None) -> InternVLConfig:
    """The config of a checkpoint such as ``OpenGVLab/InternVL3-8B-hf``; with `layers`, no more of them in tower and decoder."""
    found = re.search(r"InternVL(\d(?:[._]5)?)-(\d+B(?:-A\d+B)?)", name)
    assert found, name
    version, size = found[1].replace(".", "_"), found[2]
    family, text = CHECKPOINTS[f"{version}-{size}"]
    make, sizes, more = FAMILIES[family]
    hidden, mlp, depth, heads, kv_heads = sizes[text]
    width = {"moe_intermediate_size": mlp, "intermediate_size": 3 * hidden} if "moe" in family else {"intermediate_size": mlp}
    large = size in LARGE_TOWER
    vision = InternVLVisionConfig(
        hidden_size=3200 if large else 1024,
        intermediate_size=12800 if large else 4096,
        num_hidden_layers=layers or (45 if large else 24),
        num_attention_heads=25 if large else 16,
        norm_type="rms_norm" if large else "layer_norm",
        use_qk_norm=large,
        attention_bias=not large,
        image_size=[448, 448],
        patch_size=[14, 14],
    )
    return InternVLConfig(
        vision_config=vision,
        text_config=make(
            hidden_size=hidden,
            num_hidden_layers=layers or depth,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            tie_word_embeddings=False,
            **width,
            **more,
        ),
        image_token_id=image_token_id,
        image_seq_length=256,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def real_processor():
    """Tiles, image tokens and template as published; a vocabulary trained on the spot."""
    return small_processor(["What is it? It is a cat."], image_size=448, patch_size=14)


def write_checkpoint(name: str, folder: Path, processor, layers: int | None = None) -> Path:
    """A folder with a checkpoint's config and a processor, and no weights."""
    config_of(name, processor.image_token_id, layers).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
