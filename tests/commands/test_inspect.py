"""`mpo inspect fuser`: where an MMFuser looks, how it weighs layers, what it adds; and `show` in notebooks."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from support import TEXTS, make_image

from mpo.commands import main
from mpo.models import add_fuser
from mpo.models.looking import look
from mpo.models.mmfuser import show
from mpo.models.small import small_internvl, small_processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose fuser looks one patch to the right in its first layer alone, and adds 0.5 there; one without; an image."""
    folder = tmp_path_factory.mktemp("inspect")
    processor = small_processor(TEXTS, image_size=32, patch_size=8, max_patches=4)
    plain = small_internvl(processor, hidden_size=32, layers=1, vision_hidden_size=32, vision_layers=3)
    plain.save_pretrained(folder / "plain")
    fused = add_fuser(plain, 2, num_heads=2, num_points=1)
    with torch.no_grad():
        attention = fused.model.fuser.cross_attn
        attention.sampling_offsets.bias.copy_(torch.tensor([1.0, 0.0]).repeat(4))
        attention.attention_weights.bias.copy_(torch.tensor([50.0, 0.0]).repeat(2))
        attention.value_proj.weight.zero_()
        attention.value_proj.bias.zero_()
        attention.output_proj.weight.zero_()
        attention.output_proj.bias.fill_(1.0)
    fused.save_pretrained(folder / "new")
    fused.model.fuser.gamma1.data.fill_(0.5)
    fused.save_pretrained(folder / "fused")
    for name in ("plain", "new", "fused"):
        processor.save_pretrained(folder / name)
    make_image(1).save(folder / "a.png")
    return folder


def test_numbers_and_image(folder, tmp_path, capsys):
    """0.5 in each of 32 channels has the norm 0.5 * sqrt(32); the point 0.2 x 0.9 is in the patch with the centre 0.125 x 0.875."""
    words = ["inspect", "fuser", str(folder / "fused"), str(folder / "a.png"), "--output", str(tmp_path / "out")]
    assert main([*words, "--point", "0.2", "0.9", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"folder": str(tmp_path / "out"), **json.loads((tmp_path / "out" / "fuser.json").read_text())}
    assert (found["layers"], found["grid"], found["points"]) == ([1, 2], [4, 4], [[0.125, 0.875]])
    np.testing.assert_allclose(list(found["attention"].values()), [1, 0], atol=1e-6)
    np.testing.assert_allclose(found["added"], 0.5 * 32**0.5, rtol=1e-5)
    image = np.asarray(Image.open(tmp_path / "out" / "fuser.png"))
    assert image.shape[0] > 500 and image.std() > 10
    assert main([*words[:2], str(folder / "new"), *words[3:5], str(tmp_path / "new")]) == 0
    assert "adds nothing" in capsys.readouterr().out


def test_where_it_looks(folder):
    """From each point one patch to the right, also out of the tile; a call in a notebook draws the same."""
    from mpo.models.loading import load_model

    loaded = load_model(str(folder / "fused"))
    looks = look(loaded.model, torch.randn(3, 32, 32), 2)
    assert looks.points.tolist() == [[0.375, 0.375], [0.875, 0.375], [0.375, 0.875], [0.875, 0.875]]
    torch.testing.assert_close(looks.locations[:, 0, 0, 0], looks.points + torch.tensor([0.25, 0]))
    torch.testing.assert_close(looks.weights.sum((2, 3)), torch.ones(4, 2))
    figure = show(loaded.model, Image.open(folder / "a.png"), loaded.processor, points=[(0.5, 0.5)], tile=0)
    assert [axes.get_title() for axes in figure.axes][:2] == ["hidden state 1", "hidden state 2"]


@pytest.mark.parametrize(
    "model, more, message",
    [
        ("plain", [], "internvl has no fuser"),
        ("fused", ["--tile", "3"], "0 to 2.*got 3"),
        ("fused", ["--point", "0.5", "1.5"], "1.5"),
        ("fused", ["--point", "0.5", "0.5", "--points", "2"], "--points=2"),
        ("fused", ["--points", "0"], "0"),
    ],
)
def test_what_cannot_be_shown(folder, tmp_path, capsys, model, more, message):
    words = ["inspect", "fuser", str(folder / model), str(folder / "a.png"), "--output", str(tmp_path / "out"), *more]
    try:
        assert main(words) == 2
    except SystemExit as stop:  # argparse
        assert stop.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
