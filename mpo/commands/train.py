"""`mpo train`: compose a recipe once, check all of it, and run the job."""

import re
import sys
from collections.abc import Sequence
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

GROUPS = ("model", "data", "loss", "peft", "trainer", "experiment")
_ASSIGNMENT = re.compile(r"^([A-Za-z_][\w.]*)=")


def run(arguments: Sequence[str]) -> int:
    """Run `mpo train` with Hydra's command line; returns the exit status."""
    before = sys.argv
    sys.argv = ["mpo train", *map(settable, arguments)]
    try:
        hydra.main(version_base="1.3", config_path="pkg://mpo.recipes", config_name="train")(_task)()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.argv = before
    return 0


def settable(argument: str) -> str:
    """Let `key=value` set any key, so that Hydra leaves the checking of names to us and `trainer.` takes every field.

    >>> settable("trainer.adam_beta2=0.95"), settable("loss=dpo"), settable("-m"), settable("hydra.verbose=true")
    ('++trainer.adam_beta2=0.95', 'loss=dpo', '-m', 'hydra.verbose=true')
    """
    match = _ASSIGNMENT.match(argument)
    if match is None or match[1] in GROUPS or match[1].split(".")[0] == "hydra":
        return argument
    return f"++{argument}"


def _task(config: DictConfig) -> None:
    from mpo.commands import user_errors

    def work() -> int:
        from mpo.job import TrainJob, run_train_job  # here, so that --help and --cfg need no torch

        plain: Any = OmegaConf.to_container(config, resolve=True)
        plain["run_dir"] = HydraConfig.get().runtime.output_dir  # in a sweep, each run has its own
        job = TrainJob.from_config(plain)
        if job.dry_run:
            from mpo.dry_run.run import dry_run

            print(dry_run(job))
            return 0
        resumed = job.checkpoint()
        print(f"mpo train: {'going on from ' + resumed if resumed else 'run folder ' + job.run_dir}")
        run_train_job(job)
        print(f"mpo train: done. The trained model is in {job.run_dir}")
        return 0

    status = user_errors(work)
    if status:
        raise SystemExit(status)
