"""Run one training step of a tiny InternVL on packed rows, and one 4-bit layer of bitsandbytes.

`TrainingArguments._n_gpu` is a private name of transformers, checked on 5.24.
"""

import math
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpo.preflight.doctor import TRACEBACK, Finding, first_cause, one_line
from mpo.preflight.packages import failing_alike, fix_import, import_failure, installed

QUESTION = "What colour is this?"
COLOURS = ("red", "green", "blue", "white")
FIXES = {
    "out of memory": "nvidia-smi   (lists processes on the GPU; end them, or select another GPU: export CUDA_VISIBLE_DEVICES=1)",
    "no kernel image": "pip install --upgrade torch torchvision   (the installed build does not support this GPU)",
    "No space left": "export TMPDIR=/larger/disk",
}
"""Commands that fix an error, by a part of its message."""
TOLERANCE = 0.2
"""Maximum relative error. That of NF4 is about 10 % (arXiv 2305.14314); twice as much indicates a defect."""


def training_step() -> Iterator[Finding]:
    """Run a step and report its loss, device, dtype and time."""
    started = time.perf_counter()
    try:
        log, device, dtype = take_step()
    except Exception as error:
        traceback.print_exc()
        yield Finding("one step", f"fails: {one_line(first_cause(error))}", "problem", _fix(first_cause(error)))
        return
    seconds = time.perf_counter() - started
    about = f"a tiny InternVL on packed rows, {device} in {dtype}: loss {log['loss']:.2f}, {seconds:.1f} s"
    if math.isfinite(log["loss"]) and math.isfinite(log["grad_norm"]):
        yield Finding("one step", about)
    else:
        yield Finding("one step", f"{about}; gradient norm {log['grad_norm']}", "problem", TRACEBACK)


def take_step() -> tuple[dict[str, Any], str, str]:
    """Train a tiny InternVL for a step of two pairs. Returns what it logs, its device, and the dtype of the computation."""
    from datasets import Dataset
    from PIL import Image

    from mpo import MPOConfig, MPOTrainer
    from mpo.models.small import small_internvl, small_processor

    def turn(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    pairs = [
        {
            "prompt": turn("user", QUESTION),
            "chosen": turn("assistant", f"It is {right}."),
            "rejected": turn("assistant", f"{wrong}, maybe."),
            "images": [Image.new("RGB", (64, 32), right)],
        }
        for right, wrong in zip(COLOURS, reversed(COLOURS), strict=True)
    ]
    settings: dict[str, Any] = {"rows": "packed", "max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-4}
    settings |= {"warmup_steps": 0, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    processor = small_processor([QUESTION, *COLOURS], max_patches=4)
    with tempfile.TemporaryDirectory() as folder:
        args = MPOConfig(str(Path(folder) / "run"), **settings)
        args._n_gpu = 1  # transformers would use DataParallel over all visible GPUs
        dataset = Dataset.from_list(pairs)
        trainer = MPOTrainer(model=small_internvl(processor), args=args, train_dataset=dataset, processing_class=processor)
        trainer.train()
    dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    return trainer.state.log_history[0], str(trainer.accelerator.device), dtype


def _fix(error: BaseException) -> str:
    known = next((fix for words, fix in FIXES.items() if words in str(error)), None)
    if known is None and (isinstance(error, ImportError) or failing_alike(error) is not None):
        return fix_import(error, "mpo-trainer")
    return known or TRACEBACK


def four_bits() -> Iterator[Finding]:
    """Check a 4-bit layer; no findings if bitsandbytes is not installed or cannot be imported, which `packages` reports."""
    found = installed("bitsandbytes")
    if found is None or import_failure("bitsandbytes") is not None:
        return
    fix = f"pip install --upgrade --force-reinstall --no-deps bitsandbytes   (installed: {found})"
    try:
        device, error = layer_error()
    except Exception as failure:
        yield Finding("4-bit layer", f"fails: {one_line(failure)}", "problem", fix)
        return
    value = f"NF4 on {device}: forward and backward pass differ by {error:.0%} from the dense layer"
    if error < TOLERANCE:
        yield Finding("4-bit layer", value)
    else:
        yield Finding("4-bit layer", f"{value}; expected less than {TOLERANCE:.0%}", "problem", fix)


def layer_error() -> tuple[str, float]:
    """Return the device and the relative error of a 4-bit layer: the larger one of its output and its input gradient."""
    import torch
    from bitsandbytes.nn import Linear4bit

    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    dense = torch.nn.Linear(256, 128, bias=False)
    dense.weight.data = torch.randn(128, 256, generator=generator) / 16
    layer = Linear4bit(256, 128, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict(dense.state_dict())
    results = []
    for module in (dense, layer):
        inputs = torch.randn(8, 256, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
        output = module.to(device)(inputs)
        output.square().sum().backward()
        results.append((output.detach(), inputs.grad))
    errors = [((quantized - exact).norm() / exact.norm()).item() for exact, quantized in zip(*results, strict=True)]
    return device.type, max(errors)
