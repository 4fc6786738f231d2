"""How weights, gradients and optimizer state are sharded over ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = {
    "one process": (),
    "ddp": (),
    "fsdp2": ("weights", "gradients", "optimiser", "reference"),
    "zero1": ("optimiser",),
    "zero2": ("gradients", "optimiser"),
    "zero3": ("weights", "gradients", "optimiser", "reference"),
}
"""What each strategy shards. ZeRO: arXiv 1910.02054, section 5; FSDP: arXiv 2304.11277. The reference model is sharded with the
policy under FSDP2, and by TRL under ZeRO-3."""


@dataclass(frozen=True)
class Sharding:
    """The sharding of a run over ``world_size`` ranks; ``kind`` is a key of `KINDS`."""

    kind: str = "one process"
    world_size: int = 1

    @classmethod
    def of(cls, trainer: Mapping[str, Any], ranks: int = 1) -> Sharding:
        """Derive the sharding from a job's trainer settings.

        Args:
            trainer: ``deepspeed`` (a mapping or a file) and ``fsdp``, as in `MPOConfig`.
            ranks: number of ranks.
        """
        deepspeed = trainer.get("deepspeed")
        if deepspeed:
            settings = deepspeed if isinstance(deepspeed, Mapping) else json.loads(Path(deepspeed).read_text())
            stage = int(settings.get("zero_optimization", {}).get("stage", 0))
            return cls(f"zero{stage}" if stage else "ddp", ranks)
        if trainer.get("fsdp"):
            return cls("fsdp2", ranks)
        return cls("ddp" if ranks > 1 else "one process", ranks)

    def share(self, what: str) -> float:
        """Return the fraction of `what` that one rank holds: 1, or 1 / ``world_size`` if it is sharded."""
        return 1 / self.world_size if what in KINDS[self.kind] else 1.0

    @property
    def is_deepspeed(self) -> bool:
        """Whether DeepSpeed holds the weights in half precision, and float32 master weights with the optimizer."""
        return self.kind.startswith("zero")

    def raises_weights(self, autocast: bool) -> bool:
        """Whether accelerate casts trained weights to float32, as `fsdp2_prepare_model` does under mixed precision."""
        return self.kind == "fsdp2" and autocast

    def __str__(self) -> str:
        names = {"ddp": "DDP", "fsdp2": "FSDP2", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
        return self.kind if self.world_size == 1 else f"{names.get(self.kind, self.kind)}, {self.world_size} ranks"
