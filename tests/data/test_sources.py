"""Splits of sources without splits, mixtures in JSON, and links that change."""

import json

import pytest
from data.test_files import QUESTIONS, asked, line, write
from support import make_image

from mpo.data import load_preferences


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs*"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_has_no_splits(tmp_path, name, streaming):
    write(tmp_path / "pairs.jsonl", [line(0)])
    assert asked(load_preferences(tmp_path / name, split="train", streaming=streaming)) == QUESTIONS[:1]
    with pytest.raises(ValueError, match="no splits, but split='validation'"):
        load_preferences(tmp_path / name, split="validation", streaming=streaming)


@pytest.mark.parametrize("name", ["mixture.json", "mixture.yaml"])
def test_a_mixture_in_json_or_yaml(tmp_path, name):
    for number in range(3):
        write(tmp_path / f"{number}.jsonl", [line(number)] * 4)
    sources = [{"path": "0.jsonl"}, {"path": "1.jsonl", "repeat_time": 0.5}, {"path": "2.jsonl"}]
    (tmp_path / name).write_text(json.dumps({"sources": sources, "eval_size": 4, "eval_by": "question"}))
    train, eval_part = (load_preferences(tmp_path / name, split=split) for split in ("train", "eval"))
    assert sorted(set(asked(train)) | set(asked(eval_part))) == QUESTIONS[:3]
    assert len(eval_part) == 4
    with pytest.raises(ValueError, match="no split 'validation'.*'train' or 'eval'"):
        load_preferences(tmp_path / name, split="validation")
    with pytest.raises(ValueError, match="mixture.* own image_root"):
        load_preferences(tmp_path / name, image_root=tmp_path)


def test_json_files_that_are_no_mixture(tmp_path):
    """A pair with a field `sources`, an array, and an array of such pairs."""
    path = tmp_path / "pairs.json"
    for found in (line(0, sources=["the web"]), [line(0)], [line(0, sources=[{"path": "x"}])]):
        path.write_text(json.dumps(found))
        assert asked(load_preferences(path)) == QUESTIONS[:1]


@pytest.mark.parametrize("given", [True, False])
def test_a_link_to_the_images_that_leads_elsewhere_later(tmp_path, given):
    """The same file of pairs in the same place; its images are those of the folder that the link leads to now."""
    for number, name in enumerate(("old", "new")):
        (tmp_path / name).mkdir()
        make_image(number).save(tmp_path / name / "a.png")
        write(tmp_path / name / "pairs.jsonl", [line(0, image="a.png")])
    current = tmp_path / "current"
    path = tmp_path / "old" / "pairs.jsonl" if given else current / "pairs.jsonl"
    for number, name in enumerate(("old", "new")):
        current.unlink(missing_ok=True)
        current.symlink_to(tmp_path / name)
        pairs = load_preferences(path, **({"image_root": current} if given else {}))
        assert pairs[0]["images"][0].tobytes() == make_image(number).tobytes()


def test_a_folder_whose_name_is_like_a_pattern(tmp_path):
    """Images are beside the file, though its folder has brackets in its name."""
    folder = tmp_path / "images[1]"
    folder.mkdir()
    make_image(1).save(folder / "a.png")
    write(folder / "pairs.jsonl", [line(0, image="a.png")])
    assert load_preferences(folder / "pairs.jsonl")[0]["images"][0].tobytes() == make_image(1).tobytes()
