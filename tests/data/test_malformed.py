"""Every malformed line is skipped and listed with its place and the right reason; the good lines around it are kept."""

import json

import pytest
from data.malformed import GOOD, cases

from mpo.data import load_preferences
from mpo.data.formats import FORMATS


@pytest.mark.parametrize("format", FORMATS)
def test_malformed_lines(format, images):
    malformed = cases(format)
    assert len(malformed) >= 60
    good = json.dumps(GOOD[format]).encode()
    path = images / "pairs.jsonl"
    path.write_bytes(b"\n".join([good, *(line for _, line, _ in malformed), good]))
    listed = images / "bad_records.jsonl"
    pairs = load_preferences(path, on_bad_record="skip", max_bad_fraction=1, bad_records=listed)
    found = {bad["where"]: bad["reason"] for bad in map(json.loads, listed.read_text().splitlines())}
    wrong = {}
    for number, (name, _, reason) in enumerate(malformed, start=2):
        said = found.pop(f"{path}:{number}", "nothing: it was taken for a pair")
        if reason not in said:
            wrong[name] = f"{said!r} instead of {reason!r}"
    assert not wrong, "\n".join(f"{name}: {said}" for name, said in wrong.items())
    assert not found
    assert len(pairs) == 2
