"""MMPR's meta.json as published: paths, repeat_time, length, tiles, augmentation."""

import json
from pathlib import Path

import pytest

from mpo.data import load_preferences
from mpo.data.mixture_file import count_lines, is_meta, read_meta


def annotations(folder, name, count, image=None):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {
            "question": f"What is {number}?",
            "chosen": f"It is {name}.",
            "rejected": "No idea.",
            **({"image": image} if image else {}),
        }
        for number in range(count)
    ]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def mmpr(tmp_path, images):
    """A folder as of the unpacked MMPR-v1.2, whose meta.json names the folder in every path."""
    home = tmp_path / "MMPR-v1.2"
    (home / "images").mkdir(parents=True)
    (home / "images" / "cat").symlink_to(images)
    annotations(home / "annotations", "cat_correctness_rules", 10, "a.png")
    annotations(home / "annotations", "text_format_rules", 4)
    annotations(home / "annotations", "often", 3)
    entries = {
        "cat_correctness_rules": {
            "root": "MMPR-v1.2/images/cat",
            "annotation": "MMPR-v1.2/annotations/cat_correctness_rules.jsonl",
            "data_augment": True,
            "repeat_time": 0.5,
            "length": 10,
            "max_dynamic_patch": 6,
        },
        "text_format_rules": {
            "root": "MMPR-v1.2/images/none",
            "annotation": "MMPR-v1.2/annotations/text_format_rules.jsonl",
            "data_augment": False,
            "repeat_time": 1,
            "length": 4,
        },
        "often": {"root": "", "annotation": "MMPR-v1.2/annotations/often.jsonl", "repeat_time": 2},
    }
    (home / "meta.json").write_text(json.dumps(entries, indent=2))
    return home / "meta.json"


def changed(path, source="cat_correctness_rules", **fields):
    entries = json.loads(path.read_text())
    entries[source] |= fields
    path.write_text(json.dumps({source: {k: v for k, v in entries[source].items() if v != "gone"}}))
    return path


def test_read_meta(mmpr):
    cat, text, often = read_meta(mmpr)
    assert (cat["name"], cat["repeat_time"], cat["tiles"], cat["augment"]) == ("cat_correctness_rules", 0.5, {"max": 6}, True)
    assert Path(cat["image_root"]).samefile(mmpr.parent / "images" / "cat")
    assert Path(cat["path"]).samefile(mmpr.parent / "annotations" / "cat_correctness_rules.jsonl")
    assert (text["repeat_time"], text["tiles"], text["augment"]) == (1, None, None)
    assert often["repeat_time"] == 2


def test_load_pairs_of_a_meta(mmpr):
    """Half of ten, four once, three twice, each with its source, tiles and augmentation; the choice depends on the seed."""
    pairs = load_preferences(mmpr, seed=3)
    sources = pairs["source"][:]
    assert {name: sources.count(name) for name in sources} == {"cat_correctness_rules": 5, "text_format_rules": 4, "often": 6}
    cat, text = pairs[sources.index("cat_correctness_rules")], pairs[sources.index("text_format_rules")]
    assert (cat["tiles"], cat["augment"]) == ({"min": None, "max": 6, "thumbnail": None}, True)
    assert (text["tiles"], text["augment"], text["images"]) == (None, None, [])
    assert len(cat["images"]) == 1
    assert load_preferences(mmpr, seed=3)["id"][:] == pairs["id"][:] != load_preferences(mmpr, seed=4)["id"][:]
    assert len(load_preferences(mmpr, limit=7)) == 7
    tiles = load_preferences(mmpr, tiles={"max": 12})["tiles"]
    assert {one["max"] for one in tiles} == {6, 12}
    with pytest.raises(ValueError, match="how often .*streaming=false"):
        load_preferences(mmpr, streaming=True)


def test_paths_relative_to_a_given_folder(mmpr, tmp_path):
    elsewhere = tmp_path / "other" / "deep" / "my_meta.json"
    elsewhere.parent.mkdir(parents=True)
    elsewhere.write_bytes(mmpr.read_bytes())
    assert is_meta(elsewhere)
    with pytest.raises(ValueError, match="no annotation file.*data.image_root"):
        load_preferences(elsewhere)
    assert len(load_preferences(elsewhere, image_root=tmp_path)) == 15


def test_an_image_outside_of_its_sources_root(mmpr):
    annotations(mmpr.parent / "annotations", "cat_correctness_rules", 10, "../outside.png")
    with pytest.raises(ValueError, match="cat_correctness_rules.jsonl:1: .*lies outside"):
        load_preferences(mmpr)


@pytest.mark.parametrize("root", ["..", "/", "MMPR-v1.2/images/link"])
def test_a_root_outside_of_a_given_folder(mmpr, tmp_path, root):
    """Without the folder, the file may name any root; with it, no root may be outside."""
    (mmpr.parent / "images" / "link").symlink_to("/")
    changed(mmpr, "text_format_rules", root=root)
    assert len(load_preferences(mmpr)) == 4
    with pytest.raises(ValueError, match="source 'text_format_rules': .*outside data.image_root"):
        load_preferences(mmpr, image_root=tmp_path)
    assert len(load_preferences(changed(mmpr, "text_format_rules", root="MMPR-v1.2/images/.."), image_root=tmp_path)) == 4


def test_blank_lines_at_the_end_do_not_count_as_length(mmpr):
    with (mmpr.parent / "annotations" / "text_format_rules.jsonl").open("a") as file:
        file.write("\n \n")
    assert len(load_preferences(changed(mmpr, "text_format_rules"))) == 4


def test_a_meta_has_no_splits(mmpr):
    with pytest.raises(ValueError, match="meta.json has no split 'validation'.*'train'"):
        load_preferences(mmpr, split="validation")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"length": 11}, "has 10 lines, .*'length' says 11"),
        ({"length": -1}, "'length' .*0 or more.*got -1"),
        ({"length": 10.0}, "'length' .*got 10.0"),
        ({"length": "10"}, "'length' .*got '10'"),
        ({"repeat_time": 0}, "'repeat_time' .*got 0"),
        ({"repeat_time": -1}, "'repeat_time' .*got -1"),
        ({"repeat_time": "1"}, "'repeat_time' .*got '1'"),
        ({"repeat_time": True}, "'repeat_time' .*got True"),
        ({"repeat_time": float("nan")}, "'repeat_time' .*got nan"),
        ({"repeat_time": float("inf")}, "'repeat_time' .*got inf"),
        ({"repeat_time": None}, "'repeat_time' .*got None"),
        ({"max_dynamic_patch": 0}, "'max_dynamic_patch' .*1 or more.*got 0"),
        ({"max_dynamic_patch": True}, "'max_dynamic_patch' .*got True"),
        ({"data_augment": "yes"}, "'data_augment' .*true or false"),
        ({"annotation": "gone"}, "'annotation' is missing"),
        ({"annotation": ""}, "'annotation' is empty"),
        ({"annotation": None}, "'annotation' is null"),
        ({"annotation": 5}, "'annotation' is a number"),
        ({"annotation": "none.jsonl"}, "no annotation file"),
        ({"annotation": "MMPR-v1.2/annotations"}, "no annotation file"),
        ({"annotation": "https://example.org/a.jsonl"}, "nothing is downloaded"),
        ({"root": "gone"}, "'root' is missing"),
        ({"root": ["a"]}, "'root' is a list"),
        ({"root": "s3://bucket/"}, "nothing is downloaded"),
        ({"root": "a\0b"}, "'root' is text"),
        ({"from_preferences": True}, "'from_preferences', .*mixture"),
        ({"tiles": {"max": 2}}, "'tiles', .*mixture"),
        ({"weight": 2}, "'weight', .*mixture"),
    ],
)
def test_entries_that_make_no_sense(mmpr, fields, reason):
    with pytest.raises(ValueError, match=reason) as error:
        read_meta(changed(mmpr, **fields))
    assert "meta.json: source 'cat_correctness_rules'" in str(error.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "list instead of"),
        ("{}", "an empty object"),
        ("5", "a number instead"),
        ('{"a": 5}', "source 'a' is a number"),
        ('{"a": null}', "source 'a' is null"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_files_that_are_no_meta(tmp_path, text, reason):
    path = tmp_path / "meta.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=reason):
        read_meta(path)
    if text.startswith("{"):
        with pytest.raises(ValueError, match=reason):
            load_preferences(path)
    with pytest.raises(ValueError, match="There is no file"):
        read_meta(tmp_path / "none.json")


def test_lines_in_a_json_file_are_no_meta(tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps({"question": "?", "chosen": "A", "rejected": "B"}))
    assert not is_meta(path)
    assert len(load_preferences(path)) == 1


def test_count_lines(tmp_path):
    path = tmp_path / "lines"
    for text, lines in (("", 0), ("a", 1), ("a\n", 1), ("a\nb", 2), ("a\n\nb\n", 3), ("a\n\n \r\n", 1), ("\n\n", 0)):
        path.write_text(text)
        assert count_lines(path) == lines
    for content, records in ((b' [{"a": 1},\n\n {}]\n', 2), (b"[{", None), (b"\x1f\x8b\x08\n", None), (b"PAR1\n", None)):
        path.write_bytes(content)
        assert count_lines(path) == records
