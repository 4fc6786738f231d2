"""Measure models on benchmarks: accuracy with intervals, chain of thought, majority vote, best of N, and what differs.

Every argument is a benchmark or a model. A benchmark is a file of questions with answers (JSONL, JSON, Parquet; as in mpo
generate), a published benchmark by name (chartqa, docvqa, m3cot, mathvista, mmbench, mmmu, muirbench, mvbench, pope,
refcoco), which is loaded from the Hub, or NAME=PATH of a file in its published form. A model is a folder, a model id on the
Hub, an adapter, a run, or the address of an OpenAI-compatible server; LABEL=MODEL gives it a name. The first model is what the
others are compared with.

With --harness lmms-eval the arguments are models, and --tasks names what lmms-eval asks them: it runs in an environment of its
own, which the first run makes, asks `transformers serve` or the server that is given, and its results become ours.

The folder --output holds results.json, report.html, answers.jsonl and the ledgers of all responses: after an interruption the
same command goes on, and asks nothing again that was answered.
"""

import re
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

from mpo.commands.flags import REQUIRED, Args, Words, arg, flags, refuse
from mpo.commands.models import open_model, refuse_unfit
from mpo.commands.outcome import Report
from mpo.io import did_you_mean

EXAMPLES = """\
mpo evaluate runs/first questions.jsonl --output results
mpo evaluate start=OpenGVLab/InternVL3-1B-Instruct mpo=runs/first mathvista pope --mode both --output results
mpo evaluate start=base mpo=runs/first m3cot=m3cot.parquet --mode cot --n 8 --scorer reward --output results
mpo evaluate start=base mpo=exported --harness lmms-eval --tasks pope,chartqa --output results
mpo evaluate http://localhost:8000/v1 mmmu --mode cot --n 16 --workers 4 --output results
mpo evaluate start=base mpo=runs/first mathvista --mode both --vision-feature-cache features --output results
"""
FILES = re.compile(r"\.(?:jsonl|ndjson|json|parquet)(?:\.gz)?$", re.IGNORECASE)
ARGUMENTS = {
    "what": arg("models and benchmarks, in any order", "MODEL|BENCHMARK", nargs="+"),
    **flags("--n", "--scorer", output=REQUIRED, mode="direct", reference=Words("the first model")),
    **flags(temperature=1.0, top_p=1.0, max_new_tokens=1024, seed=0, dtype=Words("auto")),
    **flags("--tile-limit", "--limit", "--train", "--image-root", "--base", "--device", "--workers", "--retry-dropped"),
    **flags("--vision-feature-cache", "--harness", "--tasks", "--include-path", "--dry-run"),
}
OF_HARNESS = ("what", "output", "limit", "device", "workers", "harness", "tasks", "include_path", "dry_run")


def run(args: Args) -> Report:
    if args.harness:
        return _harness(args)
    refuse(args, OF_HARNESS[-3:], "needs --harness lmms-eval")
    if (args.n or 1) == 1:
        refuse(args, ("temperature", "top_p", "seed"), "is for samples (--n), and without these the response is greedy")
    if not any(name.partition("=")[0] == "reward" for name in args.scorer or ()):
        refuse(args, ["reference"], "is for --scorer=reward")
    from mpo.evaluation.page import table_of
    from mpo.evaluation.run import evaluate
    from mpo.generation.open import is_adapter

    benchmarks, models, named = _told_apart(args)
    _check(args, named)
    opened = lru_cache(partial(_open, args))
    reference = partial(opened, args.reference or named[0])
    scorers = {name: _scorer(name, opened, reference) for name in args.scorer or ()}
    if args.base and not any(map(is_adapter, named)):
        raise ValueError(f"--base={args.base} is for adapters, and none of {', '.join(named)} is one. Leave it out.")
    if "reward" in scorers and {*named} == {args.reference or named[0]}:
        raise ValueError(f"--scorer=reward compares a model with what it was trained from; got {named[0]} alone. Give both models.")
    results = evaluate(
        models,
        benchmarks,
        args.output,
        modes=("direct", "cot") if args.mode == "both" else (args.mode,),
        k=args.n or 1,
        temperature=args.temperature,
        top_p=args.top_p,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        scorers=scorers,
        workers=args.workers or 1,
        retry_dropped=args.retry_dropped,
        contamination=_contamination(args.train, benchmarks) if args.train else None,
    )
    return Report(f"{table_of(results)}\n{args.output}/report.html", results)


def _told_apart(args: Args) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """The benchmarks of the arguments, what opens each model, both by name, and the models as they are given."""
    from mpo.evaluation.published import FORMS

    benchmarks, models, named = dict[str, Any](), dict[str, Any](), list[str]()
    for text in args.what:
        label, benchmark = _benchmark(text, args)
        if benchmark is not None:
            _once(benchmarks, label, benchmark)
            continue
        label, model = _labelled(text)
        named.append(model)
        for tiles in args.tile_limit or [None]:
            name = f"{label}@{tiles}" if len(args.tile_limit or ()) > 1 else label
            _once(models, name, partial(_open, args, model, tiles))
    if not models or not benchmarks:
        missing = "model, such as runs/first" if not models else "benchmark: a file of questions, or a name such as mathvista"
        hint = next(filter(None, (did_you_mean(one, FORMS) for one in named if not Path(one).exists())), "")
        if file := next((one for one in named if Path(one).is_file()), None):  # no model, and of no type of questions
            hint = f" {file} has an unknown file type: questions are read from JSONL, JSON, Parquet and tar."
        raise ValueError(f"Expected at least one {missing}; got {' '.join(args.what)}.{hint}")
    return benchmarks, models, named


def _check(args: Args, named: list[str]) -> None:
    from transformers.utils.hub import cached_file

    from mpo.evaluation.published import FORMS
    from mpo.generation.generator import is_server
    from mpo.generation.open import is_adapter
    from mpo.models.loading import opening

    scorers = [name.partition("=")[2] for name in args.scorer or ()]
    refuse_unfit(args, *named, *filter(None, [*scorers, args.reference]))
    for model in filter(None, [*named, args.reference]):
        if is_server(model):
            continue
        if is_adapter(model):
            from mpo.models.export.trained import open_trained

            open_trained(Path(model), base=args.base)  # now, not once all questions were asked of the models before it
        else:
            try:
                with opening(model):
                    cached_file(model, "config.json")
            except ValueError as error:
                raise ValueError(f"{error}{'' if '/' in model else did_you_mean(model, FORMS)}") from None


def _harness(args: Args) -> Report:
    refuse(args, set(vars(args)) - {*OF_HARNESS, "json", "run", "default_of"}, "is not for --harness: its tasks say how they ask")
    tasks = [task.strip() for task in (args.tasks or "").split(",") if task.strip()]
    if not tasks:
        raise ValueError("--harness needs --tasks, names of its tasks such as pope,chartqa.")
    from mpo.evaluation.harness import run_harness
    from mpo.evaluation.page import table_of
    from mpo.generation.open import is_adapter

    models: dict[str, str] = {}
    for label, model in map(_labelled, args.what):
        if FILES.search(model) or is_adapter(model):
            advice = "Export it (mpo export)." if is_adapter(model) else "Leave it out; --tasks names what is asked."
            raise ValueError(f"{model} is not a model that can be served. {advice}")
        _once(models, label, model)
    lines: list[str] = []
    given = {"include_path": args.include_path, "limit": args.limit, "device": args.device, "concurrency": args.workers or 8}
    results = run_harness(models, tasks, args.output, dry_run=lines.append if args.dry_run else None, **given)
    if args.dry_run:
        return Report("\n".join(lines), {"commands": lines})
    said = [f"lmms-eval: {one['model']}, {one['task']}, {one['metric']}: {one['value']}" for one in results["harness"]]
    return Report("\n".join([table_of(results), *said, f"{args.output}/report.html"]), results)


def _contamination(paths: list[str], benchmarks: dict[str, Any]) -> dict[str, Any]:
    from mpo.curation.dedupe import find_contamination, training_records
    from mpo.pipelines.step import to_record

    return {
        name: find_contamination(
            chain.from_iterable(map(training_records, paths)),
            (to_record(question, place) for place, question in enumerate(questions)),
        )
        for name, questions in benchmarks.items()
    }


def _once(found: dict[str, Any], label: str, value: Any) -> None:
    if label in found:
        raise ValueError(f"Two of the arguments are called {label}. Give one another name: LABEL={label}.")
    found[label] = value


def _labelled(text: str) -> tuple[str, str]:
    label, equals, rest = text.partition("=")
    if equals and rest and re.fullmatch(r"[^/\\:]+", label) and not Path(text).exists():  # a folder may be called lr=1e-4
        if re.fullmatch(r"[\w.@-]+", label):
            return label, rest
        raise ValueError(f"The label {label!r} of {rest} may have letters, digits and . _ @ - alone. Write it so.")
    return re.sub(r"^https?://", "", text.rstrip("/")).replace("/v1", "") or text, text


def _benchmark(text: str, args: Args) -> tuple[str, Any]:
    from mpo.data import load_questions
    from mpo.evaluation.published import FORMS, JUDGED, load_benchmark

    label, equals, path = text.partition("=")
    place = path if equals and FILES.search(path) else text
    named = re.sub(r"[\W_]", "", (label if equals or not FILES.search(text) else FILES.sub("", Path(text).name)).lower())
    is_model = not FILES.search(place) and (equals or "/" in text or Path(text).is_dir())  # a model may be called after a benchmark
    if named.startswith(JUDGED) and not is_model:
        load_benchmark(named)  # refused
    if label.lower() in FORMS:
        given = {"image_root": args.image_root, "limit": args.limit}
        return label, Repeated(partial(load_benchmark, label.lower(), path or None, **given))
    if not FILES.search(place):
        return "", None
    if named in FORMS:
        raise ValueError(
            f"{text} would be read as questions of your own. Did you mean {named}={place}, the benchmark's published form? If not, "
            "give the file a label that is not its name."
        )
    return (label if equals else Path(place).stem), load_questions(place, image_root=args.image_root, limit=args.limit)


class Repeated:
    """Questions that are read anew each time they are iterated over."""

    def __init__(self, read: Callable[[], Any]) -> None:
        self._read = read

    def __iter__(self) -> Any:
        return self._read()


def _open(args: Args, model: str, tiles: int | None = None) -> Any:
    from mpo.generation.open import is_adapter

    return open_model(args if is_adapter(model) else Args(**{**vars(args), "base": None}), model, tiles)


def _scorer(name: str, opened: Callable[[str], Any], reference: Callable[[], Any]) -> Callable[[Any], Any]:
    from mpo.evaluation.scorers import ImplicitReward, MeanLogProb, ProcessReward, load_scorer

    kind, _, model = name.partition("=")
    if kind == "logprob":
        return lambda measured: MeanLogProb(_local(name, opened(model) if model else measured))
    if kind == "reward":

        def reward(measured: Any) -> Any:
            own, start = (_local(name, one) for one in (opened(model) if model else measured, reference()))
            if own.identity() != start.identity():
                return ImplicitReward(own, start)
            if model:
                raise ValueError(f"--scorer={name} compares {model} with itself. Give another --reference.")
            return None  # of the reference itself every reward is 0

        return reward
    if kind == "prm" and model:
        return lambda measured: ProcessReward(opened(model))
    found = load_scorer(name)
    return lambda measured: found


def _local(name: str, model: Any) -> Any:
    from mpo.generation.local import LocalGenerator

    if not isinstance(model, LocalGenerator):
        raise ValueError(
            f"--scorer={name} needs the log-probs of a model in this process, not of a server. Name a folder: {name}=MODEL."
        )
    return model
