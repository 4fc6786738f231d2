"""`mpo train ... dry_run=true`, and `mpo sft`: check a job and describe its run without training."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from mpo.batching.sampler import PairBatchSampler
from mpo.data.encoded import with_encoded_images
from mpo.encoding.costs import PairCosts
from mpo.encoding.keys import image_key
from mpo.encoding.show import decode_record
from mpo.encoding.tiles import tile_limits
from mpo.encoding.turns import encoded_images
from mpo.models.features import tile_shape
from mpo.models.fit import check_fit
from mpo.models.packable import find_text_model, fixed_context
from mpo.models.parts import base_model
from mpo.models.tower import find_tower
from mpo.preflight.memory import MemoryEstimate, Sharding, estimate_memory
from mpo.preflight.structure import adapted, build_structure, count_parameters
from mpo.training.features.use import is_projector_frozen, why_not_cached
from mpo.training.loading import batch_sampler
from mpo.training.record_checks import check_images, check_records, measure_records, name_of, sample
from mpo.training.start import adds_router_loss, choose_layout, collator_of
from mpo.visible import size, table

if TYPE_CHECKING:
    from mpo.training.job import TrainJob

LONGEST = 5
BAR = 40
"""Length of a histogram's longest bar in characters."""
NOT_SUBTRACTED = ("use_liger_kernel", "activation_offloading")
"""Settings that save memory on GPUs, by an amount that is not known here."""
LORA = {"kind": "lora", "r": 16, "lora_alpha": 32}


def dry_run(job: TrainJob) -> str:
    """Check a job, its model and its data, and describe the run as text.

    Raises ValueError for problems that would stop the run: a processor that does not match the model, records that do not fit.
    """
    start = time.perf_counter()
    args, gpu = job.planned_arguments(), not job.trainer.get("use_cpu")
    sharding = Sharding.of(job.trainer, job.place().world_size)
    model, processor, name, real = build_structure(job)
    check_fit(model, processor)
    pairs = job.kind.load(**{**job.train_data(), "streaming": False})
    records = sample(pairs, job.dry_run_records)
    costs = measure_records(records, processor, args)
    check_records(records, costs, processor, model.config, args)
    check_images(pairs, model, args.learning_rates())
    work = Workload(pairs, records, costs, model, processor, args, ranks=sharding.world_size)

    def estimate(
        policy: Any = model,
        indices: list[int] = work.most_expensive,
        over: Sharding = sharding,
        kind: str = job.peft["kind"],
        **changed: Any,
    ) -> MemoryEstimate:
        """Estimate the run's memory, or that of a run with other settings."""
        settings, batch = copy.copy(args), work.batch(indices)
        for setting, value in changed.items():
            object.__setattr__(settings, setting, value)
        how = {"four_bits": kind == "qlora", "with_adapters": kind != "none"}
        return estimate_memory(policy, batch, settings, gpu=gpu, sharding=over, **how)

    found = estimate()
    available = job.dry_run_gpu_gb
    if available is None and torch.cuda.is_available():
        available = torch.cuda.get_device_properties(0).total_memory / 2**30
    most_expensive = [name_of(records, index) for index in work.most_expensive[:LONGEST]]
    most_expensive += ["..."] * (len(work.most_expensive) > LONGEST)
    where = f"{'GPU' if gpu else 'CPU'}, {sharding}, most expensive micro-batch: {', '.join(most_expensive)}"
    memory = memory_lines(found)
    memory += [f"NOT subtracted: what trainer.{name} saves" for name in NOT_SUBTRACTED if job.trainer.get(name)]
    if found.unknown:
        memory.append(f"NOT included: activations; {found.unknown}")
    advice = partial(_advise, job, model, work, args, sharding, estimate)
    verdict = _verdict(found.total, available, advice) if gpu and available else {}
    built = "with weights, no config available" if real else "on the meta device, no weights loaded"
    limits = {"max_length": args.max_length, "truncation_mode": args.truncation_mode, "tile_budget": args.tile_budget}
    seen = decode_record(records[0], processor, **limits, **args.encoding_rules())
    sections = {
        f"Dry run of {name} ({built}), loss {args.loss_name()}, {time.perf_counter() - start:.1f} s": [],
        "Parameters": parameter_lines(count_parameters(model)),
        f"Memory, {where}": memory,
        **verdict,
        "Work": work_lines(work, args, sharding.world_size),
        **feature_lines(work, model, processor, args),
        "Lengths": length_lines(work),
        f"As the model sees it: {name_of(records, 0)}": [
            line for heading, text in seen for line in (heading, *(f"    {one}" for one in text.split("\n")))
        ],
    }
    return "\n\n".join("\n".join([title, *(f"  {line}".rstrip() for line in lines)]) for title, lines in sections.items())


def _verdict(total: int, available: float, advice: Callable[[], dict[str, int]]) -> dict[str, list[str]]:
    """Say whether an estimate, in bytes, fits a GPU of `available` GiB, and else what each setting of the advice would save."""
    if total <= available * 2**30:
        return {f"The run fits on a GPU of {available:g} GiB and uses {total / 2**30 / available:.0%} of it.": []}
    rows = [
        (change, size(total - left), f"leaves {size(left)}" + ", which fits" * (left <= available * 2**30))
        for change, left in sorted(advice().items(), key=lambda pair: pair[1])
        if total - left > 0.01 * total
    ]
    title = f"WARNING: the estimate of {size(total)} exceeds the GPU's {available:g} GiB. What each setting saves on its own:"
    return {title: [*_columns(rows), "a lower model.max_tiles or trainer.max_length shortens the longest record"]}


def _advise(
    job: TrainJob, model: Any, work: Workload, args: Any, sharding: Sharding, estimate: Callable[..., MemoryEstimate]
) -> dict[str, int]:
    kind = job.peft["kind"]
    tried: dict[str, dict[str, Any]] = {}
    if not args.gradient_checkpointing:
        tried["trainer.gradient_checkpointing=true"] = {"gradient_checkpointing": True}
    if kind == "none" and args.needs_reference and args.reference == "live":
        tried["trainer.reference=cached"] = {"reference": "cached"}
    if "8bit" not in args.optim and not sharding.is_deepspeed:
        tried |= {f"trainer.optim={optim}": {"optim": optim} for optim in ("adamw_bnb_8bit", "paged_adamw_8bit")}
    if kind == "none":
        for other in ("lora", "qlora"):
            policy = adapted(copy.deepcopy(model), replace(job, peft={**LORA, "kind": other}))
            tried[f"peft={other}"] = {"policy": policy, "kind": other}
    elif kind == "lora":
        tried["peft=qlora"] = {"kind": "qlora"}
    if args.batching != "tokens" and len(work.most_expensive) > 1:
        tried["trainer.per_device_train_batch_size=1"] = {"indices": work.most_expensive[:1]}
    if not sharding.shards("weights") and kind != "qlora":
        over = Sharding("fsdp2", max(sharding.world_size, 8))
        tried[f"FSDP2 over {over.world_size} GPUs"] = {"over": over}
    return {change: estimate(**how).total for change, how in tried.items()}


def parameter_lines(counts: dict[str, tuple[int, int]]) -> list[str]:
    """Show the numbers of parameters by part."""
    total: dict[str, Any] = {"total": tuple(map(sum, zip(*counts.values(), strict=True)))}
    rows = [(part, f"{both[0]:,}", f"{both[1]:,}") for part, both in {**counts, **total}.items() if both[0]]
    tied = "(the LM head shares the weights of the input embeddings, which count for the language model)"
    return table([("", "all", "trained"), *rows]).split("\n") + [tied] * (not counts["LM head"][0])


def memory_lines(estimate: MemoryEstimate) -> list[str]:
    """Show the memory estimate by component, and in each phase of a step, one of which is the peak."""
    lines = []
    for title, rows in {
        "permanent": estimate.fixed,
        "temporary": estimate.passing,
        "temporary memory, by phase of the step": [(moment, number, "") for moment, number in estimate.moments.items()],
        "margin (an allowance)": estimate.margin,
    }.items():
        lines += [title, *_columns([(name, size(number), why) for name, number, why in rows], indent=4)] if rows else []
    return [*lines, f"peak {size(estimate.total)} per rank, at: {estimate.peak_moment}"]


def work_lines(work: Workload, args: Any, ranks: int) -> list[str]:
    """Show the steps, epochs, tokens and tiles of the run."""
    unit = args.by_number
    times = "once per pair" if work.layout == "packed" else "twice per pair, without padding"
    once = f" (prompts counted {times})" if unit == "pairs" else ""
    measured = len(work.costs)
    tokens, tiles = (int(values.sum() * work.total / measured * work.epochs) for values in (work.tokens, work.tiles))
    lines = [
        f"{work.total:,} {unit}; epochs: {work.epochs:.4g}; steps: {work.steps:,} of {work.pairs_per_step:.4g} {unit} "
        f"(micro-batches per step and rank: {args.gradient_accumulation_steps}; ranks: {ranks})",
        f"{'about ' * (measured < work.total)}{tokens:,} tokens and {tiles:,} tiles in all epochs{once}",
        f"rows: {work.layout}" + (f", because {work.padded_because}" if work.padded_because else ""),
    ]
    if (reason := args.only_warms_up(work.steps)) is not None:
        lines.append(f"WARNING: {reason}")
    if measured < work.total:
        lines.append(
            f"measured on {measured:,} records, evenly spaced (dry_run_records); the longest record may not be one of them"
        )
    return lines + ([f"batches: {work.packing}"] if work.packing is not None else [])


def feature_lines(work: Workload, model: Any, processor: Any, args: Any) -> dict[str, list[str]]:
    """Say what cached vision features take on disk and save; nothing for a model that has none.

    Raises ValueError for a run with cached features that are not possible.
    """
    if (reason := why_not_cached(model, processor)) is not None or not work.tiles.any():
        if args.vision_features == "cached" and reason is not None:
            raise ValueError(f"trainer.vision_features=cached is not possible here: {reason}. Use live.")
        return {}
    seen: set[bytes] = set()
    distinct, encoded = 0.0, with_encoded_images(work.records)
    for record, tiles in zip(encoded, work.costs.tiles.tolist(), strict=True):
        images, videos = encoded_images(record), record.get("videos") or ()
        limits = repr(sorted(tile_limits(record, len(images), processor, "", budget=args.tile_budget).items())).encode()
        own = [limits + (image_key(image) if isinstance(image, Image.Image) else repr(image).encode()) for image in images]
        own += [repr(video).encode() for video in videos]
        distinct += tiles * len({*own} - seen) / max(len(own), 1)
        seen.update(own)
    base, scale = base_model(model), work.total / len(work.costs)
    projected = is_projector_frozen(model)
    (tokens, channels), width = tile_shape(base.config, projected=projected), base.dtype.itemsize
    width = 2 if projected and (args.bf16 or args.fp16) else width
    total, live = distinct * scale * tokens * channels * width, work.costs.tiles.sum() * scale * work.epochs
    after, limit = "after" if projected else "before", args.vision_feature_cache_gb * 1e9
    lines = [
        f"{size(total)} on disk: {distinct * scale:,.0f} distinct tiles of {tokens} x {channels} numbers, {after} the projector",
        f"the tower encodes {distinct * scale:,.0f} tiles, instead of {live:,.0f} in {work.epochs:.4g} epochs; in a later run none",
    ]
    if total > limit:
        lines.append(f"WARNING: trainer.vision_feature_cache_gb={limit / 1e9:g} holds {limit / total:.0%} of them")
    return {f"Vision features, {args.vision_features} (trainer.vision_features=cached keeps them on disk)": lines}


def length_lines(work: Workload) -> list[str]:
    """Show histograms of tokens and tiles per record, and the longest records."""
    costs, tokens = work.costs, work.costs.tokens()
    lines = histogram("tokens per record", tokens)
    if costs.tiles.any():
        lines += ["", *histogram("tiles per record", costs.tiles, bins=15)]
    rows = []
    for index in map(int, np.argsort(-tokens, kind="stable")[:LONGEST]):
        prompt, *rest = (f"{values[index]:,}" for values in (costs.prompt, costs.chosen, costs.rejected) if values.any())
        parts = (
            f"prompt {prompt}, {'completions' if len(rest) > 1 else 'the rest'} {' and '.join(rest)}, {costs.tiles[index]} tiles"
        )
        rows.append((name_of(work.records, index), f"{tokens[index]:,} tokens", parts))
    return [*lines, "", "longest records (without truncation)", *_columns(rows, indent=4)]


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
    counts = np.histogram(values, edges)[0].tolist()
    ranges = [f"{b:,}" if e - b == 1 else f"{b:,}-{e - 1:,}" for b, e in zip(edges[:-1], edges[1:], strict=True)]
    width, most = max(map(len, ranges)), len(f"{max(counts):,}")
    lines = [f"{title}: min {low:,}, median {int(np.median(values)):,}, max {high:,}"]
    for range_, count in zip(ranges, counts, strict=True):
        lines.append(f"    {range_:>{width}}  {count:>{most},} {'#' * -(-count * BAR // max(counts))}".rstrip())
    return lines


def _columns(rows: Sequence[tuple[str, str, str]], *, indent: int = 0) -> list[str]:
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(2)]
    return [f"{'':{indent}}{name:<{widths[0]}}  {value:>{widths[1]}}  {about}" for name, value, about in rows]


# The data


class Workload:
    """Plan a run over `pairs`, its pairs or conversations, from the `costs` without truncation of all or some `records` of them.

    ``tokens`` and ``tiles`` of each record are as it is trained, in rows of ``layout``, shape (N,), without padding;
    ``padded_because`` says why rows are padded, if they have to be. ``most_expensive`` are indices of the records of the
    micro-batch with the highest memory; ``packing`` is the report of the sampler that plans the batches, None without one.

    Raises ValueError for settings of rows that the trainer refuses for this model.
    """

    def __init__(self, pairs: Any, records: Any, costs: PairCosts, model: Any, processor: Any, args: Any, *, ranks: int) -> None:
        self.total, self.records, self.costs = len(pairs), records, costs
        self.layout, self.padded_because = choose_layout(args, model, router_loss=adds_router_loss(model.config, args))
        truncated = costs.truncate(args.max_length, skip=args.on_bad_record == "skip")
        paired = "sides" not in args.encoding_rules()
        twice = (1 + paired) * truncated.prompt + truncated.chosen + truncated.rejected
        self.tokens, self.tiles = truncated.tokens() if self.layout == "packed" else twice, truncated.tiles
        blank_image, context = ranks > 1 and hasattr(model.config, "vision_config"), fixed_context(model)
        self.collator = replace(collator_of(processor, args), layout=self.layout, context=context, blank_image=blank_image)
        size, sampler = args.per_device_train_batch_size, None
        if args.batching == "tokens" or args.group_same_prompt > 1:
            sampler = batch_sampler(truncated, args, pairs_per_batch=size, ranks=ranks)
            micro_batches = round(len(sampler) * self.total / len(costs))
        elif args.dataloader_drop_last:
            micro_batches = self.total // (size * ranks)
        else:
            micro_batches = -(-self.total // (size * ranks))
        per_epoch = max(-(-micro_batches // args.gradient_accumulation_steps), 1)
        self.steps: int = args.max_steps if args.max_steps > 0 else int(np.ceil(args.num_train_epochs * per_epoch))
        self.epochs, self.pairs_per_step = self.steps / per_epoch, self.total / per_epoch
        self.packing = None if sampler is None else sampler.report()
        self.most_expensive = _most_expensive(self.tokens, costs.tiles, sampler, model, args)

    def batch(self, indices: list[int]) -> Any:
        """Collate records as the trainer does."""
        return self.collator([self.records[index] for index in indices])


def _most_expensive(tokens: Any, tiles: Any, sampler: PairBatchSampler | None, model: Any, args: Any) -> list[int]:
    """Return the planned batch with the largest activations, about; without a plan, a batch of the most expensive pairs."""
    base = base_model(model)
    tower: Any = find_tower(base)
    each = tokens * _width(find_text_model(base))
    if tower is not None:
        size, patch = (np.ravel(getattr(tower.config, name, 0))[0] for name in ("image_size", "patch_size"))
        trained = any(parameter.requires_grad for parameter in tower.parameters())
        each = each + tiles * (3 * size**2 + (((size // max(patch, 1)) ** 2) * _width(tower) if trained else 0))
    if sampler is None:
        return np.argsort(-each, kind="stable")[: args.per_device_train_batch_size].tolist()
    batches = [[abs(index) - (index < 0) for index in batch] for batch in sampler]
    return max(batches, key=lambda batch: float(each[batch].sum()))


def _width(model: Any) -> int:
    """Numbers per token that go through the linear layers of a model: a measure of its activations."""
    modules = () if model is None else model.modules()
    return sum(module.in_features + module.out_features for module in modules if isinstance(module, nn.Linear))
