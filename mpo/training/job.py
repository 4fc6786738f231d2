"""A training job: from a resolved configuration to a trained model in a run folder."""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import is_deepspeed_available
from omegaconf import OmegaConf
from transformers import TrainerCallback
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.training_args import OptimizerNames
from transformers.utils import is_bitsandbytes_available, is_liger_kernel_available
from yaml import YAMLError

from mpo.batching.attention import check_backend
from mpo.data import load_conversations, load_preferences
from mpo.data.mixture_file import read_mixture
from mpo.io import BAD_RECORDS, did_you_mean, write_text
from mpo.models.family import PARTS
from mpo.models.loading import as_dtype, check_attention
from mpo.models.parts import check_parts
from mpo.models.strict import refuse_adapter
from mpo.training import schema
from mpo.training.checkpoint import latest_checkpoint
from mpo.training.config import MPOConfig
from mpo.training.launch.place import Place, find_place
from mpo.training.loop import Loop
from mpo.training.loop_config import LoopConfig
from mpo.training.mpo import MPOTrainer
from mpo.training.record_checks import check_before_training
from mpo.training.same_run import check_same_recipe
from mpo.training.samples.recipe import check_samples, sampling
from mpo.training.schema import DATA_NAMES, check_data, check_keys, hints
from mpo.training.sft import PackedSFTTrainer
from mpo.training.sft_config import PackedSFTConfig
from mpo.training.trained_model import TrainedModel

RESOLVED = "resolved.yaml"
FINAL_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
TRACKERS = ("tensorboard", "wandb", "trackio", "swanlab")
SIZES = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
GROUPS = ("model", "data", "loss", "peft", "trainer", "launch")
OPTIONAL: dict[str, Mapping[str, Any]] = {
    "fuser": hints(schema.Fuser),
    "train_parts": dict.fromkeys(PARTS, schema.Part),
    "lr": dict.fromkeys(PARTS, schema.Rate | None),
    "samples": hints(schema.Samples),
}
"""Groups that may be null, and their keys."""
LOSS_FIELDS = (
    *("loss_type", "loss_weights", "beta", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef", "discopop_tau"),
    *("reward_shift", "sft_average", "completion_end", "ld_alpha", "use_weighting"),
)
SKIPPING = ("on_bad_record", "max_bad_fraction")  # settings of both data loading and training
SHARED_WITH_EVAL = ("tiles", "frames", *SKIPPING, "bad_records", "num_proc", "metadata", "from_preferences")
EVAL_KEYS = ("eval_path", "eval_image_root", "eval_split", "eval_format")
SHARDING = ("fsdp", "fsdp_config", "deepspeed")  # settings that only ranks can apply
# Fields of the trainer's configuration that a recipe sets under another key.
ELSEWHERE = {
    "output_dir": "run_dir",
    "resume_from_checkpoint": "resume",
    "trust_remote_code": "model.trust_remote_code",
    "model_init_kwargs": "the keys of model",
    "seed": "seed",
    **{name: f"data.{name}" for name in SKIPPING},
    "vision_drop_path": "drop_path",
    **{f"{part}_learning_rate": f"lr.{part}" for part in PARTS},
}


@dataclass(frozen=True)
class Task:
    """What a job trains on and how: the trainer and its configuration, and the function that loads its data, with its keys."""

    config: type[LoopConfig]
    trainer: type[Loop]
    load: Callable[..., Any]
    data: type
    loss: tuple[str, ...] = ()  # fields of the configuration that are set in the group loss


TASKS = {
    "train": Task(MPOConfig, MPOTrainer, load_preferences, schema.Data, LOSS_FIELDS),
    "sft": Task(PackedSFTConfig, PackedSFTTrainer, load_conversations, schema.Conversations),
}
"""The tasks of `mpo train` and `mpo sft`, by the names of the commands."""


@dataclass(kw_only=True)
class TrainJob(TrainedModel):
    """A training job. Fields are the keys and groups of ``recipes/train.yaml`` and ``recipes/sft.yaml``, which explain them.

    Args:
        task: the command that runs it (`TASKS`): ``"train"``, on preference pairs, or ``"sft"``, on conversations.
        data: arguments of `load_preferences` or `load_conversations`, and ``path``, ``image_root``, ``split`` and ``format``
            with ``eval_`` for the evaluation data. ``on_bad_record`` and ``max_bad_fraction`` apply to training too.
        loss: loss fields of `MPOConfig`; empty for conversations.
        trainer: other fields of `MPOConfig`, or those of `PackedSFTConfig`, and ``global_batch_size``.
        samples: prompts (``path``, ``image_root``, ``count``) and arguments of `SampleResponses` and `MeasureAccuracy`, or None.
    """

    task: str = "train"
    data: dict[str, Any]
    loss: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    launch: dict[str, Any] = field(default_factory=dict)
    run_dir: str = "runs/train"
    resume: str = "auto"
    seed: int = 0
    lr: dict[str, float | None] | None = None
    drop_path: float = 0.0
    samples: dict[str, Any] | None = None
    dry_run: bool = False
    dry_run_gpu_gb: float | None = None
    dry_run_records: int | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "TrainJob":
        """Check a composed configuration without loading model or data.

        Raises ValueError for unknown keys (names the closest match), missing values, and invalid combinations.
        """
        check_keys({**hints(schema.Job), **dict.fromkeys((*GROUPS, *OPTIONAL), Any)}, config, "")
        job = cls(**config)
        if job.task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}; got {job.task!r}.")
        if job.loss and not job.kind.loss:
            raise ValueError("loss is a group of mpo train. mpo sft has trainer.loss_type and trainer.loss_average instead.")
        for group in GROUPS:
            if not isinstance(getattr(job, group), dict):
                raise ValueError(f"{group} must be a group of keys; got {getattr(job, group)!r}. Choose one with {group}=NAME.")
        job.check_loader()
        check_data(job.kind.data, job.data)
        for group, known in {"launch": hints(schema.Launch), **OPTIONAL}.items():
            if getattr(job, group) is not None:
                check_keys(known, getattr(job, group), group)
        for name in ("eval_split", "eval_format"):
            if job.data.get(name) and not job.data.get("eval_path"):
                raise ValueError(f"data.{name} needs data.eval_path, which is not set. Set it or remove data.{name}.")
        for name, place in {**ELSEWHERE, **{name: f"loss.{name}" for name in job.kind.loss}}.items():
            if name in job.trainer:
                raise ValueError(f"trainer.{name} cannot be set. Set {place} instead.")
        types = hints(cast(type, job.kind.config))
        settings = {f.name: types[f.name] for f in fields(job.kind.config) if f.init} | dict.fromkeys(SIZES, schema.Positive)
        check_keys({name: settings[name] for name in job.kind.loss}, job.loss, "loss")
        check_keys({**settings, "global_batch_size": schema.Positive | None, "fsdp": bool | str | None}, job.trainer, "trainer")
        job.check_sharding()
        job.check_peft()
        check_parts(job.parts(), adapters=job.peft["kind"] != "none")
        job.adapter(job.expected_family())
        job.check_fuser_rate()
        strategy, eval_path = job.trainer.get("eval_strategy", "no"), job.data.get("eval_path")
        check_samples(job.samples or {}, strategy, eval_path, evaluated=strategy == "no" or job.eval_data() is not None)
        if job.model.get("name_or_path", 0) in (None, "???"):
            raise ValueError("model.name_or_path is not set. Add model.name_or_path=... to the command.")
        if job.model.get("name_or_path"):
            refuse_adapter(job.model["name_or_path"])
        if job.model.get("dtype") is not None:
            job.model = {**job.model, "dtype": str(as_dtype(job.model["dtype"])).removeprefix("torch.")}
        job.check_packages(job.planned_arguments())
        job.checkpoint()
        return job

    @property
    def kind(self) -> Task:
        """The task."""
        return TASKS[self.task]

    def check_fuser_rate(self) -> None:
        """Refuse a learning rate of a fuser that the model, where its config is at hand, does not have."""
        rate = (self.lr or {}).get("fuser")
        if rate is not None and self.is_local() and getattr(config := self.config(), "fusion", "") != "mmfuser":
            why = "has layers that its projector fuses" if hasattr(config, "fusion") else "has no fuser"
            raise ValueError(f"lr.fuser={rate} has no effect: the {config.model_type} {why}. Set lr.fuser=null.")

    def check_packages(self, args: LoopConfig) -> None:
        """Refuse settings that need a package that is not installed."""
        for name in args.report_to:
            if name not in INTEGRATION_TO_CALLBACK:
                raise ValueError(
                    f"Unknown tracker {name!r} in trainer.report_to.{did_you_mean(name, INTEGRATION_TO_CALLBACK, most=20)}"
                )
        if self.dry_run:
            return
        check_backend(args.packed_attention)
        check_attention(self.model.get("attn_implementation"))
        available = get_available_reporting_integrations()
        needed = [(f"report_to={name}", name) for name in args.report_to if name in TRACKERS and name not in available]
        if re.search("8bit|bnb|paged", args.optim) and not is_bitsandbytes_available():
            needed.append((f"optim={OptimizerNames(args.optim).value}", "bitsandbytes"))
        if args.use_liger_kernel and not is_liger_kernel_available():
            needed.append(("use_liger_kernel", "liger-kernel"))
        for setting, package in needed:
            raise ValueError(f"trainer.{setting} needs {package}, which is not installed: pip install {package}.")

    def train_data(self) -> dict[str, Any]:
        """Return the arguments of the task's `load` for the training data."""
        given = {key: value for key, value in self.data.items() if key not in DATA_NAMES and not key.startswith("eval_")}
        return {**given, "bad_records": given.get("bad_records") or Path(self.run_dir) / BAD_RECORDS}

    def eval_data(self) -> dict[str, Any] | None:
        """Return the arguments for the evaluation data (``data.eval_path``, or the evaluation split of a mixture), or None."""
        if not self.data.get("eval_path"):
            eval_size = self.data.get("mix") and read_mixture(self.data["mix"]).get("eval_size")
            return {**self.train_data(), "split": "eval", "limit": None} if eval_size else None
        shared = {key: self.train_data()[key] for key in SHARED_WITH_EVAL if key in self.train_data()}
        own = {name.removeprefix("eval_"): self.data[name] for name in EVAL_KEYS if self.data.get(name) is not None}
        return {**own, **shared}

    def checkpoint(self) -> str | None:
        """Return the checkpoint to resume from, if any; refuse one whose run's ``resolved.yaml`` has other settings."""
        folder = self._checkpoint()
        if folder is not None and (saved := Path(folder).parent / RESOLVED).is_file():
            try:
                before: Any = OmegaConf.to_container(OmegaConf.load(saved))
            except (OSError, ValueError, YAMLError) as error:
                before = error
            if not isinstance(before, dict) or not before:
                raise ValueError(f"{saved} is damaged ({before}). Delete it to compare with what the checkpoint says alone.")
            check_same_recipe(before, asdict(self), folder)
        return folder

    def _checkpoint(self) -> str | None:
        newest = latest_checkpoint(self.run_dir)
        finished = [name for name in FINAL_WEIGHTS if (Path(self.run_dir) / name).is_file()]
        if newest is None and finished and self.resume in ("auto", "never"):
            raise ValueError(
                f"{self.run_dir} contains {finished[0]} of a finished run, and no checkpoint to compare with. Choose another "
                "run_dir, or delete that one to train again."
            )
        if self.resume == "auto":
            return newest
        if self.resume == "never":
            if newest is not None:
                raise ValueError(
                    f"resume=never, but {self.run_dir} contains {Path(newest).name} of an earlier run. Set resume=auto to resume "
                    "from it, or choose another run_dir."
                )
            return None
        if not isinstance(self.resume, str) or not (Path(self.resume) / "trainer_state.json").is_file():
            raise ValueError(f"resume must be auto, never or the path of a checkpoint; got {self.resume!r}.")
        if newest is not None and Path(self.resume).resolve().parent != Path(self.run_dir).resolve():
            raise ValueError(
                f"resume={self.resume} is a checkpoint of another run, and {self.run_dir} contains {Path(newest).name} of its own. "
                "Choose another run_dir."
            )
        return str(self.resume)

    def place(self) -> Place:
        """Find the position of this process among the ranks of the job."""
        return find_place(self.launch, os.environ, 0 if self.trainer.get("use_cpu") else torch.cuda.device_count())

    def needs_ranks(self) -> bool:
        """Whether this process must launch the ranks of the job."""
        place = self.place()
        sharded = bool(self.trainer.get("fsdp") or self.trainer.get("deepspeed"))
        return not place.is_rank and (place.world_size > 1 or sharded)

    def check_sharding(self) -> None:
        """Refuse sharding that this machine does not support."""
        fsdp, deepspeed = self.trainer.get("fsdp"), self.trainer.get("deepspeed")
        if fsdp and deepspeed:
            raise ValueError("trainer.fsdp and trainer.deepspeed both shard the model. Choose launch=fsdp2 or launch=zero3.")
        if self.dry_run or not (fsdp or deepspeed):
            return
        if deepspeed and not is_deepspeed_available():
            raise ValueError("launch=zero1, zero2 and zero3 need DeepSpeed: pip install deepspeed. launch=fsdp2 does not.")
        if self.trainer.get("use_cpu") or not torch.cuda.is_available():
            raise ValueError(
                "launch=fsdp2, zero1, zero2 and zero3 shard the model over GPUs, and this run has no GPU. Use launch=ddp on "
                "CPUs, or dry_run=true to plan the run."
            )

    def planned_arguments(self) -> Any:
        """Build the trainer's configuration without sharding, before the ranks are started or for a dry run."""
        here = {name: value for name, value in self.trainer.items() if name not in SHARDING}
        return self.arguments(without_gpu(here) if self.dry_run else here)

    def arguments(self, trainer: Mapping[str, Any] | None = None) -> Any:
        """Build the trainer's configuration, on a rank with the whole group `trainer`."""
        trainer = self.trainer if trainer is None else trainer
        given = {name: value for name, value in trainer.items() if name != "global_batch_size"}
        if (total := trainer.get("global_batch_size")) is not None:
            defaults = self.kind.config.__dataclass_fields__
            size = given.get("per_device_train_batch_size", defaults["per_device_train_batch_size"].default)
            ranks = self.place().world_size
            unit = f"trainer.per_device_train_batch_size={size}"
            if given.get("batching", defaults["batching"].default) == "tokens":
                if self.task == "train":
                    raise ValueError(
                        f"trainer.global_batch_size={total} is a number of pairs, but with trainer.batching=tokens the number of "
                        "pairs in a micro-batch varies. Set trainer.global_batch_size=null, and "
                        "trainer.gradient_accumulation_steps to the number of micro-batches in a step."
                    )
                size, unit = 1, "1 packed row"
            if total % (size * ranks) or total < size * ranks:
                raise ValueError(
                    f"trainer.global_batch_size={total} is not a multiple of {size * ranks} ({unit} x {ranks} ranks). Change one "
                    "of them."
                )
            if "gradient_accumulation_steps" in given:
                raise ValueError(
                    "trainer.gradient_accumulation_steps cannot be set together with trainer.global_batch_size, which determines "
                    "it. Set trainer.global_batch_size=null to use it."
                )
            given["gradient_accumulation_steps"] = total // (size * ranks)
        rates = {f"{part}_learning_rate": rate for part, rate in (self.lr or {}).items()}
        own: dict[str, Any] = {"output_dir": self.run_dir, "seed": self.seed, "vision_drop_path": self.drop_path, **rates}
        own |= {name: self.data[name] for name in SKIPPING if self.data.get(name) is not None}
        return self.kind.config(**own, **self.loss, **given)

    def save(self, folder: str | os.PathLike[str] | None = None) -> Path:
        """Write ``resolved.yaml`` into a folder; by default, the run folder."""
        path = Path(folder or self.run_dir) / RESOLVED
        write_text(path, OmegaConf.to_yaml(OmegaConf.create(asdict(self))))
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TrainJob":
        """Read a job written by `save`."""
        return cls.from_config(cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(path))))


def without_gpu(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Change settings so that this machine accepts them without a GPU, and the memory estimate stays the same.

    ``bf16: null``, which depends on the hardware, counts as true on the run's GPUs.

    >>> without_gpu({"bf16": None, "use_cpu": True})["bf16"]
    """
    given = dict(trainer)
    if trainer.get("use_cpu"):
        return given
    if given.get("bf16") is None and not given.get("fp16"):
        given["bf16"] = True
    if not torch.cuda.is_available():
        given |= {"use_cpu": True, "activation_offloading": False, "use_liger_kernel": False, "tf32": None}
    return given


class _Begin(TrainerCallback):  # type: ignore[misc]
    """Write ``resolved.yaml`` of a resumed job once the trainer has compared it with the run, and say where the run begins."""

    def __init__(self, job: TrainJob, said: str) -> None:
        self.job, self.said = job, said

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.job.save()
            if self.said:
                print(self.said, flush=True)


def run_train_job(job: TrainJob, *, callbacks: Iterable[TrainerCallback] = (), announce: bool = False) -> Any:
    """Train, and save the model with its processor in the run folder.

    An interrupted job that is run again resumes from its newest complete checkpoint (``resume="auto"``). `mpo.training.same_run`
    lists what may have changed; other settings or records are refused, and ``resolved.yaml`` stays that of the run.

    Args:
        callbacks: additional transformers callbacks.
        announce: print the run folder, or the checkpoint, when training begins: not before all that can be refused was checked.

    Returns:
        the trainer, after training.
    """
    args = job.arguments()  # first, because it joins the process group and configures how from_pretrained shards models
    with args.main_process_first(local=False, desc="the run folder"):
        checkpoint = job.checkpoint()  # compares with the resolved.yaml that `save` replaces
        if args.process_index == 0 and checkpoint is None:
            job.save()
            (Path(job.run_dir) / BAD_RECORDS).unlink(missing_ok=True)  # belongs to an earlier run
    said = f"mpo {job.task}: {f'resuming from {checkpoint}' if checkpoint else f'writing to {job.run_dir}'}"
    records = job.kind.load(**job.train_data())
    evaluation = job.eval_data()
    eval_records = job.kind.load(**evaluation) if evaluation else None
    samples = sampling(job.samples or {"count": 0}, job.data, eval_records)

    quantization = job.quantization()
    loaded = job.loader()(**job.settings(), **({"quantization_config": quantization} if quantization is not None else {}))
    job.freeze(loaded.model)
    for data in filter(None, (records, eval_records)):
        check_before_training(data, loaded.processor, loaded.model.config, args)
    trainer: Any = job.kind.trainer(
        model=loaded.model,
        args=args,
        train_dataset=records,
        eval_dataset=eval_records,
        processing_class=loaded.processor,
        callbacks=[_Begin(job, said if announce else ""), *samples, *callbacks],
        peft_config=job.adapter(job.family(loaded.model.config)),
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_state()
    trainer.save_model()
    return trainer
