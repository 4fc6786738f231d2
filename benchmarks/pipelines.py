"""Requests a second, client CPU and memory of a job against a stub server, and fifty kills of one.

    python benchmarks/pipelines.py OUTPUT.json [--questions 2000] [--memory 1000 100000] [--kills 50]
    python benchmarks/pipelines.py OUTPUT.json --sampling DEMO_RUN [--questions 200] [--times 7]

The stub server (tests/stub_server.py) answers at once, in a process of its own: the client is measured. Images are 448 x 448 JPEGs.
CPU times hold on a busy machine, requests a second only on an idle one with two cores. ``--sampling`` measures the sampling of
`mpo demo` with the warmed-up model of a run, 8 responses a question, by `LocalGenerator.generate`, through the step, and through
the step called in a thread of its own, in random order: CPU seconds of the program and, of these, of the system; page faults; and
the median of the ratios to `generate` in the same round.
"""

import argparse
import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mpo.data import load_questions
from mpo.generation.server import ServerGenerator
from mpo.io import write_text
from mpo.pipelines.job import Job
from mpo.pipelines.part import LEDGER
from mpo.pipelines.sample import Sample

STUB = Path(__file__).parent.parent / "tests" / "stub_server.py"
CONCURRENCY = 64
IMAGES = 100
QUESTIONS_PER_KILL = 100
"""More than are answered between two kills, so that each one hits a job that runs."""
FINAL = ("output.jsonl", "dropped.jsonl", "report.json", "report.html")


def write_questions(folder, count, *, images):
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0)
    for number in range(IMAGES if images else 0):
        pixels = noise.integers(0, 255, (28, 28, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((448, 448), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
    with open(folder / "questions.jsonl", "w") as file:
        for number in range(count):
            image = {"image": f"{number % IMAGES}.jpg"} if images else {}
            file.write(json.dumps({"id": f"q{number}", "question": f"What is {number} in words?", **image}) + "\n")
    return folder / "questions.jsonl"


def client(url, questions, folder):
    """Run the job in this process, and print what it took."""
    start, cpu = time.perf_counter(), time.process_time()
    generator = ServerGenerator(url, "tiny", concurrency=CONCURRENCY)
    report = Job([Sample(generator, temperature=1.0)], load_questions(questions), folder).run(progress=False)
    asked = generator.usage.requests
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(
        json.dumps(
            {
                "requests": asked,
                "output": report["output"],
                "requests_per_second": round(asked / wall, 1),
                "client_cpu_ms_per_request": round(1000 * cpu / max(asked, 1), 3),
                "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            }
        )
    )


def started(url, questions, folder):
    words = [sys.executable, __file__, "--client", url, str(questions), str(folder)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, start_new_session=True)


def run(url, questions, folder):
    process = started(url, questions, folder)
    said, _ = process.communicate()
    return json.loads(said)


def lines(folder):
    path = folder / LEDGER
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kills(url, folder, count):
    """Kill a job at random moments: when its ledger has grown by a random number of lines, and a random time later."""
    questions = write_questions(folder, QUESTIONS_PER_KILL * count, images=False)
    whole = run(url, questions, folder / "whole")
    chance, hits = random.Random(0), 0
    for _ in range(count):
        before, process = lines(folder / "job"), started(url, questions, folder / "job")
        target = before + chance.randrange(1, 40)
        while lines(folder / "job") < target and process.poll() is None:
            time.sleep(0.001)
        time.sleep(chance.random() * 0.02)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        hits += process.returncode == -signal.SIGKILL
    run(url, questions, folder / "job")
    same = all((folder / "job" / name).read_bytes() == (folder / "whole" / name).read_bytes() for name in FINAL)
    return {"kills": count, "hit_a_running_job": hits, "needed": whole["requests"], "concurrency": CONCURRENCY, "same_bytes": same}


def sampling(run, count, times):
    """CPU seconds of the demo's sampling, through the pipeline and without it."""
    import torch

    from mpo.demo.folder import DemoFolder
    from mpo.demo.stages import MAX_NEW_TOKENS, RESPONSES_PER_BATCH
    from mpo.generation.generator import Request
    from mpo.generation.local import LocalGenerator
    from mpo.io import read_json_lines
    from mpo.models.loading import load_model
    from mpo.pipelines.mmpr.sample import Sample as MMPRSample

    torch.set_num_threads(1)
    folder = DemoFolder(run)
    loaded = load_model(str(folder.warm), dtype="float32")
    generator = LocalGenerator(loaded.model, loaded.processor, responses_per_batch=RESPONSES_PER_BATCH)
    settings = {"n": 8, "max_new_tokens": MAX_NEW_TOKENS, "seed": 0}
    questions = [
        {
            "id": line["id"],
            "messages": [{"role": "user", "content": line["question"]}],
            "images": [str(folder.data.absolute() / line["image"])],
        }
        for line in read_json_lines(folder.lines("questions"))[:count]
    ]

    def direct():
        asked = [Request(one["messages"], one["images"]) for one in questions]
        return [[one.text for one in several] for several in generator.generate(asked, temperature=1.0, **settings)]

    def pipeline():
        made = MMPRSample(generator, prompt="plain", name="warm", **settings)(questions)
        return [[one["text"] for one in record["responses"]] for record in made]

    def thread():
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(pipeline).result()

    assert direct() == pipeline()
    ways = {"direct": direct, "pipeline": pipeline, "thread": thread}
    taken = {name: [] for name in ways}
    for number in range(times):
        for name in random.Random(number).sample([*ways], len(ways)):
            before, faults = os.times(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            ways[name]()
            after, faults = os.times(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
            taken[name].append((after.user + after.system - before.user - before.system, after.system - before.system, faults))
    found = {"questions": len(questions), "responses": 8 * len(questions), "times": times}
    for name, runs in taken.items():
        total, system, faults = (statistics.median(column) for column in zip(*runs, strict=True))
        found[name] = {"cpu_s": round(total, 3), "system_s": round(system, 3), "page_faults": round(faults)}
        found[name]["all"] = [round(one, 2) for one, *_ in runs]
    for name in ("pipeline", "thread"):
        ratios = [one / other for (one, *_), (other, *_) in zip(taken[name], taken["direct"], strict=True)]
        found[name]["ratio"] = round(statistics.median(ratios), 4)
    return found


def main():
    if sys.argv[1:2] == ["--client"]:
        return client(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--memory", type=int, nargs="*", default=[1000, 100_000])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--sampling", type=Path, metavar="DEMO_RUN")
    parser.add_argument("--times", type=int, default=7)
    args = parser.parse_args()
    if args.sampling:
        found = sampling(args.sampling, min(args.questions, 200), args.times)
        write(args.output, found)
        return print(json.dumps(found, indent=1))
    found = {"cores": os.cpu_count(), "concurrency": CONCURRENCY}
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen([sys.executable, STUB], stdout=subprocess.PIPE, text=True) as stub,
    ):
        try:
            url, folder = stub.stdout.readline().strip(), Path(folder)
            for name in ("images", "kills", *map(str, args.memory)):
                (folder / name).mkdir()
            found["images"] = run(url, write_questions(folder / "images", args.questions, images=True), folder / "images" / "job")
            write(args.output, found)
            found["memory"] = {}
            for count in args.memory:
                questions = write_questions(folder / str(count), count, images=False)
                found["memory"][count] = run(url, questions, folder / str(count) / "job")
                write(args.output, found)
            if args.kills:
                before = asked(url)
                found["kills"] = kills(url, folder / "kills", args.kills)
                found["kills"]["requests"] = asked(url) - before - found["kills"]["needed"]
                write(args.output, found)
        finally:
            stub.terminate()
    print(json.dumps(found, indent=1))


def write(path, found):
    """Write what was measured so far."""
    write_text(path, json.dumps(found, indent=1) + "\n")


def asked(url):
    """How many requests the stub has been asked."""
    with urllib.request.urlopen(f"{url}/asked") as response:
        return json.load(response)


if __name__ == "__main__":
    main()
