"""lmms-eval, the field's harness, in an environment of its own: serve a model, run tasks on it, and read the results as ours."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mpo.evaluation.results import GREEDY, summarize, write_results
from mpo.evaluation.run import slug
from mpo.generation.generator import is_server
from mpo.io import read_json_lines, read_json_object, write_text
from mpo.pipelines.ledger import content_hash

VERSION = "0.7.3"
PACKAGES = (f"lmms-eval=={VERSION}", "filelock<3.25")
"""Its evaluator patches a module that later filelocks lack."""
FAILED = "[LMMS_EVAL_"
"""How a response starts that did not come; lmms-eval scores it as any other."""
PORT = 8000


def environment() -> Path:
    """The folder of the environment, which all runs share."""
    cache = Path(os.environ.get("MPO_CACHE", Path.home() / ".cache" / "mpo"))
    return cache / f"lmms-eval-{VERSION}-python{sys.version_info.major}.{sys.version_info.minor}"


def preparing(folder: Path) -> list[list[str]]:
    """The commands that make the environment: its own packages first, which conflict with ours, then those of this one."""
    shared = "\n".join(dict.fromkeys(path for path in sys.path if path.endswith(("site-packages", "dist-packages"))))
    link = f"import pathlib, sysconfig; pathlib.Path(sysconfig.get_path('purelib'), 'shared.pth').write_text({shared!r})"
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    return [[sys.executable, "-m", "venv", str(folder)], [python, "-c", link], [*pip, *PACKAGES]]


def serving(model: str, port: int, device: str | None) -> list[str]:
    """The command that serves a folder."""
    start = "import mpo, runpy; runpy.run_module('transformers.cli.transformers', run_name='__main__')"  # mpo: for its own types
    words = [sys.executable, "-c", start, "serve", model, "--port", str(port)]
    return [*words, "--device", device] if device else words


def running(name: str, url: str, tasks: Sequence[str], output: Path, *, concurrency: int, **options: Any) -> list[str]:
    """The command that runs tasks on the model `name` of a server; further options are those of lmms-eval."""
    if "," in name + url:
        raise ValueError(f"lmms-eval splits its arguments at commas, and {name} at {url} has one. Rename the folder.")
    args = f"model_version={name},base_url={url},num_concurrent={concurrency},timeout=600"
    words = [str(environment() / "bin" / "python"), "-m", "lmms_eval", "--model", "openai", "--model_args", args]
    words += ["--tasks", ",".join(tasks), "--output_path", str(output), "--log_samples"]
    return words + [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]


def run_harness(
    models: Mapping[str, str],
    tasks: Sequence[str],
    folder: str | Path,
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    device: str | None = None,
    concurrency: int = 8,
    dry_run: Callable[[str], Any] | None = None,
) -> dict[str, Any]:
    """Run tasks of lmms-eval on models, and write their results as `mpo.evaluation.run.evaluate` does.

    Args:
        models: folders or names, which `transformers serve` serves one after another, or URLs of servers, by their labels.
        tasks: their names; those of the user's own are in the folder `include_path`.
        folder: where ``results.json``, ``report.html`` and ``answers.jsonl`` go, and lmms-eval's own files in ``harness``. A
            model that has results of the same tasks there is not asked again.
        limit: number of questions of each task.
        device: device of the served models.
        concurrency: requests at the same time.
        dry_run: called with each command as text, instead of running it.

    Returns:
        what `results.json` holds: the rows of each metric that is a mean over questions, with our intervals and comparisons, and
        ``harness``, all numbers as lmms-eval gives them.

    Raises:
        ValueError: for a model that cannot be served.
        ConnectionError: for a step that fails, or a server none of whose responses came.
    """
    folder = Path(folder).absolute()
    own = Path(include_path).absolute() if include_path is not None else None
    if own is not None and not own.is_dir():
        raise ValueError(f"include_path={include_path} is not a folder. Give that of the tasks' YAML files.")
    options: dict[str, Any] = {"limit": limit, "include_path": own, "concurrency": concurrency}
    work = folder / "harness" / "empty"  # lmms-eval takes a folder here with a task's name for the task
    if dry_run is not None:
        for line in _lines(models, tasks, folder, work, device, options):
            dry_run(line)
        return {}
    _prepare(environment())
    work.mkdir(parents=True, exist_ok=True)
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    records: dict[str, dict[str, Any]] = {}
    numbers: list[dict[str, Any]] = []
    for label, model in models.items():
        place = _of(folder, label)
        asked = {"version": VERSION, "model": model, "tasks": [*tasks], "limit": limit, "files": _state(model, own)}
        if not (place / "asked.json").is_file() or read_json_object(place / "asked.json") != asked:
            shutil.rmtree(place, ignore_errors=True)
            with served(model, device, place.with_suffix(".log")) as (url, name):
                _run(running(name, url, tasks, place, **options), cwd=work)
            newest(place)
            write_text(place / "asked.json", json.dumps(asked) + "\n")
        for task, metric, rows, row in read_results(place):
            numbers.append({"model": label, **row})
            if rows:
                found[label, task, metric] = [one for one, _ in rows]
                records[task] = {one["id"]: record for one, record in rows}
        own_rows = [one for key, rows in found.items() if key[0] == label for one in rows]
        if own_rows and all(one["dropped"] for one in own_rows):
            (place / "asked.json").unlink()  # which the same command asks again
            raise ConnectionError(f"{model}: none of lmms-eval's requests succeeded. See {place} and {place.with_suffix('.log')}.")
    first = next(iter(models))
    compared = {key: rows for key, rows in found.items() if (first, *key[1:]) in found}
    results = summarize(compared, 1) if compared else {"results": [], "comparisons": []}
    return write_results(folder, {**results, "harness": numbers}, found, records)


def _lines(
    models: Mapping[str, str], tasks: Sequence[str], folder: Path, work: Path, device: str | None, options: Mapping[str, Any]
) -> Iterator[str]:
    yield from map(shlex.join, preparing(environment()))
    for label, model in models.items():
        name, url, wait, end = "MODEL", model, "", ""
        if not is_server(model):
            name, url = _name(model), f"http://localhost:{PORT}/v1"
            wait, end = f"until curl -sf http://localhost:{PORT}/health; do sleep 1; done && ", "; kill $!; wait $!"
            yield shlex.join(serving(name, PORT, device)) + " &"
        words = running(name, url, tasks, _of(folder, label), **options)
        place = shlex.quote(str(work))
        yield f"mkdir -p {place} && cd {place} && {wait}OPENAI_API_KEY=none {shlex.join(words)}{end}"


def _name(model: str) -> str:
    return str(Path(model).absolute()) if Path(model).is_dir() else model


def _prepare(env: Path) -> None:
    if not (env / "complete").exists():
        shutil.rmtree(env, ignore_errors=True)
        for words in preparing(env):
            _run(words)
        (env / "complete").touch()


def _state(*places: str | Path | None) -> list[str]:
    folders = [Path(place) for place in places if place is not None and Path(place).is_dir()]
    return [content_hash(one, read=False) for folder in folders for one in sorted(folder.rglob("*.*")) if one.suffix != ".pyc"]


def _of(folder: Path, label: str) -> Path:
    return folder / "harness" / slug(label)


def _run(words: Sequence[str], cwd: Path | None = None) -> None:
    environ = {"OPENAI_API_KEY": "none", **os.environ}
    done = subprocess.run(words, cwd=cwd, env=environ, stdout=2)  # what it prints is not ours
    if done.returncode:
        raise ConnectionError(f"This command has ended with status {done.returncode}: {shlex.join(words)}")


@contextmanager
def served(model: str, device: str | None, log: Path, *, seconds: int = 900) -> Iterator[tuple[str, str]]:
    """The address of a model and its name there: of a URL as it is, of a folder by `transformers serve`, which ends with this."""
    if is_server(model):
        from mpo.generation.server import ServerGenerator

        yield model, ServerGenerator(model).identity()["model"]
        return
    name = _name(model)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with open(log, "w") as said, subprocess.Popen(serving(name, port, device), stdout=said, stderr=said) as process:
        try:
            end = time.monotonic() + seconds
            while True:
                try:
                    urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5).close()
                    break
                except OSError as error:
                    if process.poll() is not None or time.monotonic() > end:
                        tail = log.read_text()[-500:]
                        raise ConnectionError(f"transformers serve {model} has not started ({error}): {tail}") from None
                    time.sleep(1)
            yield f"http://localhost:{port}/v1", name
        finally:
            process.terminate()


def newest(folder: Path) -> Path:
    """The latest file of results in a folder. Raises ConnectionError without one: lmms-eval ends with status 0 also then."""
    files = sorted(folder.rglob("*_results.json"))
    if not files:
        raise ConnectionError(f"lmms-eval has written no results into {folder}; what it said is above.")
    return files[-1]


def read_results(folder: Path) -> Iterator[tuple[str, str, list[tuple[dict[str, Any], dict[str, Any]]], dict[str, Any]]]:
    """Read lmms-eval's files: ``*_results.json`` and, for each task, ``*_samples_TASK.jsonl``.

    Their layout is that of ``lmms_eval/loggers/evaluation_tracker.py`` (EvolvingLMMs-Lab/lmms-eval, 75571cfe).

    Yields:
        for each task and metric: their names, each question's row as `mpo.evaluation.results.judged` makes it, with its record, and
        the number as lmms-eval gives it. There are no rows for a metric that is not the mean of scores from 0 to 1.
    """
    path = newest(folder)
    for task, values in read_json_object(path)["results"].items():
        samples = path.with_name(f"{path.name.removesuffix('results.json')}samples_{task}.jsonl")
        lines = read_json_lines(samples) if samples.is_file() else []
        by_question: dict[Any, list[dict[str, Any]]] = {}  # a question has a line for each filter of its responses
        for line in lines:
            by_question.setdefault(line["doc_id"], []).append(line)
        metrics = [key for key in values if "," in key and "_stderr" not in key]
        filters = [*dict.fromkeys(key.rpartition(",")[2] for key in metrics)]
        for key in metrics:
            metric, _, of = key.rpartition(",")
            row = {"task": task, "metric": metric, "filter": of, "value": values[key]}
            own = [several[at] for several in by_question.values() if len(several) > (at := filters.index(of))]
            rows = [_row(line, score) for line in own if (score := _score(line.get(metric))) is not None]
            mean = sum(one["greedy"][0]["score"] for one, _ in rows) / max(len(rows), 1)
            whole = len(rows) == len(own) > 0 and isinstance(values[key], int | float) and abs(mean - values[key]) < 1e-6
            yield task, metric if of == "none" else f"{metric},{of}", rows if whole else [], row


def _score(value: Any) -> float | None:
    value = value.get("score") if isinstance(value, Mapping) else value
    return float(value) if isinstance(value, int | float) and 0 <= value <= 1 else None


def _row(line: Mapping[str, Any], score: float) -> tuple[dict[str, Any], dict[str, Any]]:
    said, name, media = line["filtered_resps"], str(line["doc_id"]), line.get("input_media", [])
    text = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
    cluster = content_hash(repr(media).encode()) if media else name
    about: dict[str, Any] = {"id": name, "group": name, "subject": None, "cluster": cluster}
    about |= {"ground_truths": [line["target"]], "dropped": text.startswith(FAILED), "sampled": [], "classes": [], "ranks": {}}
    images = [b64decode(one.partition(",")[2]) if one.startswith("data:") else one for one in media]
    record = {"messages": [{"role": "user", "content": str(line.get("input", ""))}], "images": images}
    return {**about, GREEDY: [{"text": text, "score": score, "reason": "", "none": False}]}, record
