"""Compare the memory estimate of `mpo train ... dry_run=true` with the measured peak, for training jobs of 20 to 150 M parameters.

    python benchmarks/memory.py                 # all cases, JSON into results/
    python benchmarks/memory.py --only lora     # cases with this word in their name

Each case trains a few steps with MPOTrainer in its own process. The measurement is the peak of that process's resident memory
during training, minus the memory before the model was built; a very small run before that loads every library and starts every
thread. glibc's malloc is set to return freed memory (MALLOC_MMAP_THRESHOLD_), so that resident memory is allocated memory. The
estimate is that of the same configuration, from the model on the meta device.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import get_peft_model
from PIL import Image
from step_cases import Shape, adapter, quiet
from torch import nn

from mpo import MPOConfig, MPOTrainer
from mpo.batching.collator import PairCollator
from mpo.models.small import small_processor
from mpo.models.tower import find_tower
from mpo.preflight.memory import estimate_memory

RESULTS = Path(__file__).parent / "results"
WITHIN = 0.15
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
SHAPES = {  # vision and text: hidden, MLP, layers, heads; key-value heads; vocabulary; tile and patch in pixels
    "23M": Shape((256, 1024, 6, 4), (384, 1024, 8, 6), 2, vocabulary=8_000, image_size=224),
    "62M": Shape((384, 1536, 8, 6), (512, 1536, 12, 8), 2, vocabulary=16_000, image_size=224),
    "134M": Shape((512, 2048, 12, 8), (768, 2304, 12, 12), 2, vocabulary=16_000, image_size=224),
}


@dataclass(frozen=True)
class Case:
    """A job. ``tune``: full, lora or qlora; ``pairs`` per micro-batch; ``answer``: tokens per completion; ``weights``: dtype."""

    shape: str
    tune: str = "full"
    tower: str = "trained"
    reference: str = "live"
    checkpointing: bool = False
    pairs: int = 1
    accumulation: int = 1
    answer: int = 300
    tiles: int = 7
    weights: str = "float32"
    autocast: bool = False
    optim: str = "adamw_torch_fused"

    def __str__(self) -> str:
        words = [self.shape, self.tune, f"tower {self.tower}", self.reference, "ckpt" if self.checkpointing else ""]
        words += [f"{self.pairs} pairs" if self.pairs > 1 else "", f"x{self.accumulation}" if self.accumulation > 1 else ""]
        words += [f"{self.answer} tokens", f"{self.tiles} tiles", self.weights, "autocast" if self.autocast else ""]
        return " ".join(word for word in words if word)


CASES = [
    Case("23M"),
    Case("23M", checkpointing=True, pairs=4),
    Case("23M", reference="cached", pairs=2),
    Case("23M", tune="lora", tower="frozen", pairs=2),
    Case("62M"),
    Case("62M", reference="cached"),
    Case("62M", tower="frozen", accumulation=2),
    Case("62M", checkpointing=True),
    Case("62M", checkpointing=True, pairs=3, answer=600),
    Case("62M", pairs=3),
    Case("62M", tune="lora", tower="frozen"),
    Case("62M", tune="lora", tower="frozen", checkpointing=True, pairs=2),
    Case("62M", tiles=13),
    Case("62M", weights="bfloat16"),
    Case("62M", autocast=True),
    Case("62M", autocast=True, checkpointing=True),
    Case("134M"),
    Case("134M", reference="cached", checkpointing=True),
    Case("134M", tune="lora", tower="frozen", reference="cached"),
]


def processor_of(shape: Shape, tiles: int) -> Any:
    """A processor that splits the records' images into `tiles` tiles, thumbnail included."""
    return small_processor(["0 1"], image_size=shape.image_size, patch_size=shape.patch_size, max_patches=tiles - 1, vocab_size=300)


def records(case: Case, shape: Shape) -> list[dict[str, Any]]:
    """Pairs of the same length, each with its own image and question; a digit is a token."""
    across, down = {7: (3, 2), 13: (4, 3)}[case.tiles]
    rng = np.random.default_rng(0)
    made = []
    for number in range(case.pairs * case.accumulation * 2):
        noise = rng.integers(0, 256, (down * shape.image_size, across * shape.image_size, 3), dtype=np.uint8)
        question = f"{number:02d}" + "0123456789" * 6
        completions = {side: f"{first}" + "1234567890" * (case.answer // 10) for side, first in (("chosen", 3), ("rejected", 4))}
        made.append(
            {"images": [Image.fromarray(noise)], "prompt": [{"role": "user", "content": question}]}
            | {side: [{"role": "assistant", "content": text[: case.answer - 1]}] for side, text in completions.items()}
        )
    return made


def model_of(case: Case, shape: Shape, image_token_id: int, device: str) -> Any:
    """The policy that is passed to the trainer."""
    torch.manual_seed(0)
    model = shape.build(image_token_id, device, getattr(torch, case.weights))
    if case.tower == "frozen":
        find_tower(model).requires_grad_(False)
    if case.tune == "qlora" and device != "meta":
        hold_in_four_bits(model)
    return model


def hold_in_four_bits(model: Any) -> None:
    """Quantize the matrices of the language model in place, as `mpo train peft=qlora` loads them."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    language_model = model.model.language_model
    for name, old in [item for item in language_model.named_modules() if isinstance(item[1], nn.Linear)]:
        kind: dict[str, Any] = {"compress_statistics": True, "quant_type": "nf4"}
        new = Linear4bit(
            old.in_features, old.out_features, old.bias is not None, compute_dtype=torch.bfloat16, device="meta", **kind
        )
        new.weight = Params4bit(old.weight.data, requires_grad=False, module=new, **kind).to(old.weight.device)
        new.bias = old.bias
        language_model.set_submodule(name, new)
    model.is_loaded_in_4bit = True  # read by PEFT, TRL and MPOTrainer


def arguments(case: Case, folder: str, **more: Any) -> MPOConfig:
    """The configuration of the trainer."""
    settings: dict[str, Any] = {
        "use_cpu": True,
        "bf16": case.autocast,
        "report_to": "none",
        "save_strategy": "no",
        "gradient_checkpointing": case.checkpointing,
        "per_device_train_batch_size": case.pairs,
        "gradient_accumulation_steps": case.accumulation,
        "learning_rate": 1e-6,
        "max_steps": 2,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "optim": case.optim,
        **({"reference": "cached", "reference_cache": str(Path(folder, "references"))} if case.reference == "cached" else {}),
    }
    return MPOConfig(folder, **{**settings, **more})


def estimate(case: Case, shape: Shape, *, gpu: bool = False) -> dict[str, Any]:
    """The estimate in MB: in total, with the margin of a GPU, and by component."""
    processor = processor_of(shape, case.tiles)
    with quiet(), tempfile.TemporaryDirectory() as folder:
        batch = PairCollator(processor, layout="packed")(records(case, shape)[: case.pairs])
        model = model_of(case, shape, processor.image_token_id, "meta")
        if case.tune != "full":
            with torch.device("meta"):
                model = get_peft_model(model, adapter())
        how = {"gpu": gpu, "four_bits": case.tune == "qlora", "with_adapters": case.tune != "full"}
        found = estimate_memory(model, batch, arguments(case, folder), **how)
    parts = {component.name: component.size / 2**20 for component in (*found.fixed, *found.passing)}
    return {
        "total": found.step / 2**20,
        "with margin": found.total / 2**20,
        "moment": found.peak_moment,
        "components": parts,
        "moments": {name: size / 2**20 for name, size in found.moments.items()},
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def train(case: Case, shape: Shape, device: str = "cpu") -> tuple[float, float]:
    """Train; return memory in MB before the model was built and at the peak: resident, or PyTorch's on a GPU."""
    processor = processor_of(shape, case.tiles)
    dataset = Dataset.from_list(records(case, shape))
    with quiet(), tempfile.TemporaryDirectory() as folder:
        before = resident() if device == "cpu" else torch.cuda.memory_allocated() / 2**20
        trainer = MPOTrainer(
            model=model_of(case, shape, processor.image_token_id, device),
            args=arguments(case, folder, use_cpu=device == "cpu"),
            train_dataset=dataset,
            processing_class=processor,
            peft_config=adapter() if case.tune != "full" else None,
        )
        if device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            trainer.train()
            return before, torch.cuda.max_memory_allocated() / 2**20
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM: building does not count
        trainer.train()
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return before, int(line.split()[1]) / 1024


def resident() -> float:
    """This process's resident memory, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def measure(case: Case) -> float:
    """Peak of training in MB, from a fresh process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--case", json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **MALLOC})
    if done.returncode:
        raise RuntimeError(f"{case}: {done.stderr}")
    before, peak = json.loads(done.stdout.splitlines()[-1])
    return float(peak - before)


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="run only cases with these words in their name")
    parser.add_argument("--output", type=Path, help="JSON file to write; default: benchmarks/results/memory_cpu_DATE.json")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        case = Case(**options.case)
        tiny = Shape((32, 64, 2, 2), (32, 64, 2, 2), 1, vocabulary=512, image_size=56)
        train(Case(**{**options.case, "answer": 20, "pairs": 1}), tiny)
        print(json.dumps(train(case, SHAPES[case.shape])))
        return
    result: dict[str, Any] = {
        "command": " ".join(["python benchmarks/memory.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "device": f"{platform.machine()} CPU, 1 thread",
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft", "accelerate", "mpo-trainer")},
        "shapes": {name: asdict(shape) for name, shape in SHAPES.items()},
        "how": __doc__,
        "cases": [],
    }
    print(f"{'estimate':>9} {'measured':>9} {'ratio':>6}  case")
    for case in CASES:
        if not all(word in str(case).split() for word in options.only):
            continue
        found, measured = estimate(case, SHAPES[case.shape]), measure(case)
        ratio = found["total"] / measured
        within = abs(ratio - 1) <= WITHIN
        result["cases"].append(
            {"case": asdict(case), "estimate_mb": found, "measured_mb": measured, "ratio": ratio, "within": within}
        )
        print(
            f"{found['total']:>7.0f}MB {measured:>7.0f}MB {ratio:>6.3f}  {case}{'' if within else '  NOT WITHIN 15 %'}", flush=True
        )
    path = options.output or RESULTS / f"memory_cpu_{result['date']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
