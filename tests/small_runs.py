"""The same small training job for every test, to be interrupted, split over ranks, and compared."""

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from peft import LoraConfig
from support import TEXTS, mixed_pairs, picture_pairs, text_pairs
from transformers import TrainerCallback

from mpo import MPOConfig, MPOTrainer
from mpo.models.small import small_internvl, small_processor

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
    **settings,
) -> MPOTrainer:
    """A trainer of a tiny InternVL; `kind` is full, lora, text (no pictures) or mixed (every other record has one)."""
    processor = small_processor(TEXTS, image_size=32, patch_size=8, max_patches=4)
    model = small_internvl(processor, hidden_size=32, layers=2, vision_hidden_size=32, vision_layers=2)
    model.model.vision_tower.requires_grad_(not frozen_tower)
    make = {"text": text_pairs, "mixed": mixed_pairs}.get(kind, picture_pairs)
    adapter = copy.deepcopy(LORA)
    adapter.lora_dropout = lora_dropout
    adapter.target_modules = lora_targets or adapter.target_modules
    dataset = make(pairs)
    dataset = dataset.add_column("id", [f"pair-{i}" for i in range(pairs)])
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
    return MPOTrainer(
        model=model,
        ref_model=ref_model,
        args=MPOConfig(str(folder), **{**defaults, **settings}),
        train_dataset=dataset.to_iterable_dataset() if stream else dataset,
        eval_dataset=make(eval_pairs) if eval_pairs else None,
        processing_class=processor,
        peft_config=adapter if kind == "lora" else None,
        callbacks=list(callbacks),
    )


def record(trainer, path) -> None:
    """Write what a run ended with: weights, optimiser, delta, logs. Every rank calls it."""
    shift = trainer.mixture.reward_shift
    logs = [{name: value for name, value in log.items() if not _is_time(name)} for log in trainer.state.log_history]
    weights = trainer.accelerator.get_state_dict(trainer.model)
    if not trainer.is_world_process_zero():
        return
    torch.save(
        {
            "weights": weights,
            "optimizer": None if trainer.is_fsdp_enabled else trainer.optimizer.state_dict()["state"],
            "delta": None if shift is None else shift.state_dict(),
            "logs": logs,
        },
        path,
    )


def _is_time(name: str) -> bool:
    return any(word in name for word in ("per_second", "runtime", "total_flos"))


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
            Path(path).write_bytes(b"cut")
            os.kill(os.getpid(), signal.SIGKILL)
        return save(value, path, *args, **kwargs)

    torch.save = deadly


def in_fork(work) -> int:
    """Run `work` in a forked process; returns its exit code, negative for the signal that killed it."""
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


def run_on_ranks(folder: Path, scenarios: dict[str, dict], ranks: int = 2) -> None:
    """Run every scenario of `trainer/ranks.py` in one group of processes; results are files in `folder`."""
    path = folder / f"scenarios-{ranks}.json"
    path.write_text(json.dumps(scenarios))
    tests = Path(__file__).parent
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    done = subprocess.run(
        [*launch, tests / "trainer" / "ranks.py", path],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tests}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=150,
    )
    mine = [line for line in done.stderr.splitlines() if line.startswith("[rank")]
    assert done.returncode == 0, "\n".join(mine)[-6000:] or done.stderr[-3000:]
