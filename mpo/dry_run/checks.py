"""Records that cannot be trained on with these settings, found before training."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from mpo.dry_run.workload import measure_records, sample
from mpo.packing.costs import PairCosts, measure


def check_records(records: Any, costs: PairCosts, processor: Any, config: Any, args: Any) -> None:
    """Refuse records beyond the model's context or ``max_length``, and a token budget that does not hold the longest record.

    With ``on_bad_record="skip"`` a prompt that ``max_length`` leaves no answer is left out of training, counted, and not refused.

    Args:
        records: a `datasets.Dataset`.
        costs: of its records, uncut (`mpo.packing.costs.measure`).
        processor: of the run.
        config: the model's.
        args: the run's `MPOConfig`.

    Raises:
        ValueError: naming the record, what it takes, and the setting that fits.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    skip = args.on_bad_record == "skip"
    if args.max_length is not None and not skip:
        _refuse(records, costs, costs.prompt + 1, args.max_length, processor, args, f"trainer.max_length={args.max_length}", True)
    cut = costs.cut(args.max_length, skip=skip)
    if context is not None:
        lengths = cut.prompt + np.maximum(cut.chosen, cut.rejected)
        _refuse(records, costs, lengths, context, processor, args, f"the model's context of {context:,}", False)
    if args.max_tokens_per_batch is not None:
        _check_budget(records, cut, args)


def check_before_training(pairs: Any, processor: Any, config: Any, args: Any, *, most: int = 20_000) -> None:
    """`check_records` for a run that is about to start.

    Measured once for the same records and processor, and found in datasets' cache from then on, by the other ranks too. With
    token budgets the plan of the batches measures all records anyway; otherwise only so many are, taken evenly.

    Args:
        pairs: a `datasets.Dataset` of records.
        processor: of the run.
        config: the model's.
        args: the run's `MPOConfig`.
        most: measure at most so many records when batches are not planned by tokens.

    Raises:
        ValueError: as of `check_records`.
    """
    if not hasattr(processor, "_get_num_multimodal_tokens") and hasattr(processor, "image_processor"):
        return  # nobody can say what an image takes without encoding it
    if not hasattr(pairs, "__len__"):
        return  # nor what a stream has in store
    records = sample(pairs, None if args.batching == "tokens" else most)
    with args.main_process_first(desc="measuring records"):
        costs = measure_records(records, processor, args)
    check_records(records, costs, processor, config, args)


def name_of(records: Any, index: int) -> str:
    """How a record is called: by its id, if it has one, else by its place from 0."""
    if "id" in records.column_names:
        found = records.select_columns(["id"])[index]["id"]
        if found is not None:
            return f"record {found!r}"
    return f"record {index}"


def fitting_tiles(records: Any, over: Any, limit: int, processor: Any, args: Any) -> int | None:
    """The most tiles an image at which all of some records fit; None if not even one tile does."""
    image_processor = getattr(processor, "image_processor", None)
    if not hasattr(image_processor, "max_patches"):
        return None
    some = records.select(over[:200])
    for tiles in range(image_processor.max_patches - 1, 0, -1):
        fewer = copy.copy(processor)
        fewer.image_processor = copy.deepcopy(image_processor)
        fewer.image_processor.max_patches = tiles
        fewer.image_processor.min_patches = min(tiles, image_processor.min_patches)
        costs = measure(some, fewer, completion_end=args.completion_end, tile_budget=args.tile_budget)
        answers = np.maximum(costs.chosen, costs.rejected)
        if args.max_length is not None and limit == args.max_length:
            answers = np.minimum(answers, 1)
        if int((costs.prompt + answers).max()) <= limit:
            return tiles
    return None


def _refuse(records: Any, costs: PairCosts, lengths: Any, limit: int, processor: Any, args: Any, what: str, prompt: bool) -> None:
    over = np.flatnonzero(lengths > limit)
    if not len(over):
        return
    over = over[np.argsort(-lengths[over], kind="stable")]
    worst = over[0]
    tiles = int(costs.tiles[worst])
    imaged = tiles * int(getattr(processor, "image_seq_length", 0) or 0)
    of_images = f", {imaged:,} of them of its {tiles} image tiles" if imaged else ""
    needs = "prompt and one token of an answer" if prompt else "prompt and longer answer"
    message = (
        f"{len(over):,} of {len(records):,} records do not fit into {what} tokens. The longest is {name_of(records, int(worst))}: "
        f"{needs} take {int(lengths[worst]):,} tokens{of_images}. "
    )
    fits = fitting_tiles(records, over, limit, processor, args) if imaged else None
    if fits is not None:
        raise ValueError(message + f"model.max_tiles={fits} makes them fit; or leave these records out.")
    if imaged:
        message += "Not even one tile an image makes them fit. "
    longer = f"Raise trainer.max_length to {int(lengths[worst]):,}, or leave" if prompt else "Shorten answers, or leave"
    raise ValueError(message + f"{longer} these records out.")


def _check_budget(records: Any, costs: PairCosts, args: Any) -> None:
    tokens, tiles = costs.tokens(), costs.tiles
    longest, widest = int(np.argmax(tokens)), int(np.argmax(tiles))
    too_long = int((tokens > args.max_tokens_per_batch).sum())
    if too_long:
        raise ValueError(
            f"trainer.max_tokens_per_batch={args.max_tokens_per_batch} is less than {name_of(records, longest)} takes alone: "
            f"{tokens[longest]:,} tokens (prompt {costs.prompt[longest]:,}, answers {costs.chosen[longest]:,} and "
            f"{costs.rejected[longest]:,}). {too_long:,} of {len(tokens):,} records are too long. Set it to at least "
            f"{tokens[longest]:,}, use fewer tiles (model.max_tiles), cut answers (trainer.max_length), or leave them out."
        )
    if args.max_tiles_per_batch is not None and tiles[widest] > args.max_tiles_per_batch:
        raise ValueError(
            f"trainer.max_tiles_per_batch={args.max_tiles_per_batch} is less than the {tiles[widest]} tiles of "
            f"{name_of(records, widest)} alone. Set it to at least {tiles[widest]}, or use fewer tiles (model.max_tiles)."
        )
