"""Weights shared out by DeepSpeed's ZeRO train as one process does."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from ranks import run_on_ranks
from small_runs import difference, record, small_run
from torch.multiprocessing import ProcessRaisedException

from mpo.models.official.convert import convert

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed (pip install deepspeed)"),
]

STEP = {"pairs": 9, "learning_rate": 5e-6, "num_train_epochs": 2, "warmup_steps": 0, "max_grad_norm": 0.5}
TWO_RANKS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
ONE_PROCESS = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}


def zero(stage: int) -> dict:
    """As launch=zero2 and zero3 have it."""
    auto = ("gradient_clipping", "gradient_accumulation_steps", "train_batch_size", "train_micro_batch_size_per_gpu")
    sharing = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True}
    if stage == 3:
        sharing["stage3_gather_16bit_weights_on_model_save"] = True
    half = {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}
    return {"use_cpu": False, "deepspeed": {"zero_optimization": sharing, **half, **dict.fromkeys(auto, "auto")}}


KINDS = {
    "full": {},
    "lora": {"kind": "lora", "lora_dropout": 0.0},
    "frozen tower": {"frozen_tower": True},
    "checkpointing": {"gradient_checkpointing": True},
    "images on some ranks": {"kind": "mixed", "pairs": 12},
}
LOADED = ("full", "lora")
RESUMED = [(stage, kind) for stage in (2, 3) for kind in ("full", "lora")]
SAVED = {"save_strategy": "steps", "save_steps": 3}
RUNS = [(stage, kind) for stage in (1, 2, 3) for kind in KINDS]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    start = small_run(folder)
    start.model.save_pretrained(folder / "start")
    start.processing_class.save_pretrained(folder / "start")
    convert(folder / "start", folder / "official", compare=False, progress=False)
    run = {**STEP, **TWO_RANKS, **zero(3), "checkpoint": str(folder / "start")}
    run_on_ranks(
        folder,
        {f"{kind}, {stage}": {**STEP, **TWO_RANKS, **zero(stage), **KINDS[kind]} for stage, kind in RUNS}
        | {f"{kind}, loaded sharded": {**run, **KINDS[kind]} for kind in LOADED}
        | {"full, official": {**run, "checkpoint": str(folder / "official")}}
        | {f"{kind}, {stage}, saved": {**STEP, **TWO_RANKS, **zero(stage), **KINDS[kind], **SAVED} for stage, kind in RESUMED}
        | {
            f"{kind}, {stage}, resumed": {
                **STEP,
                **TWO_RANKS,
                **zero(stage),
                **KINDS[kind],
                "resume": f"{kind}, {stage}, saved/checkpoint-3",
            }
            for stage, kind in RESUMED
        },
    )
    return folder


@pytest.mark.parametrize(
    ("kind", "how"),
    [*((kind, str(stage)) for stage, kind in RUNS), *((kind, "loaded sharded") for kind in LOADED), ("full", "official")],
)
def test_weights_are_those_of_one_process(two_ranks, tmp_path, kind, how, record_property):
    trainer = small_run(tmp_path, **{**STEP, **ONE_PROCESS, **KINDS[kind]})
    trainer.train()
    record(trainer, tmp_path / "end.pt")
    one, two = torch.load(tmp_path / "end.pt"), torch.load(two_ranks / f"{kind}, {how}.pt")
    apart = difference(one["weights"], two["weights"])
    record_property("difference", (f"ZeRO-{how}, {kind}", apart))
    assert apart < 1e-6
    for theirs, ours in zip(one["logs"][:-1], two["logs"][:-1], strict=True):
        assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-4)  # Adam would hide a wrong scale
    ranks = [json.loads((two_ranks / f"{kind}, {how}-rank{rank}.json").read_text()) for rank in (0, 1)]
    # A reward is beta times the difference of sums near 100: of the few 1e-4 that it is here, float32 rounds off some 1e-7.
    assert ranks[0]["delta"] == ranks[1]["delta"] == pytest.approx(trainer.mixture.reward_shift.value.item(), rel=1e-3)


@pytest.mark.parametrize(("stage", "kind"), RESUMED)
def test_a_run_goes_on_from_its_checkpoint(two_ranks, stage, kind):
    straight, resumed = (torch.load(two_ranks / f"{kind}, {stage}, {name}.pt") for name in ("saved", "resumed"))
    assert difference(straight["weights"], resumed["weights"]) == 0 and straight["delta"] == resumed["delta"]
    for name in ("loss", "num_tokens", "grad_norm"):
        assert straight["logs"][3][name] == resumed["logs"][3][name]


def test_cached_features_are_live_ones(tmp_path):
    """DeepSpeed casts float32 weights to bfloat16 when training begins, which autocast does not: other features, another key."""
    settings = {"pairs": 4, "per_device_train_batch_size": 1, "num_train_epochs": 2, "max_grad_norm": 0.5, "frozen_tower": True}
    cached = {"vision_features": "cached", "vision_feature_cache": str(tmp_path / "features")}
    kinds = [(stage, bf16) for stage in (1, 2) for bf16 in (False, True)]
    runs = {
        f"{stage} {bf16} {len(how)}": {**settings, **zero(stage), "bf16": bf16, **how}
        for stage, bf16 in kinds
        for how in ({}, cached)
    }
    run_on_ranks(tmp_path, runs)
    for stage, bf16 in kinds:
        live, ours = (torch.load(tmp_path / f"{stage} {bf16} {size}.pt") for size in (0, 2))
        assert difference(live["weights"], ours["weights"]) == difference(live["logs"], ours["logs"]) == 0
    metas = [json.loads(path.read_text()) for path in (tmp_path / "features").glob("*/meta.json")]
    assert {meta["parts"]["compute dtype"] for meta in metas} == {"float32", "bfloat16, cast weights"}
    assert len(list((tmp_path / "features").glob("*/??/*.safetensors"))) == 2 * 4  # the stages and ranks share them


def test_a_cache_of_pieces_is_refused(two_ranks):
    """A reference is known by its weights, and no rank has them."""
    settings = {**STEP, **TWO_RANKS, **zero(3), "checkpoint": str(two_ranks / "start"), "reference": "cached"}
    with pytest.raises(ProcessRaisedException, match="reference='cached'.*ZeRO-3.*launch=zero2"):
        run_on_ranks(two_ranks, {"cached": settings})
