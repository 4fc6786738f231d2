"""Tiny checkpoints in the official format, written tensor by tensor from the definition of InternVLChatModel."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from mpo.models.small import small_processor

TEXTS = ["How many dots are there? Three.", "What is shown? A chart of sales."] * 4
WIDTH, HEADS, SHARED, LAYERS, INNER = 32, 4, 2, 2, 48
TOWER, TILE, PATCH = 16, 32, 8
CLASSES = {
    "internlm2": "InternLM2ForCausalLM",
    "internlm3": "InternLM3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


def tower_shapes(large: bool, tile: int, patch: int) -> dict[str, tuple[int, ...]]:
    shapes = {
        "embeddings.class_embedding": (1, 1, TOWER),
        "embeddings.patch_embedding.weight": (TOWER, 3, patch, patch),
        "embeddings.patch_embedding.bias": (TOWER,),
        "embeddings.position_embedding": (1, (tile // patch) ** 2 + 1, TOWER),
    }
    for layer in range(LAYERS):
        at = f"encoder.layers.{layer}."
        shapes |= {f"{at}ls{n}": (TOWER,) for n in (1, 2)}
        shapes |= {f"{at}norm{n}.weight": (TOWER,) for n in (1, 2)}
        shapes |= {
            f"{at}attn.qkv.weight": (3 * TOWER, TOWER),
            f"{at}attn.proj.weight": (TOWER, TOWER),
            f"{at}attn.proj.bias": (TOWER,),
        }
        shapes |= {f"{at}mlp.fc1.weight": (4 * TOWER, TOWER), f"{at}mlp.fc1.bias": (4 * TOWER,)}
        shapes |= {f"{at}mlp.fc2.weight": (TOWER, 4 * TOWER), f"{at}mlp.fc2.bias": (TOWER,)}
        if large:
            shapes |= {f"{at}attn.{name}_norm.weight": (TOWER,) for name in "qk"}
        else:
            shapes |= {f"{at}norm{n}.bias": (TOWER,) for n in (1, 2)} | {f"{at}attn.qkv.bias": (3 * TOWER,)}
    return shapes


def language_shapes(family: str, words: int, size: int = WIDTH // HEADS) -> dict[str, tuple[int, ...]]:
    if family == "internlm2":
        shapes = {"model.tok_embeddings.weight": (words, WIDTH), "model.norm.weight": (WIDTH,), "output.weight": (words, WIDTH)}
        for layer in range(LAYERS):
            at = f"model.layers.{layer}."
            shapes |= {
                f"{at}attention.wqkv.weight": ((HEADS + 2 * SHARED) * size, WIDTH),
                f"{at}attention.wo.weight": (WIDTH, HEADS * size),
                f"{at}attention_norm.weight": (WIDTH,),
                f"{at}ffn_norm.weight": (WIDTH,),
                f"{at}feed_forward.w1.weight": (INNER, WIDTH),
                f"{at}feed_forward.w2.weight": (WIDTH, INNER),
                f"{at}feed_forward.w3.weight": (INNER, WIDTH),
            }
        return shapes
    shapes = {"model.embed_tokens.weight": (words, WIDTH), "model.norm.weight": (WIDTH,), "lm_head.weight": (words, WIDTH)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        rows = {"q": HEADS * size, "k": SHARED * size, "v": SHARED * size}
        shapes |= {f"{at}{name}.weight": (WIDTH,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{at}self_attn.{name}_proj.weight": (count, WIDTH) for name, count in rows.items()}
        shapes[f"{at}self_attn.o_proj.weight"] = (WIDTH, HEADS * size)
        if family == "qwen2":
            shapes |= {f"{at}self_attn.{name}_proj.bias": (count,) for name, count in rows.items()}
        if family.startswith("qwen3"):
            shapes |= {f"{at}self_attn.{name}_norm.weight": (size,) for name in "qk"}
        mlp = {"gate_proj": (INNER, WIDTH), "up_proj": (INNER, WIDTH), "down_proj": (WIDTH, INNER)}
        if family == "qwen3_moe":
            shapes[f"{at}mlp.gate.weight"] = (4, WIDTH)
            shapes |= {f"{at}mlp.experts.{e}.{name}.weight": shape for e in range(4) for name, shape in mlp.items()}
        else:
            shapes |= {f"{at}mlp.{name}.weight": shape for name, shape in mlp.items()}
    return shapes


def write_official(
    folder: Path,
    family: str,
    *,
    large: bool = False,
    dtype=torch.float32,
    tokenizer: bool = True,
    template: str = "internvl2_5",
    tile: int = TILE,
    patch: int = PATCH,
    head_dim: int | None = None,
) -> Path:
    """Write a checkpoint; `large` gives the 6B tower's norms, `head_dim` heads of another size than hidden_size / heads."""
    folder.mkdir(parents=True)
    made = small_processor(TEXTS, image_size=tile, patch_size=patch).tokenizer
    words = len(made)
    shapes = {f"vision_model.{name}": shape for name, shape in tower_shapes(large, tile, patch).items()}
    joined = 4 * TOWER
    shapes |= {"mlp1.0.weight": (joined,), "mlp1.0.bias": (joined,), "mlp1.1.weight": (WIDTH, joined), "mlp1.1.bias": (WIDTH,)}
    shapes |= {"mlp1.3.weight": (WIDTH, WIDTH), "mlp1.3.bias": (WIDTH,)}
    shapes |= {
        f"language_model.{name}": shape for name, shape in language_shapes(family, words, head_dim or WIDTH // HEADS).items()
    }
    generator = torch.Generator().manual_seed(0)
    tensors = {name: (torch.randn(shape, generator=generator) * 0.3).to(dtype) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    llm = {
        "architectures": [CLASSES[family]],
        "model_type": family,
        "vocab_size": words,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": SHARED,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "use_cache": False,
        "bias": False,
        "attn_implementation": "flash_attention_2",
        "eos_token_id": 2,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if family == "internlm2":
        llm["rope_scaling"] = {"type": "dynamic", "factor": 2.0}
    if head_dim or family not in ("internlm2", "qwen2"):
        llm["head_dim"] = head_dim or WIDTH // HEADS
    if family == "qwen3_moe":
        llm |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": INNER, "norm_topk_prob": True}
    config = {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": tile,
        "llm_config": llm,
        "max_dynamic_patch": 6,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "template": template,
        "use_thumbnail": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "drop_path_rate": 0.1,
            "hidden_size": TOWER,
            "image_size": tile,
            "initializer_factor": 0.1,
            "intermediate_size": 4 * TOWER,
            "layer_norm_eps": 1e-6,
            "model_type": "intern_vit_6b",
            "norm_type": "rms_norm" if large else "layer_norm",
            "num_attention_heads": 2,
            "num_hidden_layers": LAYERS,
            "patch_size": patch,
            "qk_normalization": large,
            "qkv_bias": not large,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer:
        made.save_pretrained(folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        for name in (
            "start_image_token",
            "end_image_token",
            "context_image_token",
            "video_token",
            "extra_special_tokens",
            "chat_template",
        ):
            settings.pop(name, None)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    return folder
