"""Small runs whose results two trees can be compared by, bit for bit (`.ci/same.py`)."""

import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from ranks import run_on_ranks
from safetensors.torch import load_file
from small_runs import KillAt, in_fork, record, small_run
from small_sft import small_sft
from support import make_image

import mpo
from mpo.batching.logprobs import completion_logprobs
from mpo.generation.generator import Request
from mpo.models.export.run import export

FOLDERS = ("reference_cache", "vision_feature_cache")


def trained(folder, *, make=small_run, kill=None, **settings):
    """Weights, optimizer, delta and logs of a run; with `kill`, of one that dies after this step and is resumed."""
    settings = {**settings, **{name: str(folder / name) for name in FOLDERS if name in settings}}
    start = partial(make, folder, **{"max_steps": 4, **settings})
    if kill:
        assert in_fork(lambda: start(callbacks=[KillAt("step", kill)]).train()) == -9
    trainer = start()
    trainer.train(resume_from_checkpoint=bool(kill))
    record(trainer, folder / "end.pt")
    return torch.load(folder / "end.pt")


def two_ranks(folder):
    """The same of a run in two processes."""
    run_on_ranks(folder, {"run": {"max_steps": 3}})
    return torch.load(folder / "run.pt")


def log_probs(folder):
    """Log-probs of given completions, in packed and in padded rows."""
    trainer = small_run(folder)
    asked = [Request.ask("What is it?", images=[make_image(1, width=96)]), Request.ask("What is 2 plus 3?", prefix="It")]
    given = [["It is 5.", "It is not 5.", "5"], [" is 5", " is a cat"]]
    compute = partial(completion_logprobs, trainer.model, trainer.processing_class, asked, given)
    return {layout: compute(layout=layout) for layout in ("packed", "padded")}


def exported(folder):
    """The tensors of an adapter that is merged and written."""
    small_run(folder).save_model(str(folder / "base"))
    adapted = small_run(folder, kind="lora", max_steps=2, warmup_steps=0)
    adapted.train()
    adapted.save_model(str(folder / "adapter"))
    export(folder / "adapter", folder / "out", base=str(folder / "base"), progress=False)
    return {"weights": load_file(folder / "out" / "model.safetensors")}


def counted(folder):
    """What the tree's `benchmarks/step.py` counts in a step: FLOPs, tiles and tokens."""
    sys.path.insert(0, str(Path(mpo.__file__).resolve().parents[1] / "benchmarks"))
    from step import Case, count

    return count(Case("tiny", pairs=2))


CACHED = {"reference": "cached", "vision_features": "cached", "frozen_tower": True, **dict.fromkeys(FOLDERS)}
RUNS = {
    "full": trained,
    "lora": partial(trained, kind="lora"),
    "padded": partial(trained, kind="mixed", rows="padded"),
    "cached": partial(trained, **CACHED),
    "tokens": partial(trained, batching="tokens", max_tokens_per_batch=180),
    "stream": partial(trained, stream=True),
    "resumed": partial(trained, kill=3, save_strategy="steps", save_steps=2),
    "sft": partial(trained, make=small_sft),
    **{"two ranks": two_ranks, "log-probs": log_probs, "export": exported, "counted": counted},
}


def run_all(tree, output, only=()):
    """Run in this process, whose mpo has to be the tree's, and save the results."""
    assert Path(mpo.__file__).resolve().is_relative_to(tree), f"mpo comes from {mpo.__file__}"
    if unknown := {*only} - {*RUNS}:
        raise SystemExit(f"No such run: {', '.join(unknown)}. There are {', '.join(RUNS)}.")
    torch.set_num_threads(1)
    found = {}
    for name in only or RUNS:
        print(f"{tree}: {name}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            found[name] = RUNS[name](Path(folder))
    torch.save(found, output)
