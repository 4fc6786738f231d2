"""A run's trainer settings on a machine that is not the run's: without its GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def plans_gpu(trainer: Mapping[str, Any]) -> bool:
    """Whether a run is meant for GPUs: all but those with ``use_cpu``."""
    return not trainer.get("use_cpu", False)


def without_gpu(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that this machine accepts, GPU or not, and that say the same about memory.

    Half precision that is left to the hardware (``bf16: null``) is taken to be there on the run's GPUs.

    >>> without_gpu({"bf16": None, "use_cpu": True})["bf16"]
    """
    given = dict(trainer)
    if not plans_gpu(trainer):
        return given
    if given.get("bf16") is None and not given.get("fp16"):
        given["bf16"] = True
    if not torch.cuda.is_available():
        given["use_cpu"] = True
        given["activation_offloading"] = given["use_liger_kernel"] = False
        given["tf32"] = None
    return given
