"""InternVL and LLaVA whose projector reads several layers of the tower: the right ones, saved, generated with, and trained."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_runs import small_run
from support import TEXTS
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    AutoProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from mpo.commands.export import serving
from mpo.models import add_fuser
from mpo.models.export.run import export
from mpo.models.family import family_of
from mpo.models.fused import InternVLFuserConfig, InternVLWithFuser, LlavaFuserConfig, LlavaWithFuser, fused_config
from mpo.models.lazily import announce
from mpo.models.loading import load_internvl
from mpo.models.mmfuser import MMFuser
from mpo.models.official.convert import convert
from mpo.models.packable import why_not
from mpo.models.parts import freeze_parts
from mpo.models.small import small_internvl, small_processor
from mpo.models.tower import SharedTower, can_share, tower_layers
from mpo.training.job import TrainJob


@pytest.fixture(scope="module")
def processor():
    return small_processor(TEXTS, image_size=32, patch_size=8, max_patches=4)


def internvl(processor, layers=4, large=False):
    """`large`: with the norms of the 6B tower."""
    model = small_internvl(processor, hidden_size=32, layers=2, vision_hidden_size=32, vision_layers=layers)
    if large:
        model.config.vision_config.update({"use_qk_norm": True, "norm_type": "rms_norm", "attention_bias": False})
        torch.manual_seed(0)
        model = type(model)(model.config)
    return model.eval()


def llava(layers=4, vision_sizes=None, **settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    vision = {"model_type": "clip_vision_model", **sizes, "num_hidden_layers": layers, "image_size": 28, "patch_size": 7}
    vision |= vision_sizes or {}
    text = {"model_type": "llama", **sizes, "num_hidden_layers": 2, "vocab_size": 100}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=5, image_seq_length=16, **settings)
    return LlavaForConditionalGeneration(config).eval()


def build(kind, processor, **settings):
    return internvl(processor, large=kind == "internvl 6B") if kind.startswith("internvl") else llava(**settings)


def woken(model, scale=0.5):
    """With weights in the fuser that have an effect."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.model.fuser.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * scale)
    return model


def pixels_of(model, tiles=2):
    size = model.config.vision_config.image_size
    size = size if isinstance(size, int) else size[0]
    return torch.randn(tiles, 3, size, size, generator=torch.Generator().manual_seed(3)).to(model.dtype)


@torch.no_grad()
def features_of(model, **settings):
    return torch.stack(list(model.get_image_features(pixels_of(model), return_dict=True, **settings).pooler_output))


@pytest.mark.parametrize("feature_layer", [-1, -2, 3])
@pytest.mark.parametrize("kind", ["internvl", "internvl 6B", "llava"])
def test_a_new_fuser_changes_nothing(processor, kind, feature_layer):
    """Nor does a concatenation in a LLaVA; InternVL's layer norm spans the new channels. The query is what the projector read."""
    plain = build(kind, processor)
    plain.config.vision_feature_layer = feature_layer
    expected = features_of(plain)
    fused = add_fuser(plain, 2)
    assert type(fused) is (LlavaWithFuser if kind == "llava" else InternVLWithFuser)
    assert torch.equal(features_of(fused), expected)
    again = build(kind, processor)
    again.config.vision_feature_layer = feature_layer
    wide = add_fuser(again, 2, fusion="concat")
    assert not hasattr(wide.model, "fuser")
    assert (features_of(wide) - expected).norm() < (1e-5 if kind == "llava" else 1) * expected.norm()


@pytest.mark.parametrize("fusion", ["mmfuser", "concat"])
@pytest.mark.parametrize("kind", ["internvl", "internvl 6B", "llava"])
@torch.no_grad()
def test_the_layers_that_are_read(processor, kind, fusion):
    """Hidden state 0 is the embeddings' output, hidden state i that of the i-th layer: noise after the last one that is read has no
    effect, and noise in each of those has one. The tower's own path is cut, so that a change of one state does not reach others."""
    fused = add_fuser(build(kind, processor, vision_feature_layer=3), [0, 1, 3] if kind == "llava" else [0, 2, -1], fusion=fusion)
    if fusion == "mmfuser":
        woken(fused)
    else:
        fused.model.multi_modal_projector.linear_1.weight.add_(torch.randn_like(fused.model.multi_modal_projector.linear_1.weight))
    plain = fused.model.vision_tower
    states = plain(pixels_of(fused), output_hidden_states=True).hidden_states
    assert len(states) == 5
    expected = features_of(fused)
    for index in range(5):
        changed = list(states)
        changed[index] = torch.randn_like(states[index])

        class Cut(torch.nn.Module):
            dtype = plain.dtype

            def forward(self, pixels, changed=changed, **kwargs):
                output = plain(pixels, output_hidden_states=True)
                output.hidden_states, output.last_hidden_state = tuple(changed), changed[-1]
                return output

        fused.model.vision_tower = Cut()
        assert torch.equal(features_of(fused), expected) is (index not in fused.config.fuser_layers), index
    fused.model.vision_tower = plain
    first = []
    hook = tower_layers(fused)[0].register_forward_pre_hook(lambda layer, args: first.append(args[0]))
    kept = plain(pixels_of(fused), output_hidden_states=fused.config.fuser_layers).hidden_states
    hook.remove()
    assert torch.equal(kept[0], first[0])
    assert all(torch.equal(kept[index], states[index]) for index in fused.config.fuser_layers)
    assert [index for index, state in enumerate(kept) if state is not None] == fused.config.fuser_layers


def test_what_the_model_had_stays(processor):
    """Attention, tied embeddings, what is frozen, and the mode; the caller's random state too. Any whole numbers are indices."""
    plain = small_internvl(processor, hidden_size=32, layers=2, vision_hidden_size=32, vision_layers=4, tie_word_embeddings=True)
    plain.set_attn_implementation("eager")
    freeze_parts(plain.train(), {"vision": "freeze"})
    state = torch.random.get_rng_state()
    fused = add_fuser(plain, [np.int64(1), np.int64(-1)])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert fused.config.fuser_layers == [1, 4] and fused.training
    assert fused.lm_head.weight is fused.get_input_embeddings().weight
    configs = (fused.config, fused.config.vision_config, fused.config.text_config)
    assert {config._attn_implementation for config in configs} == {"eager"}
    assert tower_layers(fused)[0].attention.config is fused.config.vision_config
    assert not any(parameter.requires_grad for parameter in fused.model.vision_tower.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert fused.get_image_features(pixels_of(fused), return_dict=True).pooler_output.dtype == torch.bfloat16


def test_a_frozen_tower_builds_no_graph(processor):
    """Also when a hook makes its inputs require gradients; nothing of it is kept with the output."""
    fused = woken(add_fuser(internvl(processor), 2))
    freeze_parts(fused, {"vision": "freeze"})
    fused.enable_input_require_grads()
    seen = []
    fused.model.fuser.register_forward_pre_hook(lambda module, args: seen.extend(args[0]))
    output = fused.get_image_features(pixels_of(fused), return_dict=True)
    assert [feature.requires_grad for feature in seen] == [False] * 3
    assert output.pooler_output.requires_grad and output.hidden_states is None
    freeze_parts(fused, {"fuser": "freeze", "projector": "freeze"})
    assert not fused.get_image_features(pixels_of(fused), return_dict=True).pooler_output.requires_grad
    assert len(fused.get_image_features(pixels_of(fused), return_dict=True, output_hidden_states=True).hidden_states) == 5


@pytest.mark.parametrize(
    "kind, fusion", [("internvl", "mmfuser"), ("internvl 6B", "mmfuser"), ("llava", "mmfuser"), ("internvl", "concat")]
)
def test_save_and_load(processor, tmp_path, kind, fusion):
    """Bit for bit, in bfloat16 and in several files; with its processor, by transformers' and the library's loaders."""
    fused = add_fuser(build(kind, processor), 2, fusion=fusion)
    fused = (woken(fused) if fusion == "mmfuser" else fused).bfloat16()
    fused.save_pretrained(tmp_path, max_shard_size=40_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    if kind != "llava":
        processor.save_pretrained(tmp_path)
        assert type(AutoProcessor.from_pretrained(tmp_path)) is type(processor)
    for load in (AutoModelForImageTextToText.from_pretrained, load_internvl):
        loaded = load(str(tmp_path))
        assert type(loaded) is type(fused) and loaded.dtype == torch.bfloat16
        assert (loaded.config.fuser_layers, loaded.config.fusion) == ([1, 2, 3] if kind == "llava" else [2, 3, 4], fusion)
        state, expected = loaded.state_dict(), fused.state_dict()
        assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)
        assert torch.equal(features_of(loaded.eval()), features_of(fused))


@pytest.mark.parametrize("kind", ["internvl", "llava"])
def test_a_class_without_fuser_refuses_one(processor, tmp_path, kind):
    """It would leave out the fuser's weights with a warning. The message says what to do, with `import mpo` or without."""
    fused = add_fuser(build(kind, processor), 2)
    fused.save_pretrained(tmp_path)
    for plain in type(fused).__mro__[1], type(fused.model).__mro__[2], type(fused.config).__mro__[2]:
        assert plain.__module__.startswith("transformers.")
        with pytest.raises(Exception, match=r"(?s)vision_feature_layer.*import mpo, and load by AutoModelForImageTextToText"):
            plain.from_pretrained(tmp_path)
    assert type(fused).from_pretrained(tmp_path).config.vision_feature_layer == fused.config.vision_feature_layer
    path = tmp_path / "config.json"  # as saved before there was the note
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vision_feature_layer": fused.config.vision_feature_layer}))
    assert load_internvl(str(tmp_path)).config.to_dict() == type(fused).from_pretrained(tmp_path).config.to_dict()


def test_a_plain_transformers_says_what_it_lacks(processor, tmp_path, monkeypatch):
    """And with `import mpo` alone, before or after transformers, it just loads; that import brings in neither of torch and it."""
    add_fuser(internvl(processor), 2).save_pretrained(tmp_path)
    for table in (CONFIG_MAPPING._extra_content, CONFIG_MAPPING_NAMES):
        monkeypatch.delitem(table, "internvl_mmfuser", raising=False)
    with pytest.raises(ValueError, match="`internvl_mmfuser`"):
        AutoModelForImageTextToText.from_pretrained(tmp_path)
    announce()
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path)) is InternVLWithFuser
    lines = (
        "import sys, mpo",
        "assert not {'torch', 'transformers'} & {*sys.modules}",
        "from transformers import AutoModelForImageTextToText",
        "assert 'mpo.models.fused' not in sys.modules",
        f"print(type(AutoModelForImageTextToText.from_pretrained({str(tmp_path)!r})).__name__)",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.stdout == "InternVLWithFuser\n", done.stderr


@pytest.mark.parametrize("kind", ["internvl", "llava"])
def test_generate(processor, kind):
    """With cache and several images, as without a cache; another image changes what is said."""
    fused = woken(add_fuser(build(kind, processor), 2))
    image = processor.image_token_id if kind == "internvl" else 5
    tokens = 4 if kind == "internvl" else 16
    ids = torch.tensor([[7, *[image] * tokens, 8, *[image] * tokens, 9]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    pixels = pixels_of(fused)
    scores = {"output_scores": True, "return_dict_in_generate": True, "pad_token_id": 0, "eos_token_id": None}
    cached, whole, other = (
        fused.generate(**inputs, **scores, pixel_values=given, use_cache=cache)
        for given, cache in ((pixels, True), (pixels, False), (pixels.flip(0), True))
    )
    assert torch.equal(cached.sequences, whole.sequences) and cached.sequences.shape[1] == ids.shape[1] + 6
    torch.testing.assert_close(torch.stack(cached.scores), torch.stack(whole.scores))
    assert not torch.allclose(cached.scores[0], other.scores[0])


@pytest.mark.parametrize("kind", ["internvl", "llava"])
@torch.no_grad()
def test_the_tower_is_shared_though_the_fuser_trains(processor, kind):
    """The reference's fuser reads the hidden states of the policy's pass, with its own weights."""
    policy, reference = (woken(add_fuser(build(kind, processor), 2), scale=scale) for scale in (0.5, 0.2))
    freeze_parts(policy, {"vision": "freeze"})
    assert can_share(policy)
    image, tokens = (processor.image_token_id, 4) if kind == "internvl" else (5, 16)
    inputs = {"input_ids": torch.tensor([[7, *[image] * 2 * tokens, 8]]), "pixel_values": pixels_of(policy)}
    expected = [model(**inputs).logits for model in (policy, reference)]
    tower = SharedTower(policy, reference)
    assert torch.equal(policy(**inputs).logits, expected[0])
    inputs["pixel_values"].fill_(torch.nan)
    with tower.playing():
        assert torch.equal(reference(**inputs).logits, expected[1])
    assert not torch.allclose(*expected)


def test_parts(processor):
    """The fuser is a part: trained alone, frozen, with its own rate, never quantized or adapted."""
    fused = add_fuser(internvl(processor), 2)
    family = family_of(fused.config, "train_parts")
    own = {name for name, _ in fused.named_parameters() if family.part_of(name) == "fuser"}
    assert own == {f"model.fuser.{name}" for name, _ in fused.model.fuser.named_parameters()}
    assert any(re.match(pattern, "model.fuser.cross_attn.value_proj") for pattern in family.not_quantized())
    freeze_parts(fused, {"vision": "freeze", "projector": "freeze", "language": "freeze", "head": "freeze"})
    assert {name for name, parameter in fused.named_parameters() if parameter.requires_grad} == own
    wide = add_fuser(internvl(processor), 2, fusion="concat")
    freeze_parts(wide, {"fuser": "train", "projector": "train"})  # the projector fuses, so the stages of MMFuser are its too
    for model, choices in ((internvl(processor), {"fuser": "train"}), (wide, {"fuser": "train", "projector": "freeze"})):
        with pytest.raises(ValueError, match="train_parts.fuser.*no such part"):
            freeze_parts(model, choices)
    job = TrainJob(model={}, data={}, peft={"kind": "lora"}, train_parts={"fuser": "train"})
    for without in (internvl(processor), wide):
        with pytest.raises(ValueError, match="train_parts.fuser: a internvl"):
            job.family(without.config)
    assert job.family(fused.config) is family
    assert why_not(fused) is None and why_not(add_fuser(llava(), 2)) is None


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_training_in_packed_rows(tmp_path, processor, kind):
    """A run with a rate for the fuser, with a shared tower; it is trained whole beside an adapter, and merged in the export."""
    base = add_fuser(internvl(processor, layers=2), 1)
    base.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    choices = {"language": "lora", "fuser": "train"} if kind == "lora" else {"vision": "freeze"}
    job = TrainJob(model={}, data={}, peft={"kind": kind.replace("full", "none")}, train_parts=choices)
    model = load_internvl(str(tmp_path / "base"))
    job.freeze(model)
    args = {"frozen_tower": True, "warmup_steps": 0, "max_steps": 2, "fuser_learning_rate": 1e-2, "verify_first_batch": True}
    trainer = small_run(tmp_path / "run", model=model, peft_config=job.adapter(job.family(model.config)), **args)
    assert trainer.layout == "packed" and trainer._tower is not None
    trainer.train()
    trainer.save_model(str(tmp_path / "run"))
    done = export(tmp_path / "run", tmp_path / "out", base=str(tmp_path / "base"), progress=False)
    assert done.comparison.difference < 1e-4
    trained = load_internvl(str(tmp_path / "out")).model.fuser
    assert 5e-3 < trained.gamma1.abs().max() < 3e-2
    with pytest.raises(ValueError, match="official format.*internvl_mmfuser"):
        export(tmp_path / "run", tmp_path / "official", base=str(tmp_path / "base"), form="official", progress=False)
    with pytest.raises(ValueError, match="internvl_mmfuser.*official format"):
        convert(tmp_path / "out", tmp_path / "official", progress=False)
    assert not any("serve" in line for line in serving(done))  # no other library knows the type


def block(levels=2, width=32):
    fuser = MMFuser(width, num_levels=levels, num_points=2)
    with torch.no_grad():
        fuser.gamma1.fill_(0.5)
    return fuser.state_dict()


def test_official_weights(processor):
    weights = block()
    fused = add_fuser(llava(), [1, 2, 3], weights={f"model.mm_projector.0.{name}": tensor for name, tensor in weights.items()})
    assert fused.config.fuser_points == 2
    assert all(torch.equal(tensor, fused.model.fuser.state_dict()[name]) for name, tensor in weights.items())
    with pytest.raises(ValueError, match=r"3 shallow .* 32; fuser_layers=\[1, 2, 3\] are 2"):
        add_fuser(llava(), [1, 2, 3], weights=block(levels=3))
    with pytest.raises(ValueError, match="width 64; .*width 32"):
        add_fuser(llava(), [1, 2, 3], weights=block(width=64))


def test_levels_that_do_not_fit_a_checkpoint(processor, tmp_path):
    add_fuser(internvl(processor), 2).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "fuser_layers": [1, 2, 3, 4]}))
    with pytest.raises(ValueError, match="4 tensors of another shape .model.fuser.cross_attn.attention_weights.bias"):
        load_internvl(str(tmp_path))
    for wrong, message in (
        ({"fuser_layers": [3, 5]}, r"\[5\].*0 to 4"),
        ({"fusion": "sum"}, "fusion='sum'"),
        ({"fuser_heads": 5}, "5"),
    ):
        path.write_text(json.dumps({**config, **wrong}))
        with pytest.raises(ValueError, match=message):
            load_internvl(str(tmp_path))


@pytest.mark.parametrize(
    "layers, message",
    [
        ([1, 5], r"\[5\] .*0 to 4"),
        ([-6, -1], r"\[-6\]"),
        ([1, 1, 4], r"\[1, 1, 4\]"),
        ([1, -4, 4], r"\[1, -4, 4\]"),
        ([2, 1, 4], r"\[2, 1, 4\]"),
        ([4], r"two layers.*\[4\]"),
        ([], r"\[\]"),
        ([1, 2, 3], r"end with 4.*\[1, 2, 3\]"),
        ([1.0, 4], r"\[1.0, 4\]"),
        ([True, 4], r"\[True, 4\]"),
        (0, "1 to 3 .*got 0"),
        (4, "1 to 3 .*got 4"),
        (True, "got True"),
        ("1,4", "'1,4'"),
    ],
)
def test_layers_that_cannot_be(processor, layers, message):
    with pytest.raises(ValueError, match=message):
        add_fuser(internvl(processor), layers)


def test_models_that_cannot_have_a_fuser(processor):
    model = internvl(processor)
    fused = add_fuser(model, 2)
    for wrong, message in (
        (fused, r"already has .*\[2, 3, 4\]"),
        (model.model.language_model, "qwen2 has no vision tower"),
        (model.model, "got a InternVLModel"),
        (model.model.vision_tower, "'internvl_vision'"),
        (get_peft_model(internvl(processor), LoraConfig(target_modules=["q_proj"])), "PeftModel.*before the adapter"),
        (torch.nn.Linear(2, 2), "got a Linear"),
    ):
        with pytest.raises(ValueError, match=message):
            add_fuser(wrong, 2)
    with pytest.raises(ValueError, match="fusion='add'"):
        add_fuser(internvl(processor), 2, fusion="add")
    with pytest.raises(ValueError, match="fusion='concat'"):
        add_fuser(internvl(processor), 2, fusion="concat", weights=block())
    with pytest.raises(ValueError, match="width=32, num_heads=5"):
        add_fuser(internvl(processor), 2, num_heads=5)
    for sizes, message in (({"num_heads": 5}, "width=32, num_heads=5"), ({"num_points": 0}, "num_points=0")):
        with pytest.raises(ValueError, match=message):
            fused_config(internvl(processor).config, 2, **sizes)  # before weights are read
    assert fused_config(internvl(processor).config, 2, fusion="concat", num_heads=5).fusion == "concat"  # which has no heads
    with pytest.raises(ValueError, match=r"vision_feature_layer.*\[-2, -1\]"):
        add_fuser(llava(vision_feature_layer=[-2, -1]), 2)
    with pytest.raises(ValueError, match="vision_feature_layer=-1, .*got -2"):
        features_of(fused, vision_feature_layer=-2)
    for model in (fused, add_fuser(llava(), 2, fusion="concat")):
        with pytest.raises(ValueError, match=r"4 \* 4 tokens.* 17 .*'full'"):  # with the class token
            features_of(model, vision_feature_select_strategy="full")


@pytest.mark.parametrize("kind, depth", [("internvl", 24), ("internvl", 45), ("llava", 24)])
def test_the_grids_of_the_published_models(kind, depth):
    """A tile of 448 pixels has 32 x 32 patches, 256 tokens after the pixel shuffle; an image of CLIP ViT-L/14-336 24 x 24."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    text = {"model_type": "llama", **sizes, "num_hidden_layers": 1, "vocab_size": 50}
    if kind == "internvl":
        six = {"use_qk_norm": True, "norm_type": "rms_norm", "attention_bias": False} if depth == 45 else {}
        vision = {**sizes, "num_hidden_layers": depth, "image_size": [448, 448], "patch_size": [14, 14], **six}
        plain = InternVLForConditionalGeneration(InternVLConfig(vision_config=vision, text_config=text, image_token_id=3))
    else:
        plain = llava(depth, vision_sizes={"image_size": 336, "patch_size": 14})
    fused, seen = add_fuser(plain.eval()), []
    fused.model.fuser.register_forward_pre_hook(lambda module, args: seen.append((args[1], args[0][0].shape)))
    tokens = features_of(fused).shape
    assert (seen, tokens) == (
        ([((32, 32), (2, 1024, 32))], (2, 256, 32)) if kind == "internvl" else ([((24, 24), (2, 576, 32))], (2, 576, 32))
    )


def test_the_layers_of_the_published_models():
    """LLaVA-1.5 with CLIP ViT-L/14-336 (hidden states 3, 8, 13, 18 and 23), and InternVL's 300M and 6B towers, by default."""
    assert (
        LlavaFuserConfig().fuser_layers == LlavaFuserConfig(fuser_layers=[-22, -17, -12, -7, -2]).fuser_layers == [3, 8, 13, 18, 23]
    )
    assert InternVLFuserConfig().fuser_layers == [4, 9, 14, 19, 24]
    assert InternVLFuserConfig(vision_config={"num_hidden_layers": 45}).fuser_layers == [1, 12, 23, 34, 45]
