"""One training step, ours against TRL's DPOTrainer: FLOPs, pictures, tokens, time and memory.

    python benchmarks/step.py count     # FLOPs per pair of the InternVL3 shapes, from the operators both run, without their memory
    python benchmarks/step.py time      # pairs per second and peak memory of a scaled-down shape on this machine, alternating

Both write JSON into benchmarks/results/. FLOPs are those of torch's FlopCounterMode: a multiplication and an addition are two,
causal attention counts as full attention on both sides, gradient checkpointing is off on both.
"""

import argparse
import copy
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config
from trl import DPOConfig, DPOTrainer
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import add_fused_lm_head

from mpo import MPOConfig, MPOTrainer
from mpo.models.tower import SharedTower, find_tower
from mpo.packing.attention import use_packed_attention
from mpo.packing.layout import concatenate, lay_out
from mpo.packing.picked import Picked, add_picking
from mpo.packing.turns import Answer

RESULTS = Path(__file__).parent / "results"
TEXT_TOKENS = 60  # of the question and the chat template around it
LORA = LoraConfig(r=16, target_modules=r".*language_model.*(q|k|v|o|gate|up|down)_proj", task_type="CAUSAL_LM")


@dataclass(frozen=True)
class Shape:
    """Sizes of an InternVL: vision tower and language model, (hidden, MLP, layers, heads)."""

    vision: tuple[int, int, int, int]
    text: tuple[int, int, int, int]
    kv_heads: int
    vocabulary: int = 151_674
    tied: bool = False

    def build(self, attention: str = "sdpa") -> InternVLForConditionalGeneration:
        """A model with random weights."""
        hidden, mlp, layers, heads = self.vision
        vision = InternVLVisionConfig(
            hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads, image_size=[448, 448]
        )
        hidden, mlp, layers, heads = self.text
        text = Qwen2Config(
            vocab_size=self.vocabulary,
            hidden_size=hidden,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=self.kv_heads,
            tie_word_embeddings=self.tied,
        )
        config = InternVLConfig(
            vision_config=vision, text_config=text, image_token_id=self.vocabulary - 1, tie_word_embeddings=self.tied
        )
        config._attn_implementation = attention
        return InternVLForConditionalGeneration(config)


SHAPES = {  # FACTS of the model cards: InternViT-300M with Qwen2.5 0.5B, 1.5B, 7B
    "1B": Shape((1024, 4096, 24, 16), (896, 4864, 24, 14), 2),
    "2B": Shape((1024, 4096, 24, 16), (1536, 8960, 28, 12), 2),
    "8B": Shape((1024, 4096, 24, 16), (3584, 18944, 28, 28), 4),
    "small": Shape((256, 1024, 4, 4), (224, 1216, 4, 7), 1, vocabulary=9_000),
}


@dataclass(frozen=True)
class Case:
    """What is trained: tiles of the picture, tokens of each answer, pairs of each question."""

    shape: str
    tiles: int = 7
    answer: int = 300
    pairs: int = 1
    tower: str = "frozen"
    tune: str = "full"


# --- Batches of the same records, as each trainer makes them


def prompt_ids(case: Case, shape: Shape) -> list[int]:
    """A question behind its picture, 256 tokens a tile."""
    return [5] * (TEXT_TOKENS // 2) + [shape.vocabulary - 1] * (256 * case.tiles) + [6] * (TEXT_TOKENS - TEXT_TOKENS // 2)


def answers(case: Case) -> list[list[int]]:
    """Chosen and rejected of every pair, all different from their first token on."""
    return [
        [10 + number] + [100 + (7 * number + place) % 800 for place in range(case.answer - 1)] for number in range(2 * case.pairs)
    ]


def batches(case: Case, device: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """TRL's padded rows, and our packed one."""
    shape = SHAPES[case.shape]
    prompt, texts = prompt_ids(case, shape), answers(case)
    ordered = texts[0::2] + texts[1::2]
    ids = torch.tensor([prompt + text for text in ordered])
    mask = torch.zeros_like(ids)
    mask[:, len(prompt) :] = 1
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(case.tiles, 3, 448, 448, generator=generator) if device != "meta" else torch.empty(case.tiles, 3, 448, 448)
    padded = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": mask,
        "pixel_values": pixels.repeat(2 * case.pairs, 1, 1, 1),
    }
    row = concatenate([lay_out(prompt, [Answer(text, [True] * len(text)) for text in ordered])])
    scored = row.scored
    packed = {
        "input_ids": row.input_ids,
        "position_ids": row.position_ids,
        "segments": row.segments,
        "picked": Picked(row.labelled, row.input_ids.size(1)),
        "shift_labels": row.shift_labels[:, row.labelled],
        "scored": type(scored)(torch.searchsorted(row.labelled, scored.node), scored.answer, scored.ordinal, scored.lengths),
        "tokens": row.input_ids.size(1),
        "pixel_values": pixels,
        "names": ["a record"] * case.pairs,
    }
    return ({k: v.to(device) if hasattr(v, "to") else v for k, v in batch.items()} for batch in (padded, packed))  # type: ignore[return-value]


# --- Counting


def prepared(case: Case) -> nn.Module:
    """The policy of a case on the meta device, with the head both trainers use."""
    with torch.device("meta"):
        model = SHAPES[case.shape].build().train()
    # The check that pictures and picture tokens agree would read values, which meta tensors do not have.
    core = model.model
    core.get_placeholder_mask = lambda ids, inputs_embeds, **_: (
        (ids == model.config.image_token_id).unsqueeze(-1).expand_as(inputs_embeds)
    )
    if case.tower == "frozen":
        find_tower(model).requires_grad_(False)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    add_picking(model.base_model)
    return get_peft_model(model, LORA) if case.tune == "lora" else model


def counted(work: Any) -> int:
    """FLOPs of the operators that `work` runs."""
    enabled = torch.is_autocast_enabled
    torch.is_autocast_enabled = lambda device=None: False  # the meta device does not know the question
    try:
        with FlopCounterMode(display=False) as counter:
            work()
    finally:
        torch.is_autocast_enabled = enabled
    return counter.get_total_flops()


def head_flops(shape: Shape, positions: int, backward: bool, weight_gradient: bool) -> int:
    """FLOPs of the fused LM head on a number of positions."""
    hidden = torch.empty(positions, shape.text[0], device="meta", requires_grad=backward)
    weight = torch.empty(shape.vocabulary, shape.text[0], device="meta", requires_grad=weight_gradient)
    targets = torch.zeros(positions, dtype=torch.long, device="meta")

    def work() -> None:
        values = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, ("log_probs",))[0]
        if backward:
            values.sum().backward()

    return counted(work)


def count(case: Case) -> dict[str, Any]:
    """FLOPs per pair of both trainers' model calls: the policy's forward and backward, and the reference's forward.

    On the CPU and on meta tensors TRL's head scores every position, on GPUs those of answers alone: the difference is taken off.
    """
    shape = SHAPES[case.shape]
    padded, packed = batches(case, "meta")
    full = case.tune == "full"
    labels = padded["input_ids"].masked_fill(padded["completion_mask"] == 0, -100)
    trl_inputs = {name: padded[name] for name in ("input_ids", "pixel_values")}
    rows, length = padded["input_ids"].shape  # a mask that is made already: making one would read values
    trl_inputs["attention_mask"] = torch.empty(rows, 1, length, length, dtype=torch.bool, device="meta")
    all_positions, scored_positions = labels.size(0) * (labels.size(1) - 1), 2 * case.pairs * case.answer

    def trl(backward: bool) -> int:
        model = prepared(case)
        with torch.set_grad_enabled(backward):
            flops = counted(
                lambda: _run(model, {**trl_inputs, "labels": labels}, backward)  # the policy, or the reference
            )
        extra = [head_flops(shape, n, backward, backward and full) for n in (all_positions, scored_positions)]
        return flops - extra[0] + extra[1]

    our_inputs = {n: packed[n] for n in ("input_ids", "position_ids", "segments", "picked", "shift_labels", "pixel_values")}

    def ours() -> tuple[int, int]:
        model = prepared(case)
        use_packed_attention(model)
        tower = SharedTower(model, model) if case.tower == "frozen" else None
        policy = counted(lambda: _run(model, our_inputs, True))

        def reference() -> None:
            with torch.no_grad():
                if tower is None:
                    _run(model, our_inputs, False)
                else:
                    with tower.playing():
                        _run(model, our_inputs, False)

        return policy, counted(reference)

    trl_total = trl(True) + trl(False)
    policy, reference = ours()
    per_pair = {"trl": trl_total / case.pairs, "live": (policy + reference) / case.pairs, "cached": policy / case.pairs}
    return {
        **vars(case),
        "flops_per_pair": per_pair,
        "trl_over_live": per_pair["trl"] / per_pair["live"],
        "trl_over_cached": per_pair["trl"] / per_pair["cached"],
        "tiles_encoded": {"trl": 4 * case.pairs * case.tiles, "live": case.tiles * (1 if case.tower == "frozen" else 2)},
        "text_tokens": {"trl": 2 * padded["input_ids"].numel(), "live": 2 * packed["tokens"], "cached": packed["tokens"]},
    }


def _run(model: nn.Module, inputs: dict[str, Any], backward: bool) -> None:
    output = model(**inputs, use_cache=False, fused_lm_head=True)
    if backward:
        output.log_probs.sum().backward()


TARGETS = {  # shape, pairs per prompt -> against live and cached references
    ("1B", 1): {"live": 2.3, "cached": 2.7},
    ("8B", 1): {"live": 1.75, "cached": 2.1},
    ("1B", 4): {"live": 5.5},
    ("8B", 4): {"live": 3.8},
}


def run_count(options: argparse.Namespace) -> dict[str, Any]:
    """Count all cases asked for."""
    cases = [
        Case(shape, tiles, answer, pairs, tower, tune)
        for shape in options.shapes
        for tiles in options.tiles
        for answer in options.answers
        for pairs in options.pairs
        for tower in options.towers
        for tune in options.tune
    ]
    rows = []
    print(
        f"{'shape':>5} {'tiles':>5} {'answer':>6} {'pairs':>5} {'tower':>8} {'tune':>5} {'TRL/live':>9} {'TRL/cached':>10}  target"
    )
    for case in cases:
        row = count(case)
        target = TARGETS.get((case.shape, case.pairs), {}) if (case.tiles, case.answer, case.tower) == (7, 300, "frozen") else {}
        row["target"] = target
        rows.append(row)
        reached = ", ".join(
            f"{kind} {goal} {'reached' if row[f'trl_over_{kind}'] >= goal else 'MISSED'}" for kind, goal in target.items()
        )
        print(
            f"{case.shape:>5} {case.tiles:>5} {case.answer:>6} {case.pairs:>5} {case.tower:>8} {case.tune:>5} "
            f"{row['trl_over_live']:>9.2f} {row['trl_over_cached']:>10.2f}  {reached}",
            flush=True,
        )
    return {"counted": rows}


# --- Timing


def trainers(case: Case, folder: str, reference: str = "live") -> Iterator[Any]:
    """TRL's trainer and ours, ready to step on the same model."""
    torch.manual_seed(0)
    model = SHAPES[case.shape].build()
    if case.tower == "frozen":
        find_tower(model).requires_grad_(False)
    from datasets import Dataset

    from mpo.models.small import small_processor

    processor = small_processor(["What is it?"], image_size=448, patch_size=14, max_patches=6)
    config_name = Path(folder, "model")
    model.save_pretrained(config_name)
    record = {"prompt": "?", "chosen": "a", "rejected": "b"}
    common = {"use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False, "save_strategy": "no"}
    common |= {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "max_length": None}
    for trainer_class, config_class in ((DPOTrainer, DPOConfig), (MPOTrainer, MPOConfig)):
        yield lambda trainer_class=trainer_class, config_class=config_class: trainer_class(
            model=copy.deepcopy(model),
            ref_model=None if trainer_class is MPOTrainer else copy.deepcopy(model).requires_grad_(False),
            args=config_class(folder, **common),
            train_dataset=Dataset.from_list([record] * 4),
            processing_class=processor.tokenizer if trainer_class is DPOTrainer else processor.tokenizer,
        )


def step(trainer: Any, batch: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Loss, gradients, update."""
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@contextmanager
def answers_only() -> Iterator[None]:
    """Let TRL's head score answers alone on the CPU too, as it does on GPUs."""
    import trl.trainer.utils as utils

    before, utils._use_triton = utils._use_triton, lambda device: True
    try:
        yield
    finally:
        utils._use_triton = before


def memory(field: str) -> float:
    """A field of this process's memory, in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def run_time(options: argparse.Namespace) -> dict[str, Any]:
    """Time both on the small shape, alternating, and measure each one's peak memory in a process of its own."""
    rows = []
    for pairs in options.pairs:
        case = Case("small", options.tiles[0], options.answers[0], pairs)
        padded, packed = batches(case, "cpu")
        with tempfile.TemporaryDirectory() as folder, answers_only():
            seconds: dict[str, list[float]] = {"trl": [], "live": []}
            made = [make() for make in trainers(case, folder)]
            batch_of = dict(zip(seconds, (padded, packed), strict=True))
            optimizers = [torch.optim.AdamW([p for p in t.model.parameters() if p.requires_grad], lr=1e-6) for t in made]
            for round_ in range(options.rounds + 1):
                for name, trainer, optimizer in zip(seconds, made, optimizers, strict=True):
                    start = time.perf_counter()
                    step(trainer, batch_of[name], optimizer)
                    if round_:
                        seconds[name].append(time.perf_counter() - start)
                print(f"\r{pairs} pairs a prompt: round {round_}/{options.rounds}", end="", file=sys.stderr, flush=True)
            peaks = {name: peak_of(name, case) for name in seconds}
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        rows.append(
            {
                **vars(case),
                "seconds": seconds,
                "pairs_per_second": {name: pairs / value for name, value in medians.items()},
                "faster": medians["trl"] / medians["live"],
                "peak_mb": peaks,
                "memory": peaks["live"] / peaks["trl"],
            }
        )
        print(
            f"\r{pairs} pairs a prompt: {rows[-1]['faster']:.2f} times the pairs per second of TRL, peak memory "
            f"{rows[-1]['memory']:.2f} of TRL's ({peaks['live']:.0f} of {peaks['trl']:.0f} MB)"
        )
    return {"timed": rows, "targets": {"faster": 1.8, "memory": 0.6}}


def peak_of(name: str, case: Case) -> float:
    """Peak memory of one side's trainer above what a process held before it was made, in MB; in a process of its own."""
    sizes = [str(value) for value in (case.tiles, case.answer, case.pairs)]
    command = [sys.executable, __file__, "peak", name, *sizes]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return float(done.stdout.split()[-1])


def run_peak(name: str, tiles: int, answer: int, pairs: int) -> None:
    """Print what `peak_of` reads."""
    case = Case("small", tiles, answer, pairs)
    batch = dict(zip(("trl", "live"), batches(case, "cpu"), strict=True))[name]
    before = memory("VmRSS")
    with tempfile.TemporaryDirectory() as folder, answers_only():
        make = dict(zip(("trl", "live"), trainers(case, folder), strict=True))[name]
        trainer = make()
        optimizer = torch.optim.AdamW([p for p in trainer.model.parameters() if p.requires_grad], lr=1e-6)
        for _ in range(2):
            step(trainer, batch, optimizer)
        print(memory("VmHWM") - before)


def main() -> None:
    """Run, print a table, write JSON."""
    if sys.argv[1:2] == ["peak"]:
        return run_peak(sys.argv[2], *map(int, sys.argv[3:6]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("count", "time"))
    parser.add_argument("--shapes", nargs="+", default=["1B", "8B"], choices=list(SHAPES), help="of count")
    parser.add_argument("--tiles", nargs="+", type=int, default=[7], help="tiles a picture, thumbnail included: 1, 7, 13")
    parser.add_argument("--answers", nargs="+", type=int, default=[300], help="tokens of each answer")
    parser.add_argument("--pairs", nargs="+", type=int, default=[1, 4], help="pairs of each question")
    parser.add_argument("--towers", nargs="+", default=["frozen"], choices=("frozen", "trained"))
    parser.add_argument("--tune", nargs="+", default=["full"], choices=("full", "lora"))
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each side, behind one that is not")
    parser.add_argument("--output", type=Path, help="JSON; default: benchmarks/results/step_WHAT_DATE.json")
    options = parser.parse_args()
    result = run_count(options) if options.what == "count" else run_time(options)
    packages = ("torch", "transformers", "trl", "peft", "accelerate", "mpo-trainer")
    result |= {
        "command": " ".join(["python benchmarks/step.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in packages},
    }
    path = options.output or RESULTS / f"step_{options.what}_{result['date']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
