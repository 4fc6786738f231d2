"""Suggest settings that save memory, largest saving first."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mpo.preflight.dry_run.batch import BatchShape
from mpo.preflight.dry_run.build import adapted
from mpo.preflight.dry_run.memory import estimate_memory
from mpo.preflight.dry_run.sharding import KINDS, Sharding

if TYPE_CHECKING:
    from mpo.training.job import TrainJob

LORA = {"kind": "lora", "r": 16, "lora_alpha": 32}


def advise(job: TrainJob, model: Any, batch: BatchShape, args: Any, *, gpu: bool, sharding: Sharding) -> list[tuple[str, int]]:
    """Return settings that save memory and the bytes per rank that each saves on its own, largest first.

    Args:
        job: the job.
        model: the policy on the meta device.
        batch: its most expensive micro-batch.
        args: the job's `MPOConfig`.
        gpu: whether the run has a GPU.
        sharding: sharding of the run.
    """
    adapters = job.peft["kind"] != "none"
    four_bits = job.peft["kind"] == "qlora"

    def total(
        policy: Any = model,
        shape: BatchShape = batch,
        over: Sharding = sharding,
        bits: bool = four_bits,
        with_: bool = adapters,
        **changed: Any,
    ) -> int:
        settings = copy.copy(args)
        for name, value in changed.items():
            object.__setattr__(settings, name, value)
        found = estimate_memory(policy, shape, settings, gpu=gpu, sharding=over, four_bits=bits, with_adapters=with_)
        return found.total

    now = total()
    tried: dict[str, int] = {}
    if not args.gradient_checkpointing:
        tried["trainer.gradient_checkpointing=true"] = total(gradient_checkpointing=True)
    if not adapters and args.reference == "live" and args.mixture().needs_reference:
        tried["trainer.reference=cached"] = total(reference="cached")
    if "8bit" not in args.optim and not sharding.is_deepspeed:
        tried["trainer.optim=adamw_bnb_8bit"] = total(optim="adamw_bnb_8bit")
        tried["trainer.optim=paged_adamw_8bit"] = total(optim="paged_adamw_8bit")
    if not adapters:
        tried["peft=lora"] = total(policy=adapted(copy.deepcopy(model), replace(job, peft=LORA)), with_=True)
        tried["peft=qlora"] = total(
            policy=adapted(copy.deepcopy(model), replace(job, peft={**LORA, "kind": "qlora"})), with_=True, bits=True
        )
    elif not four_bits:
        tried["peft=qlora"] = total(bits=True)
    pairs = args.per_device_train_batch_size
    if args.batching == "pairs" and pairs > 1:
        one = replace(
            batch, **{name: getattr(batch, name) // pairs for name in ("tokens", "keys", "masks", "labelled", "tiles", "pixels")}
        )
        tried["trainer.per_device_train_batch_size=1"] = total(shape=one)
    if "weights" not in KINDS[sharding.kind] and gpu and not four_bits:
        ranks = max(sharding.world_size, 8)
        tried[f"FSDP2 over {ranks} GPUs"] = total(over=Sharding("fsdp2", ranks))
    saved = [(change, now - after) for change, after in tried.items() if now - after > 0.01 * now]
    return sorted(saved, key=lambda pair: -pair[1])
