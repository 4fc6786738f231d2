"""The cache of reference log-probs on disk: real files, real processes, real kills."""

import hashlib
import multiprocessing
import os
import shutil
import signal
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mpo.training.reference.cache import ReferenceCache
from mpo.training.reference.fingerprint import Fingerprint
from mpo.training.store import META_FILE, Entries, leftovers, read_shard, shards, write_shard

HERE = Fingerprint(
    {"model weights": "w", "chat template": "t", "image processor": "i"},
    {"image processor": {"image_processor": {"max_patches": 12, "size": {"height": 448}}}},
    {"model": "InternVL"},
)


def other(**parts: str) -> Fingerprint:
    return Fingerprint({**HERE.parts, **{name.replace("_", " "): value for name, value in parts.items()}})


def key(number: int) -> bytes:
    return hashlib.blake2b(str(number).encode(), digest_size=16).digest()


def fill(cache: ReferenceCache, numbers) -> None:
    """Entry i has log-prob -i / 8 over i + 1 tokens, exact in float32."""
    numbers = list(numbers)
    cache.add([key(i) for i in numbers], [-i / 8 for i in numbers], [i + 1 for i in numbers])


def known(cache: ReferenceCache, numbers) -> list[int]:
    """Return which entries the cache has, after checking their values."""
    numbers = list(numbers)
    found = cache.get([key(i) for i in numbers])
    has = [i for i, there in zip(numbers, found.known, strict=True) if there]
    assert found.logps[found.known].tolist() == [-i / 8 for i in has]
    assert found.tokens[found.known].tolist() == [i + 1 for i in has]
    assert np.isnan(found.logps[~found.known]).all() and not found.tokens[~found.known].any()
    return has


@contextmanager
def flushed(*args, **settings):
    """A cache that writes what is left at the end."""
    cache = ReferenceCache(*args, **settings)
    yield cache
    cache.flush()


def in_process(work, *arguments) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    return process


# Looking up and adding


def test_what_is_added_is_found_now_and_after_reopening(tmp_path):
    with flushed(tmp_path, HERE) as cache:
        assert known(cache, range(5)) == []
        fill(cache, [3, 1])
        assert known(cache, range(5)) == [1, 3]
        cache.flush()
        fill(cache, [0])
        assert known(cache, range(5)) == [0, 1, 3]
    again = ReferenceCache(tmp_path, HERE)
    assert known(again, range(5)) == [0, 1, 3] and len(again) == 3
    assert known(again, [4, 3, 3, 4, 0]) == [3, 3, 0]


def test_tensors_on_any_dtype_are_taken(tmp_path):
    cache = ReferenceCache(tmp_path, HERE)
    cache.add([key(0), key(1)], torch.tensor([-1.5, -2.0], dtype=torch.bfloat16, requires_grad=True), torch.tensor([2, 3]))
    assert cache.get([key(1), key(0)]).logps.tolist() == [-2.0, -1.5]


def test_an_answer_known_stays_as_it_is_and_is_written_once(tmp_path):
    with flushed(tmp_path, HERE) as cache:
        fill(cache, [1, 1])
        cache.flush()
        cache.add([key(1)], [-99.0], [7])
        assert known(cache, [1]) == [1]
    assert len(shards(cache.folder)) == 1


def test_a_key_may_end_in_zero_bytes(tmp_path):
    """NumPy's fixed-width strings hide trailing zeros; two such keys must not be taken for one another."""
    keys = [b"k" * 16, b"k" * 15 + b"\0", b"k" * 14 + b"\0\0", b"\0" * 16]
    with flushed(tmp_path, HERE) as cache:
        cache.add(keys, [-1.0, -2.0, -3.0, -4.0], [1, 1, 1, 1])
    assert ReferenceCache(tmp_path, HERE).get(keys).logps.tolist() == [-1.0, -2.0, -3.0, -4.0]


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_log_prob_that_is_not_finite_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match="is not cached"):
        ReferenceCache(tmp_path, HERE).add([key(0)], [value], [3])


def test_add_writes_a_shard_after_so_many_answers_and_after_so_long(tmp_path):
    cache = ReferenceCache(tmp_path, HERE, flush_every=10)
    fill(cache, range(9))
    assert shards(cache.folder) == []
    fill(cache, range(9, 10))
    assert len(shards(cache.folder)) == 1
    patient = ReferenceCache(tmp_path, HERE, flush_seconds=0.05)
    fill(patient, [100])
    time.sleep(0.06)
    fill(patient, [101])
    assert known(ReferenceCache(tmp_path, HERE), range(95, 105)) == [100, 101]


def test_many_small_shards_are_few_blocks_in_memory(tmp_path):
    cache = ReferenceCache(tmp_path, HERE, flush_every=1)
    for i in range(100):
        fill(cache, [i])
    assert len(shards(cache.folder)) == 100
    assert len(cache._blocks) <= 7  # each twice as long as the next: log2(100)
    assert known(cache, range(110)) == list(range(100))


def test_an_empty_look_up_and_an_empty_add(tmp_path):
    with flushed(tmp_path, HERE) as cache:
        cache.add([], [], [])
        assert cache.get([]).logps.shape == (0,)
    assert shards(cache.folder) == []


# Many writers, and killed ones


def _write_until_killed(folder, start: int) -> None:
    """400 entries at most, however late the signal comes."""
    cache = ReferenceCache(folder, HERE, flush_every=20)
    for i in range(start, start + 400):
        fill(cache, [i])
    signal.pause()


def _write(folder, numbers: range) -> None:
    with flushed(folder, HERE, flush_every=7) as cache:
        for i in numbers:
            fill(cache, [i])


def test_killed_while_writing_only_whole_shards_remain_and_the_rest_can_be_added(tmp_path):
    interrupted = 0
    for round in range(12):
        before = len(known(ReferenceCache(tmp_path, HERE), range(5000)))
        process = in_process(_write_until_killed, tmp_path, before)
        folder = next(tmp_path.iterdir())
        written = len(shards(folder))
        while len(shards(folder)) < written + 2:  # it is at work
            assert process.is_alive()
            time.sleep(0.0001)
        time.sleep(0.0007 * round)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        interrupted = len(leftovers(folder))
        has = known(ReferenceCache(tmp_path, HERE), range(5000))
        assert has == list(range(len(has))) and len(has) % 20 == 0 and len(has) >= before + 40
    with flushed(tmp_path, HERE) as cache:
        fill(cache, range(5000))
    assert known(ReferenceCache(tmp_path, HERE), range(5000)) == list(range(5000))
    assert len(leftovers(folder)) == interrupted  # nothing else touches them


def test_a_leftover_is_never_read(tmp_path):
    with flushed(tmp_path, HERE) as cache:
        fill(cache, [1])
    whole = shards(cache.folder)[0]
    whole.with_name("answers-r0-1-0123456789ab.safetensors.ba9876543210.tmp").write_bytes(whole.read_bytes()[:50])
    assert known(ReferenceCache(tmp_path, HERE), range(3)) == [1]
    assert [path.name for path in leftovers(cache.folder)] == ["answers-r0-1-0123456789ab.safetensors.ba9876543210.tmp"]


def test_processes_write_the_same_folder_at_once(tmp_path):
    """They start with an empty root, so they create the folder and its meta.json at once; half of the entries are added twice."""
    processes = [in_process(_write, tmp_path, range(100 * rank, 100 * rank + 200)) for rank in range(3)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    cache = ReferenceCache(tmp_path, HERE)
    assert known(cache, range(500)) == list(range(400))
    assert len(cache) == 400
    assert len(list(tmp_path.iterdir())) == 1


def test_refresh_shows_what_others_wrote(tmp_path):
    mine = ReferenceCache(tmp_path, HERE)
    with flushed(tmp_path, HERE) as theirs:
        fill(theirs, [5])
    assert known(mine, [5]) == []
    mine.refresh()
    assert known(mine, [5]) == [5]


def test_a_shard_that_is_merged_away_while_shards_are_read(tmp_path, monkeypatch):
    import mpo.training.store as store

    with flushed(tmp_path, HERE, flush_every=1) as cache:
        fill(cache, [0])
        fill(cache, [1])
    real = store.read_shard

    def read(path, fingerprint):
        if len(old := shards(cache.folder)) == 2:
            write_shard(cache.folder, Entries.merged([real(path, fingerprint) for path in old]), HERE)
            for path_ in old:
                path_.unlink()
        return real(path, fingerprint)

    monkeypatch.setattr(store, "read_shard", read)
    assert known(ReferenceCache(tmp_path, HERE), range(3)) == [0, 1]


def test_a_shard_on_its_way_that_somebody_removes_is_written_again(tmp_path, monkeypatch):
    replace, removed = os.replace, []

    def remove_once(source, target):
        if not removed:
            removed.append(source)
            os.unlink(source)
        return replace(source, target)

    cache = ReferenceCache(tmp_path, HERE)
    fill(cache, [1])
    monkeypatch.setattr(os, "replace", remove_once)
    cache.flush()
    assert removed and known(ReferenceCache(tmp_path, HERE), range(3)) == [1]


def test_what_could_not_be_written_is_kept_for_the_next_time(tmp_path, monkeypatch):
    cache = ReferenceCache(tmp_path, HERE)
    fill(cache, [1])
    with monkeypatch.context() as full_disk:

        def fail(handle):
            raise OSError(28, "No space left on device")

        full_disk.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space"):
            cache.flush()
    cache.flush()
    assert known(ReferenceCache(tmp_path, HERE), range(3)) == [1]


# What is refused


@pytest.fixture
def cache(tmp_path):
    with flushed(tmp_path / "cache", HERE) as cache:
        fill(cache, range(50))
    return cache


def _flip_a_byte_of_the_values(path):
    data = bytearray(path.read_bytes())
    place = data.index(np.sort(np.array([-i / 8 for i in range(50)], np.float32)).tobytes()[:4])
    data[place] ^= 1
    path.write_bytes(data)


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-30])


def _empty(path):
    path.write_bytes(b"")


def _text(path):
    path.write_text("key,logps\n")


def _other_columns(path):
    save_file({"logps": torch.ones(1)}, path)


@pytest.mark.parametrize("damage", [_flip_a_byte_of_the_values, _truncate, _empty, _text, _other_columns])
def test_a_damaged_shard_is_refused_by_name(cache, damage):
    path = shards(cache.folder)[0]
    damage(path)
    with pytest.raises(ValueError, match="not a file of reference log-probs") as error:
        ReferenceCache(cache.folder, HERE)
    assert str(path) in str(error.value) and f"mpo cache prune {cache.folder}" in str(error.value)


def test_every_single_cut_is_noticed(cache):
    path = shards(cache.folder)[0]
    data = path.read_bytes()
    for length in range(0, len(data), 37):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="not a file of reference log-probs"):
            read_shard(path, HERE)


def test_a_shard_of_another_model_is_refused_by_name(cache, tmp_path):
    with flushed(tmp_path / "cache", other(model_weights="v")) as stranger:
        fill(stranger, [1])
    moved = shards(stranger.folder)[0].rename(cache.folder / shards(stranger.folder)[0].name)
    with pytest.raises(ValueError, match="another model") as error:
        ReferenceCache(cache.folder, HERE)
    assert str(moved) in str(error.value)


def test_set_ups_share_a_root_without_meeting(cache, tmp_path, caplog):
    with caplog.at_level("INFO"):
        second = ReferenceCache(tmp_path / "cache", other(chat_template="u"))
    assert second.folder != cache.folder and second.folder.parent == cache.folder.parent
    assert known(second, range(50)) == []
    assert f"{cache.folder.name}, differs in (there -> here): chat template" in caplog.text
    caplog.clear()
    ReferenceCache(tmp_path / "cache", other(chat_template="u"))
    assert not caplog.text


def test_an_explicit_folder_of_another_set_up_is_refused_with_what_differs(cache):
    tiles = {"image processor": {"image_processor": {"max_patches": 6, "size": {"height": 448}}}}
    there = Fingerprint({**HERE.parts, "image processor": "j"}, tiles)
    with pytest.raises(ValueError, match=r"image processor \(image_processor.max_patches 12 -> 6\)\. ") as error:
        ReferenceCache(cache.folder, there)
    assert "model weights" not in str(error.value) and "parent folder" in str(error.value)
    assert known(ReferenceCache(cache.folder, HERE), range(50)) == list(range(50))


def test_a_damaged_meta_file_is_refused_and_its_cure_works(cache, tmp_path):
    (cache.folder / META_FILE).write_text('{"format": 1')
    with pytest.raises(ValueError, match="Delete it"):
        ReferenceCache(tmp_path / "cache", HERE)
    (cache.folder / META_FILE).unlink()
    assert known(ReferenceCache(tmp_path / "cache", HERE), range(50)) == list(range(50))


def test_a_folder_of_an_earlier_format_is_refused_by_name_and_left_alone(cache, tmp_path):
    meta = cache.folder / META_FILE
    meta.write_text(meta.read_text().replace('"format": 2', '"format": 1'))
    before = {path: path.read_bytes() for path in cache.folder.iterdir()}
    for root in (tmp_path / "cache", cache.folder):
        with pytest.raises(ValueError, match=f"has format 1, .*Delete {cache.folder} "):
            ReferenceCache(root, HERE)
    assert before == {path: path.read_bytes() for path in cache.folder.iterdir()}
    meta.write_text(meta.read_text().replace('"format": 1', '"format": 3'))
    with pytest.raises(ValueError, match="has format 3, .*Update mpo"):
        ReferenceCache(cache.folder, HERE)
    meta.write_text('{"format": 3, "fingerprint": "of another structure"}')
    with pytest.raises(ValueError, match="has format 3, .*Update mpo"):
        ReferenceCache(cache.folder, HERE)
    shutil.rmtree(cache.folder)
    assert known(ReferenceCache(tmp_path / "cache", HERE), range(50)) == []


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        ReferenceCache(tmp_path / "cache", HERE)
