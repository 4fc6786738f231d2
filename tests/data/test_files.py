"""File types, places of lines, cached conversions, streams, and bad records."""

import gzip
import io
import json
import os
import tarfile
from concurrent.futures import ProcessPoolExecutor

import datasets
import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value

from mpo.data import files, load_preferences
from mpo.data.files import open_files
from mpo.io import BadRecord


def line(number, **more):
    return {"question": f"What is {number}?", "chosen": f"It is {number}.", "rejected": "Who knows?", **more}


def write(path, lines):
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path


def asked(pairs):
    return [row["prompt"][0]["content"][-1]["text"] for row in pairs]


QUESTIONS = [f"What is {number}?" for number in range(7)]


# File types


def test_json_lines_and_gzip(images):
    path = write(images / "pairs.jsonl", [line(number, image="a.png") for number in range(7)])
    packed = images / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    for found in (path, packed):
        pairs = load_preferences(found)
        assert asked(pairs) == QUESTIONS
        assert pairs[3]["images"][0].size == (64, 32)
        assert pairs["id"][3] == f"{found}:4"
        assert set(pairs["source"]) == {found.name.partition(".")[0]}
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(ValueError, match="packed.jsonl.gz is damaged"):
        load_preferences(packed)


def test_a_mark_of_utf8_and_windows_line_ends(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(line(number)).encode() for number in range(7)) + b"\r\n\r\n")
    assert asked(load_preferences(path)) == QUESTIONS


def test_line_separators_of_unicode_stay_in_their_text(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({**line(0), "chosen": "One\u2028two\x85three"}, ensure_ascii=False) + "\n" + json.dumps(line(1)))
    pairs = load_preferences(path)
    assert pairs[0]["chosen"][0]["content"][0]["text"] == "One\u2028two\x85three"
    assert len(pairs) == 2


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array(tmp_path, indent):
    """Objects are named by their first line, with and without indentation, as in LLaMA-Factory's files."""
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([line(number) for number in range(7)], indent=indent))
    pairs = load_preferences(path)
    assert asked(pairs) == QUESTIONS
    assert pairs["id"][1] == f"{path}:{7 if indent else 1.1}"  # an object takes five lines, after the bracket's
    path.write_text(json.dumps(line(3)) + "\n" + json.dumps(line(4)))
    assert asked(load_preferences(path)) == QUESTIONS[3:5]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", "has no pairs"),
        ("[1]", "pairs.json:1: .*a number"),
        ("[\n{},", "pairs.json:2: .*known format"),
        (f"[{json.dumps(line(0))} {json.dumps(line(1))}]", "pairs.json:1: not JSON after this object"),
        ("[\n\n5,]", "pairs.json:3: .*a number"),
        ("[{]", "pairs.json:1: not JSON from here on"),
        ("[", "pairs.json:1: not JSON from here on"),
        ("[" * 100_000, "pairs.json:1: not JSON from here on"),
        ("[] x", "pairs.json: .*after the end"),
    ],
)
def test_arrays_that_are_none(tmp_path, text, reason):
    (tmp_path / "pairs.json").write_text(text)
    with pytest.raises(ValueError, match=reason):
        load_preferences(tmp_path / "pairs.json")


def test_parquet(images):
    """Images as bytes, as paths, or as text; places of rows; several files by a pattern."""
    features = Features({"question": Value("string"), "chosen": Value("string"), "rejected": Value("string"), "image": Image()})
    rows = [line(number, image={"bytes": (images / "a.png").read_bytes(), "path": None}) for number in range(4)]
    Dataset.from_list(rows, features=features).to_parquet(images / "part-0.parquet")
    Dataset.from_list([line(number, image="b.png") for number in range(4, 7)]).to_parquet(images / "part-1.parquet", batch_size=2)
    pairs = load_preferences(f"{images}/part-*.parquet")
    assert asked(pairs) == QUESTIONS
    assert [row["images"][0].size for row in pairs] == [(64, 32)] * 7
    assert pairs["id"][6] == f"{images}/part-1.parquet:3"
    whole = (images / "part-0.parquet").read_bytes()
    (images / "part-0.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"part-0\.parquet .*Parquet file"):
        load_preferences(images / "part-0.parquet")


def test_saved_folders_and_their_splits(images):
    pairs = load_preferences(
        write(images / "pairs.jsonl", [line(number, image="a.png", answer_gt=str(number)) for number in range(7)])
    )
    pairs.save_to_disk(images / "saved")
    again = load_preferences(images / "saved")
    assert again.column_names == pairs.column_names
    for name in pairs.column_names:
        if name != "images":
            assert again[name][:] == pairs[name][:]
    assert again[0]["images"][0].size == (64, 32)
    DatasetDict({"train": pairs.select([0, 1]), "test": pairs.select([2])}).save_to_disk(images / "splits")
    assert len(load_preferences(images / "splits")) == 2
    assert asked(load_preferences(images / "splits", split="test")) == QUESTIONS[2:3]
    with pytest.raises(ValueError, match="no split 'validation'.* train, test"):
        load_preferences(images / "splits", split="validation")
    with pytest.raises(ValueError, match="no split 'validation'.* train"):
        load_preferences(images / "saved", split="validation")


def test_a_saved_folder_reads_nothing_beside_it(tmp_path):
    """Its state.json names its files; `datasets` would follow ``..`` there."""
    pairs = load_preferences(write(tmp_path / "pairs.jsonl", [line(0)]))
    for name in ("saved", "secret"):
        pairs.save_to_disk(tmp_path / name)
    state = json.loads((tmp_path / "saved" / "state.json").read_text())
    state["_data_files"] = [{"filename": "../secret/data-00000-of-00001.arrow"}]
    (tmp_path / "saved" / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="saved .*outside.*secret"):
        load_preferences(tmp_path / "saved")


def test_names_of_nothing(tmp_path):
    """A name on the Hub while offline, missing files, and unknown file types."""
    with pytest.raises(ValueError, match="'somebody/pairs' is not a file"):
        load_preferences("somebody/pairs")
    (tmp_path / "pairs.csv").write_text("question,chosen")
    (tmp_path / "pairs.txt").write_text("question,chosen")
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"conversations": turns}))
    (tmp_path / "array.jsonl").write_text('[\n{"question": "a", "chosen": "b", "rejected": "c"}\n]')
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name, reason in (
        ("none.jsonl", "There is no file .*none.jsonl"),
        ("/none/at/all", "There is no file /none/at/all"),
        ("none-*.jsonl", "There is no file .*none-\\*.jsonl"),
        ("pairs.csv", "pairs.csv .*unknown file type.*Parquet.*to_json"),
        ("pairs.txt", "pairs.txt .*unknown file type.*parquet"),
        ("chats.jsonl", "chats.jsonl:1: this is a conversation.*mpo sft"),
        ("array.jsonl", "array.jsonl:1: not JSON .*a file with a JSON array ends in .json"),
        ("pipe.jsonl", "pipe.jsonl .*not a regular"),
    ):
        with pytest.raises(ValueError, match=reason):
            load_preferences(tmp_path / name)


# Tars


def tar(path, members):
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            if data is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/hostname"
            else:
                data = json.dumps(data).encode() if isinstance(data, dict) else data
                member.size = len(data)
            archive.addfile(member, None if data is None else io.BytesIO(data))
    return path


def test_tars_of_a_webdataset(images):
    """One image or several of a sample, in its order or as its line names them; several shards by a pattern; gzip."""
    one, two = (images / "a.png").read_bytes(), (images / "b.png").read_bytes()
    tar(images / "shard-0.tar", [("000.jpg", one), ("000.json", line(0)), ("001.json", line(1)), ("001.png", two)])
    several = [("a/002.0.png", one), ("a/002.1.png", two), ("a/002.json", line(2)), ("a/003.json", line(3))]
    named = [("004.json", line(4, image=["004.second.png", "first.png"])), ("004.first.png", one), ("004.second.png", two)]
    tar(images / "shard-1.tar.gz", several + named)
    pairs = load_preferences(f"{images}/shard-*")
    assert asked(pairs) == QUESTIONS[:5]
    bare = pairs.cast_column("images", datasets.List(Image(decode=False)))
    assert [[image["bytes"] for image in row["images"]] for row in bare] == [[one], [two], [one, two], [], [two, one]]
    assert pairs["id"][2] == f"{images}/shard-1.tar.gz:a/002"


SAMPLE = [("0.json", line(0)), ("0.png", b"an image")]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("0.png", b"an image")], "one member 0.json"),
        ([*SAMPLE, ("0.caption.json", line(0))], "one member 0.json"),
        ([*SAMPLE, ("0.txt", b"a text")], "'0.txt' is not an image"),
        ([*SAMPLE, ("1.json", line(1)), ("0.jpg", b"another")], "key was there before"),
        ([*SAMPLE, ("0.png", b"another")], "in the tar twice"),
        ([("0.json", line(0)), ("0.png", None)], "link or a device"),
        ([("0.json", b"{"), ("0.png", b"an image")], "0: not JSON"),
        ([("0.json", b"[]")], "a JSON list"),
        ([("0.json", line(0, image="1.png")), ("0.png", b"an image")], "'1.png' is not a member"),
        ([("0.json", line(0, image=[5])), ("0.png", b"an image")], "image 5 .*not a member"),
        ([("0.json", line(0)), ("0.png", b"")], "image 1 .*no bytes"),
        ([("0.json", line(0, question="<image><image>")), ("0.png", b"an image")], "2 <image> placeholders for 1"),
    ],
)
def test_tars_that_are_wrong(tmp_path, members, reason):
    with pytest.raises(ValueError, match=reason) as error:
        load_preferences(tar(tmp_path / "shard.tar", members))
    assert "shard.tar:" in str(error.value)


def test_tars_that_are_cut_or_none(tmp_path):
    path = tar(tmp_path / "shard.tar", [("0.json", line(0)), ("0.png", b"x" * 5000)])
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="shard.tar is not a tar"):
        load_preferences(path)
    path.write_bytes(b"no tar at all" * 100)
    with pytest.raises(ValueError, match="shard.tar is not a tar"):
        load_preferences(path)


# Shards


@pytest.mark.parametrize("step", [1, 50, 200, 10_000])
def test_shards_have_all_lines_once_with_their_numbers(tmp_path, monkeypatch, step):
    """However a file is sharded; the last line has no line end, and some lines are empty."""
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n" + "\n".join(json.dumps(line(number)) + "\n" * (number % 3) for number in range(20)).rstrip("\n"))
    numbers = [number for number, text in enumerate(path.read_text().split("\n"), start=1) if text]
    monkeypatch.setattr(files, "SHARD_BYTES", step)
    opened = open_files(path)
    assert (len(opened) == 1) == (step == 10_000)
    found = [one for shard in opened for one in shard.lines()]
    assert [where for where, _ in found] == [f"{path}:{number}" for number in numbers]
    assert [text["question"] for _, text in found] == [f"What is {number}?" for number in range(20)]
    assert sum(shard.size for shard in opened) == path.stat().st_size


def test_several_processes_give_the_same(tmp_path, monkeypatch, own_cache):
    path = write(tmp_path / "pairs.jsonl", [line(number, id=number) for number in range(300)])
    alone = load_preferences(path, num_proc=1)
    monkeypatch.setattr(files, "SHARD_BYTES", 4000)
    other = tmp_path / "other"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", other)
    together = load_preferences(path, num_proc=2)
    assert len(list((other / "mpo_pairs").glob("*/*.arrow"))) > 3
    assert together.to_dict() == alone.to_dict()


def test_the_first_bad_record_of_several_processes(tmp_path, monkeypatch):
    lines = [line(number) for number in range(300)]
    lines[170] = {"question": "?"}
    monkeypatch.setattr(files, "SHARD_BYTES", 4000)
    with pytest.raises(BadRecord, match="pairs.jsonl:171: 'chosen' is missing") as error:
        load_preferences(write(tmp_path / "pairs.jsonl", lines), num_proc=2)
    assert error.value.where == f"{tmp_path}/pairs.jsonl:171"


# Cached conversions


def test_a_file_is_converted_once(tmp_path, monkeypatch, own_cache):
    """It is converted again after a change of the file or of the settings; a failed conversion is not kept."""
    path = write(tmp_path / "pairs.jsonl", [line(number) for number in range(7)])
    assert asked(load_preferences(path)) == QUESTIONS
    with monkeypatch.context() as closed:
        closed.setattr("mpo.data.sources.open_files", None)  # opening it again would fail
        again = load_preferences(path)
        assert asked(again) == QUESTIONS
        assert again._fingerprint == load_preferences(path)._fingerprint
        with pytest.raises(TypeError):
            load_preferences(path, source="another")
    write(path, [line(5), line(6)])
    assert asked(load_preferences(path)) == QUESTIONS[5:]
    write(path, [line(5), {"question": "?"}])
    for _ in range(2):
        with pytest.raises(BadRecord, match="pairs.jsonl:2"):
            load_preferences(path)
    assert not list(own_cache.rglob("*.incomplete"))


def test_ranks_that_start_together_convert_once(tmp_path, own_cache):
    """The first one converts, the others wait for it and open its result: all map the same files."""
    path = write(tmp_path / "pairs.jsonl", [line(number) for number in range(2000)])
    with ProcessPoolExecutor(3) as ranks:
        loaded = list(ranks.map(_mapped_files, [path] * 3))
    assert len({(rows, *files) for rows, files in loaded}) == 1
    assert loaded[0][0] == 2000
    assert len([one for one in (own_cache / "mpo_pairs").iterdir() if one.is_dir()]) == 1


def _mapped_files(path):
    pairs = load_preferences(path)
    return len(pairs), tuple((file["filename"], os.stat(file["filename"]).st_ino) for file in pairs.cache_files)


def test_pairs_are_mapped_not_held(tmp_path):
    pairs = load_preferences(write(tmp_path / "pairs.jsonl", [line(number) for number in range(7)]))
    assert [file["filename"].endswith(".arrow") for file in pairs.cache_files] == [True]


def test_columns_that_no_record_has_are_left_out(tmp_path):
    always = ["id", "source", "prompt_id", "images", "prompt", "chosen", "rejected"]
    pairs = load_preferences(write(tmp_path / "pairs.jsonl", [line(0), line(1)]))
    assert pairs.column_names == always
    pairs = load_preferences(write(tmp_path / "more.jsonl", [line(0), line(1, answer_gt="one", kind="sum")]))
    assert pairs.column_names == [*always, "ground_truth", "metadata"]
    assert pairs[0]["ground_truth"] is None
    assert (pairs[1]["ground_truth"], pairs[1]["metadata"]) == ("one", '{"kind": "sum"}')


def test_tiles_of_a_record_come_before_those_of_its_source(tmp_path):
    lines = [{"prompt": "?", "chosen": "A", "rejected": "B", **more} for more in ({}, {"tiles": {"max": 2}})]
    pairs = load_preferences(write(tmp_path / "pairs.jsonl", lines), tiles={"max": 6})
    assert [tiles["max"] for tiles in pairs["tiles"]] == [6, 2]
    with pytest.raises(ValueError, match="max of 'tiles' .*got 0"):
        load_preferences(tmp_path / "pairs.jsonl", tiles={"max": 0})
    assert [row["tiles"]["max"] for row in load_preferences(tmp_path / "pairs.jsonl", tiles={"max": 6}, streaming=True)] == [6, 2]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"format": "mmpr2"}, "format .*swift, sharegpt.*got 'mmpr2'"),
        ({"on_bad_record": "ignore"}, "on_bad_record .*raise, skip.*got 'ignore'"),
        ({"max_bad_fraction": 1.5}, "max_bad_fraction .*got 1.5"),
        ({"max_bad_fraction": 0.2}, "max_bad_fraction=0.2 needs on_bad_record='skip'"),
        ({"max_bad_fraction": "x"}, "max_bad_fraction .*got 'x'"),
        ({"limit": 0}, "limit .*got 0"),
        ({"limit": "5"}, "limit .*got '5'"),
        ({"limit": 1.5}, "limit .*got 1.5"),
        ({"frames": 5}, "frames .*min.*max.*got a number: 5"),
        ({"frames": {"max": "x"}}, "max of frames .*got 'x'"),
        ({"frames": {"min": 0}}, "min of frames .*1 or more; got 0"),
        ({"split": 3}, "split .*got 3"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, settings, reason):
    with pytest.raises(ValueError, match=reason):
        load_preferences(write(tmp_path / "pairs.jsonl", [line(0)]), **settings)


# Bad records


def test_skipped_records_are_counted_and_listed(tmp_path, caplog):
    """They are listed once, however often the file is loaded, and never replaced by other records; too many of them raise."""
    lines = [line(number) for number in range(7)]
    lines[2] = {**lines[2], "chosen": ""}
    lines[4] = {**lines[4], "image": "../x.png"}
    path, listed = write(tmp_path / "pairs.jsonl", lines), tmp_path / "run" / "bad_records.jsonl"
    for _ in range(2):
        caplog.clear()
        pairs = load_preferences(path, on_bad_record="skip", max_bad_fraction=0.3, bad_records=listed)
        assert asked(pairs) == [QUESTIONS[number] for number in (0, 1, 3, 5, 6)]
        assert "2 of 7 records" in caplog.text
    found = [json.loads(text) for text in listed.read_text().splitlines()]
    assert [bad["where"] for bad in found] == [f"{path}:3", f"{path}:5"]
    assert found[0]["reason"].startswith("'chosen' is empty")
    with pytest.raises(ValueError, match="2 of 7 records.*max_bad_fraction=0.2"):
        load_preferences(path, on_bad_record="skip", max_bad_fraction=0.2, bad_records=listed)
    with pytest.raises(BadRecord, match="pairs.jsonl:3"):
        load_preferences(path)


def test_a_fixed_image_is_no_longer_skipped(images, monkeypatch):
    """Bad lines are read again; as long as they stay bad, nothing is converted again."""
    lines = [line(0, image="a.png"), line(1, image="late.png"), line(2)]
    path = write(images / "pairs.jsonl", lines)
    settings = {"on_bad_record": "skip", "max_bad_fraction": 1, "bad_records": images / "bad.jsonl"}
    assert asked(load_preferences(path, **settings)) == [QUESTIONS[0], QUESTIONS[2]]
    with monkeypatch.context() as closed:
        closed.setattr("mpo.data.sources._write", None)  # converting again would fail
        assert asked(load_preferences(path, **settings)) == [QUESTIONS[0], QUESTIONS[2]]
    (images / "late.png").write_bytes((images / "b.png").read_bytes())
    for _ in range(2):
        assert asked(load_preferences(path, **settings)) == QUESTIONS[:3]


def test_ratings_that_give_no_pair_are_counted(tmp_path, caplog):
    """One line of equal ratings, and one of eight completions: 28 pairs, of which six are used."""

    def rated(*ratings):
        aspects = ("Helpfulness", "Visual Faithfulness", "Ethical Considerations")
        completions = [
            {"response": f"Answer {place}", "annotations": {aspect: {"Rating": str(rating)} for aspect in aspects}}
            for place, rating in enumerate(ratings)
        ]
        return {"prompt": "What is it?", "completions": completions}

    path = write(tmp_path / "rated.jsonl", [rated(3, 3, 3), rated(*range(8)), rated(1, 2)])
    for _ in range(2):  # converted, and then cached
        caplog.clear()
        assert len(load_preferences(path)) == 7
        assert f"1 of 3 records of {path} give no pair" in caplog.text and f"22 pairs of {path} are left out" in caplog.text


def test_nothing_but_bad_records(tmp_path):
    path = write(tmp_path / "pairs.jsonl", [{"question": "?"}])
    with pytest.raises(ValueError, match="has no pairs"):
        load_preferences(path, on_bad_record="skip", max_bad_fraction=1, bad_records=tmp_path / "bad_records.jsonl")


# Streams


def test_a_stream_gives_what_loading_gives(images):
    path = write(images / "pairs.jsonl", [line(number, image="a.png", answer_gt="a") for number in range(7)])
    loaded, streamed = load_preferences(path), list(load_preferences(path, streaming=True))
    assert [{name: row[name] for name in loaded.column_names} for row in streamed] == list(loaded)
    assert asked(load_preferences(path, streaming=True, limit=3)) == QUESTIONS[:3]
    assert load_preferences(path, streaming=True).num_shards == 7


def test_a_stream_resumes(tmp_path):
    path = write(tmp_path / "pairs.jsonl", [line(number) for number in range(200)])
    whole = asked(load_preferences(path, streaming=True))
    assert whole == [f"What is {number}?" for number in range(200)]
    for read in (1, 63, 199):
        stream = load_preferences(path, streaming=True)
        records = iter(stream)
        for _ in range(read):
            next(records)
        state = json.loads(json.dumps(stream.state_dict()))
        resumed = load_preferences(path, streaming=True)
        resumed.load_state_dict(state)
        assert asked(resumed) == whole[read:]


def test_bad_records_of_a_stream(tmp_path):
    lines = [line(number) for number in range(7)]
    lines[2] = {"question": "?"}
    path, listed = write(tmp_path / "pairs.jsonl", lines), tmp_path / "bad_records.jsonl"
    with pytest.raises(BadRecord, match="pairs.jsonl:3"):
        list(load_preferences(path, streaming=True))
    stream = load_preferences(path, streaming=True, on_bad_record="skip", bad_records=listed)
    for _ in range(2):
        assert asked(stream) == [QUESTIONS[number] for number in (0, 1, 3, 4, 5, 6)]
    assert [json.loads(text)["where"] for text in listed.read_text().splitlines()] == [f"{path}:3"]


def test_too_many_bad_records_of_a_stream(tmp_path):
    """Every 10th of 300 lines in 64 shards of 4 or 5: at the 2nd, 2 of 100 are more than 1 %; 30 of 300 are 10 %, each epoch."""
    lines = [line(number) if number % 10 else {"question": "?"} for number in range(300)]
    path, settings = write(tmp_path / "pairs.jsonl", lines), {"streaming": True, "bad_records": tmp_path / "bad_records.jsonl"}
    with pytest.raises(ValueError, match="2 of the first 11 records .* max_bad_fraction=0.01 .*pairs.jsonl:11"):
        list(load_preferences(path, on_bad_record="skip", **settings))
    stream = load_preferences(path, on_bad_record="skip", max_bad_fraction=0.11, **settings)
    assert len(list(stream)) == len(list(stream)) == 270
    with pytest.raises(ValueError, match="of the first .* max_bad_fraction=0.09"):
        list(load_preferences(path, on_bad_record="skip", max_bad_fraction=0.09, **settings))
