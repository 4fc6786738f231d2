"""Ask a model one question, with images, and print its response as it comes; or a file of questions.

MODEL is a folder or a model id on the Hub: a trained model, an adapter (loaded on its base), a run or a checkpoint of
one, an InternVL in either format, or another model of transformers. Or it is the address of an OpenAI-compatible server
(vLLM, LMDeploy, SGLang, transformers serve), with the key in OPENAI_API_KEY if it needs one.

A file of questions is JSONL, JSON or Parquet: question (or messages), image or images, answer, choices, id. It is a job in the
folder --output: after an interruption the same command goes on, and asks nothing again that was answered.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mpo.commands.flags import MODEL, Args, Words, arg, flags, refuse
from mpo.commands.models import open_model, ran, refuse_unfit
from mpo.commands.outcome import Report
from mpo.visible import visible

EXAMPLES = """\
mpo generate runs/first "What is in the image?" --image a.png
mpo generate OpenGVLab/InternVL3-1B-hf "What differs?" --image a.png --image b.png --max-new-tokens 100
mpo generate runs/lora "Describe it." --image a.png --temperature 0.7 --top-p 0.9 --seed 1
mpo generate http://localhost:8000/v1 "What is in the image?" --image a.png --json
cat question.txt | mpo generate runs/first -
mpo generate http://localhost:8000/v1 --questions questions.jsonl --output sampled --n 8 --temperature 1
"""
SINGLE = ("question", "image", "video", "prefix")
"""Flags for one question; a job has none of them."""
JOB = ("output", "n", "workers", "prompt", "image_root", "limit", "retry_dropped", "drop_bad")
"""Flags for a job; one question has none of them."""
ARGUMENTS = {
    **MODEL,
    "question": arg("question; - reads it from stdin", "QUESTION", nargs="?"),
    **flags("--image", "--video", "--system", "--prefix", max_new_tokens=1024, temperature=0.0, top_p=Words("1"), seed=0),
    **flags("--max-tiles", "--base", "--device", "--model-name", "--vision-feature-cache", dtype=Words("auto")),
    **flags("--questions", *(f"--{name.replace('_', '-')}" for name in JOB)),
}


def run(args: Args) -> Report:
    from mpo.data.images import open_image
    from mpo.generation.generator import Decoding, Request

    settings: dict[str, Any] = {name: getattr(args, name) for name in ("temperature", "max_new_tokens", "seed")}
    settings["top_p"] = 1.0 if args.top_p is None else args.top_p
    Decoding(**settings)
    refuse_unfit(args, args.model)
    if args.questions is not None:
        return _job(args, settings)
    if args.question is None:
        raise ValueError("Expected a QUESTION, or a file of questions (--questions FILE --output DIR).")
    refuse(args, JOB, "needs a file of questions (--questions)")
    text = args.question if args.question != "-" else _stdin()
    for path in args.image or ():
        open_image(path)  # before a model is loaded, or anything is paid
    question = Request.ask(text, images=args.image or (), videos=args.video or (), system=args.system, prefix=args.prefix)
    model = _opened(args, "--image" if question.images else "--video" if question.videos else "")
    response = model.ask(question, **settings, on_text=None if args.json else _print)
    if not args.json:
        print(flush=True)
    if response.finish_reason == "length":
        print(f"mpo generate: the response was truncated at --max-new-tokens={args.max_new_tokens}.", file=sys.stderr)
    said = {name: value for name, value in asdict(response).items() if name != "logprobs"}
    return Report("", {"model": args.model, **said})


def _job(args: Args, settings: dict[str, Any]) -> Report:
    from mpo.data import load_questions
    from mpo.pipelines.report import summarize
    from mpo.pipelines.sample import QUESTION, Sample

    refuse(args, SINGLE, "is for one question, and --questions asks those of a file")
    if args.output is None:
        raise ValueError("--questions needs the folder of the job. Give --output DIR.")
    questions = load_questions(args.questions, image_root=args.image_root, limit=args.limit, keep_bad=True)
    step = Sample(_opened(args), n=args.n or 1, prompt=args.prompt or QUESTION, system=args.system, **settings)
    _, report = ran(args, [step], questions)
    spent = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in report["spent"].items())
    return Report(f"{summarize(report)}\n{f'spent: {spent}' if spent else ''}\n{args.output}/report.html", report)


def _opened(args: Args, shown: str = "") -> Any:
    from mpo.generation.generator import is_server

    model = open_model(args, args.model, args.max_tiles)
    if is_server(args.model):
        return model
    from mpo.encoding.chat import is_processor
    from mpo.models.export.trained import is_qlora

    if shown and not is_processor(model.processor):
        raise ValueError(f"{args.model} is a text model and takes no images. Leave {shown} out.")
    if is_qlora(Path(args.model)):
        print(f"mpo generate: {args.model} was trained on 4-bit weights; it is loaded on the original ones.", file=sys.stderr)
    return model


def _stdin() -> str:
    try:
        return sys.stdin.read().strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"stdin is not UTF-8 (byte {error.start + 1}). Save the question as UTF-8.") from None


def _print(text: str) -> None:
    print(visible(text), end="", flush=True)
