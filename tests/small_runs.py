"""The same small training job for every test, to be interrupted, run on several ranks, and compared."""

import copy
import functools
import gc
import json
import os
import signal
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from support import TEXTS, image_pairs, make_image, mixed_pairs, text_pairs
from transformers import TrainerCallback

from mpo import MPOConfig, MPOTrainer
from mpo.data.encoded import with_encoded_images
from mpo.models import add_fuser
from mpo.models.loading import load_internvl
from mpo.models.small import small_internvl, small_processor
from mpo.training.samples.callback import SampleResponses

LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=r".*language_model.*\.(q_proj|v_proj)", task_type="CAUSAL_LM")


def small_run(
    folder,
    *,
    pairs=8,
    kind="full",
    stream=False,
    ref_model=None,
    eval_pairs=0,
    callbacks=(),
    lora_dropout=0.1,
    frozen_tower=False,
    lora_targets=None,
    lora_bias="none",
    continued=False,
    checkpoint=None,
    samples=None,
    bad=(),
    augment=False,
    model=None,
    processor=None,
    peft_config=None,
    **settings,
) -> MPOTrainer:
    """A trainer of a tiny InternVL; `kind` is full, lora, text (no images), tokenizer (text with a tokenizer as processing class),
    mixed (every other record has an image) or fuser (with an MMFuser that has an effect).

    The images at the indices `bad` do not decode, in training and in evaluation; `augment` applies to all records.
    With `continued`, the model comes with an adapter that is trained further.
    A `model` takes the place of the tiny InternVL, with its `processor`, and `peft_config` that of the usual adapter.
    A `checkpoint` is loaded after the configuration, as a job does it: ZeRO-3 then holds it sharded from the start.
    """
    processor = processor or small_processor(TEXTS, image_size=32, patch_size=8, max_patches=4)
    processor.tokenizer.chat_template = processor.chat_template
    model = model or small_internvl(processor, hidden_size=32, layers=2, vision_hidden_size=32, vision_layers=2)
    if kind == "fuser":
        model = add_fuser(model, 1)
        torch.nn.init.constant_(model.model.fuser.gamma1, 0.5)
    make = {"text": text_pairs, "tokenizer": text_pairs, "mixed": mixed_pairs}.get(kind, image_pairs)
    adapter = copy.deepcopy(LORA)
    adapter.lora_dropout = lora_dropout
    adapter.target_modules = lora_targets or adapter.target_modules
    adapter.bias = lora_bias
    dataset = make(pairs)
    dataset = dataset.add_column("id", [f"pair-{i}" for i in range(pairs)])
    dataset = with_bad_images(dataset, bad) if bad else dataset
    dataset = dataset.add_column("augment", [True] * pairs) if augment else dataset
    evaluated = make(eval_pairs) if eval_pairs else None
    evaluated = with_bad_images(evaluated, [place for place in bad if place < eval_pairs]) if evaluated and bad else evaluated
    defaults = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "gradient_checkpointing": False,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": 2,
        "disable_tqdm": True,
    }
    args = MPOConfig(str(folder), **{**defaults, **settings})
    if samples is not None:
        callbacks = [*callbacks, SampleResponses(mixed_pairs(2), **samples)]
    if checkpoint is not None:
        model = load_internvl(str(checkpoint))
    model.model.vision_tower.requires_grad_(not frozen_tower)
    if continued:
        torch.manual_seed(5)
        adapter.init_lora_weights = False  # it differs from the base, as a trained adapter does
        model = get_peft_model(model, adapter)
    return MPOTrainer(
        model=model,
        ref_model=ref_model,
        args=args,
        train_dataset=dataset.to_iterable_dataset() if stream else dataset,
        eval_dataset=evaluated,
        processing_class=processor.tokenizer if kind == "tokenizer" else processor,
        peft_config=adapter if kind == "lora" and not continued else peft_config,
        callbacks=list(callbacks),
    )


def with_bad_images(dataset: Dataset, places) -> Dataset:
    """The same records, but the images at some indices do not decode."""
    rows = with_encoded_images(dataset).to_list()
    for place in places:
        rows[place]["images"] = [{"bytes": b"no image", "path": None}]
    return Dataset.from_list(rows, features=dataset.features)


def record(trainer, path) -> None:
    """Save the end state of a run: weights, optimizer, delta, logs. Every rank calls it."""
    shift = getattr(getattr(trainer, "mixture", None), "reward_shift", None)
    logs = [{name: value for name, value in log.items() if not _is_time(name)} for log in trainer.state.log_history]
    weights = whole_weights(trainer)
    if not trainer.is_world_process_zero():
        return
    torch.save(
        {
            "weights": weights,
            "optimizer": None
            if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
            else trainer.optimizer.state_dict()["state"],
            "delta": None if shift is None else shift.state_dict(),
            "logs": logs,
        },
        path,
    )


def whole_weights(trainer) -> dict | None:
    """The trained weights, gathered from all ranks. Every rank calls it; with ZeRO-3 only rank 0 gets them."""
    return trainer.accelerator.get_state_dict(trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model)


def _is_time(name: str) -> bool:
    return any(word in name for word in ("per_second", "runtime", "data_wait", "total_flos"))


def difference(first, second) -> float:
    """The largest difference between two nested structures of numbers and tensors; inf where they do not correspond."""
    if isinstance(first, torch.Tensor):
        return (
            float("inf")
            if first.shape != second.shape
            else (first.double() - second.double()).abs().max().item()
            if first.numel()
            else 0.0
        )
    if isinstance(first, dict):
        return float("inf") if first.keys() != second.keys() else max([difference(first[k], second[k]) for k in first], default=0.0)
    if isinstance(first, list):
        pairs = zip(first, second, strict=True) if len(first) == len(second) else None
        return float("inf") if pairs is None else max([difference(a, b) for a, b in pairs], default=0.0)
    if isinstance(first, (int, float)):
        return abs(first - second)
    return 0.0 if first == second else float("inf")


def write_job(folder: Path, pairs: int) -> list[str]:
    """Write a tiny checkpoint and pairs into a folder; returns the settings of `mpo train` on a CPU that name them."""
    processor = small_processor(TEXTS, image_size=32, patch_size=8, max_patches=4)
    small_internvl(processor, hidden_size=64, layers=2, vision_hidden_size=32, vision_layers=2).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    lines = []
    for index in range(pairs):
        make_image(index).save(folder / f"{index}.png")
        completions = {"chosen": f"It is {index}.", "rejected": "It is not that, I think."}
        lines.append(json.dumps({"image": f"{index}.png", "question": "What is it?", **completions}))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    settings = ["use_cpu=true", "dataloader_num_workers=0", "global_batch_size=4", "learning_rate=1e-3", "warmup_steps=0"]
    return [
        f"model.name_or_path={folder / 'model'}",
        f"data.path={folder / 'pairs.jsonl'}",
        *(f"trainer.{setting}" for setting in settings),
    ]


class KillAt(TrainerCallback):
    """kill -9 of this process at a moment: ("step", 3), ("micro", 5), ("saving", 4: half way through writing that checkpoint)."""

    def __init__(self, moment: str, number: int):
        self.moment, self.number, self.micro = moment, number, 0

    def on_step_end(self, args, state, control, **kwargs):
        if (self.moment, self.number) == ("step", state.global_step):
            os.kill(os.getpid(), signal.SIGKILL)

    def on_substep_end(self, args, state, control, **kwargs):
        self.micro += 1
        if (self.moment, self.number) == ("micro", self.micro):
            os.kill(os.getpid(), signal.SIGKILL)


def kill_while_saving(step: int) -> None:
    """Make this process die when the checkpoint of `step` has its weights and no more."""
    save = torch.save

    def deadly(value, path, *args, **kwargs):
        if f"checkpoint-{step}{os.sep}" in str(path):
            Path(path).write_bytes(b"truncated")
            os.kill(os.getpid(), signal.SIGKILL)
        return save(value, path, *args, **kwargs)

    torch.save = deadly


@functools.cache
def warm_up() -> None:
    """Train one step before the first fork: what a first run imports and looks up, forks need not do each, nor collect."""
    with tempfile.TemporaryDirectory() as folder:
        small_run(folder, pairs=2, max_steps=1).train()
    gc.collect()
    gc.freeze()


def in_fork(work) -> int:
    """Run `work` in a forked process; returns its exit code, negative for the signal that killed it."""
    warm_up()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            print(json.dumps({"child failed": repr(error)}), flush=True)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)
