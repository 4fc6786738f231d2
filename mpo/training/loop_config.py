"""LoopConfig: the settings that runs on pairs and on conversations share, and the checks of what does not go together."""

import inspect
import re
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments
from transformers.optimization import get_scheduler
from transformers.utils import is_torch_bf16_gpu_available

from mpo.batching.batch import ON_BAD_RECORD
from mpo.batching.sampler import BALANCE_SLOTS
from mpo.encoding.tiles import BUDGETS
from mpo.generation.generator import whole_number
from mpo.io import MAX_BAD_FRACTION
from mpo.models.family import PARTS
from mpo.training.features.cache import LIMIT_GB

Config = TypeVar("Config", bound=type)


def choice(default: str, choices: tuple[str, ...]) -> Any:
    """Return a field of one of several values, which `LoopConfig` checks, as it does those of TRL."""
    return field(default=default, metadata={"choices": list(choices)})


def described(config: Config) -> Config:
    """Give fields without help (of `HfArgumentParser`) what the docstring says of them, or else the help that a base has."""
    text = inspect.cleandoc(config.__doc__ or "")
    said = dict(re.findall(r"^    (\w+): (.+?)(?=\n    \w|\n\n|\Z)", text, re.MULTILINE | re.DOTALL))
    for one in fields(config):
        if "help" not in one.metadata:
            bases = (getattr(base, "__dataclass_fields__", {}).get(one.name) for base in config.__mro__)
            known = (base.metadata["help"] for base in bases if base is not None and "help" in base.metadata)
            help = " ".join(said.get(one.name, "").split()).replace("``", "").replace("%", "%%")
            one.metadata = MappingProxyType({**one.metadata, "help": help or next(known, "")})
    return config


def _has_bf16() -> bool:
    """Whether a GPU computes in bfloat16 natively. On older GPUs PyTorch emulates it, which is slow."""
    emulated = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(is_torch_bf16_gpu_available()) and not emulated


if TYPE_CHECKING:
    from transformers import TrainingArguments as _Base
else:
    _Base = object  # its fields would take the place of TRL's


@dataclass
class LoopConfig(_Base):  # type: ignore[misc]
    """Fields and checks of `mpo.training.loop.Loop`; a configuration of TRL comes after this class among the bases.

    Attributes:
        by_number: the value of ``batching`` for batches of ``per_device_train_batch_size`` records.
        without_effect: fields that a run does not read: the value that means off, the reason, what to use.
        needs: fields that have an effect with a value of another one alone.
        group_same_prompt: most records of one prompt in a batch.
        oversized: what happens to a record that exceeds the limits of a batch.
        packing_buffer: number of records from which rows of a stream are packed; 0: a stream cannot be packed.
        balance_slots: as in `mpo.batching.sampler.PairBatchSampler`.
        needs_reference: whether a step runs a reference model.
    """

    by_number: ClassVar[str]
    without_effect: ClassVar[dict[str, tuple[Any, str]]] = {
        "dataset_num_proc": (None, "records are tokenized by the data loader during training. Use dataloader_num_workers."),
        "eval_use_gather_object": (False, "evaluation gathers tensors, not objects."),
    }
    needs: ClassVar[dict[str, tuple[str, Any]]] = {
        "max_tiles_per_batch": ("batching", "tokens"),
        "max_bad_fraction": ("on_bad_record", "skip"),
        **dict.fromkeys(("vision_feature_cache", "vision_feature_cache_gb"), ("vision_features", "cached")),
    }
    group_same_prompt: ClassVar[int] = 1
    oversized: ClassVar[str] = "refuse"
    packing_buffer: ClassVar[int] = 0
    balance_slots: ClassVar[int] = BALANCE_SLOTS
    needs_reference: ClassVar[Any] = False

    tile_budget: str = choice("prompt", BUDGETS)
    rows: str = choice("auto", ("auto", "packed", "padded"))
    packed_attention: str = choice("auto", ("auto", "segments", "flash_attn_2", "flash_attn_3"))
    max_tokens_per_batch: int | None = None
    max_tiles_per_batch: int | None = None
    verify_first_batch: bool = False
    on_bad_record: str = choice("raise", ON_BAD_RECORD)
    max_bad_fraction: float = MAX_BAD_FRACTION
    vision_learning_rate: float | None = None
    fuser_learning_rate: float | None = None
    projector_learning_rate: float | None = None
    language_learning_rate: float | None = None
    head_learning_rate: float | None = None
    vision_layer_decay: float = 1.0
    vision_drop_path: float = 0.0
    vision_features: str = choice("live", ("live", "cached"))
    vision_feature_cache: str | None = None
    vision_feature_cache_gb: float = LIMIT_GB
    num_train_epochs: float = 1.0
    weight_decay: float = 0.05
    lr_scheduler_type: str = "cosine"
    logging_nan_inf_filter: bool = False  # on, it hides divergence

    def _check(self) -> None:
        """Check the fields of a subclass, after its choices and before TRL's."""

    def __post_init__(self) -> None:
        if not (self.deepspeed or torch.accelerator.is_available()):
            self.use_cpu = True  # accelerate joins ranks on CPUs only if it is set; each would train a model of its own
        if self.padding_free and self.rows == "auto":
            self.rows = "packed"
        self._check_choices()
        self._check()
        self._check_needs()
        self._check_rows()
        self._check_effect()
        self._check_batches()
        self._check_fractions()
        self._check_features()
        bf16: bool | None = self.bf16  # type: ignore[has-type]
        if bf16 is None and not self.fp16 and (self.use_cpu or not _has_bf16()):
            self.bf16 = False  # TRL's default would raise an error here
        if self.use_cpu or not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # there is nothing to copy to, and torch would warn in every epoch
        for name in ("activation_checkpointing", "activation_checkpointing_kwargs"):  # new names of transformers 5.24
            if getattr(self, name, True) is None:  # TRL sets the old ones, which warns
                setattr(self, name, getattr(self, name.replace("activation", "gradient")))
        super().__post_init__()
        self._check_device()
        self._check_accelerator()
        self.accelerator_config.dispatch_batches = False

    def _check_choices(self) -> None:
        others = {*TrainingArguments.__dataclass_fields__, *self.without_effect}  # checked by transformers, or not read
        for name, one in self.__dataclass_fields__.items():
            choices = one.metadata.get("choices")
            if choices and name not in others and getattr(self, name) not in (*choices, one.default):
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {getattr(self, name)!r}.")

    def _check_needs(self) -> None:
        for name, (other, value) in self.needs.items():
            if (own := getattr(self, name)) != self.__dataclass_fields__[name].default and getattr(self, other) != value:
                raise ValueError(f"{name}={own!r} needs {other}={value!r}. Set it, or leave this out.")

    def _check_rows(self) -> None:
        packed_only = {"packing", "padding_free", "packed_attention", "verify_first_batch"} & self.__dataclass_fields__.keys()
        for name in sorted(packed_only) if self.rows == "padded" else ():
            if (own := getattr(self, name)) not in (None, self.__dataclass_fields__[name].default):
                raise ValueError(f"{name}={own!r} needs packed rows, and rows='padded'. Leave one of them out.")

    def _check_effect(self) -> None:
        if (strategy := self.train_sampling_strategy) in ("batch_rebalance", "group_by_length"):
            raise ValueError(
                f"train_sampling_strategy={strategy!r} needs tokenized data, and records are tokenized with their batch. Use "
                "'random'; batching='tokens' with max_tokens_per_batch groups records by their cost."
            )
        for name, (off, reason) in self.without_effect.items():
            if getattr(self, name) != off:
                raise ValueError(f"{name}={getattr(self, name)!r} would be ignored: {reason}")

    def _check_batches(self) -> None:
        if (self.batching == "tokens") != (self.max_tokens_per_batch is not None):
            raise ValueError("batching='tokens' and max_tokens_per_batch go together: set both, or neither.")
        if self.batching == "tokens" and self.rows == "padded":
            raise ValueError(
                "batching='tokens' counts the tokens of packed rows, where completions share their prompt, and rows='padded'. "
                f"Use rows='packed', or batching={self.by_number!r}."
            )
        if self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size=True continues after an out-of-memory error with the weights and reward shift of the failed "
                "attempt. Set per_device_train_batch_size (and gradient_accumulation_steps) instead."
            )
        if not self.dataloader_in_order:
            raise ValueError(
                "dataloader_in_order=False delivers batches in an order that depends on timing: a resumed run could not "
                "continue where it stopped, and repeated records could not be recognized. Leave it at True."
            )
        for name in ("max_tokens_per_batch", "max_tiles_per_batch"):
            whole_number(name, getattr(self, name), optional=True)
        if (self.batching == "tokens" or self.group_same_prompt > 1) and self.train_sampling_strategy != "random":
            raise ValueError(
                f"train_sampling_strategy={self.train_sampling_strategy!r} would be ignored: batching and group_same_prompt plan "
                "the batches. Leave it at 'random'."
            )

    def _check_fractions(self) -> None:
        for name in ("learning_rate", *(name for name in self.__dataclass_fields__ if name.endswith("_learning_rate"))):
            if (rate := getattr(self, name)) is not None and not 0.0 <= rate < float("inf"):
                raise ValueError(f"{name} must be finite and at least 0; got {rate}.")
        if self.max_steps == 0 or (self.max_steps < 0 and not self.num_train_epochs > 0):
            raise ValueError(
                f"max_steps={self.max_steps} with num_train_epochs={self.num_train_epochs} trains nothing. Set max_steps to 1 or "
                "more, or num_train_epochs above 0 with max_steps=-1."
            )
        if not 0.0 <= self.max_bad_fraction < 1.0:
            raise ValueError(f"max_bad_fraction must be at least 0 and below 1; got {self.max_bad_fraction}.")
        if not 0.0 < self.vision_layer_decay <= 1.0:
            raise ValueError(f"vision_layer_decay must be above 0 and at most 1 (no decay); got {self.vision_layer_decay}.")
        if not 0.0 <= self.vision_drop_path < 1.0:
            raise ValueError(f"vision_drop_path must be a probability, at least 0 and below 1; got {self.vision_drop_path}.")

    def _check_features(self) -> None:
        for name in ("vision_drop_path", "vision_learning_rate", "bf16_full_eval", "fp16_full_eval"):
            if self.vision_features == "cached" and (value := getattr(self, name)):
                raise ValueError(
                    f"vision_features='cached' keeps the features of a tower that never changes, and {name}={value} changes it. "
                    "Leave one of them out."
                )
        if not self.vision_feature_cache_gb > 0:
            raise ValueError(f"vision_feature_cache_gb must be a size above 0; got {self.vision_feature_cache_gb}.")

    def _check_device(self) -> None:
        if self.activation_offloading and self.device.type == "cpu":
            raise ValueError(
                "activation_offloading=True moves activations from a GPU to the CPU, and this run has no GPU. Leave it out."
            )
        if self.use_liger_kernel and self.device.type == "cpu":
            raise ValueError("use_liger_kernel=True runs Triton kernels on a GPU, and this run has no GPU. Leave it out.")

    def _check_accelerator(self) -> None:
        accelerator_config = self.accelerator_config
        if accelerator_config.dispatch_batches or accelerator_config.split_batches or not accelerator_config.even_batches:
            raise ValueError(
                "accelerator_config: dispatch_batches and split_batches would separate the rows of a record, and "
                "even_batches=False gives ranks unequal numbers of batches. Leave them at their defaults; no record counts twice."
            )

    def encoding_rules(self) -> dict[str, Any]:
        """Return how records are encoded, besides what all runs set: arguments of `mpo.encoding.costs.measure`."""
        raise NotImplementedError

    def loss_name(self) -> str:
        """Describe the loss in a few words."""
        raise NotImplementedError

    @property
    def order_seed(self) -> int:
        """The seed of the order of the records."""
        seed: int = self.seed if self.data_seed is None else self.data_seed
        return seed

    def learning_rates(self) -> dict[str, float]:
        """Learning rates of the parts that have their own (`mpo.models.parts`), by name."""
        given = {part: getattr(self, f"{part}_learning_rate") for part in PARTS}
        return {part: float(rate) for part, rate in given.items() if rate is not None}

    def only_warms_up(self, steps: int) -> str | None:
        """Return why a run of so many optimizer steps never has its full learning rate, as the warm-up takes longer; or None."""
        if (warmup := self.get_warmup_steps(steps)) < steps:
            return None
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        schedule = get_scheduler(self.lr_scheduler_type, optimizer, warmup, steps, self.lr_scheduler_kwargs)
        if not isinstance(schedule, LambdaLR) or (largest := max(map(schedule.lr_lambdas[0], range(steps)))) == 1:
            return None
        if largest > 0:
            return (
                f"The run is {steps} steps, and its warm-up takes {warmup}: the learning rate reaches no more than "
                f"{largest:.0%} of the one that is set. Take more epochs, or warmup_steps below {steps}."
            )
        return (
            f"The run is one step, whose learning rate is 0, as the warm-up begins with it (warmup_steps={self.warmup_steps:g}): "
            "the model stays as it is. Take fewer records in a step (global_batch_size in a recipe, gradient_accumulation_steps in "
            "Python; of packed conversations, fewer tokens in a row, max_tokens_per_batch), more epochs, or warmup_steps=0."
        )
