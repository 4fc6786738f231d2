"""Make preference pairs as in MMPR (arXiv 2411.10442): from questions, and the responses of models to them.

`make` does all of it; the others are its steps. Each works in a folder: after an interruption the same command goes on,
and asks nothing again that was answered.
"""

from dataclasses import replace
from typing import Any

from mpo.commands.flags import Args, Words, action, arg, flags
from mpo.commands.models import ASKED, INPUT, JOB, MAKE, asked_model, reviewed, run_make, run_step
from mpo.commands.outcome import Report


@action(
    MAKE,
    "mpo mmpr make mmpr.yaml --output mmpr                                   all of it: mmpr/meta.json, for mpo train data=mmpr",
)
def make(args: Args) -> Report:
    """Make MMPR files from a configuration: sample, verify and pair, or continue where no answer is known.

    --output becomes a folder with meta.json, for mpo train data=mmpr, and report.html. Other rules of verify and pair ask
    nothing again. Questions may come, go and change: only what is new is asked. Other settings of the sampling need another
    folder. CONFIG is YAML:

      sources: [{path: questions.jsonl}]
      models: [{model: "http://localhost:8000/v1"}]
      sample: {prompt: en, n: 8, until: {right: 2, wrong: 2, limit: 32}}
      pair: {accuracy: [0.2, 0.8]}
    """
    from mpo.pipelines.mmpr.config import read_config
    from mpo.pipelines.mmpr.make import make

    return run_make(args, make, read_config(args.config), _describe)


def _describe(report: dict[str, Any]) -> list[str]:
    first = f"{report['questions']:,} questions, {report['pairs']:,} pairs"
    shown = {**report["sources"][0], **{name: report[name] for name in ("spent", "unused") if name in report}}
    return [first, *(f"  {name}: {value}" for name, value in shown.items())]


@action(
    {
        **ASKED,
        "questions": arg("questions: a JSONL, JSON or Parquet file", "QUESTIONS"),
        **JOB,
        **flags("--image-root", "--limit", "--vision-feature-cache", prompt="en", n=8),
    },
    "mpo mmpr sample http://localhost:8000/v1 questions.jsonl --output sampled --n 32",
    "mpo mmpr sample http://localhost:8000/v1 photos.jsonl --output told --prompt plain --n 1     for mpo mmpr continue",
    "mpo mmpr sample runs/first charts.parquet --output sampled --prompt describe --n 8 --temperature 0.7",
)
def sample(args: Args) -> Report:
    """Sample responses to a file of questions, JSONL, JSON or Parquet: question, image or images, answer, choices, id."""
    from mpo.data import load_questions
    from mpo.pipelines.mmpr.make import Route
    from mpo.pipelines.mmpr.sample import Sample

    questions = load_questions(args.questions, image_root=args.image_root, limit=args.limit, keep_bad=True)
    model, sampling = asked_model(args)
    return run_step(args, Sample(model, prompt=args.prompt, n=args.n, **sampling), Route(questions))


@action(
    {**INPUT, **JOB, **flags("--answer-format", "--kind", "--tolerance")},
    "mpo mmpr verify sampled --output verified --answer-format any",
)
def verify(args: Args) -> Report:
    """Verify sampled responses by the known answers, without sampling again."""
    from mpo.pipelines.mmpr.verify import Verify

    return run_step(args, Verify(format=args.answer_format, kind=args.kind, tolerance=args.tolerance))


@action(
    {**INPUT, **JOB, **flags("--rewrite", "--review", max_pairs=15, accuracy=Words("0 1", (0.0, 1.0)), seed=0)},
    "mpo mmpr pair verified --output pairs --accuracy 0.2 0.8                pairs/mmpr/meta.json",
)
def pair(args: Args) -> Report:
    """Pair right with wrong responses, and write MMPR files with their meta.json."""
    from mpo.pipelines.mmpr.make import Records
    from mpo.pipelines.mmpr.pair import Pair

    step = Pair(max_pairs=args.max_pairs, accuracy=args.accuracy, rewrite=args.rewrite, seed=args.seed)
    corrected = reviewed(Records(args.input, as_shown=True), args)
    report = run_step(args, step, corrected, pairs=True)
    return replace(report, text=f"{report.text}\n{corrected}") if corrected else report


@action(
    {**ASKED, **INPUT, **JOB, **flags("--with-image", ratio=0.5)},
    "mpo mmpr continue http://localhost:8000/v1 told --output pairs --ratio 0.5",
)
def continue_(args: Args) -> Report:
    """Continue the first half of each response without its image, and write MMPR files of both (Dropout-NTP).

    No answer needs to be known. The model is the one that gave the responses, of which each question has one (--n 1).
    """
    from mpo.pipelines.mmpr.continuation import Continue

    model, sampling = asked_model(args)
    return run_step(args, Continue(model, ratio=args.ratio, with_image=args.with_image, **sampling), pairs=True)
