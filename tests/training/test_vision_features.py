"""Cached vision features: the run of live ones, each image encoded once, on any rank, in any run, killed at any moment."""

import copy
import json
import os
import shutil

import pytest
import torch
from conversations import conversation_set
from ranks import run_on_ranks
from small_runs import LORA, KillAt, difference, in_fork, record, small_run
from small_sft import small_sft
from support import TEXTS, image_pairs, make_image, perturbed
from torch.utils.data import DataLoader
from transformers import CONFIG_MAPPING, LlavaConfig, LlavaForConditionalGeneration, LlavaImageProcessor, LlavaProcessor
from transformers.image_utils import SizeDict
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings
from transformers.models.internvl.modeling_internvl import InternVLVisionEmbeddings
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings

import mpo.training.features.use as use
from mpo import MPOTrainer
from mpo.commands import main
from mpo.commands.outcome import user_errors
from mpo.data.encoded import with_encoded_images
from mpo.encoding.images import _OncePerImage
from mpo.encoding.keys import image_key
from mpo.evaluation.scorers import MeanLogProb
from mpo.generation.generator import Request
from mpo.generation.local import LocalGenerator
from mpo.models.features import tile_shape
from mpo.models.loading import load_model
from mpo.models.parts import base_model
from mpo.models.small import small_internvl, small_processor
from mpo.models.tower import find_tower
from mpo.preflight.dry_run import feature_lines
from mpo.schema import Question
from mpo.training.checkpoint import latest_checkpoint
from mpo.training.features.cache import FeatureCache
from mpo.training.features.use import cached_tower
from mpo.training.reference.cache import ReferenceCache
from mpo.training.reference.fingerprint import Fingerprint
from mpo.training.store import META_FILE, UnreadableShard, read_fingerprint, read_shard, shards


def cached(folder, **settings):
    return {"frozen_tower": True, "vision_features": "cached", "vision_feature_cache": str(folder / "features"), **settings}


@pytest.fixture
def encoded(monkeypatch):
    """Number of tiles of each call of a vision tower, of any model."""
    calls = []
    for embeddings in (InternVLVisionEmbeddings, CLIPVisionEmbeddings, SiglipVisionEmbeddings):

        def counting(self, pixel_values, *args, forward=embeddings.forward, **kwargs):
            calls.append(len(pixel_values))
            return forward(self, pixel_values, *args, **kwargs)

        monkeypatch.setattr(embeddings, "forward", counting)
    return calls


@pytest.fixture
def processed(monkeypatch):
    """Images that were split into tiles."""
    images, process = [], _OncePerImage.__call__

    def counting(self, given, **kwargs):
        real, calls = self._image_processor, []
        self._image_processor = lambda batch, **settings: (calls.append(len(batch)), real(batch, **settings))[1]
        images.append(sum(calls) if (found := process(self, given, **kwargs)) is None else sum(calls))
        self._image_processor = real
        return found

    monkeypatch.setattr(_OncePerImage, "__call__", counting)
    return images


@pytest.fixture
def opened(monkeypatch):
    """Images that were decoded with a cache."""
    import mpo.encoding.images as features

    images, real = [], features.open_image
    monkeypatch.setattr(features, "open_image", lambda image, **kwargs: images.append(1) or real(image, **kwargs))
    return images


def ended(trainer, folder):
    trainer.train()
    record(trainer, folder / "end.pt")
    return torch.load(folder / "end.pt")


RUNS = {
    "cached references, verified": {"kind": "full", "verify_first_batch": True, "reference": "cached"},
    "lora, padded, checkpointing, stream": {"rows": "padded", "gradient_checkpointing": True, "stream": True, "max_steps": 4},
    "mixed, by tokens": {"kind": "mixed", "batching": "tokens", "max_tokens_per_batch": 400},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_cached_run_is_a_live_one_and_encodes_each_image_once(tmp_path, name, encoded, processed, opened):
    settings = {"pairs": 4, "kind": "lora", "num_train_epochs": 2, "eval_pairs": 2, "eval_strategy": "epoch", **RUNS[name]}
    if "reference" in settings:
        settings["reference_cache"] = str(tmp_path / "references")
    live = ended(small_run(tmp_path, frozen_tower=True, **settings), tmp_path)
    encoded.clear(), opened.clear()
    shutil.rmtree(tmp_path / "references", ignore_errors=True)
    first = ended(small_run(tmp_path, **cached(tmp_path), **settings), tmp_path)
    images = 2 if settings["kind"] == "mixed" else 4
    assert len(encoded) == len(opened) == images  # the images of evaluation are among those of training
    assert difference(live["weights"], first["weights"]) < 1e-6 and difference(live["logs"], first["logs"]) < 2e-4
    encoded.clear(), processed.clear(), opened.clear()
    second = ended(small_run(tmp_path, **cached(tmp_path), **settings), tmp_path)
    assert not encoded and not opened and not any(processed)
    assert difference(first, second) == 0


def test_conversations_in_packs(tmp_path, encoded):
    by_tokens = {"batching": "tokens", "max_tokens_per_batch": 300}
    settings = {"records": 6, "kind": "lora", "num_train_epochs": 2, "evaluated": conversation_set(4), **by_tokens}
    runs = []
    for more in ({}, cached(tmp_path), cached(tmp_path)):
        model = None
        encoded.clear()
        frozen = {name: value for name, value in more.items() if name != "frozen_tower"}
        model = small_sft(tmp_path).model
        find_tower(model).requires_grad_(False)
        trainer = small_sft(tmp_path, model=model, **settings, **frozen)
        runs.append((ended(trainer, tmp_path), trainer.evaluate()["eval_loss"], len(encoded)))
    (live, loss, _), (first, own, calls), (second, again, none) = runs
    assert calls and not none and difference(first, second) == 0 and own == again
    assert difference(live["weights"], first["weights"]) < 1e-6 and abs(loss - own) < 1e-5


def test_a_frozen_projector_does_not_run_either(tmp_path):
    trainer = small_run(tmp_path, **cached(tmp_path), kind="lora")
    calls = []
    trainer.evaluate(image_pairs(8))
    projector = next(module for name, module in trainer.model.named_modules() if name.endswith("multi_modal_projector"))
    projector.register_forward_hook(lambda *_: calls.append(1))
    trainer.evaluate(image_pairs(8))
    assert not calls
    assert trainer._cached_tower.cache.read(_all(trainer._cached_tower.cache)).shape[1:] == (4, 32)


def test_a_fuser_reads_the_same_layers(tmp_path, encoded):
    """In training, and in a generator."""
    from mpo.models.fused import add_fuser

    processor = small_processor(TEXTS, image_size=32, patch_size=8, max_patches=4)
    ends = []
    for more in ({"frozen_tower": True}, cached(tmp_path)):
        torch.manual_seed(0)
        model = small_internvl(processor, hidden_size=32, layers=2, vision_hidden_size=32, vision_layers=3)
        fused = add_fuser(model, layers=[1, 2, 3], num_heads=2, num_points=2)
        ends.append(ended(small_run(tmp_path, model=fused, pairs=2, num_train_epochs=2, **more), tmp_path))
    assert difference(ends[0]["weights"], ends[1]["weights"]) < 1e-6
    plain, asked = LocalGenerator(fused, processor), [Request.ask("What is it?", images=[make_image(0)])]
    usual = plain.generate(asked, max_new_tokens=6)
    encoded.clear()
    shared = use.with_cached_features(plain, tmp_path / "asked")
    assert shared.generate(asked, max_new_tokens=6) == shared.generate(asked, max_new_tokens=6) == usual and len(encoded) == 1


LLAVAS = {  # tower, layers that the projector reads, with the class token or without
    "clip": ("clip_vision_model", -2, "default"),
    "clip, all tokens": ("clip_vision_model", -1, "full"),
    "several layers": ("clip_vision_model", [1, -1], "default"),
    "siglip": ("siglip_vision_model", -1, "full"),
}


def llava(tower, layer, strategy):
    """A tiny LLaVA and its processor, of which images of two shapes become squares of 32 pixels."""
    tokenizer, sizes = small_processor(TEXTS).tokenizer, {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    has_class, square = tower == "clip_vision_model", {"height": 32, "width": 32}
    vision = {"model_type": tower, **sizes, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8}
    text = {"model_type": "llama", **sizes, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
    token, reads = "<IMG_CONTEXT>", {"vision_feature_select_strategy": strategy}
    ids = {"image_token_index": tokenizer.convert_tokens_to_ids(token), "image_seq_length": 16, "vision_feature_layer": layer}
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, **ids, **reads)).eval()
    images = LlavaImageProcessor(size=square, crop_size=square, do_center_crop=has_class)
    template, parts = tokenizer.chat_template, {"image_token": token, "num_additional_image_tokens": int(has_class)}
    return model, LlavaProcessor(images, tokenizer, patch_size=8, chat_template=template, **reads, **parts)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", LLAVAS)
def test_a_llava_encodes_each_image_once_too(tmp_path, name, kind, encoded, processed, opened):
    """Features before the projector, which full training trains; after it with LoRA. Responses are those of live features."""
    settings = {"pairs": 4, "kind": kind, "num_train_epochs": 2, "eval_pairs": 2, "eval_strategy": "epoch"}

    def run(**more):
        model, processor = llava(*LLAVAS[name])
        trainer = small_run(tmp_path, model=model, processor=processor, **more, **settings)
        return trainer, ended(trainer, tmp_path)

    _, live = run(frozen_tower=True)
    encoded.clear(), opened.clear()
    first, ends = run(**cached(tmp_path))
    assert len(encoded) == len(opened) == 4
    assert difference(live["weights"], ends["weights"]) < 1e-6 and difference(live["logs"], ends["logs"]) < 2e-4
    cache, projected = first._cached_tower.cache, kind == "lora"
    assert cache.read(_all(cache)).shape[1:] == tile_shape(base_model(first.model).config, projected=projected)
    encoded.clear(), processed.clear(), opened.clear()
    second, again = run(**cached(tmp_path))
    assert not encoded and not opened and not any(processed) and difference(ends, again) == 0

    asked = [Request.ask("What is it?", images=[make_image(number)]) for number in (0, 0, 2)]
    model, processor = llava(*LLAVAS[name])
    usual = [LocalGenerator(model, processor).generate(asked, max_new_tokens=6, seed=1, temperature=1.0, n=2)]
    encoded.clear()
    shared = use.with_cached_features(LocalGenerator(model, processor), tmp_path / "asked")
    assert shared.generate(asked, max_new_tokens=6, seed=1, temperature=1.0, n=2) == usual[0]
    assert len(encoded) == 2


def test_a_generator_with_cached_features_keeps_what_it_is(tmp_path, encoded):
    """Its class and all settings, and so the tiles of images: of a prompt with two, a scorer has those of the response."""

    class Own(LocalGenerator):
        pass

    trainer = small_run(tmp_path)
    parts = trainer.model, trainer.processing_class
    images = [make_image(number).resize((64, 64)) for number in (0, 2)]  # 4 tiles and a thumbnail, or 1 of 2 for each
    asked, texts = [Request.ask("Which?", images=images)], [["This.", "That one."]]
    others = LocalGenerator(*parts).logprobs(asked, texts)
    plain = Own(*parts, responses_per_batch=3, progress="asked", tile_budget="image")
    usual, score = plain.logprobs(asked, texts), MeanLogProb(plain)(Question(asked[0].messages, images=images), texts[0])
    assert encoded == [2, 10, 10] and difference(usual, others) > 0
    assert score == [one.mean().item() for one in usual[0]]
    encoded.clear()
    shared = use.with_cached_features(plain, tmp_path / "features")
    assert type(shared) is Own and shared.identity() == plain.identity() and plain.tower is None
    kept = {name for name in vars(plain) if vars(plain)[name] is vars(shared)[name]}
    assert vars(plain).keys() - kept == {"tower", "_encoder"}
    assert difference(shared.logprobs(asked, texts), usual) < 1e-6 and len(encoded) == 2
    shared.generate(asked, max_new_tokens=3)
    assert len(encoded) == 2 and plain.usage.responses == 1


@pytest.mark.parametrize("model_type", ["llava_next", "qwen2_5_vl", "qwen3_vl"])
def test_a_tower_with_images_of_any_size_is_refused(model_type):
    """Their images have any number of patches (and Qwen3-VL's language model reads several layers of the tower)."""
    model, processor = llava(*LLAVAS["clip"])
    model.requires_grad_(False)
    assert use.why_not_cached(model, processor) is None
    model.config = CONFIG_MAPPING[model_type]()
    assert "one size in pixels" in use.why_not_cached(model, processor)


def test_a_fuser_of_a_llava_and_a_crop_of_no_fixed_size(tmp_path):
    from mpo.models.fused import add_fuser

    ends = []
    for more in ({"frozen_tower": True}, cached(tmp_path)):
        model, processor = llava(*LLAVAS["clip"])
        fused = add_fuser(model, layers=[1, 2], num_heads=2, num_points=2)
        torch.nn.init.constant_(fused.model.fuser.gamma1, 0.5)
        ends.append(ended(small_run(tmp_path, model=fused, processor=processor, pairs=2, num_train_epochs=2, **more), tmp_path))
    assert difference(ends[0]["weights"], ends[1]["weights"]) < 1e-6
    processor.image_processor.do_center_crop, processor.image_processor.size = False, SizeDict(shortest_edge=32)
    assert "one size in pixels" in use.why_not_cached(fused, processor)


def test_workers_find_what_the_run_has_added(tmp_path, processed):
    settings = {"pairs": 2, "num_train_epochs": 2}
    first = ended(small_run(tmp_path, **cached(tmp_path), dataloader_num_workers=2, **settings), tmp_path)
    known = keys_in(next((tmp_path / "features").iterdir()))
    alone = ended(small_run(tmp_path, **cached(tmp_path, vision_feature_cache=str(tmp_path / "b")), **settings), tmp_path)
    assert len(known) == 2 and difference(first["weights"], alone["weights"]) == 0


def _trained(trainer):
    return {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}


@pytest.mark.slow
def test_two_ranks_share_it(tmp_path):
    settings = {**cached(tmp_path), "pairs": 4, "per_device_train_batch_size": 1, "num_train_epochs": 2, "max_steps": 4}
    kinds = {"ddp": {}, "fsdp2": {"kind": "lora", "lora_dropout": 0.0}}
    fsdp2 = {"fsdp": "full_shard", "fsdp_config": {"fsdp_version": 2}}
    live, cast = {"vision_features": "live", "vision_feature_cache": None}, {**settings, **fsdp2, "bf16": True}
    scenarios = {"ddp": dict(settings), "fsdp2": {**settings, **kinds["fsdp2"], **fsdp2}}
    run_on_ranks(tmp_path, {**scenarios, "cast": dict(cast), "cast, live": {**cast, **live}})
    # FSDP casts float32 weights to bfloat16, which autocast does not.
    ends = [torch.load(tmp_path / f"{name}.pt")["weights"] for name in ("cast", "cast, live")]
    assert difference(*ends) < 1e-6
    for name, kind in kinds.items():
        trainer = small_run(tmp_path, **{**settings, **kind, **live, "per_device_train_batch_size": 2})
        one, ranks = ended(trainer, tmp_path)["weights"], torch.load(tmp_path / f"{name}.pt")["weights"]
        assert difference({key: one[key] for key in ranks}, ranks) < 1e-6 and ranks.keys() >= _trained(trainer)
    for folder in (tmp_path / "features").iterdir():
        assert len(keys_in(folder)) == 4


@pytest.mark.slow
def test_killed_and_resumed_is_bitwise_the_same(tmp_path):
    settings = {"kind": "lora", "pairs": 4, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2}
    alone = ended(small_run(tmp_path / "a", **cached(tmp_path / "a"), **settings), tmp_path)
    killed = cached(tmp_path / "b", callbacks=[KillAt("step", 3)])
    assert in_fork(lambda: small_run(tmp_path / "b", **killed, **settings).train()) == -9
    trainer = small_run(tmp_path / "b", **cached(tmp_path / "b"), **settings)
    trainer.train(resume_from_checkpoint=latest_checkpoint(tmp_path / "b"))
    record(trainer, tmp_path / "end.pt")
    assert difference(alone, torch.load(tmp_path / "end.pt")) == 0


def test_sweeps_share_features_before_the_projector_and_other_towers_do_not(tmp_path, encoded):
    small_run(tmp_path, **cached(tmp_path), pairs=2).train()
    encoded.clear()
    small_run(tmp_path, **cached(tmp_path), pairs=2, learning_rate=2e-3, beta=0.2).train()
    assert not encoded
    other = perturbed(small_run(tmp_path).model)
    small_run(tmp_path, **cached(tmp_path), pairs=2, model=other).train()
    assert len(encoded) == 2


def test_the_dry_run_refuses_them_too(tmp_path):
    trainer = small_run(tmp_path)
    trainer.args.vision_features = "cached"
    with pytest.raises(ValueError, match="is trained"):
        feature_lines(None, trainer.model, trainer.processing_class, trainer.args)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_copy_of_the_model_has_a_tower_and_projector_of_its_own(tmp_path, kind):
    backbones = [base_model(small_run(tmp_path, **cached(tmp_path), kind=kind).model).base_model]
    backbones.append(copy.deepcopy(backbones[0]))
    pixels = torch.randn(1, 3, 32, 32)
    for change in (find_tower, lambda backbone: backbone.multi_modal_projector):
        with torch.no_grad():
            before = [each.get_image_features(pixel_values=pixels, return_dict=True).pooler_output for each in backbones]
            for parameter in change(backbones[1]).parameters():
                parameter.add_(torch.randn_like(parameter))
            after = [each.get_image_features(pixel_values=pixels, return_dict=True).pooler_output for each in backbones]
        assert difference(before[0], after[0]) == 0 and difference(before[1], after[1]) > 1e-3


def _asked(tmp_path):
    """Write questions about the images of `image_pairs`, two about each."""
    lines = []
    for place, row in enumerate(with_encoded_images(image_pairs(4))):
        (tmp_path / f"{place}.png").write_bytes(row["images"][0]["bytes"])
        lines += [{"id": f"{place}{q}", "question": f"{q}?", "image": f"{place}.png", "answer": "1"} for q in ("How many", "Where")]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _evaluated(tmp_path, capsys, model, output, *words):
    """Results and responses of `mpo evaluate` on the questions of `_asked`."""
    _asked(tmp_path)
    usual = ("--max-new-tokens", "6", "--n", "2", "--scorer", "logprob", "--dtype", "float32", "--json")
    capsys.readouterr()
    status = main(["evaluate", f"m={model}", str(tmp_path / "asked.jsonl"), "--output", str(tmp_path / output), *usual, *words])
    said = capsys.readouterr()
    assert status == 0, said.err
    return json.loads(said.out)["results"], (tmp_path / output / "answers.jsonl").read_text()


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_an_evaluation_shares_the_features_of_training(tmp_path, capsys, encoded, kind):
    """Of full training before the projector, which is trained; of LoRA after it. Its responses are those of live features."""
    for part in (perturbed(small_run(tmp_path).model), small_run(tmp_path).processing_class):
        part.save_pretrained(tmp_path / "start")
    start = load_model(str(tmp_path / "start"), dtype="float32")
    find_tower(start.model).requires_grad_(False)
    trainer = MPOTrainer(
        model=start.model,
        args=small_run(tmp_path / "run", **cached(tmp_path)).args,
        train_dataset=image_pairs(4),
        processing_class=start.processor,
        peft_config=LORA if kind == "lora" else None,
    )
    trainer.train()
    trainer.save_model()
    model = tmp_path / "run"
    encoded.clear()
    live = _evaluated(tmp_path, capsys, model, "live")
    assert encoded
    encoded.clear()
    shared = _evaluated(tmp_path, capsys, model, "shared", "--vision-feature-cache", str(tmp_path / "features"))
    assert not encoded and shared == live
    own = _evaluated(tmp_path, capsys, model, "own", "--vision-feature-cache", str(tmp_path / "others"))
    assert len(encoded) == 4 and own == live  # each image once, by greedy responses, samples and scores


def test_commands_that_sample_share_it(tmp_path, capsys, encoded):
    """Of a file of questions, two about each image, `mpo generate` encodes each image once, and `mpo mmpr sample` then none."""
    trainer = small_run(tmp_path)
    for part in (trainer.model, trainer.processing_class):
        part.save_pretrained(tmp_path / "start")
    _asked(tmp_path)
    asked, output, cache = str(tmp_path / "asked.jsonl"), tmp_path / "out", ("--vision-feature-cache", str(tmp_path / "features"))
    sample, generate = (
        ("mmpr", "sample", str(tmp_path / "start"), asked),
        ("generate", str(tmp_path / "start"), "--questions", asked),
    )
    texts, calls = [], []
    for words in ((*generate, *cache), (*sample, *cache), generate, sample):
        encoded.clear(), shutil.rmtree(output, ignore_errors=True)
        assert main([*words, "--output", str(output), "--n", "2", "--max-new-tokens", "6", "--temperature", "1"]) == 0
        texts.append((output / "output.jsonl").read_text())
        calls.append(len(encoded))
    assert texts[:2] == texts[2:] and calls[:2] == [4, 0] and all(calls[2:])
    capsys.readouterr()
    server = "http://localhost:1/v1"
    for words in (["generate", server, "?"], ["mmpr", "sample", server, asked, "--output", str(output)]):
        assert main([*words, *cache]) and "--vision-feature-cache" in capsys.readouterr().err


def test_an_evaluation_without_a_fixed_tower_is_refused(tmp_path, capsys):
    trainer = small_run(tmp_path, kind="lora", lora_targets=r".*vision_tower.*q_proj")
    with pytest.raises(ValueError, match="is adapted"):
        use.cached_tower(trainer.model, trainer.processing_class, tmp_path / "features")
    trainer = small_run(tmp_path)
    _eight_bits(trainer.model)
    with pytest.raises(ValueError, match="int8"):
        use.cached_tower(trainer.model, trainer.processing_class, tmp_path / "features")
    words = ["evaluate", "http://localhost:1/v1", str(tmp_path / "asked.jsonl"), "--output", str(tmp_path / "out")]
    (tmp_path / "asked.jsonl").write_text(json.dumps({"question": "?", "answer": "1"}) + "\n")
    assert main([*words, "--vision-feature-cache", str(tmp_path)]) and "--vision-feature-cache" in capsys.readouterr().err


# What is refused


def _batch_norm(model):
    find_tower(model).layernorm = torch.nn.BatchNorm1d(17).requires_grad_(False)


def _dropout(model):
    find_tower(model).encoder.layer[0].attention.attention_dropout = 0.1


def _eight_bits(model):
    weight = find_tower(model).encoder.layer[0].mlp.fc1.weight
    find_tower(model).encoder.layer[0].mlp.fc1.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"frozen_tower": False}, "is trained"),
        ({"kind": "lora", "lora_targets": r".*vision_tower.*q_proj"}, "is adapted"),
        ({"vision_drop_path": 0.1, "frozen_tower": False}, "vision_drop_path=0.1"),
        ({"vision_learning_rate": 1e-5}, "vision_learning_rate"),
        ({"augment": True}, "augment"),
        ({"kind": "tokenizer"}, "one size in pixels"),
        ({"change": _batch_norm}, "over the batch"),
        ({"change": _dropout, "disable_dropout": False}, "has dropout"),
        ({"change": _eight_bits}, "int8"),
        ({"vision_features": "live"}, "vision_feature_cache=.* needs"),
        ({"vision_features": "some"}, "some"),
        ({"vision_feature_cache_gb": 0}, "vision_feature_cache_gb"),
        ({"bf16_full_eval": True}, "bf16_full_eval"),
    ],
)
def test_what_may_change_is_refused(tmp_path, settings, reason):
    change = settings.pop("change", None)
    model = small_run(tmp_path / "other").model if change else None
    if change:
        change(model)
    with pytest.raises(ValueError, match=reason):
        small_run(tmp_path, **{**cached(tmp_path), "model": model, **settings})


def test_an_augmented_stream_is_refused_when_it_is_read(tmp_path):
    with pytest.raises(ValueError, match="vision_features='cached'"):
        small_run(tmp_path, **cached(tmp_path), augment=True, stream=True, max_steps=2).train()


def test_a_tower_unfrozen_later_is_refused(tmp_path):
    trainer = small_run(tmp_path, **cached(tmp_path))
    find_tower(trainer.model).requires_grad_(True)
    with pytest.raises(ValueError, match="is trained now"):
        trainer.train()


def test_what_changes_after_the_trainer_was_made_is_refused(tmp_path):
    trainer = small_run(tmp_path, **cached(tmp_path))
    trainer.processing_class.image_processor.max_patches = 2
    with pytest.raises(ValueError, match="now.*image processor"):
        trainer.train()
    trainer = small_run(tmp_path, **cached(tmp_path))
    with torch.no_grad():
        find_tower(trainer.model).encoder.layer[0].mlp.fc1.weight.add_(0.1)
    with pytest.raises(ValueError, match="now.*vision weights"):
        trainer.evaluate(image_pairs(2))


def test_a_resumed_checkpoint_with_another_tower_is_refused(tmp_path):
    settings = {"records": 2, "max_steps": 2, "kinds": ("one image",)}
    models = [small_sft(tmp_path).model for _ in range(2)]
    with torch.no_grad():
        find_tower(models[1]).encoder.layer[0].mlp.fc1.weight.add_(0.1)
    for model in models:
        find_tower(model).requires_grad_(False)
    small_sft(tmp_path, model=models[0], save_strategy="steps", save_steps=1, **settings).train()
    own = {name: value for name, value in cached(tmp_path).items() if name != "frozen_tower"}
    with pytest.raises(ValueError, match="now.*vision weights"):
        small_sft(tmp_path, model=models[1], **settings, **own).train(str(tmp_path / "checkpoint-1"))


def test_zero_3_is_refused(tmp_path):
    trainer = small_run(tmp_path, frozen_tower=True)
    assert use.why_not_cached(trainer.model, trainer.processing_class) is None
    find_tower(trainer.model).encoder.layer[0].mlp.fc1.weight.ds_id = 1
    assert "ZeRO-3" in use.why_not_cached(trainer.model, trainer.processing_class)


def test_features_depend_on_kinds_of_layers_and_on_the_launchers_precision(tmp_path, monkeypatch):
    usual = small_run(tmp_path, **cached(tmp_path))
    model = small_run(tmp_path).model
    find_tower(model).encoder.layer[0].mlp.activation_fn = torch.nn.ReLU()
    assert small_run(tmp_path, **cached(tmp_path), model=model)._cached_tower.cache.folder != usual._cached_tower.cache.folder
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert small_run(tmp_path, **cached(tmp_path))._cached_tower.cache.fingerprint.parts["compute dtype"] == "bfloat16"


def test_autocast_of_16_bit_weights_has_features_of_its_own_where_norms_are_summed(tmp_path, monkeypatch):
    """On a GPU it leaves norms in float32, and what a CLIP adds to its first one; an evaluation computes without it."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    how = {"projected": False, "dtype": torch.bfloat16, "device": "cpu"}
    for given, own in ((llava(*LLAVAS["clip"]), True), ((small_run(tmp_path).model, small_processor(TEXTS)), False)):
        for dtype in (torch.bfloat16, torch.float32):
            model, processor = given[0].to(dtype), given[1]
            with_it, without = (use.vision_fingerprint(model, processor, **how, autocast=on) for on in (True, False))
            assert (with_it != without) == (own and dtype == torch.bfloat16)
    model, processor = llava(*LLAVAS["clip"])
    trainer = small_run(tmp_path, model=model.bfloat16(), processor=processor, **cached(tmp_path))
    assert trainer._cached_tower.cache.fingerprint.parts["compute dtype"] == "bfloat16, autocast"
    assert use.cached_tower(model, processor, tmp_path / "features").cache.folder != trainer._cached_tower.cache.folder


def test_a_reference_with_another_tower_is_refused_and_one_with_the_same_is_not(tmp_path):
    same = small_run(tmp_path).model
    small_run(tmp_path, **cached(tmp_path), ref_model=same)
    with pytest.raises(ValueError, match="vision weights"):
        small_run(tmp_path, **cached(tmp_path), ref_model=perturbed(same))


def test_a_later_trainer_of_the_model_is_live_again(tmp_path, encoded):
    trainer = small_run(tmp_path, **cached(tmp_path), pairs=2)
    trainer.train()
    encoded.clear()
    small_run(tmp_path, frozen_tower=True, pairs=2, model=trainer.model).train()
    assert encoded
    encoded.clear()
    models = [copy.deepcopy(trainer.model) for _ in range(2)]
    ends = [ended(small_run(tmp_path, **cached(tmp_path), pairs=2, model=model), tmp_path) for model in models]
    assert not encoded and difference(*ends) == 0


def test_cached_references_of_live_features_are_found(tmp_path, monkeypatch):
    references = {"reference": "cached", "reference_cache": str(tmp_path / "references")}
    small_run(tmp_path, frozen_tower=True, pairs=2, **references)
    small_run(tmp_path, **cached(tmp_path), pairs=2).train()  # every image is known now, and none is decoded
    before = sorted(path.name for path in (tmp_path / "references").rglob("*.safetensors"))
    small_run(tmp_path, **cached(tmp_path), pairs=2, **references).train()
    assert sorted(path.name for path in (tmp_path / "references").rglob("*.safetensors")) == before


# The files

HERE = Fingerprint({"cache": "vision features", "vision weights": "w"}, {}, {"model": "InternVL"})


def put(cache, *numbers, tiles=2):
    """Add images as one batch does; return the key of the last."""
    for number in numbers:
        key = FeatureCache.key(bytes([number]) * 16, {})
        cache.add(key, bytes([number]) * 16, (10, 20), torch.full((tiles, 3, 4), float(number), dtype=torch.bfloat16))
    cache.flush()
    return key


def keys_in(folder):
    fingerprint = read_fingerprint(folder)
    return [key for path in shards(folder) for key in read_shard(path, fingerprint).keys.tolist()]


def shard_of(cache, key):
    return cache.find(key).path


def test_what_is_added_is_found_by_others(tmp_path):
    cache = FeatureCache(tmp_path, HERE)
    first, second = put(cache, 1), put(cache, 2, tiles=1)
    other = FeatureCache(tmp_path, HERE)
    found = [other.find(second), other.find(first)]
    assert [(one.image, one.size, one.tiles) for one in found] == [(b"\2" * 16, (10, 20), 1), (b"\1" * 16, (10, 20), 2)]
    assert other.read(found)[:, 0, 0].tolist() == [2, 1, 1] and other.read(found).dtype == torch.bfloat16
    assert other.find(FeatureCache.key(b"\1" * 16, {"max_patches": 3})) is None
    cache.add(b"n" * 16, b"n" * 16, (1, 1), torch.tensor([[[float("nan")]]]))
    assert other.find(b"n" * 16) is None


def _write_for_ever(folder):
    cache = FeatureCache(folder, HERE)
    while True:
        for number in range(100):
            put(cache, number, tiles=300)


def test_killed_while_writing_only_whole_files_remain(tmp_path, capsys):
    import multiprocessing
    import signal

    cache = FeatureCache(tmp_path, HERE)
    for least in range(3, 40, 12):
        process = multiprocessing.get_context("fork").Process(target=_write_for_ever, args=(tmp_path,))
        process.start()
        while len(shards(cache.folder)) < least:
            assert process.is_alive()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert all(torch.equal(cache.read([one]), torch.full((300, 3, 4), one.image[0])) for one in _all(cache))
    assert main(["cache", "verify", str(tmp_path)]) == 0 and main(["cache", "prune", str(tmp_path)]) == 0


def _all(cache):
    cache.refresh()
    return [cache.find(key) for block in cache._blocks for key in block.keys.view("V16").tolist()]


def test_the_least_recently_used_go_first(tmp_path, caplog):
    cache = FeatureCache(tmp_path, HERE)
    keys = [put(cache, number, tiles=999) for number in range(6)]
    paths = [shard_of(cache, key) for key in keys]
    for age, path in enumerate(paths):
        os.utime(path, (1000 + age, 1000 + age))
    cache.read([cache.find(keys[0])])  # used now
    held = cache.find(keys[1])
    size = paths[0].stat().st_size
    other = FeatureCache(tmp_path, Fingerprint({**HERE.parts, "vision weights": "v"}), limit_bytes=4.5 * size)
    with caplog.at_level("INFO"):
        new = put(other, 9, tiles=999)
    assert other.find(new) and [cache.find(key) is not None for key in keys] == [True, False, False, False, True, True]
    assert cache.read([held])[0, 0, 0] == 1  # opened before
    assert "3 shards" in caplog.text


def test_of_images_that_do_not_all_fit_those_that_a_run_has_stay(tmp_path, caplog):
    """In any order, in every epoch: only those that do not fit are encoded again."""
    earlier = FeatureCache(tmp_path, Fingerprint({**HERE.parts, "vision weights": "v"}))
    put(earlier, 0, tiles=999), put(earlier, 1, tiles=999)
    for path in shards(earlier.folder):
        os.utime(path, (1000, 1000))
    cache, again = FeatureCache(tmp_path, HERE, limit_bytes=4.5 * path.stat().st_size), []
    for epoch in range(3):
        for number in (5, 3, 1, 4, 2, 6) if epoch % 2 else range(1, 7):
            if (found := cache.find(FeatureCache.key(bytes([number]) * 16, {}))) is None:
                again.append((epoch, number))
                put(cache, number, tiles=999)
            else:
                cache.read([found])
    assert not shards(earlier.folder) and len(shards(cache.folder)) == 4
    assert [number for epoch, number in again if epoch] == [5, 6, 5, 6]
    assert caplog.text.count("vision_feature_cache_gb keeps them") == 1


def test_a_command_removes_nothing_of_a_run(tmp_path):
    """A run's limit may be higher than the default, which this folder exceeds."""
    large = FeatureCache(tmp_path, HERE)
    path = shard_of(large, put(large, 1))
    os.truncate(path, 300 * 10**9)  # sparse
    os.utime(path, (1000, 1000))
    trainer = small_run(tmp_path, frozen_tower=True)
    cache = cached_tower(trainer.model, trainer.processing_class, tmp_path).cache
    assert cache.find(put(cache, 2)) and path.exists()


def test_a_time_in_the_future_keeps_nothing(tmp_path):
    old = FeatureCache(tmp_path, HERE)
    for path in [shard_of(old, put(old, number, tiles=999)) for number in range(3)]:
        os.utime(path, (4e9, 4e9))
    new = FeatureCache(tmp_path, HERE, limit_bytes=2.5 * path.stat().st_size)
    assert new.find(put(new, 9, tiles=999)) and len(shards(new.folder)) == 2


def test_what_killed_runs_left_counts_and_goes_first(tmp_path):
    cache = FeatureCache(tmp_path, HERE)
    path = shard_of(cache, put(cache, 1, tiles=999))
    left = path.with_name(f"{path.name}.0123456789ab.tmp")
    shutil.copy(path, left)
    os.utime(left, (1000, 1000)), os.utime(path, (2000, 2000))
    new = FeatureCache(tmp_path, HERE, limit_bytes=2.5 * path.stat().st_size)
    assert new.find(put(new, 2, tiles=999)) and path.exists() and not left.exists()


def test_a_folder_removed_during_a_run_is_a_cache_again(tmp_path, capsys, monkeypatch):
    cache = FeatureCache(tmp_path, HERE)
    key = put(cache, 1)
    shutil.rmtree(cache.folder)
    assert cache.find(key) is None and cache.find(put(cache, 1)) and "1 images" in cache.holds()
    assert main(["cache", "verify", str(tmp_path)]) == 0
    monkeypatch.chdir(cache.folder)
    assert "1 images" in FeatureCache(".", HERE).holds()  # its parent is known, whose size has the limit


def test_a_shard_that_cannot_be_opened_is_neither_removed_nor_damaged(tmp_path):
    import resource

    cache = FeatureCache(tmp_path, HERE)
    key, before = put(cache, 1), resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(free := os.dup(0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))
    try:
        with pytest.raises(UnreadableShard, match="Too many open files"):
            cache.find(key)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert cache.find(key)


def test_a_shard_removed_while_it_is_opened_is_not_there(tmp_path, monkeypatch):
    cache, real = FeatureCache(tmp_path, HERE), torch.UntypedStorage.from_file
    key = put(cache, 1)

    def removing(name, *args, **kwargs):
        os.unlink(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", removing)  # safetensors opens a file a second time with it
    assert cache.find(key) is None and FeatureCache(tmp_path, HERE).find(key) is None


def test_only_files_of_caches_are_removed(tmp_path):
    """Among them no log-probs in the same root."""
    logps = ReferenceCache(tmp_path, Fingerprint({"model weights": "w"}))
    logps.add([b"k" * 16], [-1.0], [1])
    logps.flush()
    old = FeatureCache(tmp_path, Fingerprint({**HERE.parts, "vision weights": "v"}))
    put(old, 1)
    others = [tmp_path / "models" / "7b" / "model.safetensors", tmp_path / "models" / f"{'0' * 32}.safetensors"]
    others += [old.folder / "notes.safetensors", old.folder / f"{'0' * 32}.safetensors" / "mine"]
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"weights" * 100)
    for path in (*others, *shards(logps.folder), *shards(old.folder)):
        os.utime(path, (1000, 1000))
    cache = FeatureCache(tmp_path, HERE, limit_bytes=1)
    assert cache.find(put(cache, 1)) is None  # beyond the limit
    assert all(path.exists() for path in others) and "0 images" in cache.holds() and len(shards(logps.folder)) == 1
    assert [path.name for path in shards(old.folder)] == ["notes.safetensors"]


def test_files_of_another_user_and_those_that_vanish_stop_nothing(tmp_path, monkeypatch):
    import mpo.training.features.cache as cache_module

    old = FeatureCache(tmp_path, HERE)
    for path in [shard_of(old, put(old, number)) for number in range(4)]:
        os.utime(path, (1000, 1000))
    unlink = cache_module.Path.unlink

    def denied(path, **kwargs):
        if path.suffix == ".safetensors":
            raise PermissionError(13, "denied")
        unlink(path, **kwargs)

    monkeypatch.setattr(cache_module.Path, "unlink", denied)
    cache = FeatureCache(tmp_path, HERE, limit_bytes=1e3)
    assert cache.find(put(cache, 9)) is None and "4 images" in cache.holds()
    gone = [*shards(cache.folder), cache.folder / f"{'0' * 32}.safetensors"]
    monkeypatch.setattr(cache_module, "shards", lambda folder: gone)
    assert "4 images" in cache.holds()


def test_a_folder_that_cannot_be_written_is_refused_and_home_is_found(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for place in ("/proc/features", tmp_path / "file", tmp_path / "file" / "features"):
        with pytest.raises(ValueError, match="vision features"):
            FeatureCache(place, HERE)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert FeatureCache("~/features", HERE).folder.parent == tmp_path / "features"


def test_bytes_of_any_type_come_before_a_path(tmp_path):
    from mpo.encoding.images import Opening

    for number in (1, 2):
        make_image(number).save(tmp_path / f"{number}.png")
    content, path = (tmp_path / "1.png").read_bytes(), str(tmp_path / "2.png")
    for given in (content, bytearray(content), memoryview(content)):
        opened = Opening(FeatureCache(tmp_path / "features", HERE), {}).open({"bytes": given, "path": path})
        assert opened.tobytes() == make_image(1).tobytes()
        assert opened.entry_key == FeatureCache.key(image_key(content), {})


@pytest.mark.parametrize("place", [0, 5, 40, -1, "tensor", "cut", "empty"])
def test_damage_is_refused_by_name_and_pruned(tmp_path, place, capsys):
    cache = FeatureCache(tmp_path, HERE)
    key = put(cache, 1)
    path = shard_of(cache, key)
    data = bytearray(path.read_bytes())
    if place == "tensor":
        place = data.index(torch.ones(4, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes())
    if isinstance(place, int):
        data[place] ^= 1
    path.write_bytes(data[:-3] if place == "cut" else b"" if place == "empty" else data)
    with pytest.raises(ValueError, match="not a file of vision features") as error:
        (another := FeatureCache(tmp_path, HERE)).read([another.find(key)])
    assert str(path) in str(error.value) and f"mpo cache prune {cache.folder}" in str(error.value)
    assert main(["cache", "verify", str(tmp_path)]) == 1 and str(path) in capsys.readouterr().out
    assert main(["cache", "prune", str(tmp_path)]) == 0 and not path.exists() and cache.find(key) is None


def test_every_byte_of_a_file_is_guarded(tmp_path):
    cache = FeatureCache(tmp_path, HERE)
    put(cache, 1)
    path = shard_of(cache, put(cache, 2, 3))
    data = path.read_bytes()
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 2
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="vision features|another model"):
            (another := FeatureCache(tmp_path, HERE)).read(_all(another))


def test_damage_stops_a_run_that_skips_bad_records(tmp_path):
    settings = {**cached(tmp_path), "pairs": 2, "on_bad_record": "skip"}
    small_run(tmp_path, **settings).train()
    for path in shards(next((tmp_path / "features").iterdir())):
        path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="not a file of vision features"):
        small_run(tmp_path, **settings).train()


def test_damage_is_no_fault_of_a_question_or_a_worker(tmp_path, capsys):
    """No question is dropped for it, which would count as wrong; of a worker's error only the message is shown."""
    trainer = small_run(tmp_path)
    for part in (trainer.model, trainer.processing_class):
        part.save_pretrained(tmp_path / "start")
    words = ("--vision-feature-cache", str(tmp_path / "features"))
    _evaluated(tmp_path, capsys, tmp_path / "start", "whole", *words)
    path = shards(next((tmp_path / "features").iterdir()))[0]
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(AssertionError, match=f"mpo: error: {path} is not a file of vision features"):
        _evaluated(tmp_path, capsys, tmp_path / "start", "damaged", *words)

    def in_worker():
        return len([*DataLoader([0], num_workers=1, collate_fn=lambda _: read_shard(path, HERE))])

    assert user_errors(in_worker) == 2
    assert capsys.readouterr().err.startswith(f"mpo: error: {path} is not a file of vision features")


def test_names_of_shards_mean_nothing(tmp_path):
    """No image gets the features of another: a shard holds its keys."""
    cache = FeatureCache(tmp_path, HERE)
    keys = [put(cache, 1), put(cache, 2)]
    one, other = (shard_of(cache, key) for key in keys)
    held = one.read_bytes()
    one.write_bytes(other.read_bytes()), other.write_bytes(held)
    another = FeatureCache(tmp_path, HERE)
    assert another.read([another.find(key) for key in keys])[:, 0, 0].tolist() == [1, 1, 2, 2]
    with pytest.raises(ValueError, match="does not match its checksum"):
        cache.read([cache.find(keys[0])])  # opened before that


def test_a_file_of_another_model_is_refused_by_name(tmp_path):
    cache, other = FeatureCache(tmp_path, HERE), FeatureCache(tmp_path, Fingerprint({**HERE.parts, "vision weights": "v"}))
    path = shard_of(other, key := put(other, 1))
    os.rename(path, cache.folder / path.name)
    with pytest.raises(ValueError, match=f"{path.name} has vision features of another model"):
        cache.find(key)


def test_a_folder_of_an_earlier_format_is_refused_by_name(tmp_path):
    """A file for each image, in sub-folders."""
    folder = FeatureCache(tmp_path, HERE).folder
    meta = folder / META_FILE
    meta.write_text(meta.read_text().replace('"format": 3', '"format": 2'))
    (folder / "0a").mkdir()
    (folder / "0a" / f"{'0a' * 16}.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=f"has format 2, and this version of mpo reads 3. Delete {folder} .*mpo cache prune --old"):
        FeatureCache(tmp_path, HERE)
    assert main(["cache", "prune", "--old", str(tmp_path)]) == 0 and not folder.exists()
    FeatureCache(tmp_path, HERE)


def test_a_full_disk_stops_writing_not_training(tmp_path, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mpo.training.store.write_shard", full)
    small_run(tmp_path, **cached(tmp_path), pairs=4).train()
    assert caplog.text.count("No space left") == 1


def test_inspect_shows_the_images(tmp_path, capsys):
    cache = FeatureCache(tmp_path, Fingerprint({**HERE.parts, "features": "f", "compute dtype": "d", "device": "cpu"}))
    put(cache, 1)
    assert main(["cache", "inspect", str(tmp_path)]) == 0
    assert "images" in (said := capsys.readouterr().out) and "completions" not in said


def test_software_is_part_of_what_features_depend_on(tmp_path, monkeypatch):
    model = small_run(tmp_path)
    how = {"projected": False, "dtype": torch.float32, "device": "cpu"}
    before = use.vision_fingerprint(model.model, model.processing_class, **how)
    monkeypatch.setattr(use.PIL, "__version__", "0")
    after = use.vision_fingerprint(model.model, model.processing_class, **how)
    assert [part.split()[0] for part in after.differences(before)] == ["software"]
