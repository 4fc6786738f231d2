"""The keys of official configs: each deleted, null and of another type is refused by name, or as in the official code."""

import copy
import json
import re
from pathlib import Path

import pytest
from datasets import Dataset, List
from datasets import Image as ImageColumn
from official_checkpoints import write_official
from PIL import Image
from transformers import AutoProcessor

from mpo.encoding.costs import measure
from mpo.encoding.encoder import Encoder
from mpo.models.loading import load_model, load_processor
from mpo.models.official.config import transformers_config
from mpo.models.official.convert import convert
from mpo.models.official.names import expected_shapes
from mpo.models.official.schema import parse

FILE = "somewhere/config.json"
DELETED = object()
WRONG = (DELETED, None, "x", 0, -1, 1.5, True, [], {"a": 1})
CHAT, TEXT, VISION = None, "llm_config", "vision_config"

# Defaults of the official code: InternVLChatConfig, InternVisionConfig, and the config classes of the language models.
DEFAULTS = {
    (CHAT, "force_image_size"): None,
    (CHAT, "select_layer"): -1,
    (CHAT, "downsample_ratio"): 0.5,
    (CHAT, "dynamic_image_size"): False,
    (CHAT, "min_dynamic_patch"): 1,
    (CHAT, "max_dynamic_patch"): 6,
    (CHAT, "use_thumbnail"): False,
    (VISION, "hidden_size"): 3200,
    (VISION, "intermediate_size"): 12_800,
    (VISION, "num_hidden_layers"): 48,
    (VISION, "num_attention_heads"): 25,
    (VISION, "image_size"): 224,
    (VISION, "patch_size"): 14,
    (VISION, "hidden_act"): "gelu",
    (VISION, "norm_type"): "rms_norm",
    (VISION, "layer_norm_eps"): 1e-6,
    (VISION, "qkv_bias"): False,
    (VISION, "qk_normalization"): True,
    (VISION, "attention_dropout"): 0.0,
    (VISION, "initializer_factor"): 0.1,
    (TEXT, "hidden_act"): "silu",
    (TEXT, "rms_norm_eps"): 1e-6,
    (TEXT, "rope_theta"): 10_000.0,
    (TEXT, "tie_word_embeddings"): False,
    (TEXT, "rope_scaling"): None,
    (TEXT, "norm_topk_prob"): False,
    (TEXT, "decoder_sparse_step"): 1,
    (TEXT, "use_sliding_window"): False,
}
OF_MODEL = {
    ("internlm2", "bias"): ("attention_bias", True),
    ("internlm2", "max_position_embeddings"): ("max_position_embeddings", 2048),
    ("internlm3", "max_position_embeddings"): ("max_position_embeddings", 32_768),
    ("llama", "max_position_embeddings"): ("max_position_embeddings", 2048),
    ("qwen2", "max_position_embeddings"): ("max_position_embeddings", 32_768),
    ("qwen3", "max_position_embeddings"): ("max_position_embeddings", 32_768),
    ("qwen3", "head_dim"): ("head_dim", 128),
    ("qwen3_moe", "max_position_embeddings"): ("max_position_embeddings", 32_768),
}
REQUIRED = {  # beside the two groups, ps_version (whose default, v1, is not supported) and template
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "num_experts", "num_experts_per_tok", "moe_intermediate_size",
}  # fmt: skip
PROCESSOR = {"template", "dynamic_image_size", "min_dynamic_patch", "max_dynamic_patch", "use_thumbnail"}
NULL = {"rope_scaling", "num_key_value_heads", "head_dim", "force_image_size", "torch_dtype", "architectures", "model_type"}
"""Keys whose null has a meaning."""
OURS = {"qkv_bias": "attention_bias", "qk_normalization": "use_qk_norm", "initializer_factor": "layer_scale_init_value"}


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def write_config(folder: Path, config: dict) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def read(config: dict):
    official = parse(config, FILE)
    return official, transformers_config(official, image_token_id=5, where=FILE)


def unlike_defaults(config: dict) -> dict:
    """No value is the official default, so that a default is seen."""
    config |= {"select_layer": -2, "use_thumbnail": True, "min_dynamic_patch": 2, "max_dynamic_patch": 7}
    config["vision_config"] |= {"hidden_act": "relu", "layer_norm_eps": 1e-5, "attention_dropout": 0.2, "initializer_factor": 0.3}
    config["llm_config"] |= {"hidden_act": "gelu", "rms_norm_eps": 1e-5}
    config["llm_config"]["rope_scaling"] = {"type": "dynamic", "factor": 2.0}
    if config["llm_config"]["model_type"].startswith("qwen"):
        config["llm_config"] |= {"use_sliding_window": True, "tie_word_embeddings": True}
    if config["llm_config"]["model_type"] == "qwen3_moe":
        config["llm_config"] |= {"decoder_sparse_step": 2}
    return config


@pytest.mark.parametrize("family", ["internlm2", "internlm3", "llama", "qwen2", "qwen3", "qwen3_moe"])
def test_every_key_deleted_null_and_of_another_type(tmp_path, family):
    """An accepted value gives the official default, the same model (keys that decide nothing), or is of the key's type."""
    whole = unlike_defaults(config_of(write_official(tmp_path / "official", family)))
    official, config = read(whole)
    unchanged, settings = config.to_dict(), official.model_dump(include=PROCESSOR)
    for part in (CHAT, TEXT, VISION):
        group = whole if part is None else whole[part]
        for key, value in group.items() if part == TEXT or family == "qwen2" else ():  # those are the same for every family
            for wrong in WRONG if family == "qwen2" or re.search("bias|expert|moe|topk|sparse", key) else WRONG[:3]:
                changed = copy.deepcopy(whole)
                target = changed if part is None else changed[part]
                if wrong is DELETED:
                    del target[key]
                else:
                    target[key] = wrong
                case = f"{family}, {part}, {key}: {wrong!r}"
                try:
                    official, config = read(changed)
                    if config.to_dict() != unchanged:
                        expected_shapes(config, FILE)
                except ValueError as error:
                    assert FILE in str(error) and (key in str(error) or wrong == 1.5), f"{case}: {error}"
                    assert (
                        wrong is not DELETED
                        or key in REQUIRED | {TEXT, VISION, "ps_version", "template"}
                        or any((of, key) in DEFAULTS for of in (CHAT, TEXT, VISION))
                    ), case
                    continue
                assert wrong is not DELETED or part is VISION or key not in REQUIRED, case
                same = (config.to_dict(), official.model_dump(include=PROCESSOR)) == (unchanged, settings)
                if wrong is DELETED and (family, key) in OF_MODEL and part == TEXT:
                    ours, default = OF_MODEL[family, key]
                    assert getattr(config.text_config, ours) == default, case
                elif wrong is DELETED and (part, key) in DEFAULTS:
                    assert found(official, config, part, key) == DEFAULTS[part, key], case
                else:
                    typed = type(wrong) is type(value) or (type(value) is float and type(wrong) is int)
                    assert same or typed or (wrong is None and key in NULL) or key in ("bias", "eos_token_id", "head_dim"), case


def found(official, config, part, key):
    """The setting that a model and a processor are made with."""
    if part is CHAT:
        return getattr(official, key)
    if part is VISION:
        value = getattr(config.vision_config, OURS.get(key, key))
        return value[0] if key in ("image_size", "patch_size") else value
    rope = config.text_config.rope_parameters
    if key == "rope_scaling":
        return None if rope["rope_type"] == "default" else rope
    return rope["rope_theta"] if key == "rope_theta" else getattr(config.text_config, key)


SETTINGS = {"dynamic_image_size": False, "max_dynamic_patch": 6, "min_dynamic_patch": 1}


@pytest.mark.parametrize("converted", [False, True])
def test_without_dynamic_image_size_an_image_is_one_tile(tmp_path, converted):
    """In the processor, the costs, the encoded record and generation; a limit that is given wins."""
    folder = write_official(tmp_path / "official", "qwen2")
    write_config(folder, config_of(folder) | SETTINGS)
    if converted:
        convert(folder, tmp_path / "ours", compare=False, progress=False)
        folder = tmp_path / "ours"
    loaded = load_model(str(folder))
    wide = Image.new("RGB", (128, 32))
    text = loaded.processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], tokenize=False)
    inputs = loaded.processor(text=text, images=[wide], return_tensors="pt")
    assert len(inputs["pixel_values"]) == 1
    if converted:
        saved = AutoProcessor.from_pretrained(folder)  # other software's
        assert len(saved(text=text, images=[wide], return_tensors="pt")["pixel_values"]) == 1
    assert loaded.model.generate(**inputs, max_new_tokens=1).shape[1] == inputs["input_ids"].shape[1] + 1
    messages = {"prompt": [{"role": "user", "content": "?"}], "chosen": [{"role": "assistant", "content": "a"}]}
    record = {**messages, "rejected": [{"role": "assistant", "content": "b"}], "images": [wide]}
    (pair,), _, _ = Encoder(loaded.processor)([record])
    assert pair.prompt_ids.count(loaded.processor.image_token_id) == 4
    costs = measure(Dataset.from_list([record]).cast_column("images", List(ImageColumn())), loaded.processor)
    assert costs.tiles.tolist() == [1]
    limited = load_processor(str(folder), max_tiles=4)
    assert len(limited(text=text, images=[wide], return_tensors="pt")["pixel_values"]) == 5
