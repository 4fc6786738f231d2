"""Fingerprints change with everything a log-prob depends on, and with nothing else."""

import copy
import io

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from support import TEXTS, make_image, perturbed
from transformers import AutoModelForImageTextToText, AutoProcessor

from mpo.encoding.keys import completion_key, image_key
from mpo.models.small import small_internvl, small_processor
from mpo.training.reference.fingerprint import Fingerprint, fingerprint

SCORING = {"completion_end": "end_of_turn", "max_length": None, "truncation_mode": "keep_start"}


def of(model, processing, **changes) -> Fingerprint:
    return fingerprint(model, processing, compute_dtype=changes.pop("dtype", torch.float32), scoring={**SCORING, **changes})


@pytest.fixture(scope="module")
def model(processor):
    return small_internvl(processor, hidden_size=32, vision_hidden_size=32)


@pytest.fixture(scope="module")
def start(model, processor) -> Fingerprint:
    return of(model, processor)


def test_what_it_says_about_itself(start, processor):
    """`mpo cache inspect` shows these."""
    assert start.about["model"] == "InternVLForConditionalGeneration"
    assert start.about["chat_template"] == processor.chat_template
    assert start.about["reference_adapter"] is False
    assert start.settings["image processor"]["image_processor"]["max_patches"] == 4


# What changes it, and only in its own part


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_one_number_by_one_ulp(model, processor, start, kind):
    changed = copy.deepcopy(model)
    tensors = changed.named_parameters() if kind == "parameter" else changed.named_buffers()
    tensor = [tensor for name, tensor in tensors if not name.endswith(".inv_freq")][-1].detach()
    tensor.view(-1)[-1] = torch.nextafter(tensor.view(-1)[-1], torch.tensor(torch.inf))
    assert of(changed, processor).differences(start) == ["model weights"]


def test_two_weights_of_one_shape_swapped(model, processor, start):
    changed = copy.deepcopy(model)
    first, second = changed.model.language_model.layers
    first.mlp.gate_proj.weight.data, second.mlp.gate_proj.weight.data = (
        second.mlp.gate_proj.weight.data,
        first.mlp.gate_proj.weight.data,
    )
    assert of(changed, processor).differences(start) == ["model weights"]


def test_the_dtype_of_weights_and_of_computing(model, processor, start):
    assert of(copy.deepcopy(model).bfloat16(), processor).differences(start) == ["model weights"]
    assert of(model, processor, dtype="bfloat16").differences(start) == ["compute dtype (float32 -> bfloat16)"]


def test_a_setting_of_the_forward(model, processor, start):
    changed = copy.deepcopy(model)
    changed.config.text_config.rms_norm_eps = 1e-5
    assert of(changed, processor).differences(start) == ["model config (config.text_config.rms_norm_eps 1e-06 -> 1e-05)"]


def test_the_chat_template(model, processor, start):
    changed = copy.deepcopy(processor)
    changed.chat_template += " "
    assert of(model, changed).differences(start) == ["chat template"]


@pytest.mark.parametrize("name, value, told", [("max_patches", 6, "4 -> 6"), ("image_mean", [0.5] * 3, "-> [0.5, 0.5, 0.5]")])
def test_a_setting_of_the_image_processor(model, processor, start, name, value, told):
    changed = copy.deepcopy(processor)
    setattr(changed.image_processor, name, value)
    (difference,) = of(model, changed).differences(start)
    assert difference.startswith(f"image processor (image_processor.{name}") and told in difference


def test_the_tokenizer(model, processor, start):
    changed = copy.deepcopy(processor)
    changed.tokenizer.add_tokens(["<mark>"])
    assert of(model, changed).differences(start) == ["tokenizer"]
    other = small_processor([*TEXTS, "other words altogether, other merges"], max_patches=4, patch_size=8)
    assert "tokenizer" in of(model, other).differences(start)
    assert "tokenizer" in of(model, small_processor(TEXTS, max_patches=4, eos_token="<|endoftext|>")).differences(start)


def test_how_answers_are_scored(model, processor, start):
    difference = of(model, processor, completion_end="template", max_length=64).differences(start)
    assert difference == ['scoring (completion_end "end_of_turn" -> "template", max_length null -> 64)']


# What does not change it


def test_saved_and_loaded_from_another_path(model, processor, start, tmp_path):
    model.save_pretrained(tmp_path / "elsewhere")
    processor.save_pretrained(tmp_path / "elsewhere")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "elsewhere")
    again = of(loaded, AutoProcessor.from_pretrained(tmp_path / "elsewhere"))
    assert again.differences(start) == []
    assert again.digest == start.digest


def test_a_copy_in_another_mode_with_dropout_and_special_tokens_and_another_attention(model, processor, start):
    changed = copy.deepcopy(model).train()
    changed.config.text_config.attention_dropout = 0.1
    changed.config.text_config.use_cache = False
    changed.config.eos_token_id = changed.config.text_config.eos_token_id = 3  # a trainer aligns them with the tokenizer's
    changed.set_attn_implementation("eager")
    changed.gradient_checkpointing_enable()
    changed.requires_grad_(False)
    assert of(changed, processor).differences(start) == []


def test_having_been_used(model, processor, start):
    used_model, used = copy.deepcopy(model), copy.deepcopy(processor)
    inputs = used(
        images=[make_image(0)], text=["<IMG_CONTEXT>\nWhat?"], padding=True, truncation=True, max_length=99, return_tensors="pt"
    )
    with torch.no_grad():
        used_model(**inputs)
    assert of(used_model, used).differences(start) == []


def test_a_tokenizer_alone(model, processor):
    both = of(model, processor.tokenizer)
    assert both.differences(of(model, copy.deepcopy(processor.tokenizer))) == []


def test_a_number_that_a_module_holds(model, processor, start):
    """The config does not know of it."""
    changed = copy.deepcopy(model)
    next(module for module in changed.modules() if isinstance(module, torch.nn.LayerNorm)).eps *= 2
    assert [part.split(" (")[0] for part in of(changed, processor).differences(start)] == ["model config"]


# Adapters


def lora(model, **settings):
    return get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj", "v_proj"], r=2, **settings))


def injected(model, seed: int):
    """A plain model with LoRA layers in it, no PeftModel around them, as `ref_model` may be."""
    torch.manual_seed(seed)
    return perturbed(lora(model), seed=seed).get_base_model()


def test_adapters_in_a_plain_model_are_part_of_it(model, processor, start):
    first, second = of(injected(model, 1), processor), of(injected(model, 2), processor)
    assert {part.split(" (")[0] for part in first.differences(start)} == {"model config", "model weights"}
    assert second.differences(first) == ["model weights"]
    assert of(injected(model, 1), processor).differences(first) == []


@pytest.mark.parametrize("name", ["lora_A", "lora_B", "modules_to_save", "lora_magnitude_vector"])
def test_every_tensor_of_an_adapter_counts(model, processor, name):
    trained = lora(model, modules_to_save=["lm_head"], use_dora=True)
    first = of(trained, processor)
    next(value for key, value in trained.named_parameters() if name in key).data.add_(1e-3)
    assert of(trained, processor).differences(first) == ["model weights"]


@pytest.mark.parametrize("change", ["scale", "off", "merged", "another adapter is active"])
def test_what_an_adapter_is_set_to_counts(model, processor, change):
    adapted = lora(model)
    adapted.add_adapter("other", LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    first = of(adapted, processor)
    if change == "scale":
        layer = next(module for module in adapted.modules() if hasattr(module, "scaling"))
        layer.set_scale("default", 3)
    elif change == "off":
        adapted.base_model.disable_adapter_layers()
    elif change == "merged":
        adapted.merge_adapter()
    else:
        adapted.set_adapter("other")
    assert any(part.startswith("model config") for part in of(adapted, processor).differences(first))


def test_mode_and_dropout_of_an_adapter_do_not_count(model, processor):
    adapted = lora(model)
    first = of(adapted.train(), processor)
    assert of(adapted.eval(), processor).differences(first) == []


def test_a_cache_of_an_earlier_version_is_another_one(start):
    """Values from before the reference was always evaluated had noise and drift in them."""
    earlier = Fingerprint({part: value for part, value in start.parts.items() if part != "format"})
    assert start.digest != earlier.digest
    assert start.differences(earlier) == ["format"]


def test_weights_that_are_not_loaded_are_refused(processor, model):
    with pytest.raises(ValueError, match="not loaded"):
        of(copy.deepcopy(model).to("meta"), processor)


def test_sharded_weights_are_refused(processor, model):
    sharded = copy.deepcopy(model)
    weight = sharded.lm_head.weight
    weight.data, weight.ds_id = torch.empty(0), 7  # what ZeRO-3 leaves on every rank
    with pytest.raises(ValueError, match="model is prepared"):
        of(sharded, processor)


def test_a_setting_without_a_lasting_value_is_refused(processor, model):
    with pytest.raises(ValueError, match="the scoring, completion_end"):
        of(model, processor, completion_end=object())


def test_tied_weights(processor, tmp_path):
    tied = small_internvl(processor, hidden_size=32, vision_hidden_size=32, tie_word_embeddings=True)
    tied.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert of(loaded, processor).differences(of(tied, processor)) == []


def test_a_model_in_four_bits(processor, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    model = small_internvl(processor, hidden_size=64, vision_hidden_size=64)
    start = of(model, processor)
    model.save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)

    def load():
        return AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=settings).eval()

    quantized = load()
    first = of(quantized, processor)
    assert {part.split(" (")[0] for part in first.differences(start)} == {"model config", "model weights"}
    assert of(quantized, processor).differences(first) == []
    assert of(load(), processor).differences(first) == []
    layer = next(module for module in quantized.modules() if type(module).__name__ == "Linear4bit")
    layer.weight.quant_state.absmax.view(-1)[0] += 1
    assert of(quantized, processor).differences(first) == ["model weights"]


# Images and completions


def test_one_pixel_changes_an_image():
    first, second = make_image(0), make_image(0)
    assert image_key(first) == image_key(second) and len(image_key(first)) == 16
    red, green, blue = second.getpixel((3, 4))
    second.putpixel((3, 4), (red, green, blue ^ 1))
    assert image_key(first) != image_key(second)


def test_the_same_bytes_in_another_shape_or_mode_are_another_image():
    pixels = make_image(0, width=64, height=32)
    wide = Image.frombytes("RGB", (32, 64), pixels.tobytes())
    grey = Image.frombytes("L", (192, 32), pixels.tobytes())
    assert len({image_key(pixels), image_key(wide), image_key(grey)}) == 3


def test_a_palette_counts():
    first = make_image(0).quantize(4)
    second = first.copy()
    second.putpalette([255 - value for value in first.getpalette()])
    assert first.tobytes() == second.tobytes()
    assert image_key(first) != image_key(second)


def test_a_file_by_path_by_bytes_and_as_datasets_has_it(tmp_path):
    path = tmp_path / "image.png"
    make_image(0).save(path)
    data = path.read_bytes()
    forms = [path, str(path), data, {"bytes": data, "path": None}, {"bytes": None, "path": str(path)}, {"bytes": data, "path": "x"}]
    assert len({image_key(form) for form in forms}) == 1
    opened, loaded = Image.open(path), Image.open(io.BytesIO(data))
    assert image_key(opened) == image_key(loaded) == image_key(make_image(0))


def test_arrays():
    pixels = np.asarray(make_image(0))
    assert image_key(pixels) == image_key(torch.from_numpy(pixels.copy()))
    assert image_key(pixels) != image_key(pixels.transpose(1, 0, 2))


@pytest.mark.parametrize("wrong", ["nowhere/image.png", 3, None, {"path": None}])
def test_what_is_no_image_is_refused(wrong):
    with pytest.raises(ValueError, match="image"):
        image_key(wrong)


def test_an_answer_s_key_holds_all_it_depends_on():
    first, second = image_key(make_image(0)), image_key(make_image(1))
    keys = [
        completion_key([first], [1, 2], [3, 4], [True, True]),
        completion_key([second], [1, 2], [3, 4], [True, True]),
        completion_key([first, second], [1, 2], [3, 4], [True, True]),
        completion_key([second, first], [1, 2], [3, 4], [True, True]),
        completion_key([], [1, 2], [3, 4], [True, True]),
        completion_key([first], [1, 5], [3, 4], [True, True]),
        completion_key([first], [1, 2], [3, 5], [True, True]),
        completion_key([first], [1, 2], [3, 4], [True, False]),
        completion_key([first], [1], [2, 3, 4], [False, True, True]),
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == completion_key([first], torch.tensor([1, 2]), np.array([3, 4]), [1, 1])
