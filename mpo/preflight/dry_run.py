"""`mpo train ... dry_run=true`: check a job and describe its run without training."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mpo.data import load_preferences
from mpo.encoding.show import show_record
from mpo.models.fit import check_fit
from mpo.preflight.memory import KINDS, Component, MemoryEstimate, Sharding, estimate_memory
from mpo.preflight.structure import Count, adapted, build_structure, count_parameters
from mpo.preflight.workload import Workload, plan_workload
from mpo.training.record_checks import check_records, measure_records, name_of, sample
from mpo.training.without_gpu import plans_gpu

if TYPE_CHECKING:
    from mpo.training.job import TrainJob

LONGEST = 5
BAR = 40
"""Length of a histogram's longest bar in characters."""
NOT_SUBTRACTED = ("use_liger_kernel", "activation_offloading")
"""Settings that save memory on GPUs, by an amount that is not known here."""
LORA = {"kind": "lora", "r": 16, "lora_alpha": 32}


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
    work = plan_workload(pairs, records, costs, model, processor, args, ranks=sharding.world_size)
    kind = job.peft["kind"]
    batch = work.batch(work.most_expensive)
    estimate = estimate_memory(
        model, batch, args, gpu=gpu, sharding=sharding, four_bits=kind == "qlora", with_adapters=kind != "none"
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
            memory_section(estimate, where, [name for name in NOT_SUBTRACTED if job.trainer.get(name)]),
            *verdict(job, estimate, model, work, args, gpu=gpu, sharding=sharding),
            work_section(work, args, sharding.world_size),
            lengths_section(work, [name_of(records, int(index)) for index in longest]),
            f"As the model sees it: {first}\n" + _indented(show_record(records[0], processor, args)),
        ]
    )


def verdict(
    job: TrainJob, estimate: MemoryEstimate, model: Any, work: Workload, args: Any, *, gpu: bool, sharding: Sharding
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
    saving = advise(job, model, work, estimate.total, args, gpu=gpu, sharding=sharding)
    width = max((len(change) for change, _ in saving), default=0)
    for change, saved in saving:
        left = estimate.total - saved
        lines.append(
            f"  {change:<{width}}  {size(saved):>10}  leaves {size(left)}{', which fits' if left <= there * 2**30 else ''}"
        )
    lines.append("  a lower model.max_tiles or trainer.max_length shortens the longest record")
    return ["\n".join(lines)]


def advise(
    job: TrainJob, model: Any, work: Workload, now: int, args: Any, *, gpu: bool, sharding: Sharding
) -> list[tuple[str, int]]:
    """Return settings that save memory and the bytes per rank that each saves on its own, largest first.

    Args:
        job: the job.
        model: the policy on the meta device.
        work: its data.
        now: the job's estimate, in bytes.
        args: the job's `MPOConfig`.
        gpu: whether the run has a GPU.
        sharding: sharding of the run.
    """
    adapters = job.peft["kind"] != "none"
    four_bits = job.peft["kind"] == "qlora"
    most_expensive = work.batch(work.most_expensive)

    def total(
        policy: Any = model,
        batch: Any = most_expensive,
        over: Sharding = sharding,
        bits: bool = four_bits,
        with_: bool = adapters,
        **changed: Any,
    ) -> int:
        settings = copy.copy(args)
        for name, value in changed.items():
            object.__setattr__(settings, name, value)
        found = estimate_memory(policy, batch, settings, gpu=gpu, sharding=over, four_bits=bits, with_adapters=with_)
        return found.total

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
    if args.batching == "pairs" and len(work.most_expensive) > 1:
        tried["trainer.per_device_train_batch_size=1"] = total(batch=work.batch(work.most_expensive[:1]))
    if "weights" not in KINDS[sharding.kind] and gpu and not four_bits:
        ranks = max(sharding.world_size, 8)
        tried[f"FSDP2 over {ranks} GPUs"] = total(over=Sharding("fsdp2", ranks))
    saved = [(change, now - after) for change, after in tried.items() if now - after > 0.01 * now]
    return sorted(saved, key=lambda pair: -pair[1])


def parameters_section(counts: dict[str, Count]) -> str:
    """Show the numbers of parameters by part."""
    rows = [(part, f"{count.total:,}", f"{count.trainable:,}") for part, count in counts.items() if count.total]
    total, trained = (sum(getattr(count, name) for count in counts.values()) for name in ("total", "trainable"))
    rows.append(("total", f"{total:,}", f"{trained:,}"))
    if not counts["LM head"].total:
        rows.append(("(the LM head shares the weights of the input embeddings, which count for the language model)", "", ""))
    return _titled("Parameters", _columns(("", "all", "trained"), rows))


def memory_section(estimate: MemoryEstimate, where: str, not_subtracted: list[str]) -> str:
    """Show the memory estimate by component, and in each phase of a step, one of which is the peak."""

    def rows(components: Iterable[Component]) -> list[tuple[str, str, str]]:
        return [(component.name, size(component.size), component.why) for component in components]

    lines = ["permanent"]
    lines += _columns(None, rows(estimate.fixed), indent=4)
    lines += ["temporary"]
    lines += _columns(None, rows(estimate.passing), indent=4)
    lines += ["temporary memory, by phase of the step"]
    lines += _columns(None, [(moment, size(bytes_), "") for moment, bytes_ in estimate.moments.items()], indent=4)
    if estimate.margin:
        lines += ["margin (an allowance)"]
        lines += _columns(None, rows(estimate.margin), indent=4)
    lines.append(f"peak {size(estimate.total)} per rank, at: {estimate.peak_moment}")
    lines += [f"NOT subtracted: what trainer.{name} saves" for name in not_subtracted]
    if estimate.unknown:
        lines.append(f"NOT included: activations; {estimate.unknown}")
    return _titled(f"Memory, {where}", lines)


def work_section(work: Workload, args: Any, ranks: int) -> str:
    """Show the steps, epochs, tokens and tiles of the run."""
    truncated = work.costs.truncate(args.max_length, skip=args.on_bad_record == "skip")
    once = "once per pair" if work.layout == "packed" else "twice per pair, without padding"
    scale = work.total / len(work.costs) * work.epochs
    about = "about " if work.sampled else ""
    lines = [
        f"{work.total:,} pairs; epochs: {work.epochs:.4g}; steps: {work.steps:,} of {work.pairs_per_step:.4g} pairs "
        f"(micro-batches per step and rank: {args.gradient_accumulation_steps}; ranks: {ranks})",
        f"{about}{int(work.tokens.sum() * scale):,} tokens and {int(truncated.tiles.sum() * scale):,} tiles in all epochs "
        f"(prompts counted {once})",
        f"rows: {work.layout}" + (f", because {work.padded_because}" if work.padded_because else ""),
    ]
    if work.sampled:
        lines.append(
            f"measured on {len(work.costs):,} records, evenly spaced (dry_run_records); the longest record may not be one of them"
        )
    if work.packing is not None:
        lines.append(f"batches: {work.packing}")
    return _titled("Work", lines)


def lengths_section(work: Workload, names: list[str]) -> str:
    """Show histograms of tokens and tiles per record, and the longest records."""
    tokens = work.costs.tokens()
    lines = [*histogram("tokens per record", tokens)]
    if work.costs.tiles.any():
        lines += ["", *histogram("tiles per record", work.costs.tiles, bins=15)]
    lines += ["", "longest records (without truncation)"]
    longest = np.argsort(-tokens, kind="stable")[: len(names)]
    costs = work.costs
    rows = [
        (
            name,
            f"{tokens[index]:,} tokens",
            f"prompt {costs.prompt[index]:,}, completions {costs.chosen[index]:,} and {costs.rejected[index]:,}, "
            f"{costs.tiles[index]} tiles",
        )
        for name, index in zip(names, longest, strict=True)
    ]
    return _titled("Lengths", lines + _columns(None, rows, indent=4))


def histogram(title: str, values: Any, bins: int = 10) -> list[str]:
    r"""Draw a histogram of integers as text.

    >>> print("\n".join(histogram("tiles", np.array([1, 1, 3]))))
    tiles: min 1, median 1, max 3
        1  2 ########################################
        2  0
        3  1 ####################
    """
    low, high = int(values.min()), int(values.max())
    edges = np.unique(np.linspace(low, high + 1, min(bins, high - low + 1) + 1).astype(int))
    counts = [int(((values >= begin) & (values < end)).sum()) for begin, end in zip(edges[:-1], edges[1:], strict=True)]
    ranges = [f"{b:,}" if e - b == 1 else f"{b:,}-{e - 1:,}" for b, e in zip(edges[:-1], edges[1:], strict=True)]
    width, most = max(map(len, ranges)), len(f"{max(counts):,}")
    lines = [f"{title}: min {low:,}, median {int(np.median(values)):,}, max {high:,}"]
    for range_, count in zip(ranges, counts, strict=True):
        bar = "#" * -(-count * BAR // max(counts))
        lines.append(f"    {range_:>{width}}  {count:>{most},} {bar}".rstrip())
    return lines


def size(number: float) -> str:
    """Format bytes in GiB or MiB.

    >>> size(1.5 * 2**30), size(3 * 2**20), size(0)
    ('1.50 GiB', '3.0 MiB', '0')
    """
    if number >= 2**30:
        return f"{number / 2**30:.2f} GiB"
    return f"{number / 2**20:.1f} MiB" if number else "0"


def _titled(title: str, lines: Iterable[str]) -> str:
    return "\n".join([title, *(f"  {line}".rstrip() for line in lines)])


def _columns(head: tuple[str, ...] | None, rows: list[tuple[str, str, str]], indent: int = 0) -> list[str]:
    table = ([head] if head else []) + [row for row in rows if any(row[1:])]
    notes = [row[0] for row in rows if not any(row[1:])]
    widths = [max((len(row[column]) for row in table), default=0) for column in range(3)]
    numbers = head is not None  # the last column holds numbers too
    return [
        (
            " " * indent + f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}"
            if numbers
            else " " * indent + f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c}"
        )
        for a, b, c in table
    ] + notes


def _indented(text: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in text.split("\n"))
