"""The log: torn, damaged, full, shared, undone, and the records that its decisions follow."""

import errno
import json
import os
import re
import resource
import signal

import pytest

from mpo.io import BadRecord, read_json_lines
from mpo.review import apply
from mpo.review.agreement import agreement, cohens_kappa, disagreements, position_bias, summary
from mpo.review.log import GONE, InUse, Log, NotSaved, read_events


def opened(path, content="one", keys=None):
    log = Log(path, owner=True)
    log.open_file(content, "f.jsonl", lambda: keys or {})
    return log


def decide(log, place, action="accept", by="anna", **more):
    return log.append(action=action, by=by, place=place, id=f"p{place}", key=f"k{place}", **{"edits": [], **more})


@pytest.mark.parametrize("cut", [1, 20, -1])
def test_a_torn_last_line_is_cut_off_and_the_log_goes_on(tmp_path, cut):
    path = tmp_path / "log"
    log = opened(path)
    decide(log, 0)
    whole = path.read_bytes()
    decide(log, 1)
    log.close()
    last = path.read_bytes()[len(whole) :]
    path.write_bytes(whole + last[:cut])
    log = opened(path)
    assert log.recovered == len(last[:cut]) and path.read_bytes() == whole
    assert log.decision("anna", 0) and log.decision("anna", 1) is None
    decide(log, 1)
    log.close()
    assert [event["n"] for event in read_json_lines(path)] == [0, 1, 2]


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: [lines[0], b"{\n", *lines[2:]],
        lambda lines: [lines[0], *lines[2:]],
        lambda lines: lines[1:],
        lambda lines: [lines[0], lines[1].replace(b'"place": 0', b'"place": 5'), *lines[2:]],  # JSON, of another record
        lambda lines: [lines[0], lines[1].replace(b"accept", b"reject"), *lines[2:]],
    ],
)
def test_other_damage_is_refused_with_its_line(tmp_path, damage):
    path = tmp_path / "log"
    log = opened(path)
    for place in range(3):
        decide(log, place)
    log.close()
    path.write_bytes(b"".join(damage(path.read_bytes().splitlines(keepends=True))))
    before = path.read_bytes()
    with pytest.raises(BadRecord, match=f"{path}:[12]"):
        Log(path, owner=True)
    assert path.read_bytes() == before


def test_lines_of_older_logs_have_no_checksum(tmp_path):
    path = tmp_path / "log"
    log = opened(path)
    decide(log, 0, "reject")
    log.close()
    path.write_bytes(re.sub(rb', "sum": "[0-9a-f]{8}"', b"", path.read_bytes()))
    log = opened(path)
    assert log.decision("anna", 0)["action"] == "reject" and "sum" not in log.decision("anna", 0)
    log.close()


def test_a_log_that_is_no_file_is_refused(tmp_path):
    """/dev/full gives zeros without an end."""
    (tmp_path / "log").symlink_to("/dev/full")
    for owner in (True, False):
        with pytest.raises(ValueError, match="no regular file"):
            Log(tmp_path / "log", owner=owner)


def test_a_log_is_held_by_one(tmp_path):
    log = opened(tmp_path / "log")
    with pytest.raises(InUse, match="log"):
        Log(tmp_path / "log", owner=True)
    log.close()
    opened(tmp_path / "log").close()


def test_a_write_that_fails_leaves_the_log_as_it_was(tmp_path):
    """A real limit of the file's size, in the middle of a line; then room again."""
    path = tmp_path / "log"
    log = opened(path)
    decide(log, 0)
    before = path.read_bytes()
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 40, limits[1]))
    try:
        with pytest.raises(NotSaved, match="log"):
            decide(log, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before and log.decision("anna", 1) is None
    decide(log, 1)
    log.close()
    assert len(read_events(path)[0]) == 3


def test_half_a_line_that_could_not_be_removed_is_removed_by_the_next_write(tmp_path, monkeypatch):
    """The disk takes ten bytes, and then nothing, not even a shorter file; then all again."""
    log, write = opened(tmp_path / "log"), os.write

    def fails(file, *_):
        raise OSError(errno.EIO, "the disk is gone")

    with monkeypatch.context() as patched, pytest.raises(NotSaved, match="log"):
        calls = iter([lambda file, data: write(file, data[:10]), fails])
        patched.setattr(os, "write", lambda file, data: next(calls)(file, data))
        patched.setattr(os, "ftruncate", lambda file, size, done=[]: fails(file) if done else done.append(size))
        decide(log, 1)
    assert log.decision("anna", 1) is None
    decide(log, 1)
    log.close()
    assert [event["action"] for event in read_events(tmp_path / "log")[0]] == ["file", "accept"]


def test_a_log_that_was_removed_is_not_written_to(tmp_path):
    log = opened(tmp_path / "log")
    (tmp_path / "log").unlink()
    with pytest.raises(NotSaved, match="removed"):
        decide(log, 0)
    log.close()


def test_undo_has_no_limit_and_survives(tmp_path):
    """Of 60 decisions of anna, on 12 records, and one of ben: hers are undone one by one, also after opening anew."""
    log = opened(tmp_path / "log")
    for number in range(60):
        decide(log, number % 12, ("accept", "reject")[number // 12 % 2])
    decide(log, 0, by="ben")
    for left in range(60, 0, -1):
        last = log.stacks["anna"][-1]
        log.append(action="undo", by="anna", undoes=last["uid"])
        assert len(log.stacks["anna"]) == left - 1
        if left == 30:
            log.close()
            log = opened(tmp_path / "log")
        if left == 49:  # the first decision on record 0 of the fifth round is undone
            assert log.decision("anna", 0)["action"] == "reject"
    assert log.decision("anna", 0) is None and log.decision("ben", 0)
    log.close()


def test_the_same_decision_asked_twice_is_one(tmp_path):
    log = opened(tmp_path / "log")
    assert decide(log, 0, uid="a" * 16) is decide(log, 0, uid="a" * 16)
    log.close()
    assert len(read_json_lines(tmp_path / "log")) == 2


def test_decisions_follow_their_records(tmp_path):
    """Equal records by their order; a record that is gone keeps its decision in the log, and comes back."""
    path = tmp_path / "log"
    log = opened(path)
    for place, key in enumerate(("a", "b", "b", "c")):
        log.append(action="reject", by="anna", place=place, key=key, edits=[], reason=str(place))
    log.close()
    log = opened(path, "two", {"new": [0], "b": [1, 5], "a": [3]})
    assert [log.decision("anna", place)["reason"] for place in (3, 1, 5)] == ["0", "1", "2"]
    assert log.decision("anna", 0) is None and log.decision("anna", GONE)["reason"] == "3"
    log.append(action="accept", by="anna", place=0, key="new", edits=[])
    log.close()
    log = opened(path, "one", {"a": [0], "b": [1, 2], "c": [3]})
    assert [log.decision("anna", place)["reason"] for place in range(4)] == ["0", "1", "2", "3"]
    log.close()


def test_kappa_by_hand():
    """p_o = 3/4; p_e = (2/4)(1/4) + (2/4)(3/4) = 1/2; kappa = 1/2. Not defined where both give one label alone."""
    assert cohens_kappa(list("aabb"), list("abbb")) == 0.5
    assert cohens_kappa(list("aa"), list("aa")) is None and cohens_kappa([], []) is None
    assert cohens_kappa(list("ab"), list("ba")) == -1.0


def test_agreement_disagreements_and_position(tmp_path):
    """anna and ben differ on records 1 and 3; ben's skip is no label; of anna's 4 pairs the left one is preferred in 3."""
    log = opened(tmp_path / "log")
    for place, (mine, yours) in enumerate([("accept", "accept"), ("accept", "swap"), ("swap", "skip"), ("accept", "reject")]):
        decide(log, place, mine, left="rejected" if place in (0, 2) else "chosen")
        decide(log, place, yours, by="ben")
    assert disagreements(log) == [1, 3]
    (found,) = agreement(log)
    assert found["records"] == 3 and found["equal"] == pytest.approx(1 / 3)
    # Of 4 fair coins, 3 or more, or 1 or fewer, are heads in 10 of 16 cases.
    assert position_bias(log)["anna"] == {"pairs": 4, "left": 3, "p": pytest.approx(10 / 16)}
    decide(log, 1, "swap", settle=True)
    assert disagreements(log) == [3] and log.final(1, log.labels()[1])["action"] == "swap"
    log.append(action="undo", by="anna", undoes=log.stacks["anna"][-1]["uid"])
    assert disagreements(log) == [1, 3]
    log.close()


@pytest.mark.parametrize("text", ["", '{"action": "file"}\n', '{"a": 1}\n', "[]\n", "no\n", None])
def test_what_is_no_log_is_refused(tmp_path, text):
    path = tmp_path / "log"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match="log"):
        apply([], path)


def test_apply_to_records_in_memory(tmp_path):
    from mpo.review.documents import read_line

    records = [{"id": str(place), "question": f"q{place}", "chosen": "c", "rejected": "r"} for place in range(5)]
    log = opened(tmp_path / "log")
    edit = [{"paths": [["chosen"]], "old": "c", "value": "C"}]
    for place, action, edits in ((0, "accept", edit), (1, "reject", []), (2, "swap", []), (3, "accept", [])):
        log.append(action=action, by="anna", place=place, id=str(place), key=read_line(records[place]).key(), edits=edits)
    log.close()
    records[3] = {**records[3], "chosen": "another"}
    for _ in range(2):
        found = apply(records, tmp_path / "log")
        kept = [*found]
        assert [one["id"] for one in kept] == ["0", "2", "3", "4"]
        assert (kept[0]["chosen"], kept[1]["chosen"], kept[1]["rejected"]) == ("C", "r", "c")
        assert kept[0]["metadata"]["review"]["was"] == [{"path": ["chosen"], "value": "c"}]
        assert kept[2:] == records[3:] and found.unmatched == ["3"] and found.counts["unmatched"] == 1
    assert json.dumps(records[0]) == json.dumps({"id": "0", "question": "q0", "chosen": "c", "rejected": "r"})


def test_agreement_is_of_what_was_decided_before_others_were_told(tmp_path):
    """anna accepts, ben rejects, and both are told: what either decides then is marked, and kappa keeps the blind decisions."""
    log = opened(tmp_path / "log")
    decide(log, 0), decide(log, 0, "reject", by="ben")
    decide(log, 1), decide(log, 1, by="ben")
    log.append(action="undo", by="anna", undoes=log.stacks["anna"][-1]["uid"])
    assert "informed" not in decide(log, 1, "swap")  # they were alike: nothing was told
    log.append(action="undo", by="anna", undoes=log.stacks["anna"][-1]["uid"])
    log.append(action="undo", by="anna", undoes=log.stacks["anna"][-1]["uid"])
    for reopened in (False, True):
        if reopened:
            log.close()
            log = opened(tmp_path / "log")
        assert decide(log, 0, "reject")["informed"] is True
        (found,) = agreement(log)
        assert (found["records"], found["equal"]) == (2, 0) and disagreements(log) == [] and summary(log)["informed"] == 1
    log.close()


def test_of_equal_records_one_that_stays_keeps_its_decision(tmp_path):
    """Records 1 and 3 are alike but for what the key leaves out; a line that is added behind moves no decision to the other."""
    log = opened(tmp_path / "log")
    log.append(action="reject", by="anna", place=3, key="b", edits=[])
    log.close()
    log = opened(tmp_path / "log", "two", {"a": [0, 2], "b": [1, 3, 4]})
    assert log.decision("anna", 3) and log.decision("anna", 1) is None
    log.close()


def test_equal_records_of_a_copy_have_a_decision_each(tmp_path):
    """Two decisions on equal records 1 and 2 of a copy are added to records 2 and 3, and not both to record 2."""
    other = opened(tmp_path / "other", "copy")
    for place, action in ((1, "reject"), (2, "accept")):
        other.append(action=action, by="ben", place=place, key="b", edits=[])
    other.close()
    log = opened(tmp_path / "log")
    log.take(Log(tmp_path / "other").by_content(), {"b": [2, 3]}, "other")
    assert log.lost == []
    assert [log.decision("ben", place)["action"] for place in (2, 3)] == ["reject", "accept"]
    log.close()
