"""What benchmarks/sft.py counts and plans of conversations without a model: FLOPs by formulas, packing, and the speed of planning.

How: the top of benchmarks/sft.py.
"""

import ast
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, List, Value
from datasets.arrow_writer import ArrowWriter
from PIL import Image as PILImage
from step import judged
from step_cases import SHAPES, Shape

from mpo.batching.sampler import PairBatchSampler
from mpo.encoding.costs import PairCosts, RecordMeasure, measure
from mpo.encoding.turns import CONVERSATION
from mpo.models.small import small_processor

MAX_TOKENS, MAX_TILES, RANKS = 16_384, 48, 64
TEXT = {"image": (250, 0.8), "several": (350, 0.7), "video": (200, 0.7), "text": (700, 1.0)}
SHARES = {"image": 0.4592, "several": 0.0937, "video": 0.3979, "text": 0.0492}
FILES = 20_000
RATED = 8_000
"""Records whose rate is measured."""
TARGETS = {("1B", "trained"): 1.5, ("1B", "frozen"): 2.0, ("8B", "trained"): 2.1}


def conversations(count: int, seed: int = 0) -> tuple[Any, Any]:
    """Tokens and tiles of conversations with the paper's token shares; a tile has 256 tokens."""
    rng, drawn = np.random.default_rng(seed), 20_000
    tiles = {
        "image": rng.choice([1, 3, 5, 7, 9, 10, 13], drawn, p=[0.1, 0.12, 0.15, 0.28, 0.15, 0.1, 0.1]),
        "several": rng.integers(2, 7, drawn) * rng.integers(1, 5, drawn),
        "video": rng.integers(8, 33, drawn),
        "text": np.zeros(drawn, dtype=np.int64),
    }
    tokens = {k: 256 * tiles[k] + rng.lognormal(np.log(mean), sigma, drawn).astype(int) + 16 for k, (mean, sigma) in TEXT.items()}
    rates = np.array([share / tokens[kind].mean() for kind, share in SHARES.items()])
    kinds, places = rng.choice(4, count, p=rates / rates.sum()), rng.integers(0, drawn, count)
    table = np.array([[np.minimum(tokens[kind], MAX_TOKENS), tiles[kind]] for kind in SHARES])
    return table[kinds, 0, places], table[kinds, 1, places]


# --- Counted


def flops(
    shape: Shape,
    tower: str,
    tokens: Any,
    lengths: Any,
    tiles: Any,
    labelled: Any,
    causal: bool = False,
    last: Any = None,
) -> float:
    """FLOPs of a pass forward and backward.

    Args:
        shape: sizes of the model.
        tower: trained, frozen, or cached: frozen, and the cache of vision features has all images.
        tokens: positions that are computed.
        lengths: of the sequences that attend to themselves.
        tiles: image tiles.
        labelled: positions through the LM head.
        causal: whether the language model's attention kernel skips what lies above the diagonal.
        last: positions at the end of each sequence that are labelled, if the last layer computes only these (but for keys and
            values); None: it computes all.
    """
    width, mlp, layers, heads = shape.text
    narrow = width // heads * shape.kv_heads
    language = layers * (2 * width * width + 2 * width * narrow + 3 * width * mlp)
    total = 6.0 * language * tokens + 6.0 * width * shape.vocabulary * labelled
    keys = np.asarray(lengths, dtype=np.float64)
    whole = np.square(keys) / 2 if causal else np.square(keys)  # pairs of a query and a key
    total += 12.0 * layers * width * whole.sum()
    if last is not None:
        queries = np.asarray(last, dtype=np.float64)
        needed = queries * keys - (np.square(queries) / 2 if causal else 0)
        total -= 6.0 * (2 * width * width + 3 * width * mlp) * (tokens - labelled) + 12.0 * width * (whole - needed).sum()
    wide, deep, depth, _ = shape.vision
    patches = (shape.image_size // shape.patch_size) ** 2 + 1
    of_tile = (
        depth * (patches * (4 * wide * wide + 2 * wide * deep) + 2 * wide * patches**2) + patches * 3 * shape.patch_size**2 * wide
    )
    projector = patches // 4 * (4 * wide * width + width * width)
    return float(total + tiles * ({"trained": 6.0, "frozen": 2.0, "cached": 0.0}[tower] * of_tile + 6.0 * projector))


def counted(count: int = 16_000, batch: int = 8) -> list[dict[str, Any]]:
    """FLOPs per useful token of TRL, in random order and grouped by length, over those of packs."""
    tokens, tiles = conversations(count)
    answers = np.minimum(np.maximum(tokens - 256 * tiles - 16, 1), 400) * 2 // 3
    rng = np.random.default_rng(1)
    mixed = rng.permutation(count)
    mega = mixed.reshape(-1, 50 * batch)  # groups of 50 batches, sorted by length, as transformers' LengthGroupedSampler
    grouped = np.take_along_axis(mega, np.argsort(-tokens[mega], axis=1, kind="stable"), axis=1).ravel()
    found = []
    for name in ("1B", "2B", "8B"):
        for tower in ("trained", "frozen", "cached"):
            own, in_full = (
                flops(SHAPES[name], tower, tokens.sum(), tokens, tiles.sum(), answers.sum(), causal, answers)
                for causal in (True, False)
            )
            full, causal = {}, {}
            for label, order in (("random", mixed), ("grouped by length", grouped)):
                longest = tokens[order].reshape(-1, batch).max(axis=1)
                rows = np.repeat(longest, batch)
                trl = flops(SHAPES[name], tower.replace("cached", "frozen"), rows.sum(), rows, tiles.sum(), answers.sum())
                full[label], causal[label] = trl / in_full, trl / own
            goal = TARGETS.get((name, tower))
            found.append({"shape": name, "tower": tower, "TRL's FLOPs per useful token over ours, attention in full": full})
            found[-1]["with our attention up to the diagonal, as kernels compute it"] = causal
            if goal:
                found[-1] |= {"target": judged(causal["random"], goal), "target, attention in full": judged(full["random"], goal)}
            print(name, tower, full, causal, goal, flush=True)
    useful = tokens.sum() / (np.repeat(tokens[mixed].reshape(-1, batch).max(axis=1), batch)).sum()
    return [{"useful fraction of padded positions in random order": float(useful)}, *found]


# --- Packing


def official(tokens: Any, tiles: Any, order: Any, buffer: int = 20) -> Any:
    """The pack of each conversation: first fit over a list of open packs, those of many tiles first.

    A pack is finished when it reaches a budget, and the one of most tokens when there are more than `buffer`.
    """
    packs, opened, made = np.zeros(len(tokens), dtype=np.int64), [], 0  # opened: [tiles, tokens, number]
    for record in order:
        fit = (p for p in opened if p[1] + tokens[record] <= MAX_TOKENS and p[0] + tiles[record] <= MAX_TILES)
        chosen = next(fit, None)
        if chosen is None:
            chosen = [0, 0, made]
            made += 1
            opened.append(chosen)
        chosen[0] += int(tiles[record])
        chosen[1] += int(tokens[record])
        packs[record] = chosen[2]
        if chosen[1] >= MAX_TOKENS or chosen[0] >= MAX_TILES:
            opened.remove(chosen)
        elif len(opened) > buffer:
            opened.remove(max(opened, key=lambda one: one[1]))
        opened.sort(key=lambda one: -one[0])
    return packs


def random_order(tokens: Any, tiles: Any, order: Any) -> Any:
    """The pack of each conversation: a new one where the next does not fit."""
    packs, number, used, shown = np.zeros(len(tokens), dtype=np.int64), 0, 0, 0
    for record in order:
        if used + tokens[record] > MAX_TOKENS or shown + tiles[record] > MAX_TILES:
            number, used, shown = number + 1, 0, 0
        used, shown = used + int(tokens[record]), shown + int(tiles[record])
        packs[record] = number
    return packs


def packing(count: int, attention_cost: float = 5e-5, tile_cost: float = 100.0) -> dict[str, Any]:
    """Packs over the lower bound and imbalance, of planned packs and of other procedures."""
    tokens, tiles = conversations(count)
    bound = max(tokens.sum() / MAX_TOKENS, tiles.sum() / MAX_TILES)
    order = np.random.default_rng(2).permutation(count)
    found: dict[str, Any] = {"conversations": count}
    for name, procedure in (("official", official), ("random order", random_order)):
        start = time.process_time()
        packs = procedure(tokens, tiles, order)
        cost = np.bincount(packs, tokens + attention_cost * tokens.astype(float) ** 2 / 2 + tile_cost * tiles)
        each = cost[: len(cost) // RANKS * RANKS].reshape(-1, RANKS)
        imbalance = float((each.max(axis=1) / each.mean(axis=1)).mean() - 1)
        seconds = time.process_time() - start
        found[name] = {"over lower bound": float((packs.max() + 1) / bound), "imbalance": imbalance, "seconds": seconds}
    ten, none = np.full(count, 10, np.int32), np.zeros(count, np.int32)
    costs = PairCosts((tokens - 10).astype(np.int32), ten, none, tiles.astype(np.int32), np.arange(count))
    for accumulated in (1, 2, 4, 8):
        start = time.process_time()
        settings: dict[str, Any] = {"max_tokens": MAX_TOKENS, "max_tiles": MAX_TILES, "world_size": RANKS, "balance_slots": 1}
        sampler = PairBatchSampler(costs, batching="tokens", micro_batches_per_step=accumulated, **settings)
        report = sampler.report()
        found[f"planned, {accumulated} micro-batches a step"] = {
            "over lower bound": report.batches / bound,
            "imbalance": report.imbalance - 1,
            "seconds": time.process_time() - start,
        }
    found["why fewer micro-batches are less even"] = (
        "A micro-step of one is 64 packs drawn uniformly, and its most expensive pack is the largest of 64 draws, however they are "
        "ordered. Only packs of like cost can make it smaller, that is, packs chosen by cost, which is no uniform draw."
    )
    return found


# --- Planning


def texts_of(minimum: int = 80) -> list[str]:
    """Words of docstrings of installed packages."""
    import scipy
    import transformers

    files = sorted(file for package in (scipy, transformers) for file in Path(package.__file__).parent.rglob("*.py"))
    random.Random(0).shuffle(files)
    found = []
    for file in files[:400]:
        for node in ast.walk(ast.parse(file.read_text(errors="ignore"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and len(text := ast.get_docstring(node) or "") > minimum:
                found.append(text)
    return found


def planning(count: int) -> dict[str, Any]:
    """CPU seconds of measuring records in one process, by way; then `count` conversations with an image planned for real."""
    rng, texts = random.Random(0), texts_of()
    processor = small_processor(texts, vocab_size=32_000, image_size=448, patch_size=14)
    words = [word for text in texts for word in text.split() if word[0].isalpha() and not set(word) & set("<>[]")]

    def said(length: int) -> list[dict[str, Any]]:
        start = rng.randrange(len(words) - length)
        return [{"type": "text", "text": " ".join(words[start : start + length])}]

    def messages(image: bool) -> Iterator[dict[str, Any]]:
        for turn in range(rng.choice((1, 1, 1, 2, 3))):
            shown = [{"type": "image", "text": None}] if image and not turn else []
            yield {"role": "user", "content": [*shown, *said(rng.choice((8, 15, 30)))]}
            yield {"role": "assistant", "content": said(rng.choice((2, 10, 40, 80)))}

    def written(folder: str, number: int, image: bool) -> Dataset:
        row = {"messages": [{"role": Value("string"), "content": [{"type": Value("string"), "text": Value("string")}]}]}
        features = Features({**row, "images": List(Image(decode=False))})
        with ArrowWriter(path=f"{folder}/{number}-{image}.arrow", features=features) as writer:
            for place in range(number):
                shown = [{"bytes": None, "path": f"{folder}/{place}.jpg"}] if image else []
                writer.write({"messages": list(messages(image)), "images": shown})
            writer.finalize()
        return Dataset.from_file(f"{folder}/{number}-{image}.arrow")

    found: dict[str, Any] = {"records": count}
    with tempfile.TemporaryDirectory() as folder:
        for place in range(max(count, RATED)):  # a name for each record; after so many, other names of the same files
            if place < FILES:
                PILImage.new("RGB", (rng.randrange(300, 1200), rng.randrange(300, 1200))).save(f"{folder}/{place}.jpg")
            else:
                os.link(f"{folder}/{place % FILES}.jpg", f"{folder}/{place}.jpg")
        for name, image in (("text", False), ("text and one image", True)):
            dataset, rates = written(folder, RATED, image).with_format("arrow"), {}
            for side, sampled, measured in (("by shapes and words", 1000, len(dataset)), ("one by one", 0, 1000)):
                one = RecordMeasure(processor, "end_of_turn", "prompt", "raise", CONVERSATION, sampled=sampled)
                one.batch(dataset[:200])  # the shapes are rendered once, whatever the number of records
                start = time.process_time()
                for at in range(0, measured, 1000):
                    one.batch(dataset[at : at + 1000])
                rates[side] = measured / (time.process_time() - start)
            found[name] = {"records per CPU second": rates}
            print(name, found[name], flush=True)
        conversations_of_files = written(folder, count, True)
        start, used = time.perf_counter(), sum(os.times()[:4])
        costs = measure(conversations_of_files, processor, sides=CONVERSATION)
        measured_in = time.perf_counter() - start
        sampler = PairBatchSampler(costs, batching="tokens", max_tokens=MAX_TOKENS, max_tiles=MAX_TILES, balance_slots=1)
        wall, used = time.perf_counter() - start, sum(os.times()[:4]) - used
    found["planned"] = {"packs": len(sampler), "seconds measuring": measured_in, "seconds": wall, "CPU seconds": used}
    if count == 1_000_000:
        found["planned"]["target"] = judged(wall, 60, at_most=True)
    return found
