"""Files with bytes changed, removed or added give their pairs, or a ValueError that names the file, and never hang."""

import gzip
import json
import shutil

import pytest
from data.malformed import GOOD
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpo.data import load_preferences
from mpo.io import BadRecord

pytestmark = pytest.mark.slow

PAIRS = [
    {"question": f"What is {number}? é", "chosen": "This.", "rejected": "That.", "answer_gt": str(number)} for number in range(3)
]
LINES = "\n".join(json.dumps(pair, ensure_ascii=False) for pair in PAIRS).encode()


def parquet(folder):
    Dataset.from_list(PAIRS).to_parquet(folder / "whole.parquet")
    return (folder / "whole.parquet").read_bytes()


def tar(folder, ending):
    from data.test_files import tar as pack

    members = [
        (f"{number}.{kind}", pair if kind == "json" else b"an image")
        for number, pair in enumerate(PAIRS)
        for kind in ("json", "png")
    ]
    return pack(folder / f"whole.{ending}", members).read_bytes()


KINDS = {
    "jsonl": lambda folder: LINES,
    "jsonl.gz": lambda folder: gzip.compress(LINES),
    "json": lambda folder: json.dumps(PAIRS, ensure_ascii=False, indent=1).encode(),
    "parquet": parquet,
    "tar": lambda folder: tar(folder, "tar"),
    "tar.gz": lambda folder: tar(folder, "tar.gz"),
}


@st.composite
def damage(draw):
    """Changes of a file at places between 0 and 1: bytes replaced, removed or inserted."""
    place = st.floats(0, 1, exclude_max=True)
    return draw(st.lists(st.tuples(place, st.integers(0, 20), st.binary(max_size=8)), min_size=1, max_size=4))


def damaged(data, changes):
    for place, removed, inserted in changes:
        at = int(place * len(data))
        data = data[:at] + inserted + data[at + removed :]
    return data


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(kind, tmp_path):
    whole = KINDS[kind](tmp_path)

    @settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
    @given(damage())
    def holds(changes):
        check(tmp_path / f"pairs.{kind}", damaged(whole, changes))

    holds()
    for length in range(0, len(whole), max(1, len(whole) // 40)):
        check(tmp_path / f"pairs.{kind}", whole[:length])


def check(path, data):
    path.write_bytes(data)
    for how in ({}, {"on_bad_record": "skip", "max_bad_fraction": 1, "bad_records": path.parent / "bad_records.jsonl"}):
        try:
            pairs = load_preferences(path, **how)
        except BadRecord as bad:
            assert bad.where.startswith(str(path))
        except ValueError as error:
            assert str(path) in str(error)
        else:
            assert all(row["chosen"] != row["rejected"] for row in pairs.select_columns(["chosen", "rejected"]))


@settings(max_examples=80)
@given(st.binary(max_size=200))
def test_files_of_any_bytes(tmp_path_factory, data):
    for kind in KINDS:
        folder = tmp_path_factory.mktemp("any")
        check(folder / f"pairs.{kind}", data)
        shutil.rmtree(folder)


def test_a_damaged_folder(tmp_path):
    Dataset.from_list([GOOD["trl"] | {"images": []}]).save_to_disk(tmp_path / "saved")
    for file in (tmp_path / "saved").iterdir():
        whole = file.read_bytes()
        for data in (b"", whole[: len(whole) // 2], b"{}"):
            file.write_bytes(data)
            try:
                assert len(load_preferences(tmp_path / "saved")) == 1  # not all of its JSON is needed
            except ValueError as error:
                assert str(tmp_path / "saved") in str(error)
        file.write_bytes(whole)
    assert len(load_preferences(tmp_path / "saved")) == 1
