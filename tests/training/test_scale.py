"""Four processes train as one does; a cache and a checkpoint of one number of processes serve another."""

import functools
import json
from pathlib import Path

import pytest
import torch
from ranks import run_on_ranks
from small_runs import difference, record, small_run

from mpo.training.store import read_fingerprint, read_shard

pytestmark = pytest.mark.slow

# Eight pairs a step. Of 13 pairs the second step has five, of 9 one: then three of four ranks have repeated pairs alone.
STEP = {"learning_rate": 5e-6, "num_train_epochs": 2, "warmup_steps": 0, "max_grad_norm": 0.0, "per_device_eval_batch_size": 2}
SPLIT = {
    1: {"per_device_train_batch_size": 8},
    2: {"per_device_train_batch_size": 4},
    4: {"per_device_train_batch_size": 2},
}
KINDS = {
    "full": {"pairs": 13},
    "one left": {"pairs": 9},
    "lora": {"pairs": 13, "kind": "lora", "lora_dropout": 0.0},
    # One pair at a time: half of the ranks have no image. Of twelve, every step has one somewhere (see test_sharded.py).
    "images on some ranks": {"pairs": 12, "kind": "mixed", "gradient_checkpointing": True},
}
ONE_BY_ONE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
CACHED = ("full", "lora")
SAVED = {"save_strategy": "steps", "save_steps": 3}  # three of four steps: in the middle of the second epoch


def settings(kind: str, ranks: int, **more) -> dict:
    return {**STEP, **SPLIT[ranks], **KINDS[kind], **more}


def cached(kind: str, ranks: int, folder: Path) -> dict:
    return settings(kind, ranks, reference="cached", reference_cache=str(folder))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Results of two processes, then four, then two, each of which resumes from the one before."""
    folder = tmp_path_factory.mktemp("scale")
    run_on_ranks(
        folder,
        {
            "full on 2": settings("full", 2, **SAVED),
            **{f"{kind}, cached by 2": cached(kind, 2, folder / f"cache2, {kind}") for kind in CACHED},
        },
        ranks=2,
    )
    before = shards(folder)
    assert before
    run_on_ranks(
        folder,
        {
            "full": settings("full", 4, **SAVED),
            "one left": settings("one left", 4),
            "images on some ranks": settings("images on some ranks", 4, **ONE_BY_ONE),
            "lora, cached by 4": cached("lora", 4, folder / "cache4, lora"),
            **{f"{kind}, cache of 2 on 4": cached(kind, 4, folder / f"cache2, {kind}") for kind in CACHED},
            "2 to 4": settings("full", 4, resume="full on 2/checkpoint-3"),
        },
        ranks=4,
    )
    assert shards(folder) == before  # four processes computed nothing that two had
    run_on_ranks(folder, {"4 to 2": settings("full", 2, resume="full/checkpoint-3")}, ranks=2)
    return folder


def shards(folder: Path) -> set[Path]:
    return set(folder.glob("cache2*/*/*.safetensors"))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The end of a kind's run in one process, which is trained once."""

    @functools.cache
    def end(kind: str) -> dict:
        folder = tmp_path_factory.mktemp("alone")
        trainer = small_run(folder, **settings(kind, 1))
        trainer.train()
        record(trainer, folder / "end.pt")
        return torch.load(folder / "end.pt") | {"value": trainer.mixture.reward_shift.value.item()}

    return end


OUTCOMES = [
    *((kind, kind, 4) for kind in KINDS if kind != "lora"),
    *((f"{kind}, cached by 2", kind, 2) for kind in CACHED),
    *((f"{kind}, cache of 2 on 4", kind, 4) for kind in CACHED),
    ("lora, cached by 4", "lora", 4),
    ("2 to 4", "full", 4),
    ("4 to 2", "full", 2),
]


@pytest.mark.parametrize(("name", "kind", "ranks"), OUTCOMES, ids=[name for name, _, _ in OUTCOMES])
def test_the_end_is_that_of_one_process(runs, one_process, name, kind, ranks, record_property):
    """Weights to 1e-6 at a learning rate of 5e-6; delta the same on all ranks, and the mean of every pair's rewards, once."""
    alone = one_process(kind)
    together = torch.load(runs / f"{name}.pt")
    apart = difference(alone["weights"], together["weights"])
    record_property("difference", (f"{ranks} processes: {name}", apart))
    assert apart < 1e-6
    ends = [json.loads((runs / f"{name}-rank{rank}.json").read_text()) for rank in range(ranks)]
    assert {end["delta"] for end in ends} == {ends[0]["delta"]} and ends[0]["delta"] == pytest.approx(alone["value"], rel=1e-3)
    assert {end["rewards_seen"] for end in ends} == {2 * 2 * KINDS[kind]["pairs"]}
    assert len({end["fingerprint"] for end in ends}) == 1
    logs = [[log["loss"] for log in run["logs"] if "loss" in log] for run in (alone, together)]
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)


@pytest.mark.parametrize(("kind", "ranks"), [("full", 2), ("lora", 2), ("lora", 4)])
def test_processes_fill_one_cache(runs, kind, ranks):
    """Thirteen pairs have 26 completions. Only those that pad the last batches of an epoch to 16 pairs may be there twice."""
    (folder,) = (runs / f"cache{ranks}, {kind}").iterdir()
    keys = [key for shard in folder.glob("*.safetensors") for key in read_shard(shard, read_fingerprint(folder)).keys.tolist()]
    assert len(set(keys)) == 26
    assert len(keys) <= 32


def test_one_process_goes_on_where_four_stopped(runs, tmp_path):
    trainer = small_run(tmp_path, **settings("full", 1))
    trainer.train(resume_from_checkpoint=str(runs / "full" / "checkpoint-3"))
    record(trainer, tmp_path / "end.pt")
    straight, resumed = torch.load(runs / "full.pt"), torch.load(tmp_path / "end.pt")
    assert difference(straight["weights"], resumed["weights"]) < 1e-6
    assert difference(straight["delta"], resumed["delta"]) < 1e-5
