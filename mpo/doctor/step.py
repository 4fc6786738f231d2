"""One real training step of a tiny InternVL on packed rows, so that it is known and not inferred that a run can start."""

from __future__ import annotations

import math
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpo.doctor.finding import TRACEBACK, Finding, first_cause, one_line
from mpo.doctor.imports import failing_alike, fix_import

QUESTION = "What colour is this?"
COLOURS = ("red", "green", "blue", "white")

FIXES = {
    "out of memory": "nvidia-smi   (shows which process holds the memory; end it, or choose a GPU: export CUDA_VISIBLE_DEVICES=1)",
    "no kernel image": "pip install --upgrade torch torchvision   (this build is not for this GPU)",
    "No space left": "export TMPDIR=/larger/disk",
}
"""Commands by a part of the error message."""


def training_step() -> Iterator[Finding]:
    """A step, its loss and what it ran on."""
    try:
        began = time.perf_counter()
        log, device, dtype = take_step()
        seconds = time.perf_counter() - began
    except Exception as error:
        traceback.print_exc()
        yield Finding("one step", f"fails: {one_line(first_cause(error))}", "problem", _fix(first_cause(error)))
        return
    about = f"a tiny InternVL on packed rows, {device} in {dtype}: loss {log['loss']:.2f}, {seconds:.1f} s"
    if all(math.isfinite(log[name]) for name in ("loss", "grad_norm")):
        yield Finding("one step", about)
    else:
        yield Finding("one step", f"{about}; gradient norm {log['grad_norm']}", "problem", TRACEBACK)


def take_step() -> tuple[dict[str, Any], str, str]:
    """Train a tiny InternVL for one step of two pairs.

    Returns:
        What the step logs, the device, and the dtype that it computed in.
    """
    from mpo import MPOConfig, MPOTrainer
    from mpo.models.small import small_internvl, small_processor

    processor = small_processor([QUESTION, *COLOURS], max_patches=4)
    with tempfile.TemporaryDirectory() as folder:
        args = MPOConfig(
            str(Path(folder) / "run"),
            rows="packed",
            max_steps=1,
            per_device_train_batch_size=2,
            learning_rate=1e-4,
            warmup_steps=0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        args._n_gpu = 1  # transformers would split the batch over all GPUs it sees; `mpo train` starts a process for each
        trainer = MPOTrainer(model=small_internvl(processor), args=args, train_dataset=_pairs(), processing_class=processor)
        trainer.train()
    dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    return trainer.state.log_history[0], str(trainer.accelerator.device), dtype


def _pairs() -> Any:
    from datasets import Dataset
    from PIL import Image

    def pair(right: str, wrong: str) -> dict[str, Any]:
        said = {
            "prompt": ("user", QUESTION),
            "chosen": ("assistant", f"It is {right}."),
            "rejected": ("assistant", f"{wrong}, maybe."),
        }
        turns = {name: [{"role": role, "content": text}] for name, (role, text) in said.items()}
        return {**turns, "images": [Image.new("RGB", (64, 32), right)]}

    return Dataset.from_list([pair(right, wrong) for right, wrong in zip(COLOURS, reversed(COLOURS), strict=True)])


def _fix(error: BaseException) -> str:
    known = next((fix for words, fix in FIXES.items() if words in str(error)), None)
    if known is None and (isinstance(error, ImportError) or failing_alike(error) is not None):
        return fix_import(error, "mpo-trainer")
    return known or TRACEBACK
