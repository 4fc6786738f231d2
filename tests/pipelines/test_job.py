"""Jobs against a stub server: killed, interrupted, on a full disk, by several workers, with another configuration."""

import asyncio
import json
import os
import signal
import time
from collections import Counter

import pytest
from stub_jobs import CONCURRENCY, PROCESSES, Judge, contents, questions, run_stub_job, stub_job
from stub_server import StubServer
from support import make_image

from mpo.data import load_questions
from mpo.generation.server import ServerGenerator
from mpo.io import read_json_lines
from mpo.pipelines.flow import Flow
from mpo.pipelines.job import Job
from mpo.pipelines.sample import Sample
from mpo.pipelines.step import Step

COUNT = 40


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a job that was not interrupted, and the number of requests it took."""
    folder = tmp_path_factory.mktemp("whole") / "job"
    with StubServer() as stub:
        report = stub_job(stub.url, folder, COUNT).run()
        assert report["records"] == COUNT == report["output"] + report["dropped"] and report["dropped"] > 0
        return folder, stub.asked


def started(*args, **settings):
    process = PROCESSES.Process(target=run_stub_job, args=args, kwargs=settings)
    process.start()
    return process


def when_asked(stub, number, do):
    """Do something when the stub is asked for the `number`th time from now."""
    last = stub.asked + number

    def poison(body):
        if stub.asked == last:
            do()

    stub.poison = poison


def test_every_record_is_in_one_place(whole):
    folder, asked = whole
    output, dropped = (read_json_lines(folder / name) for name in ("output.jsonl", "dropped.jsonl"))
    report, progress = (json.loads((folder / name).read_text()) for name in ("report.json", "progress.json"))
    ids = [f"q{number}" for number in range(COUNT)]
    assert sorted([one["id"] for one in output + dropped], key=ids.index) == ids
    assert [one["id"] for one in output] == sorted([one["input_id"] for one in output], key=ids.index)
    assert {(one["step"], one["reason"]) for one in dropped} == {("judge", "none of 2 is odd")}
    assert all(len(one["record"]["responses"]) == 2 for one in dropped)
    sample, judge = report["steps"]
    assert (sample["in"], sample["out"], judge["in"], judge["out"]) == (COUNT, COUNT, COUNT, len(output))
    assert judge["odd"] == pytest.approx(sum(one["odd"] for one in output) / len(output))
    assert asked == COUNT and sample["responses"] == 2 * COUNT == len(read_json_lines(folder / "ledger.jsonl"))
    spent = progress["spent"]
    assert (spent["requests"], spent["responses"], spent["prompt_tokens"]) == (COUNT, 2 * COUNT, COUNT * 10)
    assert spent["cost"] == pytest.approx((spent["prompt_tokens"] + 2 * spent["completion_tokens"]) / 1e6)


def test_a_finished_job_asks_nothing(whole):
    folder, asked = whole
    before = contents(folder)
    with StubServer() as stub:
        assert stub_job(stub.url, folder, COUNT).run()["output"] == len(read_json_lines(folder / "output.jsonl"))
        assert stub.asked == 0 and contents(folder) == before


def killed_at(moments, folder, count, needed):
    with StubServer() as stub:
        for moment in moments:
            process = started(stub.url, folder, count)
            when_asked(stub, moment, lambda: os.kill(process.pid, signal.SIGKILL))  # noqa: B023
            process.join()
            assert process.exitcode == -signal.SIGKILL
        stub.poison = None
        stub_job(stub.url, folder, count).run()
        assert needed <= stub.asked <= needed + CONCURRENCY * len(moments)


def test_a_job_that_is_killed_ends_the_same(whole, tmp_path):
    killed_at([1, 3, 9, 2, 6, 4, 8, 7], tmp_path / "job", COUNT, whole[1])
    assert contents(tmp_path / "job") == contents(whole[0])


@pytest.mark.slow
def test_a_job_that_is_killed_fifty_times_ends_the_same(tmp_path):
    with StubServer() as stub:
        stub_job(stub.url, tmp_path / "whole", 400).run()
    killed_at([1 + 7 * number % 13 for number in range(50)], tmp_path / "job", 400, 400)
    assert contents(tmp_path / "job") == contents(tmp_path / "whole")


def test_ctrl_c_waits_for_what_is_on_its_way(whole, tmp_path):
    """No response is lost: all runs together take as many requests as one."""
    folder, err = tmp_path / "job", tmp_path / "err"
    with StubServer(delay=0.02) as stub:
        process = started(stub.url, folder, COUNT, err=err)
        when_asked(stub, 15, lambda: os.kill(process.pid, signal.SIGINT))
        process.join()
        asked = stub.asked
        assert process.exitcode == 1 and asked < COUNT and str(folder) in err.read_text()
        assert len(read_json_lines(folder / "ledger.jsonl")) == 2 * asked
        stub.poison, stub.delay = None, 0
        stub_job(stub.url, folder, COUNT).run()
        assert stub.asked == COUNT
    assert contents(folder) == contents(whole[0])


def test_many_samples_of_one_question_are_kept_as_they_come(tmp_path):
    """Ctrl-C does not wait for the last of them, and the next run asks for the others only."""
    with StubServer(delay=0.02) as stub:
        process = started(stub.url, tmp_path / "job", 1, n=1280)
        when_asked(stub, 6, lambda: os.kill(process.pid, signal.SIGINT))
        process.join()
        kept = len(read_json_lines(tmp_path / "job" / "ledger.jsonl"))
        assert process.exitcode == 1 and 0 < kept < 1280
        stub.poison, stub.delay = None, 0
        stub_job(stub.url, tmp_path / "job", 1, n=1280).run()
        both, stub.asked = stub.asked, 0
        stub_job(stub.url, tmp_path / "whole", 1, n=1280).run()
        assert stub.asked == both
    assert contents(tmp_path / "job") == contents(tmp_path / "whole")


def test_a_full_disk(whole, tmp_path):
    folder, err = tmp_path / "job", tmp_path / "err"
    with StubServer() as stub:
        process = started(stub.url, folder, COUNT, file_bytes=8000, err=err)
        process.join()
        ledger = folder / "ledger.jsonl"
        assert process.exitcode == 1 and "File too large. All responses received are kept" in err.read_text()
        assert 7000 < ledger.stat().st_size <= 8000 and ledger.read_bytes().endswith(b"}\n")
        stub_job(stub.url, folder, COUNT).run()
        assert stub.asked <= COUNT + CONCURRENCY
    assert contents(folder) == contents(whole[0])


# The ledger


@pytest.fixture
def half(tmp_path):
    """The folder of a job that was killed when half of its requests were asked."""
    with StubServer() as stub:
        process = started(stub.url, tmp_path / "job", COUNT)
        when_asked(stub, COUNT // 2, lambda: os.kill(process.pid, signal.SIGKILL))
        process.join()
    return tmp_path / "job"


def complete(ledger):
    """How many records have both samples of their request in the ledger."""
    return list(Counter(one["record"] for one in read_json_lines(ledger)).values()).count(2)


@pytest.mark.parametrize("end", [b'{"key": "0123', b"\0" * 5000, b'{"key": "zz"}\n'])
def test_an_unfinished_last_line_is_cut_off(whole, half, end, caplog):
    there = complete(half / "ledger.jsonl")
    with open(half / "ledger.jsonl", "ab") as file:
        file.write(end)
    with StubServer() as stub:
        stub_job(stub.url, half, COUNT).run()
        assert stub.asked == COUNT - there
    assert f"{len(end)} bytes" in caplog.text and contents(half) == contents(whole[0])


def test_damage_in_the_middle_is_named(whole, half):
    ledger = half / "ledger.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join([*lines[:2], lines[2].replace(b"answer", b"ANSWER"), *lines[3:]]))
    with StubServer() as stub:
        with pytest.raises(ValueError, match=f"{ledger}:3.*Delete the line"):
            stub_job(stub.url, half, COUNT).run()
        assert stub.asked == 0
        ledger.write_bytes(b"".join([*lines[:2], *lines[3:]]))
        (half / "progress.json").unlink(missing_ok=True)
        there = complete(ledger)
        stub_job(stub.url, half, COUNT).run()
        assert stub.asked == COUNT - there
    assert contents(half) == contents(whole[0])


def test_an_output_that_is_lost_is_made_again(whole, tmp_path):
    folder = tmp_path / "job"
    with StubServer() as stub:
        stub_job(stub.url, folder, COUNT).run()
        (folder / "output.jsonl").write_bytes(b"")
        (folder / "report.json").unlink()
        progress = json.loads((folder / "progress.json").read_text())
        (folder / "progress.json").write_text(json.dumps({**progress, "records": COUNT - 1}))
        stub_job(stub.url, folder, COUNT).run()
        assert stub.asked == COUNT
    assert contents(folder) == contents(whole[0])


# Other jobs


def test_another_configuration_is_refused_with_both_values(whole):
    folder, _ = whole
    with StubServer() as stub:
        for other, names in (
            ({"n": 3}, "sample.sampling.n is 2 there and 3 now"),
            ({"temperature": 0.5}, "temperature is 1.0 there and 0.5 now"),
            ({"shards": 4}, "shards is 1 there and 4 now"),
        ):
            with pytest.raises(ValueError, match=names):
                stub_job(stub.url, folder, **{"count": COUNT, **other}).run()
        job = stub_job(stub.url, folder, COUNT)
        job.records = [{**question, "messages": [{"role": "user", "content": question["id"]}]} for question in job.records]
        with pytest.raises(ValueError, match="to other records"):
            job.run()
        job = stub_job(stub.url, folder, COUNT)
        for steps in (job.steps[:1], [job.steps[0], *[Judge()] * 2], job.steps[::-1]):
            with pytest.raises(ValueError, match=r"order is \['sample', 'judge'\] there"):
                Job(steps, job.records, folder).run()
        assert stub.asked == 0


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("text")
    with StubServer() as stub, pytest.raises(ValueError, match="thesis.tex"):
        stub_job(stub.url, tmp_path).run()


def test_two_processes_on_one_folder(tmp_path, whole):
    with StubServer(delay=0.05) as stub:
        process = started(stub.url, tmp_path / "job", COUNT)
        while not stub.asked:
            time.sleep(0.01)
        with pytest.raises(BlockingIOError, match=f"process {process.pid}"):
            stub_job(stub.url, tmp_path / "job", COUNT).run()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        stub.delay = 0
        stub_job(stub.url, tmp_path / "job", COUNT).run()
    assert contents(tmp_path / "job") == contents(whole[0])


# Failures


def test_a_record_that_fails_for_good(tmp_path):
    """The prompt of the long question has 5 + 30 + 1 + 3 tokens."""
    records = [*questions(5), {**questions(1, words=30)[0], "id": "long"}, {**questions(2)[1], "id": "last"}]
    with StubServer(context=38) as stub:
        job = Job([Sample(ServerGenerator(stub.url, "tiny"))], records, tmp_path / "job")
        report = job.run()
        (dropped,) = read_json_lines(tmp_path / "job" / "dropped.jsonl")
        assert (report["output"], dropped["id"], dropped["step"]) == (6, "long", "sample") and "38 tokens" in dropped["reason"]
        stub.context = None
        asked = stub.asked
        assert job.run()["dropped"] == 1 and stub.asked == asked
        assert job.run(retry_dropped=True)["dropped"] == 0 and stub.asked == asked + 1
    assert [one["id"] for one in read_json_lines(tmp_path / "job" / "output.jsonl")] == [one["id"] for one in records]


@pytest.mark.parametrize(("count", "most"), [(30, 5), (3, 5)])
def test_a_job_in_which_everything_fails_stops(tmp_path, count, most):
    with StubServer(context=38) as stub:
        job = Job(
            [Sample(ServerGenerator(stub.url, "tiny", concurrency=2))], questions(count, words=30), tmp_path, max_failures=most
        )
        with pytest.raises(ValueError, match=f"first {min(count, most)} records.*'q0'"):
            job.run()
        assert stub.asked < 20 and (tmp_path / "dropped.jsonl").read_text() == ""
        stub.context = None
        assert job.run()["output"] == count


def test_what_is_spent_without_a_response(tmp_path):
    """A broken response, two that are refused, and the plain request that tells whose fault the second one is."""
    records = [*questions(3), *({**questions(1, words=30)[0], "id": name} for name in ("long", "longer"))]
    with StubServer(context=38, faults=["half"]) as stub:
        job = Job([Sample(ServerGenerator(stub.url, "tiny", concurrency=1))], records, tmp_path)
        spent = job.run()["spent"]
        assert (spent["requests"], spent["responses"], spent["lost"], stub.asked) == (4, 3, 1, 3 + 1 + 2 + 1)
        (tmp_path / "progress.json").unlink()
        stub.context = None
        assert job.run()["spent"]["requests"] == 4 + 2


def test_no_server_and_another_model(tmp_path):
    with pytest.raises(ConnectionError, match="http://127.0.0.1:1/v1"):
        stub_job("http://127.0.0.1:1/v1", tmp_path / "a").run()
    with StubServer(model="other") as stub:
        with pytest.raises(ConnectionError, match="tiny"):
            stub_job(stub.url, tmp_path / "b").run()
        assert stub.answered == 0


def test_an_image_that_is_gone_is_named_before_anything_is_paid(tmp_path):
    make_image(0).save(tmp_path / "a.png")
    for name in ("b", "c"):
        (tmp_path / f"{name}.png").write_bytes((tmp_path / "a.png").read_bytes())
    lines = [{"id": name, "question": "What is it?", "image": f"{name}.png", "answer": 3} for name in "abc"]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = list(load_questions(tmp_path / "questions.jsonl"))
    (tmp_path / "b.png").unlink()
    with StubServer() as stub:
        step = Sample(ServerGenerator(stub.url, "tiny"))
        with pytest.raises(ValueError, match="1 of 3 records.*\n.*'b'.*b.png"):
            Job([step], records, tmp_path / "job").run()
        assert stub.asked == 0
        assert Job([step], records, tmp_path / "job", drop_bad=True).run()["dropped"] == 1
        assert stub.asked == 2
    (dropped,) = read_json_lines(tmp_path / "job" / "dropped.jsonl")
    assert dropped["id"] == "b" and "b.png" in dropped["reason"]


def test_encoded_images_become_files(tmp_path):
    make_image(0).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    records = [{**question, "images": [data if number else make_image(0)]} for number, question in enumerate(questions(2))]
    with StubServer() as stub:
        Job([Sample(ServerGenerator(stub.url, "tiny"))], records, tmp_path / "job").run()
    for one in load_questions(tmp_path / "job" / "output.jsonl"):
        assert open(one.images[0], "rb").read() == data


# Workers


@pytest.mark.slow
def test_workers_give_the_same_bytes_and_take_over(whole, tmp_path):
    """The first worker that asks is killed."""
    folder = tmp_path / "job"
    with StubServer(delay=0.01) as stub:

        def kill():
            owners = sorted(folder.glob("shards/*/.part.owner"))
            os.kill(int(owners[0].read_text().split()[1]), signal.SIGKILL)

        when_asked(stub, 5, kill)
        report = stub_job(stub.url, folder, COUNT).run(workers=2)
        assert report["records"] == COUNT and COUNT < stub.asked + 1 <= COUNT + CONCURRENCY + 1
    assert contents(folder) == contents(whole[0])


@pytest.mark.slow
def test_workers_go_on_with_a_job_that_one_process_began(whole, half):
    there = complete(half / "ledger.jsonl")
    with StubServer() as stub:
        stub_job(stub.url, half, COUNT).run(workers=2)
        assert stub.asked == COUNT - there
    assert contents(half) == contents(whole[0])


@pytest.mark.slow
def test_an_error_of_a_worker_is_raised_however_long_it_is(tmp_path):
    """It names the record, whose id is longer than a pipe holds (64 KiB)."""
    with pytest.raises(KeyError, match="responses"):
        Job([Judge()], [{"id": "q" * 200_000}], tmp_path).run(workers=2)


def test_a_job_of_one_part_is_divided(whole, half):
    """What was paid for is found in all parts and counted once, also with an unfinished line; and they are gone on with in one."""
    there, before = complete(half / "ledger.jsonl"), read_json_lines(half / "ledger.jsonl")
    with open(half / "ledger.jsonl", "ab") as file:
        file.write(b'{"key": "0123')
    with StubServer() as stub:
        stub_job(stub.url, half, COUNT).prepare(2)
        spent = stub_job(stub.url, half, COUNT).run()["spent"]
        assert stub.asked == COUNT - there and len([*half.glob("shards/0*")]) == 8
        assert spent["requests"] == stub.asked + sum(one["spent"].get("requests", 0) for one in before)
        assert stub_job(stub.url, half, COUNT).run()["spent"] == spent and stub.asked == COUNT - there
        with pytest.raises(ValueError, match="shards is 8 there and 4 now"):
            stub_job(stub.url, half, COUNT, shards=4).run(workers=2)
    with pytest.raises(ValueError, match="shards=1.*2 workers"):
        stub_job(stub.url, whole[0], COUNT, shards=1).run(workers=2)
    assert contents(half) == contents(whole[0])


def test_shards_in_one_process_give_the_same_bytes(whole, tmp_path):
    with StubServer() as stub:
        stub_job(stub.url, tmp_path / "job", COUNT, shards=COUNT + 3).run()
        assert stub.asked == COUNT
    assert contents(tmp_path / "job") == contents(whole[0])


# Steps


class Slow(Step):
    """It is not finished before the server has answered all."""

    verb = "slow"

    def __init__(self, stub, count):
        self._stub, self._count = stub, count

    def finish(self, record, responses):
        end = time.monotonic() + 60
        while self._stub.answered < self._count:
            assert time.monotonic() < end
            time.sleep(0.01)
        return record


def test_a_slow_step_holds_no_request_up():
    """And two steps together ask no more at a time than their generator may."""
    with StubServer(delay=0.01) as stub:
        generator = ServerGenerator(stub.url, "tiny", concurrency=3)
        flow = Flow([Sample(generator), Slow(stub, 6), Again(generator)])
        found = []
        flow.run(questions(6), found.append)
        assert [result.outputs[0]["id"] for result in found] == [f"q{number}" for number in range(6)]
        assert stub.answered == 12 and stub.most_at_once <= 3


class Again(Sample):
    verb = "again"


@pytest.mark.parametrize("error", [StopIteration, KeyError])
def test_an_error_of_a_step_names_the_record(error):
    class Wrong(Step):
        verb = "wrong"

        def finish(self, record, responses):
            raise error("row")

    with pytest.raises((KeyError, RuntimeError)) as raised:
        Wrong()(questions(2))
    assert error is StopIteration or "'q0'" in str(raised.value.__notes__)


class Split(Step):
    """Each response becomes a record."""

    verb, many = "split", True

    def finish(self, record, responses):
        return [{"text": response["text"]} for response in record["responses"]]


def test_a_step_in_a_notebook(whole, caplog):
    """Where an event loop runs already."""
    with StubServer() as stub:
        generator = ServerGenerator(stub.url, "tiny")

        async def cell():
            return Judge()(Sample(generator, n=2)(questions(10)))

        found = asyncio.run(cell())
    expected = [one for one in read_json_lines(whole[0] / "output.jsonl") if int(one["id"][1:]) < 10]
    assert found == expected and caplog.text.count("none of 2 is odd") == 10 - len(found) > 0


def test_a_step_with_several_outputs(tmp_path):
    with StubServer() as stub:
        steps = [Sample(ServerGenerator(stub.url, "tiny"), n=2), Split(), Count(), Count()]
        report = Job(steps, questions(3), tmp_path).run()
    ids = [(one["id"], one["input_id"]) for one in read_json_lines(tmp_path / "output.jsonl")]
    assert ids == [(f"q{one}/{place}", f"q{one}") for one in range(3) for place in range(2)]
    assert [(row["step"], row["in"], row["out"]) for row in report["steps"]] == [
        ("sample", 3, 3), ("split", 3, 6), ("count", 6, 6), ("count_2", 6, 6),
    ]  # fmt: skip


class Count(Step):
    verb = "count"

    def finish(self, record, responses):
        return {**record, "words": len(record["text"].split())}


@pytest.mark.parametrize("wrong", [None, [], "text"])
def test_a_step_that_returns_no_record(wrong):
    class Wrong(Step):
        verb = "wrong"

        def finish(self, record, responses):
            return wrong

    with pytest.raises(TypeError, match="'wrong'"):
        Wrong()(questions(1))


@pytest.mark.parametrize(
    ("records", "name"),
    [
        ([{"messages": []}], "Record 0 has the id None"),
        (["text"], "Record 0 is a str"),
        ([*questions(2), *questions(1)], "record 2: the id 'q0'.*record 0"),
        ([], "no records"),
        (iter(questions(1)), "only once"),
        ([{"id": "q0", "thing": object()}], "a record has a object"),
    ],
)
def test_records_that_are_none(tmp_path, records, name):
    with pytest.raises(ValueError, match=name):
        Job([Judge()], records, tmp_path).run()


def test_settings_without_a_meaning(tmp_path):
    for settings, name in (({"shards": 0}, "shards=0"), ({"steps": []}, "got \\[\\]"), ({"steps": Judge()}, "list of one step")):
        with pytest.raises(ValueError, match=name):
            Job(**{"steps": [Judge()], "records": questions(1), "folder": tmp_path, **settings})
    with pytest.raises(ValueError, match="workers=0"):
        Job([Judge()], questions(1), tmp_path).run(workers=0)
