"""The precision and device type of a run, which every formula of the memory estimate depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Precision:
    """Bytes per element.

    ``stream``: of the residual stream, which has the weights' dtype. ``compute``: of matrix products; smaller than ``stream``
    when float32 weights are trained under autocast. ``autocast``: autocast is enabled. ``gpu``: on an NVIDIA GPU, where layer norms
    run in float32 under autocast and half precision uses varlen kernels.
    """

    stream: int
    compute: int
    autocast: bool
    gpu: bool

    @classmethod
    def of(cls, model: Any, args: Any, *, gpu: bool) -> Precision:
        """Derive the precision from a model's dtype and a run's configuration.

        Args:
            model: the policy; parameters may be on the meta device.
            args: an `MPOConfig`; ``bf16`` and ``fp16`` enable autocast.
            gpu: whether the run uses GPUs.
        """
        stream = model.get_input_embeddings().weight.element_size()
        autocast = bool(args.bf16 or args.fp16)
        return cls(stream, 2 if autocast else stream, autocast, gpu)

    @property
    def casts(self) -> bool:
        """Whether autocast makes a copy of every input and weight of a matrix product."""
        return self.autocast and self.compute != self.stream
