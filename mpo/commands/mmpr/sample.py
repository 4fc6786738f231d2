"""Sample responses to a file of questions, JSONL, JSON or Parquet: question, image or images, answer, choices, id."""

from mpo.commands.flags import Args, arg, flags
from mpo.commands.mmpr.steps import ASKED, JOB, asked_model, run_step
from mpo.commands.outcome import Report

EXAMPLES = """\
mpo mmpr sample http://localhost:8000/v1 questions.jsonl --output sampled --n 32
mpo mmpr sample runs/first charts.parquet --output sampled --prompt describe --n 8 --temperature 0.7
"""
ARGUMENTS = {
    **ASKED,
    "questions": arg("questions: a JSONL, JSON or Parquet file", "QUESTIONS"),
    **JOB,
    **flags("--image-root", "--limit", "--vision-feature-cache", prompt="en", n=8),
}


def run(args: Args) -> Report:
    from mpo.data import load_questions
    from mpo.pipelines.mmpr.make import Route
    from mpo.pipelines.mmpr.sample import Sample

    questions = load_questions(args.questions, image_root=args.image_root, limit=args.limit, keep_bad=True)
    model, sampling = asked_model(args)
    return run_step(args, Sample(model, prompt=args.prompt, n=args.n, **sampling), Route(questions))
