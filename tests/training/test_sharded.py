"""Weights sharded over ranks (FSDP2) train as one process does, whatever is trained and whichever rank has images."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from ranks import run_on_ranks
from small_runs import LORA, record, small_run

# Nine pairs, four micro-batches of two or one a step: the last step has one pair, and one rank repeats pairs that do not count.
STEP = {"pairs": 9, "learning_rate": 5e-6, "num_train_epochs": 2, "warmup_steps": 0, "max_grad_norm": 0.0}
TWO_RANKS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
ONE_PROCESS = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
BESIDE = LoraConfig(r=4, target_modules=LORA.target_modules, modules_to_save=["fuser"], task_type="CAUSAL_LM")
SHARDED = {"fsdp": True, "fsdp_config": {"version": 2}}
KINDS = {
    "full": {},
    "clipped, checkpointing": {"max_grad_norm": 0.5, "gradient_checkpointing": True},
    "frozen tower, padded": {"frozen_tower": True, "rows": "padded"},
    "lora": {"kind": "lora", "lora_dropout": 0.0},
    "biases": {"kind": "lora", "lora_dropout": 0.0, "lora_bias": "all"},
    "continued": {"kind": "lora", "lora_dropout": 0.0, "continued": True},
    # Twelve pairs: every step has an image somewhere. Without any, one process has no gradient for the tower and leaves it alone,
    # and several have a zero gradient, with which AdamW continues.
    "images on some ranks": {"kind": "mixed", "pairs": 12},
    "images on some ranks, padded": {"kind": "mixed", "pairs": 12, "rows": "padded", "gradient_checkpointing": True},
    "no images": {"kind": "text"},
    "fuser, checkpointing": {"kind": "fuser", "frozen_tower": True, "gradient_checkpointing": True},
    "fuser beside lora": {"kind": "fuser", "frozen_tower": True, "peft_config": BESIDE},
    "token budget": {"batching": "tokens", "max_tokens_per_batch": 200},
}
CACHED = ("full", "lora")
RESUMED = ("full", "lora", "biases")
MOVED = ("biases", "continued")  # whose reference needs start values
SAVED = {"save_strategy": "steps", "save_steps": 3}
EVALUATED = {"eval_pairs": 5, "per_device_eval_batch_size": 2}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    run_on_ranks(
        folder,
        {name: {**STEP, **TWO_RANKS, **SHARDED, **kind, **(SAVED if name in RESUMED else {})} for name, kind in KINDS.items()}
        | {
            f"{name}, cached": {
                **STEP,
                **TWO_RANKS,
                **SHARDED,
                **KINDS[name],
                "reference": "cached",
                "reference_cache": str(folder / f"cache-{name}"),
            }
            for name in CACHED
        }
        | {f"{kind}, far": {**STEP, **TWO_RANKS, **SHARDED, **KINDS[kind], "learning_rate": 1e-3} for kind in MOVED}
        | {"evaluated": {**STEP, **TWO_RANKS, **SHARDED, **EVALUATED, "kind": "mixed", "pairs": 12}}
        | {
            f"{kind}, resumed": {**STEP, **TWO_RANKS, **SHARDED, **KINDS[kind], "resume": f"{kind}/checkpoint-3"}
            for kind in RESUMED
        },
    )
    return folder


def one_process(folder: Path, settings) -> dict:
    trainer = small_run(folder, **settings)
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    record(trainer, folder / "end.pt")
    return {**torch.load(folder / "end.pt"), "start": start, "trainer": trainer}


def apart(first, second) -> float:
    assert first.keys() == second.keys()
    return max((first[name].double() - second[name].double()).abs().max().item() for name in first)


@pytest.mark.parametrize("kind", [*KINDS, *(f"{name}, cached" for name in CACHED)])
def test_sharded_weights_are_those_of_one_process(two_ranks, tmp_path, kind, record_property):
    settings = KINDS[kind.removesuffix(", cached")]
    tokens = {"max_tokens_per_batch": 400} if "max_tokens_per_batch" in settings else {}
    end = one_process(tmp_path, {**STEP, **ONE_PROCESS, **settings, **tokens})
    sharded = torch.load(two_ranks / f"{kind}.pt")
    ranks = [json.loads((two_ranks / f"{kind}-rank{rank}.json").read_text()) for rank in (0, 1)]
    for result in ranks:
        assert result["delta"] == ranks[0]["delta"] and result["rewards_seen"] == 2 * 2 * settings.get("pairs", 9)
        assert result["sharded"] > 4  # models and layers
    assert apart(end["start"], end["weights"]) > 1e-6  # it did train
    difference = apart(end["weights"], sharded["weights"])
    record_property("difference", (f"FSDP2, {kind}", difference))
    assert difference < 1e-6


@pytest.mark.parametrize("kind", MOVED)
def test_the_reference_of_a_sharded_adapter_stays_the_start(two_ranks, tmp_path, kind):
    """Rewards after four steps at a high rate, which a reference that moves along would keep at 0."""
    end = one_process(tmp_path, {**STEP, **ONE_PROCESS, **KINDS[kind], "learning_rate": 1e-3})
    sharded = torch.load(two_ranks / f"{kind}, far.pt")
    for name in ("rewards/chosen", "rewards/rejected"):
        here, there = ([log[name] for log in run["logs"] if name in log] for run in (end, sharded))
        assert here == pytest.approx(there, abs=1e-4)
        assert abs(here[-1]) > 1e-3


def test_evaluation_of_sharded_weights(two_ranks, tmp_path):
    trainer = one_process(tmp_path, {**STEP, **ONE_PROCESS, **EVALUATED, "kind": "mixed", "pairs": 12})["trainer"]
    metrics = trainer.evaluate()
    first, again = json.loads((two_ranks / "evaluated-rank0.json").read_text())["evaluation"]
    for key in ("eval_loss", "eval_loss/sft", "eval_rewards/margins"):  # a margin is beta times a difference of large sums
        assert first[key] == pytest.approx(metrics[key], rel=1e-5, abs=1e-6) and first[key] == again[key], key


@pytest.mark.parametrize("kind", RESUMED)
def test_sharded_run_goes_on_from_its_checkpoint(two_ranks, kind, record_property):
    straight, resumed = (torch.load(two_ranks / f"{name}.pt") for name in (kind, f"{kind}, resumed"))
    difference = apart(straight["weights"], resumed["weights"])
    record_property("difference", (f"FSDP2, {kind}: resumed at step 3 of 4", difference))
    assert difference == 0 and straight["delta"] == resumed["delta"]
    for name in ("loss", "num_tokens", "grad_norm"):
        assert straight["logs"][3][name] == resumed["logs"][3][name]


@pytest.mark.slow
def test_four_ranks_go_on_where_two_stopped(two_ranks, record_property):
    settings = {**STEP, **SHARDED, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    run_on_ranks(two_ranks, {"four": {**settings, "resume": "full/checkpoint-3"}}, ranks=4)
    straight, resumed = (torch.load(two_ranks / f"{name}.pt") for name in ("full", "four"))
    difference = apart(straight["weights"], resumed["weights"])
    record_property("difference", ("FSDP2, full: saved on two ranks, resumed on four", difference))
    assert difference < 1e-6
    assert straight["logs"][3]["loss"] == pytest.approx(resumed["logs"][3]["loss"], rel=1e-5)
