"""`mpo train ... dry_run=true`: check a job and describe its run without training."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mpo.data import load_preferences
from mpo.encoding.show import show_record
from mpo.models.fit import check_fit
from mpo.preflight.dry_run.advice import advise
from mpo.preflight.dry_run.build import build_structure
from mpo.preflight.dry_run.memory import MemoryEstimate, estimate_memory
from mpo.preflight.dry_run.page import lengths_section, memory_section, parameters_section, size, work_section
from mpo.preflight.dry_run.parts import count_parameters
from mpo.preflight.dry_run.sharding import Sharding
from mpo.preflight.dry_run.workload import plan_workload
from mpo.training.record_checks import check_records, measure_records, name_of, sample
from mpo.training.without_gpu import plans_gpu

if TYPE_CHECKING:
    from mpo.training.job import TrainJob

LONGEST = 5


def dry_run(job: TrainJob) -> str:
    """Check a job, its model and its data, and describe the run.

    Args:
        job: a checked job. ``dry_run_records`` limits the number of measured records; ``dry_run_gpu_gb`` is the GPU memory to
            compare the estimate with, by default that of this machine's GPU, if any.

    Returns:
        the report as text.

    Raises:
        ValueError: for problems that would stop the run: a processor that does not match the model, records that do not fit.
    """
    start = time.perf_counter()
    args = job.planned_arguments()
    gpu = plans_gpu(job.trainer)
    sharding = Sharding.of(job.trainer, job.place().world_size)
    structure = build_structure(job)
    model, processor = structure.model, structure.processor
    check_fit(model, processor)
    pairs = load_preferences(**{**job.train_data(), "streaming": False})
    records = sample(pairs, job.dry_run_records)
    costs = measure_records(records, processor, args)
    check_records(records, costs, processor, model.config, args)
    work = plan_workload(pairs, records, costs, model, processor, args, ranks=sharding.world_size, gpu=gpu)
    kind = job.peft["kind"]
    estimate = estimate_memory(
        model, work.batch, args, gpu=gpu, sharding=sharding, four_bits=kind == "qlora", with_adapters=kind != "none"
    )
    longest = np.argsort(-work.costs.tokens(), kind="stable")[:LONGEST]
    most_expensive = ", ".join(name_of(records, index) for index in work.most_expensive[:LONGEST]) + (
        ", ..." if len(work.most_expensive) > LONGEST else ""
    )
    where = f"{'GPU' if gpu else 'CPU'}, {sharding}, most expensive micro-batch: {most_expensive}"
    built = "with weights, no config available" if structure.real else "on the meta device, no weights loaded"
    first = name_of(records, 0)
    return "\n\n".join(
        [
            f"Dry run of {structure.name} ({built}), loss {args.mixture()!r}, {time.perf_counter() - start:.1f} s",
            parameters_section(count_parameters(model)),
            memory_section(estimate, where),
            *verdict(job, estimate, model, work.batch, args, gpu=gpu, sharding=sharding),
            work_section(work, args, sharding.world_size),
            lengths_section(work, [name_of(records, int(index)) for index in longest]),
            f"As the model sees it: {first}\n" + _indented(show_record(records[0], processor, args)),
        ]
    )


def verdict(
    job: TrainJob, estimate: MemoryEstimate, model: Any, batch: Any, args: Any, *, gpu: bool, sharding: Sharding
) -> list[str]:
    """Say whether the estimate fits a GPU, and which settings save memory if not. Empty without a GPU to compare with."""
    there = job.dry_run_gpu_gb
    if there is None and gpu and torch.cuda.is_available():
        there = torch.cuda.get_device_properties(0).total_memory / 2**30
    if there is None or not gpu:
        return []
    if estimate.total <= there * 2**30:
        return [f"The run fits on a GPU of {there:g} GiB and uses {estimate.total / 2**30 / there:.0%} of it."]
    lines = [
        f"WARNING: the estimate of {size(estimate.total)} exceeds the GPU's {there:g} GiB. What each setting saves on its own:"
    ]
    saving = advise(job, model, batch, args, gpu=gpu, sharding=sharding)
    width = max((len(change) for change, _ in saving), default=0)
    for change, saved in saving:
        left = estimate.total - saved
        lines.append(
            f"  {change:<{width}}  {size(saved):>10}  leaves {size(left)}{', which fits' if left <= there * 2**30 else ''}"
        )
    lines.append("  a lower model.max_tiles or trainer.max_length shortens the longest record")
    return ["\n".join(lines)]


def _indented(text: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in text.split("\n"))
