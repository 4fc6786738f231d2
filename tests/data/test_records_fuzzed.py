"""Any JSON value in any place of a line of any format gives a record that fits the table, or a BadRecord."""

import copy
import json

import pyarrow as pa
import pytest
from data.malformed import GOOD
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo.data.formats import FORMATS
from mpo.data.mixture_file import read_meta
from mpo.data.paths import Folders
from mpo.data.records import KINDS, to_prompt, to_records
from mpo.io import BadRecord

pytestmark = pytest.mark.slow

FIELDS = sorted({field for line in GOOD.values() for field in line} | {"rejected_messages", "rejected_images", "system", "videos"})
WORDS = [
    "user",
    "assistant",
    "system",
    "human",
    "gpt",
    "image",
    "text",
    "<image>",
    "<video>",
    "a.png",
    "../outside.png",
    "",
    "\ud83d",
]
INNER = [
    "role",
    "content",
    "type",
    "text",
    "from",
    "value",
    "path",
    "bytes",
    "Rating",
    "min",
    "max",
    "question",
    "chosen",
    "response",
]
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**31, 2**63, 10**400]),
    st.floats(),
    st.sampled_from(WORDS),
    st.text(max_size=8),
    st.binary(max_size=4),  # of Parquet
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(INNER) | st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a.png, which is never opened."""
    folder = tmp_path_factory.mktemp("fuzzed")
    (folder / "a.png").write_bytes(b"an image")
    return folder


def places(value, path=()):
    """Every place in a nested value."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, one in inner:
        yield from places(one, (*path, step))


@st.composite
def changed_lines(draw, format):
    """A good line with one to three of its places replaced."""
    line = copy.deepcopy(GOOD[format])
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from([path for path in places(line) if path]))
        inner = line
        for step in path[:-1]:
            inner = inner[step]
        inner[path[-1]] = draw(VALUES)
    return line


def check(line, folder, format=None):
    try:
        rows = to_records(line, where="fuzzed:1", find=Folders(folder), format=format)
    except BadRecord as bad:
        assert str(bad).startswith("fuzzed:1: ") and bad.reason
        return
    table = pa.Table.from_pylist(rows, schema=KINDS["pair"].features.arrow_schema)
    assert table.num_rows == len(rows)
    for row in rows:
        assert row["chosen"] != row["rejected"]
        kinds = [part["type"] for message in row["prompt"] for part in message["content"]]
        assert kinds.count("image") == len(row["images"])
        assert kinds.count("video") == len(row["videos"] or [])
        assert json.loads(row["metadata"] or "{}") is not None


@pytest.mark.parametrize("format", FORMATS)
def test_changed_lines(format, folder):
    @settings(max_examples=300)
    @given(changed_lines(format))
    def holds(line):
        check(line, folder)
        check(line, folder, format)

    holds()


@pytest.mark.parametrize("format", [None, *FORMATS])
def test_lines_of_anything(format, folder):
    @settings(max_examples=150)
    @given(st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), VALUES, max_size=6))
    def holds(line):
        check(line, folder, format)

    holds()


@settings(max_examples=150)
@given(st.dictionaries(st.sampled_from(["question", "prompt", "image", "images", "id"]), VALUES, max_size=4))
def test_prompts_of_anything(folder, line):
    try:
        row = to_prompt(line, where="fuzzed:1", image_root=folder)
    except BadRecord:
        return
    assert row["prompt"]


@settings(max_examples=150)
@given(
    st.dictionaries(st.sampled_from(["root", "annotation", "length", "repeat_time", "data_augment", "max_dynamic_patch"]), VALUES)
    | VALUES
)
def test_meta_of_anything(tmp_path_factory, entry):
    path = tmp_path_factory.mktemp("meta") / "meta.json"
    path.write_text(json.dumps({"a": entry}, default=str))
    with pytest.raises(ValueError, match="meta.json"):
        read_meta(path)
