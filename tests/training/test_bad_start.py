"""Settings that cannot work raise an error before the first step, with what to do."""

import importlib.util
import json

import numpy as np
import pytest
from datasets import Dataset, Image, List
from small_runs import small_run, write_job
from support import TEXTS, image_pairs, make_image, messages, text_pairs

from mpo import MPOConfig
from mpo.encoding.costs import RecordMeasure, measure
from mpo.models.loading import load_model
from mpo.models.small import small_internvl, small_processor
from mpo.preflight.structure import build_structure
from mpo.training.job import TrainJob
from mpo.training.record_checks import check_before_training, may_exceed


def job(folder, **changes) -> TrainJob:
    write_job(folder, pairs=2)
    config = {
        "model": {"_target_": "mpo.models.loading.load_model", "name_or_path": str(folder / "model")},
        "data": {"path": str(folder / "pairs.jsonl")},
        "trainer": {"use_cpu": True, "bf16": False, "report_to": "none"},
        "run_dir": str(folder / "run"),
    }
    return TrainJob.from_config({**config, **changes})


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (["nothing"], "'nothing'"),
        (["q_proj", "qkv"], "'qkv'"),
        (r".*language_model.*\.wqkv", r"'\.\*language_model\.\*\\\\\.wqkv'"),
    ],
    ids=["one", "one of two", "pattern"],
)
def test_an_adapter_without_layers(tmp_path, targets, named):
    """The message lists the names of InternVL's linear layers: those of its tower, projector, language model and head."""
    message = f"target_modules={named} matches no layer of InternVLForConditionalGeneration.*fc1, fc2.*linear_1.*lm_head.*q_proj"
    with pytest.raises(ValueError, match=message):
        small_run(tmp_path, kind="lora", lora_targets=targets)
    with pytest.raises(ValueError, match=message):
        build_structure(job(tmp_path, peft={"kind": "lora", "target_modules": targets}))  # a dry run


@pytest.mark.parametrize("targets", [["q_proj", "fc1"], "all-linear", r".*\.layers\.\d\.mlp\.up_proj"])
def test_an_adapter_with_layers(tmp_path, targets):
    small_run(tmp_path, kind="lora", lora_targets=targets)


@pytest.mark.parametrize(("version", "package"), [(2, "flash_attn"), (3, "flash_attn_interface")])
def test_flash_attention_that_is_not_installed(tmp_path, version, package):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(ValueError, match=f"packed_attention='flash_attn_{version}' needs the package {package}.*'auto'"):
        small_run(tmp_path, packed_attention=f"flash_attn_{version}")
    write_job(tmp_path, pairs=1)
    with pytest.raises(ValueError, match=rf"attn_implementation=flash_attention_{version} .*pip install.* null"):
        load_model(str(tmp_path / "model"), attn_implementation=f"flash_attention_{version}")


def records(*widths):
    rows = {"prompt": messages("What is it?", "user"), "chosen": messages("A cat.", "assistant")}
    rows["rejected"] = messages("A dog.", "assistant")
    return Dataset.from_list([{**rows, "id": f"wide-{width}", "images": [make_image(0, width, 64)]} for width in widths])


def test_records_that_do_not_fit(tmp_path):
    """16 tokens a tile of 64 x 64 pixels; 512 x 64 are eight tiles and a thumbnail, 144 tokens."""
    processor = small_processor(TEXTS, image_size=64, patch_size=8, max_patches=12)

    def start(dataset, context=8192, **settings):
        config = small_internvl(processor, max_position_embeddings=context).config
        args = MPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **settings)
        check_before_training(dataset, processor, config, args)

    dataset = records(64, 512)
    start(dataset)
    with pytest.raises(ValueError, match="record 'wide-512'.*144 .*9 tiles.*Set model.max_tiles="):
        start(dataset, context=150)
    with pytest.raises(ValueError, match="max_length=100.*model.max_tiles="):
        start(dataset, max_length=100)
    with pytest.raises(ValueError, match="max_tokens_per_batch=150 .*record 'wide-512' .*at least"):
        start(dataset, batching="tokens", max_tokens_per_batch=150)
    with pytest.raises(ValueError, match="max_tiles_per_batch=8 .*9 tiles"):
        start(dataset, batching="tokens", max_tokens_per_batch=400, max_tiles_per_batch=8)


def test_a_budget_that_does_not_hold_a_record_stops_the_trainer_before_a_step(tmp_path):
    trainer = small_run(tmp_path, batching="tokens", max_tokens_per_batch=30)
    with pytest.raises(ValueError, match="max_tokens"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_text_model_without_an_image_is_measured_too(tmp_path, processor):
    config = small_internvl(processor, max_position_embeddings=20).config
    args = MPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(ValueError, match="context of 20 tokens"):
        check_before_training(image_pairs(3).remove_columns("images"), processor.tokenizer, config, args)


def test_a_folder_whose_tokenizer_has_no_image_tokens(tmp_path):
    write_job(tmp_path, pairs=1)
    file = tmp_path / "model" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    for name in ("start_image_token", "end_image_token", "context_image_token", "extra_special_tokens"):
        settings.pop(name, None)
    file.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="start_image_token, end_image_token, context_image_token"):
        load_model(str(tmp_path / "model"))


def test_an_unknown_part(tmp_path):
    with pytest.raises(ValueError, match="'tower' in train_parts"):
        job(tmp_path, train_parts={"tower": "freeze"})
    with pytest.raises(ValueError, match="'tower' in lr"):
        job(tmp_path, lr={"tower": 1e-5})


def test_only_records_that_may_be_too_long_are_rendered(tmp_path, monkeypatch):
    """The bound is never below the measured length, and short records are not measured at all."""
    processor = small_processor(TEXTS, image_size=64, patch_size=8, max_patches=2)
    rows = [*records(64), *records(128), *text_pairs(6)]
    rows += [{**rows[1], "chosen": messages("A cat. " * 400, "assistant")}, {**rows[1], "prompt": messages("é" * 500, "user")}]
    dataset = Dataset.from_list([{"images": [], **row} for row in rows]).cast_column("images", List(Image()))
    costs = measure(dataset, processor)
    lengths = costs.prompt + np.maximum(costs.chosen, costs.rejected)
    for limit in (*range(0, 400, 40), 1000, 2000):
        assert set(np.flatnonzero(lengths > limit)) <= set(may_exceed(dataset, processor, limit))
    assert may_exceed(dataset, processor, 2000) == [8]

    rendered = []
    monkeypatch.setattr(RecordMeasure, "__call__", lambda self, record: rendered.append(record) or pytest.fail())
    config = small_internvl(processor, max_position_embeddings=4096).config
    args = MPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    check_before_training(dataset, processor, config, args)
    assert not rendered
