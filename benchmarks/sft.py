"""Compare packed conversations with TRL's SFTTrainer: counted FLOPs, packing against other procedures, and the speed of planning.

    python benchmarks/sft.py                                   # all of it, JSON into results/
    python benchmarks/sft.py --measure planning --records 1000000

Counted, by formulas: the FLOPs of forward and backward passes of an InternVL over conversations with InternVL 2.5's token shares
(arXiv 2412.05271), per token that is no padding. A multiplication and an addition are two FLOPs; attention has 2 matrix products
forward, 4 backward; a frozen tower has no backward pass. Of TRL, 8 conversations are padded to the longest of their batch; a
position goes through the LM head's matrix only if labelled, as with its fused head. Ours are packs, of which the last layer
computes labelled positions only, but for keys and values. Attention counts in full on both sides. Beside it is the ratio of what
kernels compute: a padded batch has a mask, with which PyTorch's compute whole rows (counted_step checks that TRL passes one); of
packs' causal segments, the half up to the diagonal (masks: CPU seconds of both).

Packing: packs per lower bound (the larger of tokens / 16,384 and tiles / 48), and the most expensive to the mean micro-batch of 64
ranks; against first fit over a buffer of 20 open packs, as the official procedure is described, and filling packs in random order.

Planning: records per CPU second in one process (text is counted by shapes and words, or each record one by one), and seconds of
planning all of them in as many processes as `measure` takes. The texts are made of docstrings, the tokenizer has 32,000 tokens, and
each record has a name of its own of one of 20,000 image files.

Timed: full steps on all batches of 64 conversations of a small model, in alternating passes, medians of CPU seconds; peak memory of
each side in its own process. TRL's LM head skips unlabelled positions, as on a GPU. Exact: loss and gradients of packs against one
conversation a row, and both against float64. Counted step: the formulas against torch's counter on the meta device, 1B shape.
"""

import argparse
import ast
import contextlib
import copy
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from datasets import Dataset, Features, Image, List, Value
from datasets.arrow_writer import ArrowWriter
from PIL import Image as PILImage
from step import PARTS, RESULTS, SHAPES, Call, Case, Shape, count_calls, head_as_on_gpus, judged, quiet, synchronised_seconds
from torch.nn.functional import scaled_dot_product_attention
from trl import SFTConfig, SFTTrainer

from mpo import PackedSFTConfig, PackedSFTTrainer
from mpo.batching.sampler import PairBatchSampler
from mpo.encoding.costs import PairCosts, RecordMeasure, measure
from mpo.encoding.turns import CONVERSATION
from mpo.models.small import small_processor

MAX_TOKENS, MAX_TILES, RANKS = 16_384, 48, 64
TEXT = {"image": (250, 0.8), "several": (350, 0.7), "video": (200, 0.7), "text": (700, 1.0)}
SHARES = {"image": 0.4592, "several": 0.0937, "video": 0.3979, "text": 0.0492}
FILES = 20_000
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
        for place in range(count):  # a name for each record; after so many, other names of the same files
            if place < FILES:
                PILImage.new("RGB", (rng.randrange(300, 1200), rng.randrange(300, 1200))).save(f"{folder}/{place}.jpg")
            else:
                os.link(f"{folder}/{place % FILES}.jpg", f"{folder}/{place}.jpg")
        for name, image in (("text", False), ("text and one image", True)):
            dataset, rates = written(folder, 8_000, image).with_format("arrow"), {}
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


# --- A small model on the CPU: speed, memory, exactness; and a counted step of a large one

SMALL = Shape((128, 512, 3, 4), (192, 768, 4, 6), 2, vocabulary=2_000, image_size=112, scale=16)
BATCH, OF_SMALL = 8, 64
SIDES = ("trl", "packed")


def small_set(shape: Shape, count: int, seed: int = 3) -> Dataset:
    """Conversations with the paper's shares; each tile is an image of its own, and tokens are divided by the shape's scale."""
    tokens, tiles = conversations(count, seed)
    rows = []
    for length, shown in zip(tokens, tiles, strict=True):
        said = max(int(length - 256 * shown) // shape.scale, 8)
        content = [*[{"type": "image", "text": None}] * int(shown), {"type": "text", "text": "0123456789" * (said // 30 + 1)}]
        answer = [{"type": "text", "text": ("1234567890" * said)[: 2 * said // 3]}]
        image = PILImage.effect_noise((shape.image_size, shape.image_size), 80).convert("RGB")
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages, "images": [image] * int(shown)})
    return Dataset.from_list(rows)


def sft_trainer(side: str, shape: Shape, dataset: Any, folder: str, device: str = "cpu", **more: Any) -> Any:
    """A trainer of a model of this shape, with random weights."""
    processor = small_processor(["0 1"], image_size=shape.image_size, patch_size=shape.patch_size, max_patches=1, vocab_size=300)
    torch.manual_seed(0)
    model = shape.build(processor.image_token_id, device)
    if "dtype" in more:  # the same weights in every dtype
        model = model.to(torch.bfloat16).to(more.pop("dtype"))
    settings = {
        "use_cpu": device == "cpu",
        "bf16": device != "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    settings |= {"gradient_checkpointing": False, "max_length": None, "per_device_train_batch_size": BATCH}
    own: dict[str, Any] = {"max_tokens_per_batch": MAX_TOKENS // shape.scale, "loss_average": "token", "oversized": "own_row"}
    kind, config = (SFTTrainer, SFTConfig) if side == "trl" else (PackedSFTTrainer, PackedSFTConfig)
    settings |= {} if side == "trl" else own
    return kind(model=model, args=config(folder, **{**settings, **more}), train_dataset=dataset, processing_class=processor)


def batches_of(trainer: Any) -> list[Any]:
    """The batches of an epoch on the device."""
    return [trainer._prepare_inputs(batch) for batch in trainer.get_train_dataloader()]


def epoch_of(trainer: Any, batches: list[Any]) -> Callable[[], None]:
    """A function that takes a full step on each batch."""
    optimizer = torch.optim.AdamW([p for p in trainer.model.parameters() if p.requires_grad], lr=1e-6, fused=True)
    trainer.model.train()

    def run() -> None:
        for batch in batches:
            with trainer.accelerator.autocast():
                loss = trainer.compute_loss(trainer.model, copy.copy(batch))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def sft_timed(rounds: int = 3) -> dict[str, Any]:
    """Conversations per CPU second of all batches of an epoch, a full step each, alternating; and peak memory by process."""
    dataset = small_set(SMALL, OF_SMALL)
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet())
        stack.enter_context(head_as_on_gpus())
        works, steps = {}, {}
        for side in SIDES:
            trainer = sft_trainer(side, SMALL, dataset, stack.enter_context(tempfile.TemporaryDirectory()))
            batches = batches_of(trainer)
            steps[side], works[side] = len(batches), epoch_of(trainer, batches)
        for round_ in range(rounds + 1):
            for side in SIDES if round_ % 2 else SIDES[::-1]:
                start = time.process_time()
                works[side]()
                seconds[side] += [time.process_time() - start] if round_ else []
            print(f"round {round_} of {rounds}", seconds, flush=True)
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    peaks = {}
    for side in SIDES:
        command = [sys.executable, __file__, "--memory-of", side]
        peaks[side] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    return {
        "conversations": OF_SMALL,
        "steps": steps,
        "CPU seconds of each round": seconds,
        "conversations per CPU second": {side: OF_SMALL / median for side, median in medians.items()},
        "speed over TRL's": judged(medians["trl"] / medians["packed"], 1.4),
        "peak memory, MB": peaks,
        "peak memory over TRL's": judged(peaks["packed"] / peaks["trl"], 0.7, at_most=True),
    }


def sft_memory(side: str) -> float:
    """Peak memory of this process over an epoch, in MB, less what it had before the model was built."""
    dataset = small_set(SMALL, OF_SMALL)

    def status(name: str) -> float:
        return next(int(line.split()[1]) / 1024 for line in Path("/proc/self/status").read_text().splitlines() if name in line)

    with tempfile.TemporaryDirectory() as folder, quiet(), head_as_on_gpus():
        libraries = status("VmRSS")
        trainer = sft_trainer(side, SMALL, dataset, folder)
        Path("/proc/self/clear_refs").write_text("5")
        epoch_of(trainer, batches_of(trainer))()
    return status("VmHWM") - libraries


def sft_exact() -> dict[str, Any]:
    """Loss and gradients of packs against one conversation a row: norms of differences over norms, by part of the model."""
    dataset = small_set(SMALL, 12)
    found: dict[str, Any] = {}
    gradients: dict[str, dict[str, Any]] = {}
    for dtype in ("float64", "float32", "bfloat16"):
        for name, more in (("packed", {}), ("alone", {"batching": "conversations", "per_device_train_batch_size": 1})):
            if (dtype, name) == ("float64", "packed"):
                continue
            with tempfile.TemporaryDirectory() as folder, quiet():
                more = {"max_tokens_per_batch": None, "oversized": "refuse", **more} if more else more
                trainer = sft_trainer("packed", SMALL, dataset, folder, dtype=getattr(torch, dtype), **more)
                trainer.model.train()
                total = 0.0
                for batch in batches_of(trainer):
                    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(1000.0))
                    loss.backward()
                    total += loss.item()
                parts: dict[str, list[Any]] = {part: [] for part in PARTS.values()}
                for weight, parameter in trainer.model.named_parameters():
                    part = next((label for key, label in PARTS.items() if key in weight), "text model")
                    parts[part] += [] if parameter.grad is None else [parameter.grad.double().flatten()]
                gradients[f"{dtype}, {name}"] = {"loss": total, **{part: torch.cat(all_) for part, all_ in parts.items()}}

    def difference(one: Any, other: Any) -> float:
        one, other = (torch.as_tensor(value, dtype=torch.float64) for value in (one, other))
        return float((one - other).norm() / other.norm())

    for dtype in ("float32", "bfloat16"):
        packed, alone, exact = (gradients[name] for name in (f"{dtype}, packed", f"{dtype}, alone", "float64, alone"))
        found[dtype] = {
            what: {
                "packed against alone": difference(packed[what], alone[what]),
                "packed against float64": difference(packed[what], exact[what]),
                "alone against float64": difference(alone[what], exact[what]),
            }
            for what in exact
        }
        print(dtype, found[dtype], flush=True)
    return found


def masks(tokens: int = 4096, device: str = "cpu") -> dict[str, Any]:
    """Seconds (of the CPU: of its time) of PyTorch's attention forward and backward: with a mask, as for padding, and causal."""
    how: dict[str, Any] = {"device": device, "dtype": torch.float32 if device == "cpu" else torch.bfloat16}
    query, key, value = (torch.randn(1, 14, tokens, 64, **how, requires_grad=True) for _ in range(3))
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()[None, None]
    seconds: dict[str, list[float]] = {"mask": [], "causal": []}

    def attend(**options: Any) -> None:
        scaled_dot_product_attention(query, key, value, **options).sum().backward()

    for round_ in range(4):
        for name, options in (("mask", {"attn_mask": mask}), ("causal", {"is_causal": True})):
            start = time.process_time()
            taken = synchronised_seconds(partial(attend, **options), device)
            seconds[name] += [time.process_time() - start if device == "cpu" else taken] if round_ else []
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"tokens": tokens, "seconds": medians, "causal over mask": medians["causal"] / medians["mask"]}


def sft_counted_step() -> dict[str, Any]:
    """FLOPs of a pack and of TRL's batch on the 1B shape, counted on the meta device, over those of the formulas."""
    shape, found = SHAPES["1B"], {}
    stand_in = replace(shape, vision=(32, 32, 1, 1), text=(32, 32, 2, 2), kv_heads=1, vocabulary=512)
    dataset = small_set(replace(shape, scale=1), BATCH)
    for side in SIDES:
        calls: list[Call] = []
        kinds: set[str] = set()

        def before(module: Any, args: Any, kwargs: dict[str, Any], calls: list[Call] = calls) -> None:
            calls.append(Call("policy", dict(kwargs), len(kwargs.get("pixel_values", ())), False))

        def attend(*args: Any, kinds: set[str] = kinds, **options: Any) -> Any:
            masked, causal = options.get("attn_mask") is not None, options.get("is_causal")
            kinds.add("with a mask" if masked else "causal" if causal else "in full (tower)")
            return scaled_dot_product_attention(*args, **options)

        with tempfile.TemporaryDirectory() as folder, quiet(), head_as_on_gpus():
            trainer = sft_trainer(side, stand_in, dataset, folder)
            trainer.model.register_forward_pre_hook(before, with_kwargs=True)
            batch = batches_of(trainer)[0]
            image_token = trainer.processing_class.image_token_id
            with (
                mock.patch("torch.nn.functional.scaled_dot_product_attention", attend),
                mock.patch("mpo.batching.attention.scaled_dot_product_attention", attend),
            ):
                trainer.compute_loss(trainer.model, copy.copy(batch))
        inputs = calls[0].inputs
        ids, segments = inputs["input_ids"], inputs.get("segments")
        starts = np.flatnonzero(inputs["position_ids"][0] == 0) if segments is not None else []
        lengths = [ids.shape[1]] * len(ids) if segments is None else np.diff([*starts, ids.numel()])
        labelled = int((inputs["labels"] != -100).sum()) if side == "trl" else int(batch.lengths.sum())
        total = sum(count_calls(calls[:1], Case("1B", tower="trained"), shape, image_token)["policy"].values())
        last = None if side == "trl" else batch.lengths[0]
        formula = flops(shape, "trained", ids.numel(), lengths, calls[0].tiles, labelled, last=last)
        found[side] = {"positions": ids.numel(), "tiles": calls[0].tiles, "attention": sorted(kinds), "counted": total}
        found[side]["counted over formula, with attention in full"] = total / formula
        print(side, found[side], flush=True)
    return found


def main() -> None:
    """Measure and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measures: dict[str, Callable[[int], Any]] = {
        "counted": lambda _: counted(),
        "packing": lambda _: packing(100_000),
        "planning": planning,
        "exact": lambda _: sft_exact(),
        "masks": lambda _: masks(),
        "counted_step": lambda _: sft_counted_step(),
        "timed": lambda _: sft_timed(),
    }
    parser.add_argument("--measure", nargs="+", default=list(measures), choices=list(measures))
    parser.add_argument("--records", type=int, default=20_000, help="records for planning (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file to write (default: results/sft_cpu_DATE.json here)")
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(sft_memory(options.memory_of))
        return
    result: dict[str, Any] = {
        "command": " ".join(["python benchmarks/sft.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "device": f"{platform.machine()} CPU",
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "tokenizers", "mpo-trainer")},
        "how": __doc__,
    }
    path = options.output or RESULTS / f"sft_cpu_{result['date']}.json"
    for name in options.measure:
        result[name] = measures[name](options.records)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
