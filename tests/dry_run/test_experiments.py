"""A dry run of every experiment, at the published shapes, without a hub, weights or a GPU."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from real_shapes import real_processor, write_checkpoint
from support import picture

from mpo.commands.train import settable
from mpo.dry_run.run import dry_run
from mpo.job import TrainJob

EXPERIMENTS = Path(str(files("mpo.recipes"))) / "experiment"
NAMES = sorted(path.relative_to(EXPERIMENTS).with_suffix("").as_posix() for path in EXPERIMENTS.rglob("*.yaml"))


@pytest.fixture(scope="module")
def processor():
    return real_processor()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """One record of a picture of 12 tiles and a thumbnail, one of a single tile."""
    folder = tmp_path_factory.mktemp("pairs")
    lines = []
    for name, size in (("large", (40, 30)), ("small", (8, 8))):
        picture(0, *size).save(folder / f"{name}.png")
        answers = {"chosen": "It is a cat. " * 20, "rejected": "It is a dog, I think."}
        lines.append(json.dumps({"id": name, "image": f"{name}.png", "question": "What is it?", **answers}))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return folder / "pairs.jsonl"


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment(name, processor, pairs, tmp_path):
    overrides = [f"experiment={name}", f"data.path={pairs}", f"run_dir={tmp_path / 'run'}", "dry_run=true", "dry_run_gpu_gb=80"]
    with initialize_config_module("mpo.recipes", version_base="1.3"):
        config = OmegaConf.to_container(compose("train", [settable(override) for override in overrides]), resolve=True)
    config.pop("hydra", None)
    checkpoint = yaml.safe_load((EXPERIMENTS / f"{name}.yaml").read_text()).get("model", {}).get("name_or_path")
    published = checkpoint or "InternVL3-1B"  # an experiment that leaves the model open
    config["model"]["name_or_path"] = str(write_checkpoint(published, tmp_path / "model", processor))
    page = dry_run(TrainJob.from_config(config))
    print(page)
    assert "peak " in page
    assert "record 'large'" in page
    assert "<IMG_CONTEXT> x 3,328" in page or "<IMG_CONTEXT> x 3328" in page or "max_tiles" in config["model"]
    assert "NOT in it" not in page
