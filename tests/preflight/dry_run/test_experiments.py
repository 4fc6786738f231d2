"""A dry run of every experiment, at the published shapes, without the Hub, weights or a GPU.

The layers of a part are alike, and take time: where the size of the whole does not matter, a model has two of each.
"""

import json

import pytest
from composition import composed
from real_shapes import real_processor, write_checkpoint
from support import make_image

from mpo.preflight.dry_run import dry_run
from mpo.recipes import EXPERIMENTS
from mpo.training.job import TrainJob

pytestmark = pytest.mark.slow

NAMES = sorted([*EXPERIMENTS, "demo"])
ADVISED = ("internvl3_78b", "internvl3_5_30b_a3b")
"""Experiments that do not fit on one GPU, of which the report also says what to change."""


@pytest.fixture(scope="module")
def processor():
    return real_processor()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Two records: an image of 12 tiles and a thumbnail, and an image of one tile."""
    folder = tmp_path_factory.mktemp("pairs")
    lines = []
    for name, size in (("large", (40, 30)), ("small", (8, 8))):
        make_image(0, *size).save(folder / f"{name}.png")
        completions = {"chosen": "It is a cat. " * 20, "rejected": "It is a dog, I think."}
        lines.append(json.dumps({"id": name, "image": f"{name}.png", "question": "What is it?", **completions}))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return folder / "pairs.jsonl"


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment(name, processor, pairs, tmp_path):
    gpu_gb = 80 if name in ADVISED else 10_000
    overrides = [f"experiment={name}", f"data.path={pairs}", f"run_dir={tmp_path / 'run'}", "dry_run=true"]
    overrides.append(f"dry_run_gpu_gb={gpu_gb}")
    config = composed(overrides)
    given = config["model"]["name_or_path"]
    published = "InternVL3-1B" if given == "???" else given  # an experiment that leaves the model open
    layers = None if name in ADVISED else 2
    config["model"]["name_or_path"] = str(write_checkpoint(published, tmp_path / "model", processor, layers))
    page = dry_run(TrainJob.from_config(config))
    print(page)
    assert "peak " in page
    assert "record 'large'" in page
    assert "<IMG_CONTEXT> x 3,328" in page or "<IMG_CONTEXT> x 3328" in page or "max_tiles" in config["model"]
    assert "NOT included" not in page
    assert ("on its own:" in page) == (name in ADVISED)


@pytest.mark.parametrize("gpu_gb", [24, 48, 80])
def test_small_gpus_are_large_enough(gpu_gb, processor, pairs, tmp_path):
    overrides = [f"experiment=small_gpu_{gpu_gb}gb", f"data.path={pairs}", f"run_dir={tmp_path / 'run'}", "dry_run=true"]
    config = composed(overrides)
    config["model"]["name_or_path"] = str(write_checkpoint(config["model"]["name_or_path"], tmp_path / "model", processor))
    page = dry_run(TrainJob.from_config({**config, "dry_run_gpu_gb": gpu_gb}))
    assert f"fits on a GPU of {gpu_gb} GiB" in page
