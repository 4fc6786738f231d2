"""Give every test its own cache of converted data."""

import datasets
import pytest
from support import make_image


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture
def images(tmp_path):
    """A folder with a.png, b.png and sub/c.png, an image outside it, and links that lead there."""
    make_image(2).save(tmp_path / "outside.png")
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.png", "sub/c.png")):
        make_image(number).save(folder / name)
    (folder / "link.png").symlink_to(folder / "a.png")
    (folder / "link_out.png").symlink_to(tmp_path / "outside.png")
    (folder / "out").symlink_to(tmp_path)
    (folder / "clip.mp4").write_bytes(b"a video")
    return folder
