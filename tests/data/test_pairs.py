"""Records from files of pairs."""

import json

import pytest
from support import make_image

from mpo.data import load_preferences
from mpo.schema import Preference

GOOD = {"image": "a.png", "question": "What is it?", "chosen": "A cat.", "rejected": "A dog."}


@pytest.fixture
def folder(tmp_path):
    make_image(0).save(tmp_path / "outside.png")
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        make_image(0).save(folder / name)
    return folder


def write(folder, *lines) -> str:
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def parts(message) -> list[str]:
    return [part["text"] if part["type"] == "text" else "<image>" for part in message[0]["content"]]


def test_mmpr_lines(folder):
    """One image, several (with placeholders), none."""
    pairs = load_preferences(
        write(
            folder,
            GOOD,
            {**GOOD, "image": ["a.png", "b.png"], "question": "First <image>\nsecond <image>?", "id": "two"},
            "",
            {key: value for key, value in GOOD.items() if key != "image"},
        )
    )
    assert [len(row["images"]) for row in pairs] == [1, 2, 0]
    assert parts(pairs[0]["prompt"]) == ["<image>", "What is it?"]
    assert parts(pairs[1]["prompt"]) == ["First ", "<image>", "second ", "<image>", "?"]
    assert parts(pairs[2]["prompt"]) == ["What is it?"]
    assert parts(pairs[0]["chosen"]) == ["A cat."]
    assert pairs[1]["id"] == "two"
    assert pairs[0]["images"][0].size == (64, 32)


def test_messages(folder):
    line = {
        "images": ["a.png"],
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is it?"}],
        "chosen": [{"role": "assistant", "content": "A cat."}],
        "rejected": [{"role": "assistant", "content": "A dog."}],
    }
    (row,) = load_preferences(write(folder, line))
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    assert parts(row["prompt"][1:]) == ["<image>", "What is it?"]


def test_limit(folder):
    assert len(load_preferences(write(folder, GOOD, GOOD, GOOD), limit=2)) == 2


def test_parquet_and_saved_folders(folder):
    pairs = load_preferences(write(folder, GOOD, GOOD))
    pairs.to_parquet(folder / "pairs.parquet")
    pairs.save_to_disk(folder / "saved")
    for path in ("pairs.parquet", "saved"):
        loaded = load_preferences(folder / path)
        assert loaded[0]["chosen"] == pairs[0]["chosen"]
        assert loaded[0]["images"][0].size == (64, 32)


SILENT = [
    {"role": "assistant", "content": " "},
    {"role": "user", "content": "Well?"},
    {"role": "assistant", "content": "A cat."},
]
"""A completion of three messages, the first of which would teach the model to say nothing."""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": ', r"pairs.jsonl:2: not JSON"),
        ("[1, 2]", "JSON list instead"),
        ({"question": "?", "chosen": "a"}, "'rejected' is missing"),
        ({"question": "?", "choosen": "a", "rejected": "b"}, "'chosen' is missing.* If 'choosen' is meant, call it 'chosen'"),
        ({**GOOD, "chosen": ""}, "'chosen' is empty"),
        ({**GOOD, "chosen": SILENT}, "'chosen' is empty"),
        ({**GOOD, "rejected": GOOD["chosen"]}, "the same completion"),
        ({**GOOD, "image": "missing.png"}, "no image 'missing.png'"),
        ({**GOOD, "image": "../outside.png"}, "lies outside"),
        ({**GOOD, "question": "<image><image>?"}, "2 <image> placeholders for 1 images"),
    ],
)
def test_refusals_name_the_line(folder, line, message):
    with pytest.raises(ValueError, match=message) as error:
        load_preferences(write(folder, GOOD, line))
    assert "pairs.jsonl:2" in str(error.value)


def test_missing_and_empty_files(folder):
    with pytest.raises(ValueError, match="There is no file"):
        load_preferences(folder / "nothing.jsonl")
    with pytest.raises(ValueError, match="has no pairs"):
        load_preferences(write(folder, ""))


def test_tiles_of_a_source(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"question": "Why?", "chosen": "So.", "rejected": "No."}\n' * 2)
    pairs = load_preferences(path, tiles={"min": None, "max": 6, "thumbnail": False})
    assert pairs["tiles"][:] == [{"min": None, "max": 6, "thumbnail": False}] * 2
    assert "tiles" not in load_preferences(path, tiles={"min": None, "max": None, "thumbnail": None}).column_names


def test_pairs_of_a_prompt_are_grouped_and_flat_again():
    """The same text with another image, or other tiles, is another prompt; nothing is lost on the way back."""
    pairs = [
        {"id": number, "prompt": text, "images": [image], "chosen": "4", "rejected": rejected, **more}
        for number, (text, image, rejected, more) in enumerate(
            [
                ("2 + 2?", b"a", "5", {}),
                ("3 + 1?", b"a", "5", {}),
                ("2 + 2?", b"a", "6", {"margin": 1.0}),
                ("2 + 2?", b"b", "5", {}),
                ("2 + 2?", b"a", "5", {"tiles": {"max": 1}}),
                ("2 + 2?", b"a", "4.0", {"chosen": "6"}),
            ]
        )
    ]
    groups = Preference.grouped(pairs)
    assert [[columns["id"] for columns in group.columns] for group in groups] == [[0, 2, 5], [1], [3], [4]]
    assert (groups[0].completions, groups[0].pairs) == (["4", "5", "6", "4.0"], [(0, 1), (0, 2), (2, 3)])
    assert sorted((pair for group in groups for pair in group.flat()), key=lambda pair: pair["id"]) == pairs
