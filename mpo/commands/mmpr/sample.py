"""Sample responses to a file of questions, JSONL, JSON or Parquet: question, image or images, answer, choices, id."""

import argparse

from mpo.commands.flags import add
from mpo.commands.mmpr.steps import add_job, asked_model, run_step
from mpo.commands.outcome import Report

EXAMPLES = """\
mpo mmpr sample http://localhost:8000/v1 questions.jsonl --output sampled --n 32
mpo mmpr sample runs/first charts.parquet --output sampled --prompt describe --n 8 --temperature 0.7
"""


def configure(parser: argparse.ArgumentParser) -> None:
    add_job(parser, model=True, made=False)
    parser.add_argument("questions", metavar="QUESTIONS", help="questions: a JSONL, JSON or Parquet file")
    add(parser, "--prompt", default="en")
    add(parser, "--n", default=8)
    add(parser, "--image-root", "--limit", "--vision-feature-cache")


def run(args: argparse.Namespace) -> Report:
    from mpo.data import load_questions
    from mpo.pipelines.mmpr.make import Route
    from mpo.pipelines.mmpr.sample import Sample

    questions = load_questions(args.questions, image_root=args.image_root, limit=args.limit, keep_bad=True)
    model, sampling = asked_model(args)
    return run_step(args, Sample(model, prompt=args.prompt, n=args.n, **sampling), Route(questions))
