"""Trainer settings of a run, adapted to a machine without the run's GPUs."""

from collections.abc import Mapping
from typing import Any

import torch


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
        given["use_cpu"] = True
        given["activation_offloading"] = given["use_liger_kernel"] = False
        given["tf32"] = None
    return given
