"""Sample responses to a file of questions, with a prompt for reasoning.

Questions are JSONL, JSON or Parquet: question (or messages), image or images, answer, choices, id.
"""

from __future__ import annotations

import argparse

from mpo.commands.flags import add
from mpo.commands.mmpr.steps import add_job, add_model, open_model, run_step, sampling
from mpo.commands.outcome import Report

EXAMPLES = """\
mpo mmpr sample http://localhost:8000/v1 questions.jsonl --output sampled --n 32
mpo mmpr sample runs/first charts.parquet --output sampled --prompt describe --n 8 --temperature 0.7
"""


def configure(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("questions", metavar="QUESTIONS", help="file of questions: JSONL, JSON or Parquet")
    add(
        parser,
        "--prompt",
        default="en",
        help="prompt: en, en_v2, en_r1, zh, background, describe, grounded, plain, a Jinja template, or its file",
    )
    add(parser, "--n", default=8)
    add(parser, "--image-root", "--limit")
    add_job(parser, samples=True)


def run(args: argparse.Namespace) -> Report:
    from mpo.data import load_questions
    from mpo.pipelines.mmpr.sample import Sample

    questions = load_questions(args.questions, image_root=args.image_root, limit=args.limit, keep_bad=True)
    return run_step(args, Sample(open_model(args), prompt=args.prompt, n=args.n, **sampling(args)), questions)
