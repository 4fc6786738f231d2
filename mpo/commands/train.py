"""Train a model on preference pairs with a recipe.

The recipe is composed and checked before anything loads; `mpo train --help` is Hydra's.
"""

from __future__ import annotations

import math
import os
import re
import sys
import tempfile
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mpo.io import did_you_mean, read_json_object, without_collection
from mpo.recipes import EXPERIMENTS

if TYPE_CHECKING:
    from mpo.training.job import TrainJob
    from mpo.training.launch.place import Place

GROUPS = ("model", "method", "peft", "loss", "data", "trainer", "launch", "experiment")
OTHERS = {"train": {"data/conversations", "trainer/sft"}, "sft": {"loss", "data/pairs", "data/mmpr", "experiment/demo"}}
"""Task -> groups and options that are not in the help of its command."""
_ASSIGNMENT = re.compile(r"^([A-Za-z_][\w.]*)=")
_RESULTS: list[dict[str, Any]] = []
"""Of the runs of this command, of which a sweep has several."""


def run(arguments: Sequence[str], task: str = "train") -> int:
    """Run `mpo train`, or another task, with Hydra's command line and return the exit status.

    With `--json`, the results of its runs alone are printed.
    """
    from mpo.commands.outcome import print_json, stdout_to_stderr, user_errors

    as_json, words = "--json" in arguments, [settable(word) for word in arguments if word != "--json"]
    before = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = [f"mpo {task}", *words], "1"  # errors come here, not to stderr
    _RESULTS.clear()
    try:
        with stdout_to_stderr() if as_json else nullcontext():
            status = user_errors(lambda: _with_hydra(task))
    finally:
        sys.argv = before[0]
        os.environ.pop("HYDRA_FULL_ERROR")
        if before[1] is not None:
            os.environ["HYDRA_FULL_ERROR"] = before[1]
    if as_json and _RESULTS:
        print_json({"runs": _RESULTS})
    return status


def _with_hydra(task: str) -> int:
    def task_function(config: DictConfig) -> None:
        _task(config, task)

    try:
        hydra.main(version_base="1.3", config_path="pkg://mpo.recipes", config_name=task)(task_function)()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except MissingConfigException as error:
        name = (error.missing_cfg_file or "").split("/")[-1]
        near = did_you_mean(name, error.options or [], most=20) or f" mpo {task} --help lists the options."
        first = re.sub("^In '.*?': ", "", str(error).splitlines()[0])  # the file of the defaults list, which is not the user's
        raise ValueError(f"{first}.{near}" if name and error.options else str(error)) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError("\n".join(filter(None, [str(error), str(error.__cause__ or "")]))) from error
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


def groups(task: str) -> str:
    """List the groups with their options, for the help: names that differ in their size only as one."""
    lines = []
    for group in (name for name in GROUPS if name not in OTHERS[task]):
        shown, sizes = [], defaultdict(list)
        for name in _options(group, task):
            size = re.fullmatch(r"(\w+)_(\d+)(b\w*)", name)
            if group == "model" and size:
                sizes[size[1]].append((int(size[2]), size[3]))
            elif group != "experiment" or name not in EXPERIMENTS:
                shown.append(name)
        shown += [f"{family}_{{{','.join(f'{n}{rest}' for n, rest in sorted(found))}}}" for family, found in sorted(sizes.items())]
        if group == "experiment":
            shown.append("MODEL, MODEL_lora, MODEL_qlora for each MODEL with a size" + ", each with method=..." * (task == "sft"))
        lines.append(textwrap.fill(f"{group}: {', '.join(shown)}", 110, subsequent_indent="    ", break_on_hyphens=False))
    return "\n".join(lines)


def _options(group: str, task: str) -> list[str]:
    loader: Any = GlobalHydra.instance().config_loader()
    fitting = (name for name in sorted(loader.get_group_options(group)) if f"{group}/{name}" not in OTHERS[task])
    return [name for name in fitting if group != "method" or _task_of(name) in (None, task)]


def _task_of(method: str) -> Any:
    loader: Any = GlobalHydra.instance().config_loader()
    return loader.repository.load_config(f"method/{method}").config.get("task")


OmegaConf.register_new_resolver("mpo_groups", groups, replace=True)


class CheckSweep(Callback):  # type: ignore[misc]
    """Refuse a sweep whose jobs write to the same folder, before the first of them runs."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra with the configuration of the sweep."""
        from mpo.commands.outcome import user_errors

        if status := user_errors(lambda: self._check(config)):
            raise SystemExit(status)  # Hydra turns exceptions of callbacks into warnings

    def _check(self, config: DictConfig) -> int:
        sweep: Any = OmegaConf.to_container(config.hydra.sweep, resolve=False)
        if "hydra.job.num" in str(sweep["subdir"]) or not config.hydra.sweeper._target_.endswith(".BasicSweeper"):
            return 0
        loader: Any = GlobalHydra.instance().config_loader()
        words = OverridesParser.create(config_loader=loader).parse_overrides(list(config.hydra.overrides.task))
        jobs: dict[str, list[str]] = {}
        for overrides in BasicSweeper.split_arguments(words, None)[0]:
            job = loader.load_sweep_config(config, overrides).hydra.sweep
            folder = os.path.normpath(os.path.join(job.dir, job.subdir))
            if folder in jobs:
                raise ValueError(
                    f"Two jobs of the sweep would write to {folder}: {' '.join(jobs[folder])} and {' '.join(overrides)}. Put "
                    f"${{hydra.job.num}} into hydra.sweep.subdir (here {sweep['subdir']!r}), or leave it out."
                )
            jobs[folder] = overrides
        return 0


def _task(config: DictConfig, task: str) -> None:
    from mpo.commands.outcome import user_errors

    status = user_errors(lambda: _train(config, task))  # here, or Hydra adds a line of its own
    if status:
        raise SystemExit(status)


def _train(config: DictConfig, task: str) -> int:
    from mpo.training.schema import Conversations, Data, check_data

    method = HydraConfig.get().runtime.choices["method"]
    if (other := _task_of(method)) not in (None, task):
        fitting = " or ".join(f"method={name}" for name in _options("method", task))
        raise ValueError(
            f"method={method} (a model chooses its own unless you choose one) has the hyper-parameters of mpo {other}. Choose "
            f"{fitting}, without published numbers."
        )
    if config.task != task:
        raise ValueError(f"task={config.task} is set by the command, which is mpo {task}. Leave it out.")
    named = "${now" not in str(OmegaConf.to_container(config, resolve=False)["run_dir"])  # type: ignore[call-overload,index]
    plain: Any = OmegaConf.to_container(config, resolve=True)
    plain["run_dir"] = HydraConfig.get().runtime.output_dir  # in a sweep, each run has its own
    check_data(Conversations if task == "sft" else Data, plain["data"])  # the usual omission, before what takes seconds to import
    with without_collection():
        from mpo.training.job import TrainJob, run_train_job  # here, so that --help and --cfg need no torch
    job = TrainJob.from_config(plain)
    if job.dry_run:
        from mpo.preflight.dry_run import dry_run

        _RESULTS.append({"run_dir": job.run_dir, "dry_run": dry_run(job)})
        print(_RESULTS[-1]["dry_run"])
        return 0
    place = job.place()
    if not named and (place.is_rank or place.nnodes > 1):
        raise ValueError(
            "The default run_dir contains the time, which differs between ranks started by another launcher. Set run_dir=... to a "
            "folder that all nodes can access."
        )
    resumed, before = None, -1
    if place.is_rank or place.node_rank == 0:
        resumed = job.checkpoint()
        before = read_json_object(Path(resumed, "trainer_state.json"))["global_step"] if resumed else -1
    if job.needs_ranks():
        status = _train_on_ranks(job, place)
    else:
        os.environ.update(place.environment)
        if not place.is_rank:  # transformers would use DataParallel over all visible GPUs
            os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        run_train_job(job, announce=True)
        status = 0
    if status == 0 and place.node_rank == 0 and os.environ.get("RANK", "0") == "0":
        _report(job, resumed, before)
    return status


def _train_on_ranks(job: TrainJob, place: Place) -> int:
    from mpo.training.checkpoint import latest_checkpoint
    from mpo.training.launch.ranks import start_ranks

    try:
        with tempfile.TemporaryDirectory() as folder:
            return start_ranks(place, "mpo.commands.rank", [str(job.save(folder))])
    except RuntimeError as error:
        newest = latest_checkpoint(job.run_dir)
        further = f"Run the same command to resume from {newest}." if newest else "No checkpoint has been saved yet."
        print(f"mpo: error: {error} {further}", file=sys.stderr)
        return 1


def _report(job: TrainJob, resumed: str | None, before: int) -> None:
    run_dir, said = job.run_dir, f"mpo {job.task}:"
    state = read_json_object(Path(run_dir, "trainer_state.json"))
    if state["global_step"] == before:
        print(f"{said} nothing was left to train: {resumed} has {before} steps, and this run ends at step {state['max_steps']}.")
    rates = [entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry]
    if state["global_step"] == 1 and rates == [0] and job.trainer.get("learning_rate", 1):
        print(f"{said} nothing was trained: the only step had the learning rate 0. The model was saved to {run_dir} as it was.")
    else:
        print(f"{said} done. The trained model was saved to {run_dir}")
    metrics = {name: value for entry in state["log_history"] for name, value in entry.items()}
    metrics = {name: value if math.isfinite(value) else None for name, value in metrics.items() if isinstance(value, (int, float))}
    _RESULTS.append({"run_dir": run_dir, "resumed_from": resumed, "metrics": metrics})
