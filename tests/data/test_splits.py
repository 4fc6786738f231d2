"""Folders of files: which files belong to a split, and that only these are read."""

import json
import socket

import pytest
from data.test_files import QUESTIONS, asked, line, tar, write
from datasets import Dataset

from mpo.data import load_preferences
from mpo.data.files import files_of_split, open_files


def made(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def test_a_data_set_laid_out_as_on_the_hub(tmp_path):
    """Every row is named by its file, and text that looks like a date stays text."""
    folder = tmp_path / "hub"
    (folder / "data").mkdir(parents=True)
    for split, numbers in (("train", range(5)), ("test", range(5, 7))):
        rows = [line(number, day="2015-01-01") for number in numbers]
        Dataset.from_list(rows).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    pairs = load_preferences(folder)
    assert asked(pairs) == QUESTIONS[:5]
    assert pairs["id"][1] == f"{folder}/data/train-00000-of-00001.parquet:2"
    assert json.loads(pairs[0]["metadata"]) == {"day": "2015-01-01"}
    assert asked(load_preferences(folder, split="test")) == QUESTIONS[5:]
    assert asked(load_preferences(folder, streaming=True)) == QUESTIONS[:5]
    assert asked(load_preferences(folder, split="train[:2]")) == QUESTIONS[:2]
    assert asked(load_preferences(folder, split="train[20%:60%]")) == QUESTIONS[1:3]
    with pytest.raises(ValueError, match=r"'train\[x\]' could not be loaded"):
        load_preferences(folder, split="train[x]")
    with pytest.raises(ValueError, match=r"no split 'dev(\[:2\])?'"):
        load_preferences(folder, split="dev[:2]")


def test_a_readme_is_not_obeyed(tmp_path, monkeypatch):
    """`datasets` would download what a README names, or read a file above the folder."""
    write(tmp_path / "secret.jsonl", [line(6)])
    folder = tmp_path / "given"
    folder.mkdir()
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("the network"))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    for named in ("../secret.jsonl", "hf://datasets/somebody/pairs/a.jsonl", "http://127.0.0.1:9/a.jsonl"):
        (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {named}\n---\n")
        with pytest.raises(ValueError, match="given .*folder of records"):
            load_preferences(folder)
    write(folder / "own.jsonl", [line(0), {"question": "?"}])
    with pytest.raises(ValueError, match="given/own.jsonl:2: 'chosen' is missing"):
        load_preferences(folder)


def test_names_that_tell_a_split(tmp_path):
    names = ["a.jsonl", "train_1.jsonl", "pairs-test.jsonl", "dev.jsonl", "held_out2.jsonl", "contest.jsonl", "data/valid-0.jsonl"]
    names += ["validation/x.jsonl", "test/a.png", "images/a.jsonl", ".hidden.jsonl", "bad_records.jsonl", "dataset_info.json"]
    names += ["data/train_prefs-00000-of-00002.jsonl"]
    folder = made(tmp_path, *names)

    def of(split):
        return [str(file.relative_to(folder)) for file in files_of_split(folder, split)]

    assert of("train") == ["a.jsonl", "contest.jsonl", "held_out2.jsonl", "train_1.jsonl"]
    assert of("test") == ["pairs-test.jsonl"]
    assert of("validation") == of("val") == ["dev.jsonl", "validation/x.jsonl", "data/valid-0.jsonl"]
    assert of("train_prefs") == ["data/train_prefs-00000-of-00002.jsonl"]
    with pytest.raises(ValueError, match="no split 'held_out'.*validation, test, train_prefs"):
        of("held_out")
    made(tmp_path, "held_out-2.jsonl", "held_out/x.jsonl")
    assert of("held_out") == ["held_out/x.jsonl", "held_out-2.jsonl"]


def test_files_in_other_subfolders_are_reported(tmp_path, caplog):
    folder = made(tmp_path, "a.jsonl", "validation/b.jsonl", "data/c.jsonl", ".cache/d.jsonl", "images/e.png")
    open_files(folder)
    assert not caplog.messages
    made(tmp_path, "more/f.jsonl", "data/held_out/g.jsonl")
    open_files(folder)
    assert "(2, such as more/f.jsonl)" in caplog.text and f"{folder}/**/*.jsonl" in caplog.text


def test_several_file_types_in_one_folder(tmp_path):
    """They may have the same pairs twice. Next to tars, other files are ignored; another split may have another file type."""
    folder = made(tmp_path / "mixed", "a.jsonl", "a.parquet", "test.json")
    with pytest.raises(ValueError, match="a.jsonl and a.parquet.*mixed/\\*.jsonl"):
        load_preferences(folder)
    assert [file.name for file in files_of_split(folder, "test")] == ["test.json"]
    shards = made(tmp_path / "shards", "sizes.json")
    for number, name in enumerate(("0.tar", "1.tar", "test-0.tar")):
        tar(shards / name, [(f"{number}.json", line(number))])
    assert asked(load_preferences(shards)) == QUESTIONS[:2]
    assert asked(load_preferences(shards, split="test")) == QUESTIONS[2:3]


def test_links_in_a_folder(tmp_path):
    """A link to a file elsewhere is followed; a broken link is an error."""
    write(tmp_path / "elsewhere.jsonl", [line(0)])
    folder = tmp_path / "links"
    folder.mkdir()
    (folder / "a.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    assert asked(load_preferences(folder)) == QUESTIONS[:1]
    (folder / "b.jsonl").symlink_to(tmp_path / "nothing.jsonl")
    with pytest.raises(ValueError, match="b.jsonl is not .*regular"):
        load_preferences(folder)


def test_what_lies_beside_the_pairs_changes_nothing(tmp_path, monkeypatch):
    folder = made(tmp_path, "images/a.txt")
    write(folder / "pairs.jsonl", [line(0)])
    load_preferences(folder)
    made(folder, "images/b.txt", "bad_records.jsonl")
    monkeypatch.setattr("mpo.data.sources._write", None)  # converting again would fail
    assert asked(load_preferences(folder)) == QUESTIONS[:1]
