"""A job: train and measure one method with one learning rate and one seed, in minutes, and write one JSON file."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from transformers import set_seed

from comparison.measure import measure, reward_margin
from comparison.prepare import worked_rows
from comparison.settings import Settings
from mpo.demo.stages import logs_to, train_on_examples
from mpo.models.loading import load_model
from mpo.training.job import TrainJob, run_train_job


@dataclass(frozen=True)
class Method:
    """A training method.

    Attributes:
        title: its name in tables.
        loss: overrides of `mpo train` for its loss; None to train on the worked examples of the warm-up instead of pairs.
        paper: direct and reasoned accuracy in the paper's Table 6 (M3CoT), if listed there.
    """

    title: str
    loss: tuple[str, ...] | None
    paper: tuple[float, float] | None = None


METHODS = {
    "more_warm_up": Method("more warm-up", None),
    "sft": Method("SFT on the chosen", ("loss=sft",), (65.7, 68.5)),
    "dpo": Method("DPO", ("loss=dpo",), (75.8, 72.7)),
    "bco": Method("BCO", ("loss=bco",), (78.1, 78.4)),
    "dpo_sft": Method("DPO + SFT", ("loss=dpo_plus_sft",), (76.4, 78.9)),
    "bco_sft": Method("BCO + SFT", ("loss=bco_plus_sft",), (77.4, 78.4)),
    "mpo_no_delta": Method("MPO without delta", ("loss=mpo", "loss.reward_shift=none")),
    "mpo": Method("MPO", ("loss=mpo",), (77.7, 79.1)),
}
LEARNING_RATES = (5e-5, 2e-4, 8e-4)


def result_path(folder: Path, method: str, rate: float) -> Path:
    """The JSON file of a job in a seed's folder."""
    return folder / "jobs" / f"{method}_{rate:.0e}.json"


def run_job(folder: Path, method: str, rate: float, seed: int, settings: Settings) -> None:
    """Train the warmed-up model of a seed with a method and measure it, unless its result exists."""
    path = result_path(folder, method, rate)
    if path.is_file():
        return
    path.parent.mkdir(exist_ok=True)
    set_seed(seed)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=path.parent) as place:
        model = Path(place) / "model"
        (_train_on_examples if METHODS[method].loss is None else _train_on_pairs)(folder, model, method, rate, seed, settings)
        trained = time.monotonic()
        numbers = {
            "method": method,
            "learning_rate": rate,
            "seed": seed,
            **measure(model, folder, settings),
            "margin": reward_margin(model, folder),
            "seconds": {"training": trained - started, "measuring": time.monotonic() - trained},
        }
        unfinished = Path(place) / path.name
        unfinished.write_text(json.dumps(numbers) + "\n")
        unfinished.replace(path)


def _train_on_examples(folder: Path, model: Path, method: str, rate: float, seed: int, settings: Settings) -> None:
    warm = load_model(str(folder / "warm"), dtype="float32")
    train_on_examples(
        warm.model,
        warm.processor,
        worked_rows(folder, settings),
        model,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        learning_rate=rate,
        seed=seed,
    )


def _train_on_pairs(folder: Path, model: Path, method: str, rate: float, seed: int, settings: Settings) -> None:
    loss = METHODS[method].loss or ()
    with initialize_config_module("mpo.recipes", version_base="1.3"):
        config = compose(
            "train",
            overrides=[
                "experiment=demo",
                *loss,
                f"run_dir={model}",
                f"seed={seed}",
                f"model.name_or_path={folder / 'warm'}",
                f"data.path={folder / 'questions_pairs.jsonl'}",
                f"data.image_root={folder}",
                f"trainer.max_steps={settings.steps}",
                f"trainer.learning_rate={rate}",
                f"trainer.global_batch_size={settings.batch}",
                f"trainer.per_device_train_batch_size={settings.batch}",
                "trainer.dataloader_num_workers=0",
                "trainer.save_strategy=no",
            ],
        )
    with logs_to(model / "train.log"):
        run_train_job(TrainJob.from_config(OmegaConf.to_container(config, resolve=True)))
