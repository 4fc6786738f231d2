"""Pairs that are written in any form and read again are the same."""

import json
from pathlib import Path

import pytest
from data.malformed import GOOD
from datasets import Dataset
from support import make_image

from mpo.curation.write import first_difference, not_kept, write_pairs
from mpo.data import load_preferences
from mpo.data.formats import FORMATS
from mpo.data.records import KINDS

LINES = [
    {"id": "one", "image": "in/a.png", "question": "What is it?", "chosen": "A cat.", "rejected": "A dog.", "answer_gt": "cat"},
    {
        "id": "two",
        "image": ["in/a.png", "b.jpg"],
        "question": "First <image>\n and\n<image>\n\nthen?",
        "chosen": "Ä €\u2028\n\nTwo.",
        "rejected": " One. ",
        "chosen_meta": {"score": 0.5, "tags": ["x"]},
    },
    {"id": "none", "question": "Why?\n", "chosen": "So.", "rejected": "No."},
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    make_image(0).save(tmp_path / "in" / "a.png")
    make_image(1).save(tmp_path / "b.jpg")
    (tmp_path / "mmpr.jsonl").write_text("\n".join(map(json.dumps, LINES)))
    return tmp_path


@pytest.fixture
def pairs(folder):
    return load_preferences(folder / "mmpr.jsonl")


def again(written):
    return load_preferences(written.path, **({"image_root": written.image_root} if written.image_root else {}))


def without(written, *sets):
    """Drop the columns that are not kept from data sets."""
    return [one.remove_columns([name for name in not_kept(written) if name in one.column_names]) for one in sets]


@pytest.mark.parametrize(
    ("target", "settings"),
    [
        ("out.jsonl", {}),
        ("out.jsonl", {"images": "copy"}),
        ("out.jsonl", {"form": "mmpr"}),
        ("out.jsonl", {"form": "mmpr", "images": "copy"}),
        ("out.parquet", {}),
        ("out.parquet", {"images": "path"}),
        ("out.parquet", {"images": "copy"}),
        ("saved", {}),
        ("new/folder/out.jsonl", {}),
    ],
)
def test_round_trips(pairs, folder, target, settings):
    written = write_pairs(pairs, folder / target, **settings)
    assert written.lost == ({"source": 3} if settings.get("form") == "mmpr" else {})
    assert first_difference(*without(written, pairs, again(written))) is None
    assert not list(folder.rglob("*.partial"))


@pytest.mark.parametrize("target", ["out.jsonl", "out.parquet", "saved"])
def test_the_number_of_frames_is_kept(folder, target):
    """A source's number of frames is stored in its records, and takes precedence over the reader's setting."""
    (folder / "film.mp4").write_bytes(b"decoded when it is used")
    (folder / "films.jsonl").write_text(json.dumps({"video": "film.mp4", "question": "Why?", "chosen": "a", "rejected": "b"}))
    written = write_pairs(load_preferences(folder / "films.jsonl", frames={"max": 4}), folder / target)
    found = load_preferences(written.path, frames={"max": 16}, **({"image_root": folder} if written.image_root else {}))
    assert found[0]["frames"] == {"min": 4, "max": 4}
    assert "metadata" not in found.column_names


def test_frames_that_are_no_numbers_stay_what_they_are(folder):
    line = {"prompt": "Why?", "chosen": "a", "rejected": "b", "frames": ["1.png", "2.png"]}
    (folder / "other.jsonl").write_text(json.dumps(line))
    with pytest.raises(ValueError, match="'frames'"):
        load_preferences(folder / "other.jsonl")
    found = load_preferences(folder / "other.jsonl", metadata=["frames"])
    assert json.loads(found[0]["metadata"]) == {"frames": ["1.png", "2.png"]}


@pytest.mark.parametrize("target", ["out.jsonl", "out.mmpr.jsonl", "out.parquet", "saved"])
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_in_every_form(folder, format, target):
    """A good line of each format, detected, written and read again, gives the same record."""
    line = json.dumps(GOOD[format]).replace("a.png", "in/a.png")
    (folder / "given.jsonl").write_text(line)
    pairs = load_preferences(folder / "given.jsonl")
    written = write_pairs(pairs, folder / target, form="mmpr" if "mmpr" in target else None)
    assert first_difference(*without(written, pairs, again(written))) is None


@pytest.mark.parametrize(
    "metadata",
    [
        {"by": "hand"},
        {"ds_name": "x", "idx": 3, "id": "other", "image_path": "gone.png"},
        {"text": "Look."},
        {"text": '{"question": "Who?"}', "messages": [1], "completions": 2},
        {"prompt": "Another?"},
        {"clip": [0, 1], "system": "Be brief.", "question": "Who?"},
        {"nothing": None},
        {"metadata": {"by": "hand"}},
        {"metadata": "by hand"},
        {"metadata": {"metadata": {}}, "b": 1},
    ],
    ids=json.dumps,
)
def test_no_name_among_metadata_changes_how_a_line_of_mmpr_is_read(folder, metadata):
    given = {"id": "one", "images": ["a.png"], "prompt": "What?", "chosen": "A cat.", "rejected": "A dog.", "metadata": metadata}
    (folder / "in" / "given.jsonl").write_text(json.dumps(given))
    pairs = load_preferences(folder / "in" / "given.jsonl")
    assert json.loads(pairs[0]["metadata"]) == metadata
    written = write_pairs(pairs, folder / "out.jsonl", form="mmpr")
    assert first_difference(*without(written, pairs, again(written))) is None
    assert json.loads(written.path.read_text()).get("by") == metadata.get("by")  # in its place, unless it has another meaning there


def test_mmpr_lines_come_back_as_they_were(pairs, folder):
    """MMPR -> Parquet with the images inside -> MMPR: the same lines, except for the image paths."""
    parquet = load_preferences(write_pairs(pairs, folder / "out.parquet").path)
    written = write_pairs(parquet, folder / "again.jsonl", form="mmpr")
    lines = [json.loads(line) for line in written.path.read_text("utf-8").rstrip("\n").split("\n")]
    for line, original in zip(lines, LINES, strict=True):
        shown = line.pop("image", [])
        original = dict(original)
        names = original.pop("image", [])
        for path, name in zip(*([one] if isinstance(one, str) else one for one in (shown, names)), strict=True):
            assert (written.image_root / path).read_bytes() == (folder / name).read_bytes()
            assert (written.image_root / path).suffix == name[-4:]
        question = original["question"]
        expected = question if "<image>" in question or not names else f"<image>\n{question}"
        assert line == {**original, "question": expected}


def test_paths_are_relative_to_the_deepest_folder_or_the_one_that_is_given(pairs, folder):
    (elsewhere := folder / "elsewhere").mkdir()
    assert write_pairs(pairs, elsewhere / "x.jsonl").image_root == folder.resolve()
    assert write_pairs(pairs.select([0, 2]), elsewhere / "y.jsonl").image_root == (folder / "in").resolve()
    beside = write_pairs(pairs.select([0, 2]), folder / "y.jsonl")
    assert len(load_preferences(beside.path)) == 2  # its folder contains the images, so nothing else has to be said
    written = write_pairs(pairs.select([0]), folder / "z.jsonl", image_root=folder)
    assert json.loads(written.path.read_text())["images"] == ["in/a.png"]
    with pytest.raises(ValueError, match="lies outside"):
        write_pairs(pairs, folder / "w.jsonl", image_root=folder / "in")
    assert not (folder / "w.jsonl").exists()


def test_everything_a_record_may_have_survives(folder):
    row = {
        "id": "all",
        "source": "charts",
        "prompt_id": "p",
        "images": [{"bytes": (folder / "in" / "a.png").read_bytes(), "path": None}],
        "prompt": [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": [{"type": "text", "text": "Look: "}, {"type": "image", "text": None}]},
            {"role": "assistant", "content": [{"type": "text", "text": "I do."}]},
            {"role": "user", "content": [{"type": "text", "text": "And?"}]},
        ],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "Red."}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "Blue."}]}],
        "ground_truth": "red",
        "margin": 0.25,
        "tiles": {"min": None, "max": 6, "thumbnail": False},
        "augment": True,
        "metadata": '{"by": "hand"}',
    }
    features = KINDS["pair"].features
    pairs = Dataset.from_list([row], features=features.__class__({name: features[name] for name in row}))
    for target in ("a.jsonl", "b.parquet", "c"):
        assert first_difference(pairs, again(write_pairs(pairs, folder / target))) is None
    with pytest.raises(ValueError, match="Record 'all': .*'prompt'"):
        write_pairs(pairs, folder / "d.jsonl", form="mmpr")
    assert not (folder / "d.jsonl").exists()


@pytest.mark.parametrize(
    ("target", "settings", "message"),
    [
        ("mmpr.jsonl", {}, "mmpr.jsonl already exists"),
        ("x.jsonl", {"form": "csv"}, "form .*trl, mmpr, parquet, disk.*got 'csv'"),
        ("x.jsonl", {"images": "bytes"}, "images='bytes'"),
        ("x.jsonl", {"images": "links"}, "images .*path, copy, bytes.*got 'links'"),
        ("x.csv", {}, "x.csv .*unknown suffix .csv"),
        ("x.jsonl.gz", {}, "x.jsonl.gz .*unknown suffix .gz"),
        ("x", {"images": "path"}, "images='path'"),
        ("x.parquet", {"image_root": "."}, "image_root='.'"),
    ],
)
def test_refusals(pairs, folder, target, settings, message):
    before = (folder / "mmpr.jsonl").read_bytes()
    with pytest.raises(ValueError, match=message):
        write_pairs(pairs, folder / target, **settings)
    assert (folder / "mmpr.jsonl").read_bytes() == before


def test_differences_are_found(pairs, folder):
    """The check of a conversion finds a lost pair, a changed text, another image, a lost column."""
    assert first_difference(pairs, pairs) is None
    assert first_difference(pairs, pairs.select([0, 1])) == "3 pairs against 2"
    assert "column 'id'" in first_difference(pairs, pairs.select([0, 2, 1]))
    make_image(5).save(folder / "in" / "a.png")
    other = write_pairs(pairs, folder / "other.parquet")
    make_image(0).save(folder / "in" / "a.png")
    assert "column 'images'" in first_difference(pairs, load_preferences(other.path))
    assert "column 'ground_truth'" in first_difference(pairs, pairs.remove_columns(["ground_truth"]))


@pytest.mark.parametrize(
    ("target", "settings"), [("v.jsonl", {}), ("v.jsonl", {"form": "mmpr", "images": "copy"}), ("v.parquet", {}), ("v", {})]
)
def test_videos(folder, target, settings):
    """A video is written as a path relative to the given folder, or copied."""
    (folder / "films").mkdir()
    (folder / "films" / "one.mp4").write_bytes(b"never opened")
    line = {
        "id": "film",
        "video": "films/one.mp4",
        "question": "<video>\nWhat happens?",
        "chosen": "A lot.",
        "rejected": "Nothing.",
    }
    (folder / "videos.jsonl").write_text(json.dumps(line))
    pairs = load_preferences(folder / "videos.jsonl")
    written = write_pairs(pairs, folder / target, **settings)
    loaded = again(written)
    assert [path.read_bytes() for path in map(Path, loaded[0]["videos"])] == [b"never opened"]
    bare = [one.remove_columns(["videos", "prompt_id", *written.lost]) for one in (pairs, loaded)]
    assert first_difference(*bare) is None
