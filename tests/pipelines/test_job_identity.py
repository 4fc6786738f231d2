"""What belongs to a job, and what is refused: other settings, contents, edited files, steps that are not written as one."""

import json
import os
import shutil
import sys
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from stub_jobs import contents, stub_job
from stub_server import StubServer
from support import make_image

from mpo.data import load_questions
from mpo.generation.generator import Request
from mpo.generation.server import ServerGenerator
from mpo.io import read_json_lines
from mpo.pipelines.job import Job
from mpo.pipelines.ledger import Ledger
from mpo.pipelines.sample import Sample
from mpo.pipelines.step import Dropped, Step


@pytest.fixture
def server():
    with StubServer() as stub:
        yield stub


ASKED = [{"role": "user", "content": "What is it?"}]


def records(count=3):
    return [{"id": f"r{number}", "words": ["What", "is", str(number)]} for number in range(count)]


class Make(Step):
    """Give what a function makes of the record."""

    verb, measure = "make", "size"

    def __init__(self, make):
        self._make = self.make = make

    def settings(self):
        return {}

    def finish(self, record, responses):
        return self._make(record)


class Ask(Step):
    verb = "ask"

    def __init__(self, generator):
        self.generator = generator

    def requests(self, record):
        record["words"].append("please")
        return Request.ask(" ".join(record["words"]))

    def finish(self, record, responses):
        return {"words": record["words"], "text": responses[0][0].text}


def read(folder, name="output.jsonl"):
    return read_json_lines(folder / name)


def test_long_text_in_the_report(tmp_path):
    for shift in range(4):
        job = Job([Make(lambda record: {"text": "x" * shift + "文" * 3000})], records(1), tmp_path / str(shift))  # noqa: B023
        job.run()
        assert "文文" in (tmp_path / str(shift) / "report.html").read_text()


def test_a_step_that_edits_its_record(tmp_path, server):
    given = records()
    step = Ask(ServerGenerator(server.url, "tiny"))
    Job([step], given, tmp_path / "job").run()
    assert given == records() and [one["words"] for one in read(tmp_path / "job")] == [one["words"] for one in given]
    assert all(
        body["messages"][0]["content"].endswith("please")
        for body in server.bodies
        if isinstance(body["messages"][0]["content"], str)
    )
    asked = server.asked
    assert step(given) == read(tmp_path / "job") and given == records() and server.asked == 2 * asked
    (tmp_path / "job" / "progress.json").unlink()
    Job([step], given, tmp_path / "job").run()
    assert server.asked == 2 * asked


def test_children_share_nothing(tmp_path):
    class Split(Step):
        verb, many = "split", True

        def finish(self, record, responses):
            return [{"words": record["words"]}] * 3

    def grow(record):
        record["words"].append(record["id"])
        return record

    Job([Split(), Make(grow)], records(1), tmp_path).run()
    assert [one["words"] for one in read(tmp_path)] == [["What", "is", "0", f"r0/{place}"] for place in range(3)]


def test_sampling_and_class_are_settings(tmp_path, server):
    def step(name="Sampled", verb="ask", **sampling):
        return type(name, (Ask,), {"verb": verb, "sampling": sampling})(ServerGenerator(server.url, "tiny"))

    Job([step(max_new_tokens=5, seed=1)], records(), tmp_path).run()
    for other, name in (
        (step(max_new_tokens=6, seed=1), "ask.sampling.max_new_tokens is 5 there and 6 now"),
        (step(max_new_tokens=5), "seed is 1 there and 0 now"),
        (step(max_new_tokens=5, seed=1, temperature=0.5), "temperature is 1.0 there and 0.5 now"),
        (step(max_new_tokens=5, seed=1, n=2), "n is 1 there and 2 now"),
        (step("Other", max_new_tokens=5, seed=1), "Sampled' there and .*Other' now"),
    ):
        with pytest.raises(ValueError, match=name):
            Job([other], records(), tmp_path).run()
    with pytest.raises(ValueError, match="'ask'.*'tokens'"):
        Job([step(tokens=5)], records(), tmp_path / "other").run()


def test_arguments_that_are_not_kept(tmp_path):
    class Hides(Step):
        verb = "hides"

        def __init__(self, style="a", **more):
            self._style, self.more = style, more

        def finish(self, record, responses):
            return record

    class Passes(Hides):
        def __init__(self, *args, **more):
            super().__init__(*args, **more)
            self.style = "b"

    @dataclass
    class Plain(Hides):
        style: object = "a"
        least: float = 0.5

    with pytest.raises(ValueError, match="'hides'.*'style'"):
        Job([Hides()], records(), tmp_path / "a").run()
    Job([Passes(x=1)], records(), tmp_path / "b").run()
    with pytest.raises(ValueError, match="more.x is 1 there and 2 now"):
        Job([Passes(x=2)], records(), tmp_path / "b").run()
    Job([Plain(tmp_path)], records(), tmp_path / "c").run()
    for wrong in (lambda: 1, {1, 2}, float("nan"), object()):
        with pytest.raises(ValueError, match="'hides' has style="):
            Job([Plain(wrong)], records(), tmp_path / "d").run()


# Files


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", ["output.jsonl", "dropped.jsonl"])
def test_edited_output_is_made_again(tmp_path, server, shards, name, caplog):
    folder = tmp_path / "job"
    stub_job(server.url, folder, 12, shards=shards).run()
    whole, asked = contents(folder), server.asked
    path = folder / name if shards == 1 else folder / "shards" / "00000" / name
    progress, data = path.with_name("progress.json"), path.read_bytes()
    before = json.loads(progress.read_text())
    for edited in (data[len(data) // 2 :], data.replace(b"answer", b"ANSWER", 1), data + b"{}\n", None):
        path.unlink() if edited is None else path.write_bytes(edited)
        spent = stub_job(server.url, folder, 12).run()["spent"]
        assert contents(folder) == whole and (edited == data or str(path) in caplog.text) and spent["requests"] == asked
        caplog.clear()
    for wrong in ({}, {**before, "records": "x"}, {**before, "counts": {}}, {"records": before["records"]}, []):
        progress.write_text(json.dumps(wrong))
        assert stub_job(server.url, folder, 12).run()["spent"]["responses"] == 2 * asked and contents(folder) == whole
    assert server.asked == asked


def look(folder, server, **settings):
    return Job([Sample(ServerGenerator(server.url, "tiny"))], load_questions(folder / "q.jsonl"), folder / "job", **settings)


@pytest.fixture
def shown(tmp_path):
    folder = tmp_path / "there"
    folder.mkdir()
    for number in range(3):
        make_image(number).save(folder / f"{number}.png")
    lines = [{"id": f"q{number}", "question": "What?", "image": f"{number}.png"} for number in range(3)]
    (folder / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_images_that_are_replaced(shown, server):
    look(shown, server).run()
    asked = server.asked
    make_image(7).save(shown / "1.png")
    assert look(shown, server).run()["unused"] == 1 and server.asked == asked + 1
    (shown / "job" / ".job.marks").unlink()
    make_image(1).save(shown / "1.png")  # its response is still there
    assert look(shown, server).run()["unused"] == 1 and server.asked == asked + 1
    asked = server.asked
    opened = []
    sys.addaudithook(lambda event, args: opened.append(args[0]) if event == "open" and str(args[0]).endswith(".png") else None)
    look(shown, server).run()
    assert opened == []
    (shown / "job" / ".job.marks").write_bytes(b"edited")
    look(shown, server).run()
    assert {*opened} == {str(shown / f"{number}.png") for number in range(3)} and server.asked == asked


def test_a_folder_of_an_earlier_version_goes_on(shown, server):
    """It lacks the hashes of this one: also where an answer was corrected in the meantime, and its images are read again."""
    lines = [{**json.loads(line), "answer": "3", "kind": "number"} for line in (shown / "q.jsonl").read_text().splitlines()]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (shown / "q.jsonl").write_text(text)
    look(shown, server).run()
    asked = server.asked
    for number in range(3):
        os.utime(shown / f"{number}.png", (1, 1))
    marks, job = shown / "job" / ".job.marks", shown / "job" / "job.json"
    marks.rename(marks.with_name(".job.records"))
    settings = json.loads(job.read_text())
    job.write_text(json.dumps({**settings, "records": {**settings["records"], "contents": "0" * 32}}))
    (shown / "q.jsonl").write_text(text.replace('"3"', '"4"', 1).replace('"number"', '"list"', 1))
    look(shown, server).run()
    assert server.asked == asked and read(shown / "job")[0]["ground_truths"] == ["4"]


@pytest.mark.parametrize("shards", [None, 2])
def test_other_records_are_refused_without_hashes(shown, server, shards):
    """In a folder of an earlier version: unless nothing was answered, or one of the records has a response, at any place."""
    lines = [json.loads(line) for line in (shown / "q.jsonl").read_text().splitlines()]

    def go_on(lines):
        (shown / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (shown / "job" / ".job.marks").unlink(missing_ok=True)
        return look(shown, server, shards=shards).run()

    go_on(lines)
    asked, before = server.asked, contents(shown / "job")
    for others in (
        [{**line, "question": "Other?"} for line in lines],
        [{**line, "image": "0.png", "question": "?"} for line in lines],
    ):
        with pytest.raises(ValueError, match="to other records: none of its 3 is among these 3"):
            go_on(others)
    assert server.asked == asked and contents(shown / "job") == before
    assert go_on([{**lines[0], "id": "new", "question": "New?"}, {**lines[2], "id": "moved"}])["unused"] == 2
    assert server.asked == asked + 1
    for ledger in (shown / "job").rglob("ledger*.jsonl"):
        ledger.write_text("")
    assert go_on([{**line, "question": "Other?"} for line in lines])["output"] == 3


def test_reports_are_gone_while_an_output_is_made_again(tmp_path, server):
    """Where it goes on, is made again, is tried again or is divided; a finished one keeps them, also where it is refused."""

    def check(count, **settings):
        seen = []

        class Look(Make):
            def finish(self, record, responses):
                seen.append([(folder / name).exists() for name in ("report.json", "report.html")])
                return super().finish(record, responses)

        retry = settings.pop("retry_dropped", False)
        job = Job([Look(drop_first)], records(count), folder, **settings)
        job.run(retry_dropped=retry)
        assert all((folder / name).exists() for name in ("report.json", "report.html"))
        assert not any(any(one) for one in seen)
        return len(seen)

    def drop_first(record):
        if record["id"] == "r0":
            raise Dropped("no")
        return record

    folder = tmp_path / "job"
    assert [check(3), check(3), check(5), check(4), check(4, retry_dropped=True)] == [3, 0, 2, 4, 4]
    with pytest.raises(ValueError, match="another job"):
        Job([Make(dict), Make(dict)], records(4), folder).run()
    assert (folder / "report.json").exists()
    (folder / "output.jsonl").write_text("")
    assert check(4) == 4


def test_whether_records_have_changed(shown, server):
    """Without the model that was asked."""
    assert look(shown, server).changed()
    look(shown, server).run()
    asked, lines = server.asked, (shown / "q.jsonl").read_text()
    job = Job([Sample(object())], load_questions(shown / "q.jsonl"), shown / "job", drop_bad=True)
    assert not job.changed()
    (shown / "q.jsonl").write_text(lines.replace("What?", "Which?", 1))
    assert job.changed()
    (shown / "q.jsonl").write_text(lines)
    assert not job.changed()
    make_image(9).save(shown / "2.png")
    assert job.changed() and server.asked == asked


def test_a_ledger_of_other_settings_has_no_response(server, tmp_path):
    """Neither of another sampling nor of another model; also where the output is made again."""

    def run(folder, url=server.url, **sampling):
        Job([Sample(ServerGenerator(url), **sampling)], [{"id": "r0", "messages": ASKED}], tmp_path / folder).run()
        return (tmp_path / folder / "output.jsonl").read_bytes()

    mine = run("mine", seed=0)
    others = [run("seed", seed=5), run("temperature", temperature=0.5)]
    with StubServer("big", text=lambda body, number: "Big.") as big:
        others.append(run("model", big.url))
    assert len({mine, *others}) == 3  # the stub's texts are the same at any temperature
    for folder in ("seed", "temperature", "model"):
        shutil.copytree(tmp_path / "mine", tmp_path / f"in {folder}")
        shutil.copy(tmp_path / folder / "ledger.jsonl", tmp_path / f"in {folder}" / "ledger.jsonl")
        (tmp_path / f"in {folder}" / "output.jsonl").unlink()
        asked = server.asked
        assert run(f"in {folder}", seed=0) == mine and server.asked == asked + 1


def test_everything_is_moved(shown, server, tmp_path):
    look(shown, server).run()
    asked = server.asked
    shutil.move(shown, tmp_path / "here")
    assert look(tmp_path / "here", server).run()["spent"]["requests"] == asked == server.asked
    assert [one["images"] for one in read(tmp_path / "here" / "job")] == [[str(tmp_path / "here" / f"{n}.png")] for n in range(3)]


def test_what_json_cannot_hold(tmp_path):
    for place, (wrong, name) in enumerate(
        [
            (float("nan"), "float values"),
            ({1: 2, "1": 3}, "key 1"),
            ({"a": [{(1, 2): 3}]}, "tuple"),
            ([float("inf")], "float values"),
            (object(), "object"),
        ]
    ):
        with pytest.raises(ValueError, match=f"'r0'.*{name}"):
            Job([Make(lambda record: {"x": wrong})], records(1), tmp_path / str(place)).run()  # noqa: B023
        with pytest.raises(ValueError, match=f"'r0'.*{name}"):
            Job([Make(dict)], [{"id": "r0", "x": wrong}], tmp_path / f"in{place}").run()
    Job([Make(lambda record: {"x": "\ud800", "y": np.float32(1)})], records(1), tmp_path / "job").run()
    assert read(tmp_path / "job") == [{"x": "\ud800", "y": 1.0, "id": "r0", "input_id": "r0"}]


def test_measures(tmp_path):
    report = Job([Make(lambda record: {"size": None})], records(), tmp_path / "none").run()
    assert (
        report["steps"][0]["size"] is None
        and json.loads((tmp_path / "none" / "report.json").read_text())["steps"] == report["steps"]
    )
    values = {"r0": True, "r1": None, "r2": np.float32(0.5)}
    assert (
        Job([Make(lambda record: {"size": values[record["id"]]})], records(), tmp_path / "some").run()["steps"][0]["size"] == 0.75
    )
    for wrong in (float("nan"), float("inf"), "0.5", [1], 10**400):
        with pytest.raises(ValueError, match="'make' measures 'size'.*'r0'"):
            Make(lambda record: {"size": wrong})(records())  # noqa: B023


# Steps


def test_steps_that_are_none(tmp_path, server):
    class NoVerb(Make):
        verb = None

    generator = ServerGenerator(server.url, "tiny")
    for steps, name in (
        ([NoVerb(dict)], "NoVerb has the verb None"),
        ([type("Slash", (Make,), {"verb": "a/b"})(dict)], "'a/b'"),
        ([Make], "instance.*Make"),
        (["sample"], "'sample'"),
        ([type("Two", (Make,), {"verb": "make_2"})(dict), Make(dict), Make(dict)], "make_2"),
        ([Ask(object())], "'ask', a object, has no identity"),
    ):
        with pytest.raises(ValueError, match=name):
            Job(steps, records(), tmp_path / "job").run()
    for wrong in (None, "text", ["text"], {"messages": []}, 3):
        step = type("Wrong", (Ask,), {"requests": lambda self, record: wrong})(generator)  # noqa: B023
        for run in (step, lambda given: Job([step], given, tmp_path / "wrong", drop_bad=True).run()):  # noqa: B023
            with pytest.raises(ValueError, match="'ask' must return a list of requests"):
                run(records())
    assert server.answered == 0
    step = type("Several", (Ask,), {"requests": lambda self, record: (Request.ask(word) for word in record["words"])})(generator)
    assert len(step(records())) == 3


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("concurrency", (0, -1, "4", 2.5, True)),
        ("shards", (0, -2, 2.5, "2", True)),
        ("max_failures", (0, "3")),
        ("workers", (2.5, "2")),
    ],
)
def test_numbers_that_are_none(tmp_path, name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"{name}={value!r}"):
            given = {} if name == "workers" else {name: value}
            Job([Make(dict)], records(), tmp_path / "job", **given).run(**({name: value} if name == "workers" else {}))
    (tmp_path / "file").write_text("text")
    for folder in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(ValueError, match="is a file"):
            Job([Make(dict)], records(), folder).run()


def test_a_step_that_drops_all(tmp_path):
    def drop(record):
        raise Dropped("no")

    assert Job([Make(drop)], records(), tmp_path).run()["dropped"] == 3


@pytest.mark.parametrize("shards", [None, 2, 3])
def test_new_records_go_on_after_the_old_ones(tmp_path, shards):
    """What is there keeps its place and is not made again; the rest is that of a new job."""
    made = []
    step = Make(lambda record: made.append(record["id"]) or {"text": record["id"]})
    for count in (3, 4, 8):
        made.clear()
        Job([step], records(count), tmp_path / "grown", shards=shards).run()
        assert len({*made}) == {3: 3, 4: 1, 8: 4}[count] and len(read(tmp_path / "grown")) == count
    Job([step], records(8), tmp_path / "whole").run()
    assert read(tmp_path / "grown") == read(tmp_path / "whole")


@pytest.mark.parametrize("shards", [None, 3])
@pytest.mark.parametrize("ids", ["own", "of places"])
def test_records_come_go_and_change(tmp_path, server, shards, ids):
    """Each request without a response is asked once, whatever part held it; the output is that of a new job."""

    def run(numbers, folder="job"):
        given = [
            {"id": f"r{place if ids == 'of places' else number}", "messages": [{"role": "user", "content": f"What is {number}?"}]}
            for place, number in enumerate(numbers)
        ]
        before = server.asked
        report = Job([Sample(ServerGenerator(server.url, "tiny"), n=2)], given, tmp_path / folder, shards=shards).run()
        assert report["records"] == report["output"] == len(numbers)
        return server.asked - before, report.get("unused", 0)

    of_one = run([0, 1, 2, 3, 4, 5, 6])[0] // 7
    for numbers, new, unused in (
        ([1, 2, 3, 4, 5, 6], 0, 2),  # the first is gone
        ([6, 5, 10, 3, 2, 1], 1, 4),  # another order, and one has changed
        ([20, 6, 5, 10, 1, 21, 22], 3, 8),
        ([0, 1, 2, 3, 4, 5, 6], 0, 8),  # as at first
    ):
        assert run(numbers) == (new * of_one, unused)
        assert run(numbers) == (0, unused)
        (new_, none), mine = run(numbers, f"new {numbers}"), read(tmp_path / "job")
        assert new_ and not none and [one["id"] for one in mine] == [one["id"] for one in read(tmp_path / f"new {numbers}")]
        assert [one["messages"] for one in mine] == [one["messages"] for one in read(tmp_path / f"new {numbers}")]
    with pytest.raises(ValueError, match="to other records: none of its 7 is among these 2"):
        run([30, 31])


def test_ledgers_of_earlier_parts_are_read_once(tmp_path, server, monkeypatch):
    """By 4 parts: those of the 4 parts before, and their own 4; after another change the 4 and 1 new one before, and their own."""
    read_, scan = [], Ledger._scan
    monkeypatch.setattr(Ledger, "_scan", lambda self: (read_.append(self.path.name), scan(self))[1])

    def run(numbers):
        given = [{"id": f"r{number}", "messages": [{"role": "user", "content": f"What is {number}?"}]} for number in numbers]
        read_.clear()
        before = server.asked
        Job([Sample(ServerGenerator(server.url, "tiny"))], given, tmp_path, shards=4).run()
        return Counter(read_), server.asked - before

    run(range(8))
    earlier = [f"ledger-{number}.jsonl" for number in range(4)]
    assert run([9, *range(1, 8)]) == ({"ledger.jsonl": 4, **dict.fromkeys(earlier, 1)}, 1)
    found, new = run(range(7, -1, -1))
    assert new == 0 and found.pop("ledger.jsonl") == 4 and set(found.values()) == {1} and set(earlier) < set(found)


@pytest.mark.parametrize("shards", [None, 2])
def test_unused_responses_where_records_ask_the_same(tmp_path, server, shards):
    """A response that two records share is one: of A, B, C and then A, C, A' those of B are unused."""

    def unused(*words):
        given = [{"id": word, "messages": [{"role": "user", "content": word.strip("'")}]} for word in words]
        return (
            Job([Sample(ServerGenerator(server.url, "tiny"), n=2)], given, tmp_path / "job", shards=shards).run().get("unused", 0)
        )

    assert [unused(*words) for words in ("ABC", ["A", "C", "A'"], "AC", ["C", "A'"], "ABC")] == [0, 2, 2, 2, 0]
    assert server.asked == 3
