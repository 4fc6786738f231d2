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
import contextlib
import copy
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from datasets import Dataset
from flops import PARTS, Call, count_calls
from PIL import Image as PILImage
from sft_planning import MAX_TOKENS, conversations, counted, flops, packing, planning
from step import RESULTS, judged, synchronised_seconds
from step_cases import SHAPES, Case, Shape, head_as_on_gpus, quiet
from torch.nn.functional import scaled_dot_product_attention
from trl import SFTConfig, SFTTrainer

from mpo import PackedSFTConfig, PackedSFTTrainer
from mpo.models.small import small_processor

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
        "packing": lambda _: packing(1_000_000),
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
