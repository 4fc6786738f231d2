"""Write recipes/experiment/internvl*.yaml, one per published MPO run and training method, with its memory estimated by a dry run.

    .venv/bin/python .ci/write_experiments.py           write the files
    .venv/bin/python .ci/write_experiments.py NAME ...  write only these

The runs are those of the official scripts (OpenGVLab/InternVL: shell/internvl2.0_mpo, internvl2.5_mpo, internvl3.0/mpo and
internvl_chat_gpt_oss/shell/internvl3_5_qwen3); learning rates of adapters are our choice.
"""

import json
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE / "tests"))

GPU_GB = 80
GPUS = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Family:
    """Settings shared by the runs of one InternVL generation."""

    sizes: tuple[str, ...]
    checkpoint: str
    source: str
    learning_rate: str
    max_length: int
    adapter_rate: str

    def batch(self, size: str) -> int:
        """Return the pairs per optimizer step."""
        return 512 if size in ("38B", "78B") and "3_5" not in self.checkpoint else 256

    def length(self, size: str) -> int:
        """Return the maximum length of a record in tokens."""
        return 8192 if self.max_length == 12288 and size in ("38B", "78B") else self.max_length

    def drop_path(self, size: str) -> float:
        """Return the drop path rate of the vision tower: 0.1 for the 300M tower, 0.4 for the 6B tower."""
        if size in ("26B", "38B", "78B", "241B-A28B"):
            return 0.4
        return 0.0 if "3_5" in self.checkpoint and size in ("1B", "2B", "4B") else 0.1


FAMILIES = {
    "internvl2": Family(("8B",), "InternVL2-{}", "arXiv 2411.10442, data MMPR", "5.0e-6", 6144, "5.0e-5"),
    "internvl2_5": Family(
        ("1B", "2B", "4B", "8B", "26B", "38B", "78B"),
        "InternVL2_5-{}",
        "arXiv 2412.05271's models, MPO of 2024-12, data MMPR-v1.1",
        "1.0e-6",
        8192,
        "2.0e-5",
    ),
    "internvl3": Family(
        ("1B", "2B", "8B", "9B", "14B", "38B", "78B"),
        "InternVL3-{}-Instruct",
        "arXiv 2504.10479, data MMPR-v1.2",
        "2.0e-7",
        12288,
        "2.0e-5",
    ),
    "internvl3_5": Family(
        ("1B", "2B", "4B", "8B", "14B", "30B-A3B", "38B", "241B-A28B"),
        "InternVL3_5-{}-Instruct",
        "arXiv 2508.18265 (its offline stage), data MMPR-v1.2",
        "2.0e-7",
        16384,
        "2.0e-5",
    ),
}
METHODS = {"": "all weights", "_lora": "LoRA", "_qlora": "QLoRA"}
FLOAT32 = "master weights; in bfloat16, updates of this size would be rounded away. Autocast computes in bfloat16"
ROUTER = "  router_aux_loss_coef: 0.0  # output_router_logits is false in the published config, so there is no router loss"


def experiments() -> dict[str, tuple[Family, str, str]]:
    """Map the name of each file to its family, size and training method."""
    return {
        f"{name}_{size.lower().replace('-', '_')}{method}": (family, size, method)
        for name, family in FAMILIES.items()
        for size in family.sizes
        for method in METHODS
        # bitsandbytes quantizes linear layers; the experts of a layer are one tensor, which it would leave in bfloat16.
        if not (method == "_qlora" and "-A" in size)
    }


def recipe(name: str, hardware: str, launch: str) -> str:
    """Return the text of one file."""
    family, size, method = experiments()[name]
    checkpoint = family.checkpoint.format(size)
    head = [
        "# @package _global_",
        f"# {checkpoint}, {METHODS[method]}: {family.source}.",
        *(
            [
                "# Batch size, length and warm-up are those of the official script, which trains all weights; "
                "learning rate and rank",
                f"# of the adapter are our choice (all weights: {float(family.learning_rate):.0e}). "
                "Vision tower and projector are frozen.",
            ]
            if method
            else ["# Learning rate, batch size, length, warm-up and drop path are those of the official script."]
        ),
        f"# Command:  mpo train experiment={name} data.path=pairs.jsonl",
        f"# Hardware: {hardware}. Not yet run.",
    ]
    overrides = []
    if method:
        overrides.append(f"  - override /peft: {method[1:]}")
    if launch != "ddp":
        overrides.append(f"  - override /launch: {launch}")
    if overrides:
        head += ["defaults:", *overrides, ""]
    drop_path = 0.0 if method else family.drop_path(size)
    dtype = "bfloat16" if method else f"float32  # {FLOAT32}"
    head += [
        *([f"drop_path: {drop_path}"] if drop_path else []),
        "model:",
        f"  name_or_path: OpenGVLab/{checkpoint}",
        f"  dtype: {dtype}",
        "  max_tiles: 12",
        "trainer:",
        f"  learning_rate: {family.adapter_rate if method else family.learning_rate}",
        "  warmup_steps: 0.03",
        f"  global_batch_size: {family.batch(size)}",
        f"  max_length: {family.length(size)}",
        *([ROUTER] if "-A" in size else []),
    ]
    return "\n".join(head) + "\n"


def pairs(folder: Path) -> Path:
    """Write one record with an image of 12 tiles and a thumbnail and two completions of about 300 tokens."""
    from support import make_image

    make_image(0, 40, 30).save(folder / "large.png")
    record = {"image": "large.png", "question": "What is it?", "chosen": "It is a cat. " * 60, "rejected": "It is a dog. " * 60}
    (folder / "pairs.jsonl").write_text(json.dumps(record))
    return folder / "pairs.jsonl"


def peak(config: dict, ranks: int) -> float:
    """Estimate the GiB per rank with a dry run."""
    from mpo.preflight.dry_run import dry_run
    from mpo.training.job import TrainJob

    page = dry_run(TrainJob.from_config({**config, "launch": {"nproc_per_node": ranks}}))
    found = re.search(r"peak ([\d.]+) ([KMGT]iB)", page)
    return float(found[1]) * {"MiB": 1 / 1024, "GiB": 1.0, "TiB": 1024.0}[found[2]]


def main(names: list[str]) -> None:
    """Write the files of the named experiments, or of all."""
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf
    from real_shapes import real_processor, write_checkpoint

    processor = real_processor()
    target = HERE / "recipes" / "experiment"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = pairs(folder)
        for name in names or experiments():
            family, size, method = experiments()[name]
            path = target / f"{name}.yaml"
            model = write_checkpoint(family.checkpoint.format(size), folder / name, processor)
            for gpus in GPUS:
                launch = "ddp" if gpus == 1 else "fsdp2"
                path.write_text(recipe(name, "?", launch))
                overrides = [f"experiment={name}", f"++data.path={data}", f"++run_dir={folder / 'run'}", "++dry_run=true"]
                with initialize_config_module("mpo.recipes", version_base="1.3"):
                    config = OmegaConf.to_container(compose("train", overrides), resolve=True)
                config.pop("hydra", None)
                config["model"]["name_or_path"] = str(model)
                needs = peak(config, gpus)
                if needs <= 0.95 * GPU_GB or method == "_qlora":  # QLoRA is not run sharded
                    break
            devices = "one GPU" if gpus == 1 else f"{gpus} GPUs"
            fits = next((gb for gb in (24, 48, 80) if needs <= 0.95 * gb), None)
            assert fits is not None, (name, needs)
            hardware = f"{devices} of {fits} GB (estimate: {needs:.0f} GiB per GPU, one pair with an image of 12 tiles at a time)"
            path.write_text(recipe(name, hardware, launch))
            print(f"{name:<32} {hardware}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
