"""`mpo cache`: its output, the problems it finds, the files it removes and the files it keeps."""

import json
import multiprocessing
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from mpo.commands import main
from mpo.training import store
from mpo.training.reference.cache import ReferenceCache
from mpo.training.reference.fingerprint import Fingerprint
from mpo.training.store import LOG_PROBS, Entries, read_shard, shards, write_shard

HERE = Fingerprint(
    {"model weights": "w", "compute dtype": "float32"},
    {"image processor": {"image_processor": {"max_patches": 12}}, "scoring": {"completion_end": "end_of_turn"}},
    {"model": "InternVL", "name_or_path": "OpenGVLab/InternVL3-1B-hf", "chat_template": "{% for message in messages %}"},
)


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def entries(values: dict[int, float], tokens: int = 4) -> Entries:
    keys = np.frombuffer(b"".join(key(number) for number in values), "S16")
    return Entries.of(keys, LOG_PROBS, logps=list(values.values()), tokens=tokens)


def write(cache: ReferenceCache, values: dict[int, float], tokens: int = 4):
    return write_shard(cache.folder, entries(values, tokens), HERE)


def values_in(cache: ReferenceCache, count: int = 10) -> dict[int, float]:
    found = ReferenceCache(cache.folder, HERE).get([key(number) for number in range(count)])
    return {number: float(found.logps[number]) for number in np.flatnonzero(found.known)}


def content(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def cache(tmp_path):
    """Three shards; completion 2 is in two of them, with the same value up to rounding."""
    cache = ReferenceCache(tmp_path / "cache", HERE)
    for values in ({0: -1.0, 1: -2.0}, {2: -3.0}, {2: -3.0001, 3: 0.0}):
        write(cache, values)
    return cache


@pytest.fixture
def run(capsys):
    def run(*arguments) -> tuple[int, str]:
        status = main(["cache", *map(str, arguments)])
        said = capsys.readouterr()
        return status, said.out + said.err

    return run


def leave(cache: ReferenceCache, age: float):
    path = cache.folder / "answers-r3-77-0123456789ab.safetensors.ba9876543210.tmp"
    path.write_bytes(b"no more")
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_inspect_says_whose_it_is_and_how_much(cache, run):
    leave(cache, age=5)
    ReferenceCache(cache.folder.parent, Fingerprint({"model weights": "v"}, {}, {"model": "Other"}))
    status, said = run("inspect", cache.folder.parent)
    assert status == 0
    for part in (
        "OpenGVLab/InternVL3-1B-hf",
        "max_patches=12",
        "completion_end=end_of_turn",
        "for message in",
        "temporary files",
        "1, 0.0 KiB",
    ):
        assert part in said, said
    assert re.search(r"completions +5\n", said) and re.search(r"shards +3, ", said)
    assert "Other" in said and "nothing yet" in said


def test_inspect_goes_on_where_runs_remove_files(cache, run, monkeypatch):
    gone = [cache.folder / f"{'0' * 32}.safetensors", cache.folder / f"{'0' * 32}.safetensors.ba9876543210.tmp"]
    found = [*shards(cache.folder), gone[0]]
    monkeypatch.setattr(store, "shards", lambda folder: found)
    monkeypatch.setattr(store, "leftovers", lambda folder: gone[1:])
    status, said = run("inspect", cache.folder)
    assert status == 0 and re.search(r"shards +3, ", said) and "unreadable" not in said and re.search("temporary files +none", said)


def test_a_shard_that_this_user_may_not_read_is_named_and_kept(cache, run, monkeypatch):
    path, real = shards(cache.folder)[0], store.open_shard

    def denied(file, fingerprint):  # as of root nothing is denied
        if file == path:
            raise store.UnreadableShard(f"{path} cannot be opened (Permission denied).")
        return real(file, fingerprint)

    monkeypatch.setattr(store, "open_shard", denied)
    status, said = run("verify", cache.folder)
    assert status == 1 and "Permission denied" in said and "prune" not in said
    status, said = run("prune", cache.folder)
    assert f"keep {path.name}: this user cannot read it" in said and path.exists()


def test_verify_is_content_with_a_whole_cache(cache, run):
    status, said = run("verify", cache.folder.parent)
    assert status == 0 and "4 entries in 3 intact shards, 0 problems" in said


def test_verify_lists_all_that_is_wrong_and_changes_nothing(cache, run):
    wrong = write(cache, {4: float("nan"), 5: 0.5, 6: float("-inf")})
    apart = write(cache, {0: -1.5})
    counted = write(cache, {1: -2.0}, tokens=5)
    truncated = write(cache, {7: -1.0})
    truncated.write_bytes(truncated.read_bytes()[:100])
    foreign = write_shard(cache.folder, entries({8: -1.0}), Fingerprint({"model weights": "v"}))
    before = content(cache.folder)
    status, said = run("verify", cache.folder)
    assert status == 1 and "7 problems" in said
    for path in (wrong, apart, counted, truncated, foreign):
        assert path.name in said
    for reason in (
        "log-prob nan",
        "log-prob 0.5",
        "log-prob -inf",
        "-1.5 over 4",
        "over 5",
        "not a file of reference log-probs",
        "another",
    ):
        assert reason in said, said
    assert content(cache.folder) == before


def test_in_16_bits_the_same_answer_may_differ_more(tmp_path, run):
    half = Fingerprint({"compute dtype": "bfloat16"})
    cache = ReferenceCache(tmp_path, half)
    write_shard(cache.folder, entries({0: -80.0}, tokens=100), half)
    write_shard(cache.folder, entries({0: -80.9}, tokens=100), half)  # 0.1 * sqrt(100) = 1 is allowed
    assert run("verify", tmp_path)[0] == 0
    write_shard(cache.folder, entries({0: -83.0}, tokens=100), half)
    assert run("verify", tmp_path)[0] == 1


def test_prune_merges_small_shards_and_removes_leftovers_and_damage(cache, run):
    old = leave(cache, age=3600)
    truncated = write(cache, {7: -1.0})
    truncated.write_bytes(b"")
    status, said = run("prune", cache.folder)
    assert status == 0 and f"remove {old.name}" in said and f"remove {truncated.name}" in said and "merge 3 shards" in said
    (merged,) = shards(cache.folder)
    assert len(read_shard(merged, HERE).keys) == 4
    assert not list(cache.folder.glob("*.tmp"))
    assert list(values_in(cache)) == [0, 1, 2, 3]
    assert run("verify", cache.folder)[0] == 0
    assert "nothing to do" in run("prune", cache.folder)[1]


def test_a_dry_run_changes_nothing_and_says_the_same(cache, run):
    leave(cache, age=3600)
    before = content(cache.folder)
    status, dry = run("prune", "--dry-run", cache.folder)
    assert status == 0 and content(cache.folder) == before
    assert run("prune", cache.folder)[1] == dry.replace(": would", ": done")


def test_prune_leaves_alone_what_is_not_its_own(cache, run):
    strangers = {"notes.txt": b"mine", "train.safetensors": b"mine too", "model.tmp": b"x", "answers.safetensors.tmp": b"y"}
    for name, data in strangers.items():
        (cache.folder / name).write_bytes(data)
        os.utime(cache.folder / name, (0, 0))
    foreign = write_shard(cache.folder, entries({8: -1.0}), Fingerprint({"model weights": "v"}))
    status, said = run("prune", cache.folder)
    after = content(cache.folder)
    assert status == 0 and strangers.items() <= after.items() and foreign.name in after
    assert "keep train.safetensors" in said and f"keep {foreign.name}" in said


def test_prune_leaves_a_young_leftover_which_may_be_on_its_way(cache, run):
    young = leave(cache, age=1)
    run("prune", cache.folder)
    assert young.exists()


def test_prune_leaves_out_answers_that_cannot_be_right(cache, run):
    write(cache, {4: float("nan"), 5: 0.5, 6: -1.0})
    write(cache, {0: -1.5})  # one of the two is wrong, and nothing says which
    status, said = run("prune", cache.folder)
    assert status == 0 and "drop 3 entries" in said
    assert list(values_in(cache)) == [1, 2, 3, 6]
    assert run("verify", cache.folder)[0] == 0


def test_a_run_that_has_the_cache_open_goes_on_after_a_pruning(cache, run):
    reader = ReferenceCache(cache.folder, HERE)
    run("prune", cache.folder)
    reader.add([key(9)], [-9.0], [1])
    reader.flush()
    reader.refresh()
    assert values_in(cache)[9] == -9.0 and len(reader) == 5


def _write_slowly(folder, count: int) -> None:
    cache = ReferenceCache(folder, HERE, flush_every=2)
    for number in range(count):
        cache.add([key(number)], [-number], [1])


def test_pruning_again_and_again_while_another_process_writes(tmp_path, run):
    folder = ReferenceCache(tmp_path, HERE).folder
    process = multiprocessing.get_context("fork").Process(target=_write_slowly, args=(tmp_path, 300))
    process.start()
    prunings = 0
    while process.is_alive():
        assert run("prune", folder)[0] == 0
        prunings += 1
        assert all(value == -number for number, value in values_in(ReferenceCache(folder, HERE), 300).items())
    process.join()
    assert process.exitcode == 0 and prunings > 1
    run("prune", folder)
    assert len(shards(folder)) == 1
    assert values_in(ReferenceCache(folder, HERE), 300) == {number: -number for number in range(300)}


def of_format(number: int, root, name: str):
    """A folder as mpo wrote it in that format, with shards of format 1, features and a file of its user."""
    (folder := root / name).mkdir()
    (folder / "meta.json").write_text(json.dumps({"format": number, "parts": {}, "settings": {}, "about": {}}))
    (folder / "0a").mkdir()
    for file in ("answers-r0-4711-9a0b3c5d7e1f.parquet", f"0a/{'0a' * 16}.safetensors", "notes.txt"):
        (folder / file).write_bytes(b"x" * 500_000)
    return folder


def test_folders_that_cannot_be_read_are_named_and_the_others_done(cache, run, capsys):
    root = cache.folder.parent
    old, later, broken = of_format(1, root, "InternVL-0"), of_format(3, root, "Zed-0"), root / "A-0"
    (broken / "meta.json").mkdir(parents=True)  # an OSError, as that of a folder of another user
    of_format(2, root, "B-0").joinpath("meta.json").write_text('{"format": 2, "parts": 3, "settings": {}, "about": {}}')
    for action, done in (("inspect", "completions +5\n"), ("verify", "4 entries in 3 intact"), ("prune", "merge 3 shards")):
        status, said = run(action, root)
        assert status == 1 and re.search(done, said) and "has format 3" in said and str(broken) in said
        assert f"{old / 'meta.json'} has format 1" in said and f"mpo cache prune --old {old}" in said
        main(["cache", action, str(root), "--json"])
        found = json.loads(capsys.readouterr().out)
        assert len(found["folders"]) == 1 and len(found["problems"]) == 4
        status, said = run(action, old)
        assert status == 1 and "has format 1" in said
    ReferenceCache(root, HERE)  # a run with a cache of its own goes on too
    status, said = run("prune", "--old", "--dry-run", root)
    assert status == 1 and "remove the files of an earlier format (3, 1.0 MB)" in said and (old / "meta.json").exists()
    assert run("prune", "--old", root)[0] == 1 and [path.name for path in old.iterdir()] == ["notes.txt"]
    assert (later / "0a" / f"{'0a' * 16}.safetensors").exists() and values_in(cache)
    (other := root / "Made-0" / "meta.json").parent.mkdir()
    other.write_text('{"format": 1, "made": "by another program"}')
    (old / "notes.txt").rename(root / "notes.txt")
    of_format(1, root, "Other-0").joinpath("notes.txt").unlink()
    run("prune", "--old", root)
    assert not (root / "Other-0").exists() and other.exists() and (root / "notes.txt").exists()


def test_a_folder_that_is_no_cache_is_refused(tmp_path, run):
    for folder, reason in ((tmp_path, "has no meta.json"), (tmp_path / "nowhere", "is not a folder")):
        for action in ("inspect", "verify", "prune"):
            status, said = run(action, folder)
            assert status == 2 and reason in said and "reference_cache" in said


@pytest.mark.parametrize("words", [[], ["inspect"], ["verify"], ["prune"]])
def test_help_teaches(capsys, words):
    with pytest.raises(SystemExit) as stop:
        main(["cache", *words, "--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "usage: mpo cache" in said and len(said) > 250


def test_help_needs_no_torch():
    program = "import sys; sys.modules['torch'] = None; from mpo.commands import main; main(['cache', 'prune', '--help'])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0
