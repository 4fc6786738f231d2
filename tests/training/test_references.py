"""Cached reference log-probs: the run of live ones, no second model, nothing computed twice, killed at any moment."""

import os
import signal
import weakref

import pytest
import small_runs
import torch
from datasets import Dataset, Features, Image, List
from small_runs import difference, in_fork, record, small_run
from support import TEXTS, image_pairs, make_image, perturbed, text_pairs
from transformers import AutoModelForCausalLM, Qwen2Config

import mpo.training.mpo
from mpo import MPOConfig, MPOTrainer
from mpo.models.small import small_internvl, small_processor
from mpo.training.reference.cache import ReferenceCache
from mpo.training.reference.filling import default_folder
from mpo.training.store import shards


def cached(tmp_path, **settings):
    return {"reference": "cached", "reference_cache": str(tmp_path / "cache"), "warmup_steps": 0, **settings}


@pytest.fixture
def forwards(monkeypatch):
    """Number of completions whose log-probs were computed under the reference."""
    from mpo.training.mpo import MPOTrainer

    counted, compute = [], MPOTrainer.compute_ref_log_probs

    def counting(self, model, inputs, **kwargs):
        counted.append(len(inputs.labelled.lengths))
        return compute(self, model, inputs, **kwargs)

    monkeypatch.setattr(MPOTrainer, "compute_ref_log_probs", counting)
    return counted


@pytest.mark.parametrize("kind", ["full", "lora", "text"])
@pytest.mark.parametrize("rows", ["packed", "padded"])
def test_a_cached_run_is_a_live_one(tmp_path, kind, rows):
    settings = {
        "kind": kind,
        "rows": rows,
        "eval_pairs": 3,
        "num_train_epochs": 2,
        "eval_strategy": "epoch",
        "disable_dropout": True,
    }
    ends = []
    for more in ({}, cached(tmp_path)):
        trainer = small_run(tmp_path, **settings, **{"warmup_steps": 0, **more})
        trainer.train()
        ends.append(trainer)
    assert ends[1].ref_model is None
    # Prompts of different batches are computed in other company: equal to rounding.
    assert difference(ends[0].model.state_dict(), ends[1].model.state_dict()) < 2e-5
    evaluated = [[log["eval_loss"] for log in end.state.log_history if "eval_loss" in log] for end in ends]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-4)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_nothing_is_computed_twice(tmp_path, kind, forwards):
    """Not in a second epoch, not by a second run, not for what a grown data set already had."""
    small_run(tmp_path, kind=kind, num_train_epochs=3, **cached(tmp_path)).train()
    assert sum(forwards) == 16
    small_run(tmp_path, kind=kind, **cached(tmp_path, learning_rate=1e-4)).train()
    assert sum(forwards) == 16
    small_run(tmp_path, kind=kind, pairs=10, **cached(tmp_path)).train()
    assert sum(forwards) in (20, 24)  # two more pairs; a batch of them may hold one that was known


def test_a_run_without_anything_to_compute_reads_no_data_first(tmp_path, monkeypatch):
    small_run(tmp_path, **cached(tmp_path)).train()
    trainer_class = type(small_run(tmp_path))

    def computed(*args, **kwargs):
        raise AssertionError("computed")

    monkeypatch.setattr(trainer_class, "compute_ref_log_probs", computed)
    trainer = small_run(tmp_path, **cached(tmp_path))
    assert trainer.ref_model is None
    trainer.train()


@pytest.mark.parametrize("frozen", ["tower", "nothing"])
def test_a_cached_run_holds_no_second_model(tmp_path, monkeypatch, frozen):
    copies, copy = [], mpo.training.mpo.frozen_copy

    def watched(*args, **kwargs):
        model = copy(*args, **kwargs)
        copies.append(weakref.ref(model))
        return model

    monkeypatch.setattr(mpo.training.mpo, "frozen_copy", watched)
    trainer = small_run(tmp_path, frozen_tower=frozen == "tower", **cached(tmp_path))
    assert [model() for model in copies] == [None]
    trainer.train()


def test_precompute_ref_log_probs_means_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("MPO_CACHE", str(tmp_path / "home"))
    trainer = small_run(tmp_path, precompute_ref_log_probs=True)
    assert trainer.args.reference == "cached"
    assert trainer.ref_model is None
    assert list(default_folder().rglob("*.safetensors"))


def test_ld_alpha_has_its_own_answers(tmp_path, forwards):
    live = small_run(tmp_path, max_steps=1, ld_alpha=0.3, rows="padded")
    live.train()
    forwards.clear()
    for _ in range(2):
        trainer = small_run(tmp_path, max_steps=1, ld_alpha=0.3, **cached(tmp_path))
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(live.state.log_history[0]["loss"], rel=1e-5)
    small_run(tmp_path, max_steps=1, **cached(tmp_path))
    assert sum(forwards) == 32


def test_another_model_is_another_set_up(tmp_path, forwards):
    small_run(tmp_path, **cached(tmp_path))
    other = small_run(tmp_path)
    with torch.no_grad():
        next(other.model.parameters()).add_(1e-3)
    from mpo import MPOTrainer

    args = small_run(tmp_path, **cached(tmp_path)).args
    MPOTrainer(model=other.model, args=args, train_dataset=other.train_dataset, processing_class=other.processing_class)
    assert len(list((tmp_path / "cache").glob("*/meta.json"))) == 2
    assert sum(forwards) == 32


def test_a_damaged_shard_is_refused_by_name(tmp_path):
    small_run(tmp_path, **cached(tmp_path))
    (folder,) = (tmp_path / "cache").iterdir()
    shard = shards(folder)[0]
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"{shard.name}.*mpo cache prune"):
        small_run(tmp_path, **cached(tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"), [({"stream": True, "max_steps": 2}, "reference='cached'.*stream"), ({"sync_ref_model": True}, "sync")]
)
def test_refusals(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        small_run(tmp_path, **cached(tmp_path), **settings)


def test_data_that_comes_later_is_refused(tmp_path):
    """The reference of full fine-tuning has been released, and after the first step the policy differs from it."""
    trainer = small_run(tmp_path, max_steps=1, **cached(tmp_path))
    trainer.train()
    with pytest.raises(ValueError, match="eval_dataset"):
        trainer.evaluate(image_pairs(12).select([11]))


def test_adapters_do_not_stand_in_for_a_reference_of_its_own(tmp_path):
    """It has been released, and the policy's base would give other values under its fingerprint."""
    processor = small_processor(TEXTS, image_size=32, patch_size=8, max_patches=4)
    reference = perturbed(small_internvl(processor, hidden_size=32, layers=2, vision_hidden_size=32, vision_layers=2))
    trainer = small_run(tmp_path, kind="lora", ref_model=reference, **cached(tmp_path))
    trainer.train()
    known = len(trainer._references)
    with pytest.raises(ValueError, match="reference model was released"):
        trainer.evaluate(image_pairs(12).select([11]))
    assert len(trainer._references) == known == 16


TWO = {"per_device_eval_batch_size": 2}  # pairs that are computed at once


@pytest.fixture
def images(tmp_path, monkeypatch):
    """Eight image files, which the training records of `small_run` name by their paths."""
    paths = [tmp_path / f"{number}.png" for number in range(8)]
    for number, path in enumerate(paths):
        make_image(number).save(path)

    def on_disk(count):
        files = [[{"path": str(path), "bytes": None}] for path in paths[:count]]
        rows = [{**row, "images": own} for row, own in zip(text_pairs(count), files, strict=True)]
        features = Features({**text_pairs(1).features, "images": List(Image())})
        return Dataset.from_list(rows, features=features)

    monkeypatch.setattr(small_runs, "image_pairs", on_disk)
    return paths


def test_a_replaced_image_is_computed_before_training(tmp_path, images, forwards):
    """To datasets the data set is the same, since it holds a path."""
    small_run(tmp_path, **cached(tmp_path, **TWO)).train()
    small_run(tmp_path, **cached(tmp_path, **TWO)).train()
    assert sum(forwards) == 16
    make_image(20).save(images[3])
    small_run(tmp_path, **cached(tmp_path, **TWO)).train()
    assert sum(forwards) == 20  # with the one beside it


def test_removed_log_probs_are_computed_again_though_as_many_others_were_added(tmp_path, images, forwards):
    small_run(tmp_path, pairs=3, **cached(tmp_path)).train()
    for path in (tmp_path / "cache").rglob("*.safetensors"):
        path.unlink()
    for number, path in enumerate(images):
        path.rename(path.with_suffix(".first"))
        make_image(20 + number).save(path)
    small_run(tmp_path, pairs=3, **cached(tmp_path)).train()
    for path in images:
        path.with_suffix(".first").rename(path)  # with its time
    small_run(tmp_path, pairs=3, **cached(tmp_path)).train()
    assert sum(forwards) == 18


def test_a_mended_image_is_computed_before_training(tmp_path, images, forwards):
    """It was left out when the cache was filled. Fixed without a trace, in size and time."""
    whole, status = images[3].read_bytes(), images[3].stat()
    images[3].write_bytes(bytes(len(whole)))
    os.utime(images[3], ns=(status.st_atime_ns, status.st_mtime_ns))
    settings = cached(tmp_path, **TWO, on_bad_record="skip", max_bad_fraction=0.5)
    small_run(tmp_path, **settings).train()
    known = sum(forwards)
    images[3].write_bytes(whole)
    os.utime(images[3], ns=(status.st_atime_ns, status.st_mtime_ns))
    small_run(tmp_path, **settings).train()
    assert sum(forwards) == known + 4


def test_an_image_that_changes_during_the_run(tmp_path, images, forwards):
    """The remedy in the error message works."""
    trainer = small_run(tmp_path, **cached(tmp_path, **TWO))
    make_image(20).save(images[3])
    with pytest.raises(ValueError, match="image files changed"):
        trainer.train()
    small_run(tmp_path, **cached(tmp_path, **TWO)).train()
    assert sum(forwards) == 20


def test_adapters_take_streams_and_later_data(tmp_path):
    """The base model computes what is missing."""
    trainer = small_run(tmp_path, kind="lora", stream=True, max_steps=2, **cached(tmp_path))
    trainer.train()
    assert trainer.evaluate(image_pairs(12).select([11]))["eval_loss"] > 0


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_killed_while_filling(tmp_path, batch, forwards, monkeypatch):
    """kill -9 in the middle: what was written is found again, and the rest is computed."""
    from mpo.training.mpo import MPOTrainer

    def killed():
        add = ReferenceCache.add

        def add_then_die(self, *args):
            add(self, *args)
            self.flush()
            if len(self) >= 16 * batch:
                os.kill(os.getpid(), signal.SIGKILL)

        ReferenceCache.add = add_then_die
        small_run(tmp_path, pairs=32, **cached(tmp_path))

    assert MPOTrainer.compute_ref_log_probs is not None
    assert in_fork(killed) == -9
    forwards.clear()  # the first fork of a process is preceded by a run of its own
    trainer = small_run(tmp_path, pairs=32, **cached(tmp_path))
    assert sum(forwards) == 64 - 16 * batch
    trainer.train()
    record(trainer, tmp_path / "end.pt")
    live = small_run(tmp_path, pairs=32, warmup_steps=0)
    live.train()
    assert difference(live.model.state_dict(), trainer.model.state_dict()) < 2e-5


ROPES = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 48,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "factor": 2.0,
    },
}


def with_rope(kind):
    config = Qwen2Config(vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    config.update({"num_attention_heads": 2, "num_key_value_heads": 1, "rope_parameters": ROPES[kind]})
    config.max_position_embeddings = 48 if kind == "dynamic" else 96
    config.initializer_range = 0.5  # attention that depends on positions
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", ROPES)
def test_frequencies_that_depend_on_the_batch_are_refused(tmp_path, kind):
    """Beyond 48 tokens a short record's log-probs change with the longest row of its batch; up to there they do not."""
    model = with_rope(kind)
    short = torch.arange(1, 21)[None]
    values = []
    for width in (20, 48, 60):
        rows = torch.zeros(2, width, dtype=torch.int64)
        rows[0, :20], rows[1] = short, torch.arange(width) + 5
        values.append(model(input_ids=rows).logits[0, :20].log_softmax(-1))
    assert torch.allclose(values[0], values[1], atol=1e-4) and not torch.allclose(values[0], values[2], atol=1e-2)

    processor = small_processor(TEXTS, image_size=32, patch_size=8, max_patches=4)
    tokenizer = processor.tokenizer
    tokenizer.chat_template = processor.chat_template
    for words, settings in ((1, {}), (60, {}), (60, {"max_length": 48}), (60, {"on_bad_record": "skip", "max_bad_fraction": 0.5})):
        records = text_pairs(2).to_list()
        records[1]["chosen"][0]["content"] = "yes " * words
        args = {"use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1, "per_device_train_batch_size": 2, **settings}
        trainer = MPOTrainer(
            model=with_rope(kind),
            args=MPOConfig(str(tmp_path / "run"), save_strategy="no", **args),
            train_dataset=Dataset.from_list(records),
            processing_class=tokenizer,
        )
        if words == 60 and not settings:
            with pytest.raises(ValueError, match="beyond 48 .*max_length=48"):
                trainer.train()
            continue
        trainer.train()
