"""Find records that do not fit the settings before training starts."""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset

from mpo.data.encoded import with_encoded_images
from mpo.encoding.costs import READ_COLUMNS, PairCosts, measure
from mpo.encoding.turns import SIDES, encoded_images, render
from mpo.models.parts import learns_from_images_alone
from mpo.schema import IMAGE_COLUMNS

SLACK = 64
"""Tokens for what a tokenizer or processor adds around a text or an image."""
MOST = 20_000
"""Maximum number of records to look at without token budgets."""


def check_records(records: Any, costs: PairCosts, processor: Any, config: Any, args: Any, *, looked_at: int | None = None) -> None:
    """Refuse records longer than the model's context or ``max_length``, and token budgets smaller than the longest record.

    With ``on_bad_record="skip"``, training skips and counts records whose prompt fills ``max_length``, or that exceed a batch.

    Args:
        costs: costs of the records without truncation (`mpo.encoding.costs.measure`).
        looked_at: number of records of which `records` are the ones that may be too long. Default: all of them.

    Raises:
        ValueError: names the record, its length, and a setting that makes it fit.
    """
    context = _context(config)
    skip = args.on_bad_record == "skip"
    rest = {"processor": processor, "args": args, "of": looked_at or len(records)}
    if args.max_length is not None and not skip:
        _refuse(records, costs, costs.prompt + 1, args.max_length, f"trainer.max_length={args.max_length}", prompt=True, **rest)
    truncated = costs.truncate(args.max_length, skip=skip)
    if context is not None:
        lengths = truncated.prompt + np.maximum(truncated.chosen, truncated.rejected)
        _refuse(records, costs, lengths, context, f"the model's context of {context:,}", prompt=False, **rest)
    if args.max_tokens_per_batch is not None and args.oversized != "own_row" and not skip:
        _check_budget(records, truncated, args)


def check_before_training(pairs: Any, processor: Any, config: Any, args: Any) -> None:
    """Run `check_records` at the start of a run.

    With token budgets all records are measured, because the sampler needs their costs, once for the same records and processor;
    later runs and other ranks read them from datasets' cache. Otherwise at most `MOST` records are looked at, evenly spaced, and
    only those are rendered and measured that may be too long by the length of their text (`may_exceed`).

    Raises:
        ValueError: as `check_records`.
    """
    if not hasattr(processor, "_get_num_multimodal_tokens") and hasattr(processor, "image_processor"):
        return  # the number of image tokens is unknown until an image is encoded
    if not hasattr(pairs, "__len__"):
        return  # a stream has no length
    records = sample(pairs, None if args.batching == "tokens" else MOST)
    looked_at = len(records)
    if args.batching != "tokens":
        limits = [limit for limit in (_context(config), args.max_length) if limit is not None]
        records = records.select(may_exceed(records, processor, min(limits)) if limits else [])
    if not len(records):
        return
    with args.main_process_first(desc="measuring records"):
        costs = measure_records(records, processor, args)
    check_records(records, costs, processor, config, args, looked_at=looked_at)


def check_images(dataset: Any, model: Any, rates: Mapping[str, float]) -> None:
    """Refuse a data set without an image or video if only parts of the model are trained that learn from images alone."""
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom" or not learns_from_images_alone(model, rates):
        return
    shown = [name for name in (*IMAGE_COLUMNS, "videos") if name in dataset.column_names]
    bare = with_encoded_images(dataset.with_format(None).select_columns(shown)) if shown else ()
    if not any(record[name] for record in bare for name in shown):
        raise ValueError(
            "No record has an image or a video, and the parts that are trained, vision tower and projector, learn from nothing "
            "else. Give records with images, or train the language model too (train_parts.language)."
        )


def may_exceed(records: Any, processor: Any, limit: int) -> list[int]:
    """Find the indices of records that may have more than `limit` tokens, by a bound that neither renders them nor reads images.

    A token stands for at least one byte of the normalized text; the chat template adds what it adds to short texts in the same
    roles, and an image its largest number of tiles. Records without such a bound (tools, videos, tile limits of their own, a
    processor without tiles) count as too long.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return list(range(len(records)))
    tiles = getattr(getattr(processor, "image_processor", None), "max_patches", None)
    of_image = None if tiles is None else (tiles + 1) * processor.image_seq_length + SLACK
    simple = {"prompt", *SIDES, *IMAGE_COLUMNS}
    read = records.with_format(None)
    read = with_encoded_images(read.select_columns([name for name in read.column_names if name in READ_COLUMNS]))
    added: dict[Any, int] = {}

    def bound(record: dict[str, Any]) -> float:
        if any(record[name] is not None for name in record.keys() - simple - {"id", "augment"}):
            return float("inf")
        images = len(encoded_images(record))
        if images and of_image is None:
            return float("inf")
        found = {name: _outline(record[name]) for name in ("prompt", *SIDES) if record.get(name) is not None}
        outline = {name: one for name, one in found.items() if one is not None}
        if len(outline) < len(found):
            return float("inf")
        roles = tuple((name, own) for name, (own, _) in outline.items())
        if roles not in added:
            added[roles] = _of_template(dict(roles), processor)
        normalizer = backend.normalizer
        texts = [text for _, own in outline.values() for text in own]
        size = sum(len((normalizer.normalize_str(text) if normalizer else text).encode("utf-8", "replace")) for text in texts)
        return size + added[roles] + SLACK + images * (of_image or 0)

    return [place for place, record in enumerate(read) if bound(record) > limit]


def _context(config: Any) -> int | None:
    found: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found


def _outline(value: Any) -> tuple[tuple[str, ...], list[str]] | None:
    """The roles of messages, none for plain text, and the texts. None: messages with more than texts and images."""
    if isinstance(value, str):
        return (), [value]
    texts = []
    for message in value:
        if any(part is not None for name, part in message.items() if name not in ("role", "content")):
            return None
        content = message["content"] or ""
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if any(part.get("type") not in ("text", "image") for part in parts):
            return None
        texts += [part["text"] for part in parts if part.get("text")]
    return tuple(message["role"] for message in value), texts


def _of_template(roles: dict[str, tuple[str, ...]], processor: Any) -> int:
    """The bytes that the chat template adds to both conversations, measured on texts of one letter."""
    letters = {"prompt": "a", "chosen": "b", "rejected": "c"}
    record: dict[str, Any] = {
        name: [{"role": role, "content": letters[name]} for role in own] if own else letters[name] for name, own in roles.items()
    }
    try:
        rendered = render(record, processor)
    except ValueError:
        return 1 << 60  # the record's own measurement says what is wrong
    return sum(len(text.encode()) for text in (rendered.prompt, *(p.text for c in rendered.completions for p in c)))


def sample(pairs: Any, limit: int | None) -> Any:
    """Select `limit` evenly spaced records; None: all."""
    if limit is None or limit >= len(pairs):
        return pairs
    return pairs.select(np.linspace(0, len(pairs) - 1, limit).round().astype(int))


def measure_records(records: Any, processor: Any, args: Any) -> PairCosts:
    """Measure the costs of records without truncation, encoded as in the run; several processes measure a large data set."""
    many = args.dataloader_num_workers if len(records) > 20_000 and args.dataloader_num_workers > 1 else None
    rules = {"tile_budget": args.tile_budget, "on_bad_record": args.on_bad_record, **args.encoding_rules()}
    return measure(records, processor, **rules, num_proc=many)


def name_of(records: Any, index: int) -> str:
    """Name a record by its id, or by its index if it has none."""
    if "id" in records.column_names:
        found = records.select_columns(["id"])[index]["id"]
        if found is not None:
            return f"record {found!r}"
    return f"record {index}"


def fitting_tiles(records: Any, over: Any, limit: int, processor: Any, args: Any) -> int | None:
    """Find the largest max_tiles that makes the records in `over` fit; None if they do not fit with one tile per image."""
    image_processor: Any = getattr(processor, "image_processor", None)
    if not hasattr(image_processor, "max_patches"):
        return None
    some = records.select(over[:200])
    for tiles in range(image_processor.max_patches - 1, 0, -1):
        fewer = copy.copy(processor)
        fewer.image_processor = copy.deepcopy(image_processor)
        fewer.image_processor.max_patches = tiles
        fewer.image_processor.min_patches = min(tiles, image_processor.min_patches)
        costs = measure(some, fewer, tile_budget=args.tile_budget, **args.encoding_rules())
        completions = np.maximum(costs.chosen, costs.rejected)
        if args.max_length is not None and limit == args.max_length:
            completions = np.minimum(completions, 1)
        if int((costs.prompt + completions).max()) <= limit:
            return tiles
    return None


def _refuse(
    records: Any, costs: PairCosts, lengths: Any, limit: int, what: str, *, prompt: bool, processor: Any, args: Any, of: int
) -> None:
    over = np.flatnonzero(lengths > limit)
    if not len(over):
        return
    over = over[np.argsort(-lengths[over], kind="stable")]
    worst = over[0]
    tiles = int(costs.tiles[worst])
    image_tokens = tiles * int(getattr(processor, "image_seq_length", 0) or 0)
    of_images = f", of which {image_tokens:,} are image tokens ({tiles} tiles)" if image_tokens else ""
    longest = "its prompt and its longer completion have" if costs.rejected.any() else "it has"
    needs = "its prompt and one token of a completion have" if prompt else longest
    message = (
        f"{len(over):,} of {of:,} records do not fit into {what} tokens. The longest is {name_of(records, int(worst))}: "
        f"{needs} {int(lengths[worst]):,} tokens{of_images}. "
    )
    fits = fitting_tiles(records, over, limit, processor, args) if image_tokens else None
    if fits is not None:
        raise ValueError(message + f"Set model.max_tiles={fits} to make them fit, or remove these records.")
    if image_tokens:
        message += "They do not fit with one tile per image either. "
    longer = f"Set trainer.max_length={int(lengths[worst])}" if prompt else "Shorten the completions"
    raise ValueError(message + f"{longer}, or remove these records.")


def _check_budget(records: Any, costs: PairCosts, args: Any) -> None:
    tokens, tiles = costs.tokens(), costs.tiles
    longest, widest = int(np.argmax(tokens)), int(np.argmax(tiles))
    too_long = int((tokens > args.max_tokens_per_batch).sum())
    paired = "sides" not in args.encoding_rules()
    shorten = "truncate completions (trainer.max_length)" if paired else "set trainer.oversized=own_row or fewer_frames"
    if too_long:
        parts = f"prompt {costs.prompt[longest]:,}, completions {costs.chosen[longest]:,} and {costs.rejected[longest]:,}"
        raise ValueError(
            f"trainer.max_tokens_per_batch={args.max_tokens_per_batch} is too small for {too_long:,} of {len(tokens):,} records. "
            f"The longest is {name_of(records, longest)} with {tokens[longest]:,} tokens{f' ({parts})' * paired}. Set it to at "
            f"least {tokens[longest]}, use fewer tiles (model.max_tiles), {shorten}, or remove these records."
        )
    if args.max_tiles_per_batch is not None and tiles[widest] > args.max_tiles_per_batch:
        raise ValueError(
            f"trainer.max_tiles_per_batch={args.max_tiles_per_batch} is too small for {name_of(records, widest)}, which has "
            f"{tiles[widest]} tiles. Set it to at least {tiles[widest]}{'' if paired else ', ' + shorten}, or use fewer tiles "
            "per image (model.max_tiles)."
        )
