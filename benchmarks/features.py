"""Measure cached vision features against live ones: exactness, the time of epochs, and the wait for data.

    python benchmarks/features.py                  # the shape "small" of benchmarks/step.py on a CPU, float32 and bfloat16
    python benchmarks/features.py --epochs 3 --images 12 --workers 2
    python benchmarks/features.py --measure steps runs     # the times alone

Exactness, by dtype of the weights: `tower` is the largest difference between the output of a tile in two batches of the live tower
(alone, and among others), relative to the largest value; `live` the difference between two compositions of a live batch
(its pairs together, and one at a time) of loss and gradients (norm of the difference over norm); `cached` that between cached and
live features of the same batch. `steps` are seconds of full steps of benchmarks/step.py at 1 pair a question, alternating, with
cached references, without and with cached features: of the clock, and of this process on the CPU, which does not depend on others.
Times are of real runs of `MPOTrainer` with data loader workers; `data_wait` is a fraction of them. Beside it is what fetching takes
of the CPU time of the main process: on a machine that others use, the wait of the clock is that for a core as well.
"""

import argparse
import copy
import json
import platform
import statistics
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image, List
from PIL import Image as PILImage
from step import RESULTS, stepper
from step_cases import SHAPES, Case, make_trainer, quiet
from transformers import TrainerCallback

from mpo import MPOConfig, MPOTrainer
from mpo.models.small import small_processor
from mpo.models.tower import find_tower


def records(images: int, pairs: int, folder: Path) -> Dataset:
    """Pairs, `pairs` for each image: a JPEG file of 6 tiles and a thumbnail."""
    rows = []
    for number in range(images):
        path = folder / f"{number}.jpg"
        if not path.exists():
            PILImage.effect_noise((1344, 896), 80).convert("RGB").save(path)
        for pair in range(pairs):
            completions = {"chosen": f"{pair}" + "12345" * 14, "rejected": f"{pair + 5}" + "54321" * 14}
            rows.append(
                {
                    "images": [{"path": str(path), "bytes": None}],
                    "prompt": [{"role": "user", "content": "0123456789"}],
                    **{side: [{"role": "assistant", "content": text}] for side, text in completions.items()},
                }
            )
    return Dataset.from_list(rows).cast_column("images", List(Image()))


def trainer(folder: Path, data: Dataset, dtype: str, callbacks: Any = (), **settings: Any) -> MPOTrainer:
    """A run of the shape "small" with a frozen tower, and cached references."""
    shape = SHAPES["small"]
    processor = small_processor(["0 1"], image_size=shape.image_size, patch_size=shape.patch_size, max_patches=6, vocab_size=300)
    torch.manual_seed(0)
    model = shape.build(processor.image_token_id, "cpu", getattr(torch, dtype))
    find_tower(model).requires_grad_(False)
    usual = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    usual |= {"gradient_checkpointing": False, "learning_rate": 1e-6, "per_device_train_batch_size": 1}
    usual |= {"reference": "cached", "reference_cache": str(folder / f"references-{dtype}")}
    if settings.get("vision_features") == "cached":
        usual["vision_feature_cache"] = str(folder / f"features-{dtype}")
    args = MPOConfig(str(folder / "run"), **{**usual, **settings})
    return MPOTrainer(model=model, args=args, train_dataset=data, processing_class=processor, callbacks=list(callbacks))


def gradients(run: MPOTrainer, batches: list[Any]) -> tuple[float, torch.Tensor]:
    """Loss and gradients of micro-batches that are one step."""
    run.model.train().zero_grad()
    loss = 0.0
    for batch in batches:
        part = run.compute_loss(run.model, copy.copy(batch)) / len(batches)
        part.backward()
        loss += part.item()
    return loss, torch.cat([p.grad.double().flatten() for p in run.model.parameters() if p.grad is not None])


def exactness(folder: Path, dtype: str) -> dict[str, Any]:
    """Compare batch compositions of live features, and cached features with live ones."""
    data = records(2, 1, folder)
    runs = {how: trainer(folder, data, dtype, vision_features=how) for how in ("live", "cached")}
    rows = [runs["live"].train_dataset[place] for place in range(2)]

    def collated(run: MPOTrainer, places: list[int]) -> Any:
        return run._prepare_inputs(run.data_collator([rows[place] for place in places]))

    tiles = collated(runs["live"], [0, 1])["pixel_values"].to(getattr(torch, dtype))
    tower = find_tower(runs["live"].model)
    with torch.no_grad():
        together = tower(tiles).last_hidden_state[:1]
        tower_alone = tower(tiles[:1]).last_hidden_state
    results = {
        "together": gradients(runs["live"], [collated(runs["live"], [0, 1])]),
        "one at a time": gradients(runs["live"], [collated(runs["live"], [place]) for place in (0, 1)]),
        "cached": gradients(runs["cached"], [collated(runs["cached"], [0, 1])]),
    }

    def apart(first: str, second: str) -> dict[str, float]:
        (loss, gradient), (other, others) = results[first], results[second]
        return {"loss": abs(loss - other), "gradients": float((gradient - others).norm() / others.norm())}

    found = {"tower": float((together - tower_alone).abs().max() / together.abs().max())}
    return {**found, "live": apart("one at a time", "together"), "cached": apart("cached", "together")}


def steps(rounds: int = 8) -> dict[str, Any]:
    """Time full steps without and with cached features."""
    case, clocks = Case("small", pairs=1), {"cpu": time.process_time, "wall": time.perf_counter}
    sides = ("cached", "cached features")
    work = {side: stepper(*make_trainer(side, case, SHAPES["small"], tempfile.mkdtemp())) for side in sides}
    found: dict[str, Any] = {clock: {side: [] for side in sides} for clock in clocks}
    for round_ in range(rounds + 1):
        for side in sides:
            before = {name: clock() for name, clock in clocks.items()}
            work[side]()
            for name, clock in clocks.items() if round_ else ():
                found[name][side].append(clock() - before[name])
    medians = {name: {side: statistics.median(found[name][side]) for side in sides} for name in clocks}
    return {**found, **{f"{name} ratio": each["cached"] / each["cached features"] for name, each in medians.items()}}


class Epochs(TrainerCallback):
    """Seconds of each epoch, by the clock and on the CPU."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu: list[float] = []
        self.start = self.begin = 0.0

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clocks."""
        self.start, self.begin = time.perf_counter(), time.process_time()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop them."""
        self.seconds.append(time.perf_counter() - self.start)
        self.cpu.append(time.process_time() - self.begin)


def fetching(run: MPOTrainer) -> list[tuple[int, float]]:
    """The epoch, and the CPU seconds of the main process, of each time that the run fetches the batches of a step."""
    fetch, spent = run.get_batch_samples, []

    def measured(*args: Any) -> Any:
        start = time.process_time()
        try:
            return fetch(*args)
        finally:
            spent.append((int(run.state.epoch or 0), time.process_time() - start))

    run.get_batch_samples = measured
    return spent


def timed(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run live and cached, and report each epoch."""
    data, found = records(options.images, 1, folder), {}
    for how in ("live", "cached"):
        epochs, calls = Epochs(), []
        run = trainer(
            folder,
            data,
            "float32",
            [epochs],
            vision_features=how,
            num_train_epochs=options.epochs,
            dataloader_num_workers=options.workers,
            dataloader_persistent_workers=options.workers > 0,
        )
        find_tower(run.model).embeddings.register_forward_hook(
            lambda module, args, output, calls=calls, run=run: calls.append(int(run.state.epoch or 0))
        )
        fetched = fetching(run)
        run.train()
        logs = [log for log in run.state.log_history if "data_wait" in log]
        size = len(logs) // options.epochs
        parts = [logs[epoch * size + 1 : (epoch + 1) * size] for epoch in range(options.epochs)]
        waits = [sum(log["data_wait"] for log in part) / len(part) for part in parts]
        found[how] = {
            "seconds of each epoch": epochs.seconds,
            "data_wait of each epoch, without its first step": waits,
            "fetching, fraction of the main process's CPU seconds of each epoch": [
                sum(seconds for number, seconds in fetched if number == epoch) / epochs.cpu[epoch]
                for epoch in range(options.epochs)
            ],
            "calls of the tower in each epoch": [calls.count(epoch) for epoch in range(options.epochs)],
        }
    return found


def main() -> None:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs="+", default=["exactness", "steps", "runs"], choices=["exactness", "steps", "runs"])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / f"features_cpu_{date.today()}.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, quiet():
        parts: dict[str, Any] = {
            "exactness": lambda: {dtype: exactness(Path(name), dtype) for dtype in ("float32", "bfloat16")},
            "steps": steps,
            "runs": lambda: timed(Path(name), options),
        }
        found = {part: parts[part]() for part in options.measure}
        result = {
            "command": " ".join(["python benchmarks/features.py", *sys.argv[1:]]),
            "how": __doc__,
            "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
            "versions": {package: version(package) for package in ("torch", "transformers", "trl", "mpo-trainer")},
            **found,
        }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
