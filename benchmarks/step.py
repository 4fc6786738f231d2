"""Compare a training step with TRL's DPOTrainer: FLOPs, encoded tiles, computed tokens, time and peak memory.

    python benchmarks/step.py                          # the default set: counted on the full shapes, timed on a small one
    python benchmarks/step.py --measure counted --all  # every combination of the settings below
    python benchmarks/step.py --measure timed --timed-shape 1B --device cuda --dtype bfloat16

Counted: both trainers compute the loss of the same records with a very small model, and each of their calls to it is recorded: its
inputs, with or without gradients, with or without adapters. The calls are then executed again, forward and backward, by a model of
the full shape on the meta device, which runs every operator without its memory, under torch's FlopCounterMode. A multiplication and
an addition are two FLOPs; attention counts as in a flash kernel (2 matrix products forward, 5 backward), in full with any mask;
element-wise operations and the optimiser are not counted. TRL's LM head is counted for labelled positions only, as on a GPU.

Timed: real trainers with random weights, alternating steps, medians; peak memory of each side in its own process. On a CPU TRL's LM
head computes every position. For times it uses its GPU head, which skips unlabelled positions; memory is compared with both.
"""

import argparse
import contextlib
import copy
import ctypes
import itertools
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config
from transformers.utils import logging as transformers_logging
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import add_fused_lm_head

from mpo import MPOConfig, MPOTrainer
from mpo.batching.attention import use_packed_attention
from mpo.batching.logits_to_keep import add_logits_to_keep, label_padded_rows
from mpo.models.features import KEYWORD, take_features, tile_shape
from mpo.models.parts import base_model
from mpo.models.small import small_processor
from mpo.models.tower import SharedTower, find_tower

RESULTS = Path(__file__).parent / "results"
SIDES = ("trl", "live", "cached", "cached features")
PARTS = {"vision_tower": "vision tower", "multi_modal_projector": "projector", "language_model": "text model"}
LOGGED = ("log_probs", "entropy", "mean_logits", "is_top1")  # outputs of the policy's head that both trainers use


@dataclass(frozen=True)
class Shape:
    """Sizes of an InternVL; vision and text are (hidden, MLP, layers, heads).

    ``scale`` divides the tokens of question and completions, so that a smaller shape keeps the proportions.
    """

    vision: tuple[int, int, int, int]
    text: tuple[int, int, int, int]
    kv_heads: int
    vocabulary: int = 151_674
    image_size: int = 448
    patch_size: int = 14
    scale: int = 1

    def build(
        self, image_token_id: int, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> InternVLForConditionalGeneration:
        """A model with random weights, drawn on the target device in the target dtype: on a GPU 8 billion take a second or two."""
        usual = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                return InternVLForConditionalGeneration(self.config(image_token_id))
        finally:
            torch.set_default_dtype(usual)

    def config(self, image_token_id: int) -> InternVLConfig:
        """The config of the model."""
        hidden, mlp, layers, heads = self.vision
        vision = InternVLVisionConfig(
            hidden_size=hidden,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            image_size=[self.image_size] * 2,
            patch_size=[self.patch_size] * 2,
        )
        hidden, mlp, layers, heads = self.text
        text = Qwen2Config(
            vocab_size=self.vocabulary,
            hidden_size=hidden,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=self.kv_heads,
        )
        tokens = (self.image_size // self.patch_size) ** 2 // 4
        return InternVLConfig(vision_config=vision, text_config=text, image_token_id=image_token_id, image_seq_length=tokens)


SHAPES = {  # InternViT-300M with Qwen2.5-0.5B, -1.5B and -7B; "small": the 1B shape with a quarter of each size
    "1B": Shape((1024, 4096, 24, 16), (896, 4864, 24, 14), 2),
    "2B": Shape((1024, 4096, 24, 16), (1536, 8960, 28, 12), 2),
    "8B": Shape((1024, 4096, 24, 16), (3584, 18944, 28, 28), 4),
    "small": Shape((256, 1024, 6, 4), (224, 1216, 6, 7), 1, vocabulary=9_480, image_size=224, scale=4),
    "tiny": Shape((32, 64, 2, 2), (32, 64, 2, 2), 1, vocabulary=512, image_size=56, scale=20),
}


@dataclass(frozen=True)
class Case:
    """The settings of a step.

    ``tiles``: of the image, thumbnail included; ``answer``: tokens per completion, before the shape's scale; ``pairs`` of one
    question; ``tower``: frozen or trained; ``tune``: full or lora; ``checkpointing`` on both sides.
    """

    shape: str
    tiles: int = 7
    answer: int = 300
    pairs: int = 1
    tower: str = "frozen"
    tune: str = "full"
    checkpointing: bool = False


# --- The same records and settings for both


def records(case: Case, shape: Shape) -> list[dict[str, Any]]:
    """Pairs of one question. Digits are one token each, so lengths are exact; completions differ in their first token."""
    across, down = {1: (1, 1), 7: (3, 2), 13: (4, 3)}[case.tiles]
    size = 2 * shape.image_size  # large enough for all its tiles
    image = Image.effect_noise((across * size, down * size), 80).convert("RGB")
    if 2 * case.pairs > 10:
        raise ValueError(f"Expected at most 5 pairs, since completions differ in their first digit; got pairs={case.pairs}.")

    def said(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    digits = case.answer // shape.scale - 1  # the last token of a completion is the end of turn
    completions = [f"{number}" + "1234567890" * (digits // 10 + 1) for number in range(2 * case.pairs)]
    question = said("user", ("0123456789" * 6)[: max(60 // shape.scale, 1)])
    return [
        {
            "images": [image],
            "prompt": question,
            "chosen": said("assistant", completions[2 * number][:digits]),
            "rejected": said("assistant", completions[2 * number + 1][:digits]),
        }
        for number in range(case.pairs)
    ]


def processor_of(case: Case, shape: Shape) -> Any:
    """A processor that splits the image into the case's number of tiles."""
    return small_processor(
        ["0 1"],
        image_size=shape.image_size,
        patch_size=shape.patch_size,
        max_patches=max(case.tiles - 1, 1),
        vocab_size=300,
    )


def adapter() -> LoraConfig:
    """LoRA for all matrices of the language model."""
    return LoraConfig(r=16, lora_alpha=32, target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj", task_type="CAUSAL_LM")


def make_trainer(side: str, case: Case, shape: Shape, folder: str, device: str = "cpu", dtype: str = "float32") -> tuple[Any, Any]:
    """Create the trainer of one side, ready for a step, and its batch on the device."""
    processor = processor_of(case, shape)
    torch.manual_seed(0)
    model = shape.build(processor.image_token_id, device, getattr(torch, dtype))
    if case.tower == "frozen":
        find_tower(model).requires_grad_(False)
    settings: dict[str, Any] = {
        "use_cpu": device == "cpu",
        "bf16": dtype == "bfloat16" and device != "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "gradient_checkpointing": case.checkpointing,
        "per_device_train_batch_size": case.pairs,
        "loss_type": ["sigmoid", "bco_pair", "sft"],
        "loss_weights": [0.8, 0.2, 1.0],
        "max_length": None,
        "learning_rate": 1e-6,
        "disable_tqdm": True,
    }
    if side.startswith("cached"):
        settings |= {"reference": "cached", "reference_cache": str(Path(folder, "references"))}
    if side == "cached features":
        settings |= {"vision_features": "cached", "vision_feature_cache": str(Path(folder, "features"))}
    trainer_class, config_class = (DPOTrainer, DPOConfig) if side == "trl" else (MPOTrainer, MPOConfig)
    rows = records(case, shape)
    lora = case.tune == "lora"
    trainer = trainer_class(
        model=model,
        # TRL would load the reference by the model's name.
        ref_model=copy.deepcopy(model).requires_grad_(False).eval() if side == "trl" and not lora else None,
        args=config_class(folder, **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
        peft_config=adapter() if lora else None,
    )
    columns = set(trainer._signature_columns or []) or set(rows[0])
    read = [{name: value for name, value in trainer.train_dataset[i].items() if name in columns} for i in range(case.pairs)]
    batch = trainer._prepare_inputs(trainer.data_collator(read))
    trainer.model.train()
    if case.checkpointing:  # as the training loop does before its first step
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    return trainer, batch


@contextlib.contextmanager
def head_as_on_gpus() -> Iterator[None]:
    """Make TRL's head skip unlabelled positions on every device; by default it does so on GPUs only."""
    with mock.patch("trl.trainer.utils._use_triton", lambda device: True):
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings about temporary models."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(before)


# --- Counting


@dataclass
class Call:
    """A trainer's call to a model. ``tiles``: encoded by its vision tower; ``plays``: whether their features were replayed."""

    role: str
    inputs: dict[str, Any]
    tiles: int
    plays: bool


def record_calls(side: str, case: Case, shape: Shape) -> list[Call]:
    """Record the calls of one step of a trainer to its models, with a very small model instead of the shape's.

    It is the second step: in the first, MPOTrainer also compares the policy with its reference, once in a run.
    """
    stand_in = replace(shape, vision=(32, 32, 1, 1), text=(32, 32, 1, 2), kv_heads=1, vocabulary=512)
    calls: list[Call] = []

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        assert not args
        calls.append(Call("policy" if torch.is_grad_enabled() else "reference", dict(kwargs), 0, False))

    def encoded(module: nn.Module, args: Any, output: Any) -> None:
        calls[-1].tiles += len(output if isinstance(output, Tensor) else output[0])

    with tempfile.TemporaryDirectory() as folder, quiet():
        trainer, batch = make_trainer(side, replace(case, checkpointing=False), stand_in, folder)
        models = [trainer.model] + ([trainer.ref_model] if trainer.ref_model is not None else [])
        for model in models:
            model.register_forward_pre_hook(before, with_kwargs=True)
            # Hooks on the first part of the tower: a shared tower returns without running it.
            find_tower(model).embeddings.register_forward_hook(encoded)
        for _ in range(2):
            calls.clear()
            with torch.enable_grad():
                trainer.compute_loss(trainer.model, copy.copy(batch))
    for call in calls:
        call.plays = call.tiles == 0
    return calls


@contextlib.contextmanager
def flop_counter() -> Iterator[FlopCounterMode]:
    """Count FLOPs, with the formulas of the GPU's flash kernel for the CPU's, which torch does not count."""
    aten = torch.ops.aten
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
        aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[aten._scaled_dot_product_flash_attention_backward],
    }
    with mock.patch.dict(flop_registry, formulas), FlopCounterMode(display=False) as counter:
        yield counter


def _flash_on_meta(query: Tensor, key: Tensor, value: Tensor, *args: Any, is_causal: bool = False, **kwargs: Any) -> Tensor:
    """Attention on the meta device as in a flash kernel, instead of one that materialises its weights."""
    group = query.size(1) // key.size(1)
    if group > 1:
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal)[0]


def meta_model(case: Case, shape: Shape, image_token_id: int, logged: tuple[str, ...] = LOGGED) -> Any:
    """Create a model of the shape on the meta device, prepared as in both trainers."""
    model = shape.build(image_token_id, "meta")

    def placeholders(input_ids: Tensor, inputs_embeds: Tensor, **_: Any) -> Tensor:
        # The model's own method also compares the number of image tokens with that of features, which needs their values.
        return (input_ids == image_token_id).unsqueeze(-1).expand_as(inputs_embeds)

    model.model.get_placeholder_mask = placeholders
    if case.tower == "frozen":
        find_tower(model).requires_grad_(False)
    add_fused_lm_head(model, outputs=logged)
    return model


def _for_meta(inputs: dict[str, Any], features: tuple[int, int]) -> dict[str, Any]:
    inputs = dict(inputs)
    if KEYWORD in inputs:  # of a very small model; `features` is the shape of a tile's
        inputs[KEYWORD] = torch.empty(len(inputs[KEYWORD]), *features)
    labels = inputs.pop("labels", None)
    if labels is not None:  # labelled positions depend on values, which meta tensors do not have
        inputs["positions_to_keep"], inputs["shift_labels"], _ = label_padded_rows(inputs["input_ids"], labels != -100)
        del inputs["attention_mask"]  # also read by value; attention counts the same with a mask
    return {name: value.to("meta") if hasattr(value, "to") else value for name, value in inputs.items()}


def count_calls(calls: list[Call], case: Case, shape: Shape, image_token_id: int) -> dict[str, dict[str, int]]:
    """Count the FLOPs of recorded calls, by role and part of the model, with a model of the shape on the meta device."""
    policy = meta_model(case, shape, image_token_id)
    if case.tune == "lora":
        with torch.device("meta"):
            policy = get_peft_model(policy, adapter())
        reference = policy
    else:
        reference = meta_model(case, shape, image_token_id, ("log_probs",)).requires_grad_(False).eval()
    for model in (policy, reference):
        add_logits_to_keep(base_model(model).base_model)  # after the adapters, as in a trainer
    policy.train()
    if case.checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if case.tune == "lora":
            policy.enable_input_require_grads()
    packed = "segments" in calls[0].inputs
    if packed:
        for model in (policy, reference):
            use_packed_attention(model)
    projected = case.tune == "lora"
    stored = any(KEYWORD in call.inputs for call in calls)
    for model in (policy, reference) if stored else ():
        take_features(base_model(model).base_model, projected=projected)
    features = tile_shape(shape.config(image_token_id), projected=projected)
    tower = SharedTower(policy, reference) if not stored and packed and case.tower == "frozen" else None

    counts: dict[str, dict[str, int]] = {}
    patched = (
        mock.patch("torch.nn.functional.scaled_dot_product_attention", _flash_on_meta),
        mock.patch("mpo.batching.attention.scaled_dot_product_attention", _flash_on_meta),
        mock.patch("torch.is_autocast_enabled", lambda device_type=None: False),  # does not support the meta device
        # Whether positions restart inside a row is read from their values; in TRL's rows they do not.
        mock.patch("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None),
    )
    for call in calls:
        inputs = _for_meta(call.inputs, features)
        with contextlib.ExitStack() as stack:
            for patch in patched:
                stack.enter_context(patch)
            if call.role == "policy":
                model = policy
            else:
                model = reference
                stack.enter_context(torch.no_grad())
                if case.tune == "lora":
                    stack.enter_context(policy.disable_adapter())
                if call.plays and tower is not None:
                    stack.enter_context(tower.playing())
            with flop_counter() as counter:
                output = model(**inputs)
                if call.role == "policy":
                    output.log_probs.sum().backward()
        # The counter attributes parts of a backward pass to the wrong module, so the policy has a total only.
        counts[call.role] = {"whole": counter.get_total_flops()} if call.role == "policy" else _by_part(counter)
    return counts


def _by_part(counter: FlopCounterMode) -> dict[str, int]:
    parts = dict.fromkeys([*PARTS.values(), "LM head"], 0)
    for name, by_operator in counter.get_flop_counts().items():
        part = PARTS.get(name.split(".")[-1])
        if part is not None:
            parts[part] += sum(by_operator.values())
    parts["LM head"] = counter.get_total_flops() - sum(parts.values())
    return parts


def count_directly(side: str, case: Case, shape: Shape) -> int:
    """Count the FLOPs of a real step on the CPU, loss and backward, without recording calls."""
    with tempfile.TemporaryDirectory() as folder, quiet(), head_as_on_gpus():
        trainer, batch = make_trainer(side, case, shape, folder)
        trainer.compute_loss(trainer.model, copy.copy(batch))  # as in `record_calls`, the first step is not counted
        with flop_counter() as counter:
            trainer.compute_loss(trainer.model, copy.copy(batch)).backward()
    return counter.get_total_flops()


def count(case: Case, shape: Shape | None = None, sides: tuple[str, ...] = SIDES) -> dict[str, Any]:
    """Count FLOPs and tokens of one step of each side, per pair, and the ratio of TRL's to ours."""
    shape = shape or SHAPES[case.shape]
    image_token_id = processor_of(case, shape).image_token_id
    result: dict[str, Any] = {"case": asdict(case), "per_pair": {}, "TRL over": {}}
    if case.tower == "trained":  # it has no features to keep
        sides = tuple(side for side in sides if side != "cached features")
    for side in sides:
        calls = record_calls(side, case, shape)
        flops = count_calls(calls, case, shape, image_token_id)
        result["per_pair"][side] = {
            "flops": sum(sum(parts.values()) for parts in flops.values()) / case.pairs,
            "flops_by_part": {role: {part: n / case.pairs for part, n in parts.items()} for role, parts in flops.items()},
            "tiles_encoded": sum(call.tiles for call in calls) / case.pairs,
            "text_tokens": sum(call.inputs["input_ids"].numel() for call in calls) / case.pairs,
        }
    trl = result["per_pair"]["trl"]["flops"]
    result["TRL over"] = {side: trl / result["per_pair"][side]["flops"] for side in sides if side != "trl"}
    return result


# --- Timing


def synchronised_seconds(work: Callable[[], Any], device: str) -> float:
    """Measure the seconds that `work` takes on the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def stepper(trainer: Any, batch: dict[str, Any]) -> Callable[[], None]:
    """Return a full training step: loss, gradients, clipping and AdamW, on a collated batch."""
    # Fused, as in the Trainer: PyTorch's default on a GPU needs a second copy of the gradients.
    optimizer = torch.optim.AdamW([p for p in trainer.model.parameters() if p.requires_grad], lr=1e-6, fused=True)

    def step() -> None:
        with trainer.accelerator.autocast():
            loss = trainer.compute_loss(trainer.model, copy.copy(batch))
        loss.backward()
        nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def timed(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Measure pairs per second of each side, in alternating steps, and peak memory of each in its own process."""
    shape = SHAPES[case.shape]
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet())
        stack.enter_context(head_as_on_gpus() if options.device == "cpu" else contextlib.nullcontext())
        steps = {}
        for side in SIDES:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            steps[side] = stepper(*make_trainer(side, case, shape, folder, options.device, options.dtype))
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        for round_ in range(options.warmup + options.steps):
            for side, step in steps.items():
                taken = synchronised_seconds(step, options.device)
                if round_ >= options.warmup:
                    seconds[side].append(taken)
            say(f"timed {case.shape}, {case.pairs} pairs a question: round {round_ + 1} of {options.warmup + options.steps}")
    peaks = {side: measure_in_own_process(side, case, options, as_on_gpus=False) for side in SIDES}
    lean = peaks["trl"] if options.device == "cuda" else measure_in_own_process("trl", case, options, as_on_gpus=True)
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    ours = [side for side in SIDES if side != "trl"]
    return {
        "case": asdict(case),
        "seconds_of_each_step": seconds,
        "pairs_per_second": {side: case.pairs / median for side, median in medians.items()},
        "memory_mb": peaks,
        "pairs per second over TRL's": {side: medians["trl"] / medians[side] for side in ours},
        "peak memory over TRL's": {side: peaks[side]["peak"] / peaks["trl"]["peak"] for side in ours},
        "peak memory over TRL's with its GPU head": {side: peaks[side]["peak"] / lean["peak"] for side in ours},
    }


def measure_in_own_process(side: str, case: Case, options: argparse.Namespace, *, as_on_gpus: bool) -> dict[str, float]:
    """Measure the peak memory of a side in a new process that runs only this side."""
    command = [sys.executable, str(Path(__file__).resolve()), "--memory-of", side, "--case", json.dumps(asdict(case))]
    command += ["--device", options.device, "--dtype", options.dtype, *["--head-as-on-gpus"] * as_on_gpus]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def memory_of(side: str, case: Case, device: str, dtype: str, as_on_gpus: bool) -> dict[str, float]:
    """Measure the memory of this process over three steps, in MB, without that of Python and the libraries.

    ``peak``: models, optimiser, gradients and activations. ``of_steps``: increase since before the first step (activations,
    gradients, optimiser state).
    """
    on_gpu = device == "cuda"
    head = head_as_on_gpus() if as_on_gpus else contextlib.nullcontext()

    def now() -> float:
        if on_gpu:
            return torch.cuda.memory_allocated() / 2**20
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

    libraries = now()
    with tempfile.TemporaryDirectory() as folder, quiet(), head:
        step = stepper(*make_trainer(side, case, SHAPES[case.shape], folder, device, dtype))
        if not on_gpu:
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory freed by building and filling the cache does not count
        before = now()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM: building the trainers does not count
        for _ in range(3):
            step()
        if on_gpu:
            peak = torch.cuda.max_memory_allocated() / 2**20
        else:
            line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
            peak = int(line.split()[1]) / 1024
    return {"peak": peak - libraries, "of_steps": peak - before, "libraries": libraries}


# --- Targets, table, command line

TARGETS = {  # 6+1 tiles, 300-token completions, frozen tower, full: smallest ratio of TRL's FLOPs to ours
    ("1B", 1): {"live": 2.3, "cached": 2.7, "cached features": 5.2},
    ("8B", 1): {"live": 1.75, "cached": 2.1, "cached features": 2.5},
    ("1B", 4): {"live": 5.5, "cached features": 11.0},
    ("8B", 4): {"live": 3.8, "cached features": 5.6},
}
FEATURES = 1.4  # pairs per second of cached features over those of cached references alone, with 1 pair a question
FASTER, MEMORY = 1.8, 0.6  # pairs per second over TRL's, at least; peak memory over TRL's, at most


def targets_of(case: Case) -> dict[str, float]:
    """The FLOP targets of a case, by side."""
    at_settings = (case.tiles, case.answer, case.tower, case.tune) == (7, 300, "frozen", "full")
    return TARGETS.get((case.shape, case.pairs), {}) if at_settings else {}


def judged(value: float, goal: float, at_most: bool = False) -> dict[str, Any]:
    """Compare a measurement with its target."""
    return {"value": value, "target": goal, "reached": value <= goal if at_most else value >= goal}


def cases_of(options: argparse.Namespace) -> list[Case]:
    """The cases to count."""
    every = {
        "shapes": ["1B", "2B", "8B"],
        "tiles": [1, 7, 13],
        "completions": [100, 300, 1000],
        "pairs": [1, 4],
        "towers": ["frozen", "trained"],
        "tune": ["full", "lora"],
        "checkpointing": ["off", "on"],
    }
    axes = [every[name] if options.all else getattr(options, name) for name in every]
    made = []
    for shape, tiles, completion, pairs, tower, tune, checkpointing in itertools.product(*axes):
        made.append(Case(shape, tiles, completion, pairs, tower, tune, checkpointing == "on"))
    return made


def say(text: str) -> None:
    """Print progress to stderr."""
    print(text, file=sys.stderr, flush=True)


def print_counted(result: dict[str, Any]) -> None:
    """Print a line of the table."""
    case, over, goals = result["case"], result["TRL over"], result["targets"]
    verdict = ", ".join(f"{s} {g['target']} {'reached' if g['reached'] else 'NOT REACHED'}" for s, g in goals.items())
    print(
        f"{case['shape']:>5} {case['tiles']:>5} {case['answer']:>6} {case['pairs']:>5} {case['tower']:>7} {case['tune']:>4} "
        f"{'on' if case['checkpointing'] else 'off':>5} {over['live']:>8.2f} {over['cached']:>10.2f} "
        f"{over.get('cached features', float('nan')):>10.2f}  {verdict}",
        flush=True,
    )


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs="+", default=["counted", "timed"], choices=("counted", "timed"))
    parser.add_argument("--all", action="store_true", help="count every combination of the settings (432)")
    parser.add_argument("--shapes", nargs="+", default=["1B", "2B", "8B"], choices=list(SHAPES), help="shapes to count")
    parser.add_argument(
        "--tiles", nargs="+", type=int, default=[7], choices=(1, 7, 13), help="tiles of the image, with its thumbnail"
    )
    parser.add_argument("--completions", nargs="+", type=int, default=[300], help="tokens each: 100, 300, 1000")
    parser.add_argument("--pairs", nargs="+", type=int, default=[1, 4], help="pairs of one question, in one batch")
    parser.add_argument("--towers", nargs="+", default=["frozen"], choices=("frozen", "trained"))
    parser.add_argument("--tune", nargs="+", default=["full"], choices=("full", "lora"))
    parser.add_argument(
        "--checkpointing", nargs="+", default=["off", "on"], choices=("off", "on"), help="gradient checkpointing on both sides"
    )
    parser.add_argument(
        "--timed-shape", default="small", choices=list(SHAPES), help="shape to time, with the settings of the targets"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="device of timing")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="dtype of timing")
    parser.add_argument("--steps", type=int, default=7, help="number of timed steps per side")
    parser.add_argument("--warmup", type=int, default=2, help="number of untimed steps per side before them")
    parser.add_argument("--output", type=Path, help="JSON file to write; default: benchmarks/results/step_DEVICE_DATE.json")
    parser.add_argument("--head-as-on-gpus", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, print a table, write JSON."""
    options = parse()
    if options.memory_of:
        print(
            json.dumps(memory_of(options.memory_of, Case(**options.case), options.device, options.dtype, options.head_as_on_gpus))
        )
        return
    on_gpu = options.device == "cuda"
    result: dict[str, Any] = {
        "command": " ".join(["python benchmarks/step.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "dtype_of_timing": options.dtype,
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft", "accelerate", "mpo-trainer")},
        "shapes": {name: asdict(shape) for name, shape in SHAPES.items()},
        "how": __doc__,
        "counted": [],
        "timed": [],
    }
    if "counted" in options.measure:
        print("TRL's FLOPs per pair over ours; tokens: of a completion; ckpt: gradient checkpointing on both sides")
        print(
            f"{'shape':>5} {'tiles':>5} {'tokens':>6} {'pairs':>5} {'tower':>7} {'tune':>4} {'ckpt':>5} {'live':>8} {'cached':>10} "
            f"{'features':>10}"
        )
        for case in cases_of(options):
            counted = count(case)
            counted["targets"] = {side: judged(counted["TRL over"][side], goal) for side, goal in targets_of(case).items()}
            result["counted"].append(counted)
            print_counted(counted)
    if "timed" in options.measure:
        for pairs in options.pairs:
            measured = timed(Case(options.timed_shape, pairs=pairs), options)
            measured["targets"] = {
                "pairs per second": judged(measured["pairs per second over TRL's"]["live"], FASTER),
                "peak memory": judged(measured["peak memory over TRL's"]["live"], MEMORY, at_most=True),
            }
            if pairs == 1:
                speed = measured["pairs_per_second"]
                measured["targets"]["cached features over cached"] = judged(speed["cached features"] / speed["cached"], FEATURES)
            result["timed"].append(measured)
            print(f"timed {options.timed_shape}, {pairs} pairs a question, {options.device} {options.dtype}:")
            for what in ("pairs per second over TRL's", "peak memory over TRL's", "peak memory over TRL's with its GPU head"):
                print(f"  {what:<42} " + "  ".join(f"{side} {value:.2f}" for side, value in measured[what].items()))
            for what, goal in measured["targets"].items():
                print(
                    f"  {what}: {goal['value']:.2f}, target {goal['target']} {'reached' if goal['reached'] else 'NOT REACHED'}",
                    flush=True,
                )
    path = options.output or RESULTS / f"step_{options.device}_{result['date']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    say(f"written to {path}")


if __name__ == "__main__":
    main()
