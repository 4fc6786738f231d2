"""Run the same small runs in two trees, and compare what comes out bit for bit: losses, weights, log-probs, an export, FLOPs.

    python .ci/same.py main                    # a revision against this checkout, uncommitted changes included
    python .ci/same.py v0.1 v0.2               # two revisions, or folders of checkouts
    python .ci/same.py main --only full lora   # some of the runs

Both run under this Python, on the CPU, with the helpers of this checkout's tests. Where a change moves no number, every row says
equal; a row that differs says by how much at the most, and the exit status is 1.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def trained(folder: Path, *, sft: bool = False, kill: int | None = None, **settings: Any) -> Any:
    """Weights, optimizer, delta and logs of a run; with `kill`, of one that dies after this step and is resumed."""
    from small_runs import KillAt, in_fork, record, small_run, torch
    from small_sft import small_sft

    caches = {name: str(folder / name) for name in ("reference_cache", "vision_feature_cache") if name in settings}
    start = partial(small_sft if sft else small_run, folder, **{"max_steps": 4, **settings, **caches})
    if kill:
        assert in_fork(lambda: start(callbacks=[KillAt("step", kill)]).train()) == -9
    trainer = start()
    trainer.train(resume_from_checkpoint=bool(kill))
    record(trainer, folder / "end.pt")
    return torch.load(folder / "end.pt")


def two_ranks(folder: Path) -> Any:
    """The same of a run in two processes."""
    from ranks import run_on_ranks
    from small_runs import torch

    run_on_ranks(folder, {"run": {"max_steps": 3}})
    return torch.load(folder / "run.pt")


def log_probs(folder: Path) -> Any:
    """Log-probs of given completions, in packed and in padded rows."""
    from small_runs import make_image, small_run

    from mpo.batching.logprobs import completion_logprobs
    from mpo.generation.generator import Request

    model, processor = (trainer := small_run(folder)).model, trainer.processing_class
    asked = [Request.ask("What is it?", images=[make_image(1, width=96)]), Request.ask("What is 2 plus 3?", prefix="It")]
    given = [["It is 5.", "It is not 5.", "5"], [" is 5", " is a cat"]]
    return {layout: completion_logprobs(model, processor, asked, given, layout=layout) for layout in ("packed", "padded")}


def exported(folder: Path) -> Any:
    """The tensors of an adapter that is merged and written."""
    from safetensors.torch import load_file
    from small_runs import small_run

    from mpo.models.export.run import export

    small_run(folder).save_model(str(folder / "base"))
    (adapted := small_run(folder, kind="lora", max_steps=2, warmup_steps=0)).train()
    adapted.save_model(str(folder / "adapter"))
    export(folder / "adapter", folder / "out", base=str(folder / "base"), progress=False)
    return {"weights": load_file(folder / "out" / "model.safetensors")}


def counted(folder: Path, tree: Path) -> Any:
    """What the tree's `benchmarks/step.py` counts in a step: FLOPs, tiles and tokens."""
    sys.path.insert(0, str(tree / "benchmarks"))
    from step import Case, count

    return count(Case("tiny", pairs=2))


CACHED: dict[str, Any] = {"reference": "cached", "reference_cache": None, "frozen_tower": True, "vision_features": "cached"}
RUNS: dict[str, Any] = {
    "full": trained,
    "lora": partial(trained, kind="lora"),
    "padded": partial(trained, kind="mixed", rows="padded"),
    "cached": partial(trained, **CACHED, vision_feature_cache=None),
    "tokens": partial(trained, batching="tokens", max_tokens_per_batch=180),
    "stream": partial(trained, stream=True),
    "resumed": partial(trained, kill=3, save_strategy="steps", save_steps=2),
    "sft": partial(trained, sft=True),
    **{"two ranks": two_ranks, "log-probs": log_probs, "export": exported, "counted": counted},
}


def main() -> int:
    """Run in both trees, print the table; 0 when nothing differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="a revision, or the folder of a checkout")
    parser.add_argument("new", nargs="?", default=str(ROOT), help="the same (default: this checkout)")
    parser.add_argument("--only", nargs="+", default=[*RUNS], choices=[*RUNS], metavar="RUN", help=f"some of {', '.join(RUNS)}")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        for side in ("old", "new"):
            folder = Path(name, side)
            (folder / "mpo").mkdir(parents=True)
            if not (tree := Path(getattr(given, side)).resolve()).is_dir():
                (tree := folder / "tree").mkdir()
                files = subprocess.run(["git", "-C", ROOT, "archive", getattr(given, side)], check=True, stdout=subprocess.PIPE)
                subprocess.run(["tar", "-x", "-C", tree], input=files.stdout, check=True)
            for one in (*(tree / "mpo").iterdir(), tree / "losses", tree / "recipes"):
                (folder / "mpo" / one.name).symlink_to(one)  # found there before the packages that are installed
            paths = {"PYTHONPATH": os.pathsep.join(map(str, (folder, ROOT / "tests", ROOT / ".ci"))), "HF_HUB_OFFLINE": "1"}
            code = f"import same, pathlib; same.run_all(pathlib.Path({str(tree)!r}), {f'{folder}.pt'!r}, {given.only})"
            subprocess.run([sys.executable, "-P", "-c", code], env={**os.environ, **paths}, stdout=subprocess.DEVNULL, check=True)
        return compare(Path(name))


def run_all(tree: Path, output: str, only: list[str]) -> None:
    """Run in this process, whose mpo is the tree's, and save the results."""
    import torch

    import mpo

    assert Path(mpo.__file__).resolve().is_relative_to(tree), f"mpo comes from {mpo.__file__}"
    torch.set_num_threads(1)
    found = {}
    for name in only:
        print(f"{tree}: {name}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            found[name] = RUNS[name](Path(folder), **({"tree": tree} if name == "counted" else {}))
    torch.save(found, output)


def compare(folder: Path) -> int:
    """Print the largest difference of each part of each run; 0 when nothing differs."""
    sys.path.insert(0, str(ROOT / "tests"))
    from small_runs import difference, torch

    old, new = (torch.load(folder / f"{side}.pt") for side in ("old", "new"))
    rows = {f"{run}: {part}": difference(value, new[run].get(part)) for run, parts in old.items() for part, value in parts.items()}
    for label, most in rows.items():
        print(f"{label:<24} {'equal' if most == 0 else f'differs by {most:.3g}'}")
    return int(any(rows.values()))


if __name__ == "__main__":
    sys.exit(main())
