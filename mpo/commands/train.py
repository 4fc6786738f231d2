"""Train a model with a recipe.

The recipe is composed and checked before anything loads; `mpo train --help` is Hydra's.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from mpo.training.job import TrainJob
    from mpo.training.launch.place import Place

GROUPS = ("model", "data", "loss", "peft", "trainer", "launch", "experiment")
_ASSIGNMENT = re.compile(r"^([A-Za-z_][\w.]*)=")


def run(arguments: Sequence[str]) -> int:
    """Run `mpo train` with Hydra's command line and return the exit status."""
    from mpo.commands.outcome import user_errors

    before = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = ["mpo train", *map(settable, arguments)], "1"  # errors come here, not to stderr
    try:
        return user_errors(_with_hydra)
    finally:
        sys.argv = before[0]
        os.environ.pop("HYDRA_FULL_ERROR")
        if before[1] is not None:
            os.environ["HYDRA_FULL_ERROR"] = before[1]


def _with_hydra() -> int:
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        hydra.main(version_base="1.3", config_path="pkg://mpo.recipes", config_name="train")(_task)()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(str(error)) from error
    return 0


def settable(argument: str) -> str:
    """Rewrite `key=value` to `++key=value`: any field of `trainer` can be set, and unknown keys are refused by mpo, not Hydra.

    >>> settable("trainer.adam_beta2=0.95"), settable("loss=dpo"), settable("-m"), settable("hydra.verbose=true")
    ('++trainer.adam_beta2=0.95', 'loss=dpo', '-m', 'hydra.verbose=true')
    """
    match = _ASSIGNMENT.match(argument)
    if match is None or match[1] in GROUPS or match[1].split(".")[0] == "hydra":
        return argument
    return f"++{argument}"


def _task(config: DictConfig) -> None:
    from mpo.commands.outcome import user_errors

    status = user_errors(lambda: _train(config))  # here, or Hydra adds a line of its own
    if status:
        raise SystemExit(status)


def _train(config: DictConfig) -> int:
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from mpo.training.job import TrainJob, run_train_job  # here, so that --help and --cfg need no torch

    named = "${now" not in str(OmegaConf.to_container(config, resolve=False)["run_dir"])  # type: ignore[call-overload,index]
    plain: Any = OmegaConf.to_container(config, resolve=True)
    plain["run_dir"] = HydraConfig.get().runtime.output_dir  # in a sweep, each run has its own
    job = TrainJob.from_config(plain)
    if job.dry_run:
        from mpo.preflight.dry_run import dry_run

        print(dry_run(job))
        return 0
    place = job.place()
    if not named and (place.is_rank or place.nnodes > 1):
        raise ValueError(
            "The default run_dir contains the time, which differs between ranks started by another launcher. Set run_dir=... to a "
            "folder that all nodes can access."
        )
    if place.is_rank or place.node_rank == 0:
        resumed = job.checkpoint()
        print(f"mpo train: {'resuming from ' + resumed if resumed else 'writing to ' + job.run_dir}")
    if job.needs_ranks():
        return _train_on_ranks(job, place)
    os.environ.update(place.environment)
    if not place.is_rank:  # transformers would use DataParallel over all visible GPUs
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    run_train_job(job)
    print(f"mpo train: done. The trained model was saved to {job.run_dir}")
    return 0


def _train_on_ranks(job: TrainJob, place: Place) -> int:
    from mpo.training.launch.ranks import start_ranks

    try:
        status = start_ranks(place, "mpo.commands.rank", [str(job.save())])
    except RuntimeError as error:
        newest = job.newest_checkpoint()
        print(
            f"mpo: error: {error} "
            + (f"Run the same command to resume from {newest}." if newest else "No checkpoint has been saved yet."),
            file=sys.stderr,
        )
        return 1
    if status == 0 and place.node_rank == 0:
        print(f"mpo train: done. The trained model was saved to {job.run_dir}")
    return status
