"""Run one training step of a tiny InternVL on packed rows."""

from __future__ import annotations

import math
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpo.preflight.doctor.finding import TRACEBACK, Finding, first_cause, one_line
from mpo.preflight.doctor.imports import failing_alike, fix_import

QUESTION = "What colour is this?"
COLOURS = ("red", "green", "blue", "white")

FIXES = {
    "out of memory": "nvidia-smi   (lists processes on the GPU; end them, or select another GPU: export CUDA_VISIBLE_DEVICES=1)",
    "no kernel image": "pip install --upgrade torch torchvision   (the installed build does not support this GPU)",
    "No space left": "export TMPDIR=/larger/disk",
}
"""Commands that fix an error, by a part of its message."""


def training_step() -> Iterator[Finding]:
    """Run a step and report its loss, device, dtype and time."""
    try:
        started = time.perf_counter()
        log, device, dtype = take_step()
        seconds = time.perf_counter() - started
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
        The logged values of the step, the device, and the dtype of the computation.
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
        args._n_gpu = 1  # transformers would use DataParallel over all visible GPUs
        trainer = MPOTrainer(model=small_internvl(processor), args=args, train_dataset=_pairs(), processing_class=processor)
        trainer.train()
    dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    return trainer.state.log_history[0], str(trainer.accelerator.device), dtype


def _pairs() -> Any:
    from datasets import Dataset
    from PIL import Image

    def pair(right: str, wrong: str) -> dict[str, Any]:
        texts = {
            "prompt": ("user", QUESTION),
            "chosen": ("assistant", f"It is {right}."),
            "rejected": ("assistant", f"{wrong}, maybe."),
        }
        turns = {name: [{"role": role, "content": text}] for name, (role, text) in texts.items()}
        return {**turns, "images": [Image.new("RGB", (64, 32), right)]}

    return Dataset.from_list([pair(right, wrong) for right, wrong in zip(COLOURS, reversed(COLOURS), strict=True)])


def _fix(error: BaseException) -> str:
    known = next((fix for words, fix in FIXES.items() if words in str(error)), None)
    if known is None and (isinstance(error, ImportError) or failing_alike(error) is not None):
        return fix_import(error, "mpo-trainer")
    return known or TRACEBACK
