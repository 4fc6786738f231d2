"""Tiling of images: the grids of the official code, for the processors of loaded checkpoints."""

import json
import shutil

import numpy as np
import pytest
from official_checkpoints import write_official
from PIL import Image
from transformers import AutoProcessor

from mpo.models.loading import load_processor

# width, height -> (columns, rows) with at most 6, 12 and 24 tiles, computed with the official function
GRIDS = {
    (448, 448): ((1, 1), (1, 1), (1, 1)),
    (400, 400): ((1, 1), (1, 1), (1, 1)),
    (560, 448): ((1, 1), (4, 3), (5, 4)),
    (640, 480): ((3, 2), (4, 3), (4, 3)),
    (800, 600): ((3, 2), (4, 3), (4, 3)),
    (600, 800): ((2, 3), (3, 4), (3, 4)),
    (896, 448): ((2, 1), (2, 1), (2, 1)),
    (1000, 1000): ((2, 2), (3, 3), (3, 3)),
    (1250, 1000): ((3, 2), (4, 3), (5, 4)),
    (1280, 720): ((2, 1), (4, 2), (5, 3)),
    (1920, 1080): ((2, 1), (4, 2), (5, 3)),
    (1080, 1920): ((1, 2), (2, 4), (3, 5)),
    (2000, 300): ((6, 1), (7, 1), (7, 1)),
    (300, 2000): ((1, 6), (1, 7), (1, 7)),
    (2480, 3508): ((2, 3), (2, 3), (4, 6)),
}


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    return write_official(tmp_path_factory.mktemp("tiles") / "official", "qwen2", tile=448, patch=14)


@pytest.mark.parametrize("place, most", enumerate((6, 12, 24)))
@pytest.mark.parametrize("size", GRIDS, ids="{0[0]}x{0[1]}".format)
def test_golden_grids(official, size, place, most):
    """An image whose colour encodes the position: every tile is at its place in the grid, followed by a thumbnail."""
    processor = load_processor(str(official), max_tiles=most)
    columns, rows = GRIDS[size][place]
    width, height = size
    ramp = np.zeros((height, width, 3), dtype=np.uint8)
    ramp[..., 0] = np.linspace(0, 255, width)[None]
    ramp[..., 1] = np.linspace(0, 255, height)[:, None]
    pixels = processor.image_processor(Image.fromarray(ramp), return_tensors="pt")["pixel_values"]
    tiles = columns * rows
    assert len(pixels) == (tiles + 1 if tiles > 1 else 1)
    mean, std = (np.array(values) for values in (processor.image_processor.image_mean, processor.image_processor.image_std))
    colour = pixels.mean((2, 3)).numpy() * std + mean
    for number in range(tiles):
        row, column = divmod(number, columns)
        assert colour[number, 0] == pytest.approx((column + 0.5) / columns, abs=0.02)
        assert colour[number, 1] == pytest.approx((row + 0.5) / rows, abs=0.02)


@pytest.mark.parametrize("thumbnail", [True, False])
def test_thumbnail(official, tmp_path, thumbnail):
    """Without it an image of two tiles has two; the setting is saved, under the name of transformers' own processor."""
    processor = load_processor(str(official), max_tiles=6, thumbnail=thumbnail)
    wide = Image.new("RGB", (896, 448))
    pixels = processor.image_processor(wide, return_tensors="pt")
    assert len(pixels["pixel_values"]) == int(pixels["num_patches"][0]) == 2 + thumbnail
    assert processor._get_num_multimodal_tokens(image_sizes=[(448, 896)])["num_image_patches"] == [2 + thumbnail]
    processor.save_pretrained(tmp_path)
    again = load_processor(str(tmp_path))
    assert len(again.image_processor(wide, return_tensors="pt")["pixel_values"]) == 2 + thumbnail
    assert len(AutoProcessor.from_pretrained(tmp_path).image_processor(wide, return_tensors="pt")["pixel_values"]) == 3


def test_the_official_configs_thumbnail(official, tmp_path):
    folder = tmp_path / "official"
    shutil.copytree(official, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "use_thumbnail": False}))
    assert not load_processor(str(folder)).image_processor.use_thumbnail
    assert load_processor(str(folder), thumbnail=True).image_processor.use_thumbnail


def test_tokens_of_an_image(official):
    """256 tokens a tile, as published."""
    processor = load_processor(str(official), max_tiles=6)
    assert processor.image_seq_length == 256
    text = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], tokenize=False)
    ids = processor(text=text, images=[Image.new("RGB", (896, 448))], return_tensors="pt")["input_ids"]
    assert int((ids == processor.image_token_id).sum()) == 3 * 256
