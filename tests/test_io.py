"""Files that are whole or absent, and JSON of unknown origin."""

import json
import os
import pickle
import threading
from pathlib import Path

import pytest

from mpo.io import (
    MAX_REASON_LENGTH,
    TEMPORARY,
    BadRecord,
    append_json_lines,
    atomic_folder,
    atomic_write,
    did_you_mean,
    read_json_lines,
    replacing,
    temporary_path,
    write_json_lines,
    write_text,
)


def test_an_interrupted_write_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "new" / "lines.jsonl"

    def interrupted():
        yield {"a": 1}
        raise KeyboardInterrupt

    for before in (None, [{"a": 0}]):
        if before is not None:
            write_json_lines(path, before)
        with pytest.raises(KeyboardInterrupt):
            write_json_lines(path, interrupted())
        assert [entry.name for entry in path.parent.iterdir()] == ([] if before is None else ["lines.jsonl"])
    assert read_json_lines(path) == before


def test_writers_at_the_same_time_do_not_mix(tmp_path):
    """Eight threads write a text of one letter each; whichever is last, the file has one letter, and no temporary file stays."""
    path = tmp_path / "state.json"
    threads = [threading.Thread(target=write_text, args=(path, letter * 100_000)) for letter in "abcdefgh"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(path.read_text())) == 1 and len(path.read_text()) == 100_000
    assert os.listdir(tmp_path) == ["state.json"]


def test_a_durable_write_flushes_the_file_before_it_gets_its_name_and_the_folder_afterwards(tmp_path, monkeypatch):
    path, seen, fsync = tmp_path / "a", [], os.fsync

    def noted(descriptor):
        seen.append((os.path.isdir(f"/proc/self/fd/{descriptor}"), path.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    with atomic_write(path, "wb", durable=True) as file:
        file.write(b"x")
    assert seen == [(False, False), (True, True)]


def test_temporary_names_tell_their_target(tmp_path):
    assert TEMPORARY.fullmatch(temporary_path(tmp_path / "a.parquet").name)["name"] == "a.parquet"


def test_a_folder_appears_whole(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), atomic_folder(target) as partial:
        (partial / "a").write_text("1")
        raise KeyboardInterrupt
    assert not target.exists()
    with atomic_folder(target) as partial:
        assert not list(partial.iterdir())
        (partial / "b").write_text("2")
    assert [path.name for path in target.iterdir()] == ["b"]
    with pytest.raises(ValueError, match=f"{target}"), atomic_folder(target):
        pass


@pytest.mark.parametrize("theirs", ["file", "folder", "link", "both"])
def test_a_users_own_partial_is_left_alone(tmp_path, theirs):
    """``TARGET.partial`` is emptied only if failed attempts are all it holds."""
    target, own = tmp_path / "out", tmp_path / "out.partial"
    if theirs == "file":
        own.write_text("mine")
    elif theirs == "link":
        (tmp_path / "elsewhere").mkdir()
        own.symlink_to(tmp_path / "elsewhere")
    else:
        own.mkdir()
        (own / "thesis.tex").write_text("mine")
    if theirs == "both":
        temporary_path(own / "out").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=f"{own} "), atomic_folder(target):
        pass
    assert sorted(tmp_path.rglob("*")) == before


def test_a_target_is_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with atomic_folder(Path(".")) as partial:
        (partial / "a").write_text("1")
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["here", "here/a"]


def test_lines_appended_after_an_unterminated_line_stay_whole(tmp_path):
    """As a killed process leaves it: the line that was cut is a bad record, and the next one is itself."""
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 0}\n{"a": 1}')
    append_json_lines(path, [{"a": 2}])
    assert read_json_lines(path) == [{"a": 0}, {"a": 1}, {"a": 2}]
    path.write_text('{"a": 0}\n{"a"')
    append_json_lines(path, [{"a": 2}])
    assert path.read_text().splitlines()[2] == '{"a": 2}'
    with pytest.raises(BadRecord, match="lines.jsonl:2"):
        read_json_lines(path)


def test_appending_writes_to_a_pipe(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    append_json_lines(pipe, [{"a": "x" * 200_000}])  # more than a pipe holds
    reader.join()
    assert json.loads(read[0]) == {"a": "x" * 200_000}


def test_text_of_another_encoding_is_named(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes('{"a": "e"}\n{"a": "\u00e9"}\n'.encode("latin-1"))
    with pytest.raises(BadRecord, match=r"lines.jsonl:2: .*UTF-8 \(byte 8 "):
        read_json_lines(path)


@pytest.mark.parametrize("line", ['{"a": ', "[" * 100_000, "1" * 5000])
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "lines.jsonl"
    append_json_lines(path, [{"a": "\u00e9"}])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(BadRecord, match="lines.jsonl:2"):
        read_json_lines(path)
    assert json.loads(path.read_text().splitlines()[0]) == {"a": "\u00e9"}


def test_a_bad_record_crosses_processes_and_has_a_bounded_reason():
    error = pickle.loads(pickle.dumps(BadRecord("pairs.jsonl:3", "x" * 10_000)))
    assert (error.where, len(error.reason)) == ("pairs.jsonl:3", MAX_REASON_LENGTH)


@pytest.mark.parametrize("name, hint", [("learning_rat", "'learning_rate'"), (3, ""), (None, "")])
def test_hints(name, hint):
    found = did_you_mean(name, ["learning_rate", "seed"])
    assert hint in found and bool(hint) == bool(found)


def test_a_link_a_mode_and_a_pipe_stay_what_they_are(tmp_path):
    private, link, pipe = tmp_path / "private", tmp_path / "link", tmp_path / "pipe"
    private.write_text("old")
    private.chmod(0o600)
    link.symlink_to(private)
    write_text(link, "new")
    assert link.is_symlink() and private.read_text() == "new" and private.stat().st_mode & 0o777 == 0o600
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    read: list[str] = []
    reader.start()
    write_text(pipe, "through")
    reader.join()
    assert read == ["through"] and pipe.is_fifo()


def test_a_folder_that_is_not_finished_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), replacing(tmp_path / "out") as temporary:
        temporary.mkdir()
        (temporary / "a.arrow").write_text("half")
        raise RuntimeError
    assert not [*tmp_path.iterdir()]
    with replacing(tmp_path / "out") as temporary:
        temporary.mkdir()
        (temporary / "a.arrow").write_text("whole")
    assert [*tmp_path.iterdir()] == [tmp_path / "out"] and (tmp_path / "out/a.arrow").read_text() == "whole"
