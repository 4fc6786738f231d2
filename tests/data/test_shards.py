"""Lines, rows and samples that cannot be read or are too large, and the good ones around them."""

import gzip
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.test_files import QUESTIONS, SAMPLE, asked, line, tar
from datasets import Dataset

from mpo.curation.validate import validate
from mpo.data import load_preferences, shards
from mpo.io import BadRecord


def skipping(path):
    """Return the questions of a source's good records, and the places and reasons of the bad ones."""
    listed = path.parent / "listed.jsonl"
    pairs = load_preferences(path, on_bad_record="skip", max_bad_fraction=1, bad_records=listed)
    bad = [json.loads(text) for text in listed.read_text().splitlines()]
    return asked(pairs.remove_columns("images")), [(entry["where"], entry["reason"]) for entry in bad]


def refused(path, place, reason):
    """Check the first bad record of a source, when bad records are not skipped."""
    with pytest.raises(BadRecord, match=reason) as error:
        load_preferences(path)
    assert error.value.where == f"{path}{place}"


# Lines


@pytest.mark.parametrize("packed", [False, True])
def test_a_line_that_is_too_long(tmp_path, monkeypatch, packed):
    monkeypatch.setattr(shards, "MAX_LINE_BYTES", 500)
    path = tmp_path / ("pairs.jsonl.gz" if packed else "pairs.jsonl")
    text = "".join(f"{one}\n" for one in (json.dumps(line(0)), "x" * 5000, json.dumps(line(1)), "x" * 500, "y" * 501)).encode()
    path.write_bytes(gzip.compress(text) if packed else text)
    refused(path, ":2", "a line of more than")
    good, bad = skipping(path)
    assert good == QUESTIONS[:2]
    assert [where for where, _ in bad] == [f"{path}:2", f"{path}:4", f"{path}:5"]


@pytest.mark.parametrize(
    ("text", "place", "reason"),
    [
        ('[\n%s,\n{"a": },\n%s]', ":3", "not JSON from here on"),
        ('[\n%s,\n{"a": "\n}, \n%s]', ":3", "not JSON from here on"),
        ("[\n%s,\n\0,\n%s]", ":3", "zero byte"),
        ("[\n%s\n%s]", ":2", "not JSON after this object"),
        ("[\n%s,\n%s", ":3", "not JSON after this object"),
        ("[\n%s,\n%s] x", "", "text after the end"),
        ("[\n%s,\n%s][]", "", "text after the end"),
    ],
)
def test_arrays_with_damage(tmp_path, text, place, reason):
    """What cannot be read is of unknown size, so it is not skipped."""
    path = tmp_path / "pairs.json"
    path.write_text(text % (json.dumps(line(0)), json.dumps(line(1))))
    refused(path, place, reason)
    for streaming in (False, True):
        with pytest.raises(BadRecord, match=reason):
            list(load_preferences(path, on_bad_record="skip", max_bad_fraction=1, streaming=streaming))
    found = validate(path, output=tmp_path / "bad.jsonl")
    assert sum(found.counts.values()) == 1 and not found.may_start


@pytest.mark.parametrize(
    ("element", "reason"),
    [
        ("5", "array has a number"),
        ('{"a": 1, "a": 2}', "'a' is given twice"),
        ('{"a": [{"b": 1, "b": "]}"}]}', "'b' is given twice"),
        ('{"a": "\0"}', "not JSON"),
        ('{"a": "line\nbreak"}', "not JSON"),
        ('{"a": %s}' % ("1" * 5000), "too long"),
        ('{"a": -%s, "a": "\t"}' % ("1" * 5000), "too long|not JSON"),
    ],
)
def test_elements_of_arrays_that_are_bad(tmp_path, element, reason):
    """The good ones around them are kept, and lines are counted on."""
    path = tmp_path / "pairs.json"
    path.write_text(f"[\n{json.dumps(line(0))},\n{element},\n{json.dumps(line(1))}, {element}]")
    refused(path, ":3", reason)
    found, bad = skipping(path)
    assert found == QUESTIONS[:2]
    last = 4 + element.count("\n")
    assert [where for where, _ in bad] == [f"{path}:3", f"{path}:{last}.1"] and all(re.search(reason, why) for _, why in bad)


@pytest.mark.parametrize("name", ["pairs.json", "pairs.json.gz"])
def test_arrays_that_are_too_large(tmp_path, monkeypatch, name):
    """The limit is on the uncompressed bytes: 40 MB of blanks are 40 kB."""
    monkeypatch.setattr(shards, "MAX_ARRAY_BYTES", 30 * 2**20)
    text = b"[" + b" " * (40 * 2**20) + json.dumps(line(0)).encode() + b"]"
    (tmp_path / name).write_bytes(gzip.compress(text, 1) if name.endswith("gz") else text)
    with pytest.raises(ValueError, match=f"{name} .*30 MiB.*JSONL"):
        load_preferences(tmp_path / name)
    monkeypatch.setattr(shards, "MAX_ARRAY_BYTES", len(text))
    assert asked(load_preferences(tmp_path / name)) == QUESTIONS[:1]


# Rows

VALUES = {
    "a timestamp": pa.array([0, 2**61, None]).cast(pa.timestamp("us")),
    "a duration": pa.array([0, 2**62, None]).cast(pa.duration("ms")),
    "a date": pa.array([0, 10**7, None], pa.int32()).cast(pa.date32()),
    "no UTF-8": pa.array([b"fine", b"\xff", None], pa.binary()).view(pa.string()),
}


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("saved", [False, True])
def test_values_that_python_cannot_hold(tmp_path, kind, saved):
    """Only the row is bad, and the reason names the column."""
    table = pa.Table.from_pylist([line(number) for number in range(3)]).append_column("odd", VALUES[kind])
    path = tmp_path / ("saved" if saved else "pairs.parquet")
    if saved:
        Dataset(table).save_to_disk(path)
    else:
        pq.write_table(table, path)
    refused(path, ":2", "the value of column 'odd' cannot be read")
    good, bad = skipping(path)
    assert good == [QUESTIONS[0], QUESTIONS[2]]
    assert [where for where, _ in bad] == [f"{path}:2"]


# Samples


@pytest.mark.parametrize(
    ("members", "where", "reason"),
    [
        ([("1.json", line(1)), ("1.png", None)], "1.png", "link or a device"),
        ([("1.png", None), ("1.json", line(1))], "1.png", "link or a device"),
        ([("1.json", line(1)), ("1.png", b"a"), ("1.png", b"b")], "1.png", "in the tar twice"),
        ([("1.json", line(1)), ("0.jpg", b"a")], "0.jpg", "key was there before"),
        ([("1.json", line(1)), ("1.png", b"x" * 600), ("1.jpg", b"x" * 600)], "1.jpg", "more than 0 MiB"),
        ([("1.json", line(1)), ("1.png", b"x" * 1200)], "1.png", "more than 0 MiB"),
    ],
)
def test_bad_samples_of_a_tar(tmp_path, monkeypatch, members, where, reason):
    """The whole sample is bad, and the other samples are read."""
    monkeypatch.setattr(shards, "MAX_SAMPLE_BYTES", 1000)
    path = tar(tmp_path / "shard.tar", [*SAMPLE, *members, ("2.json", line(2)), ("2.png", b"an image")])
    refused(path, f":{where}", reason)
    good, bad = skipping(path)
    assert good == [QUESTIONS[0], *([QUESTIONS[1]] if where == "0.jpg" else []), QUESTIONS[2]]
    assert len(bad) == 1 and bad[0][0] == f"{path}:{where}" and reason in bad[0][1]


def test_bad_samples_stay_known(tmp_path, monkeypatch):
    """If they are read again as the same bad records, nothing is converted again."""
    path = tar(tmp_path / "shard.tar", [*SAMPLE, ("1.json", line(1)), ("1.png", None)])
    skipping(path)
    monkeypatch.setattr("mpo.data.sources._write", None)  # converting again would fail
    assert skipping(path)[0] == QUESTIONS[:1]
