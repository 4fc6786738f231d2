"""Ask a model one question, with images, and print its response as it comes; or a file of questions.

MODEL is a folder or a model id on the Hub: a trained model, an adapter (loaded on its base), a run or a checkpoint of
one, an InternVL in either format, or another model of transformers. Or it is the address of an OpenAI-compatible server
(vLLM, LMDeploy, SGLang, transformers serve), with the key in OPENAI_API_KEY if it needs one.

A file of questions is JSONL, JSON or Parquet: question (or messages), image or images, answer, choices, id. It is a job in the
folder --output: after an interruption the same command goes on, and asks nothing again that was answered.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mpo.commands.flags import add, refuse
from mpo.commands.generate_job import configure_job, refuse_job_flags, run_job
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
LOCAL = ("base", "device", "dtype", "vision_feature_cache")
"""Flags for a model in this process, which a server does not take."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="model: a folder, a model id on the Hub, or http(s)://HOST:PORT/v1")
    parser.add_argument("question", metavar="QUESTION", nargs="?", help="question; - reads it from stdin")
    add(parser, "--image", "--video", "--system", "--prefix")
    add(parser, "--max-new-tokens", default=1024)
    add(parser, "--temperature", default=0.0)
    add(parser, "--top-p", otherwise="1")
    add(parser, "--seed", default=0)
    add(parser, "--max-tiles", "--base", "--device", "--model-name", "--vision-feature-cache")
    add(parser, "--dtype", otherwise="auto")
    configure_job(parser)


def run(args: argparse.Namespace) -> Report:
    from mpo.data.images import open_image
    from mpo.generation.generator import Decoding, Request

    settings: dict[str, Any] = {name: getattr(args, name) for name in ("temperature", "max_new_tokens", "seed")}
    settings["top_p"] = 1.0 if args.top_p is None else args.top_p
    Decoding(**settings)
    at_server = re.match("https?://", args.model, re.IGNORECASE)
    if args.questions is not None:
        return run_job(args, lambda: _server(args) if at_server else _local(args, None), local=not at_server, settings=settings)
    refuse_job_flags(args)
    text = args.question if args.question != "-" else _stdin()
    for path in args.image or ():
        open_image(path)  # before a model is loaded, or anything is paid
    question = Request.ask(text, images=args.image or (), videos=args.video or (), system=args.system, prefix=args.prefix)
    model = _server(args) if at_server else _local(args, question)
    response = model.ask(question, **settings, on_text=None if args.json else _print)
    if not args.json:
        print(flush=True)
    if response.finish_reason == "length":
        print(f"mpo generate: the response was truncated at --max-new-tokens={args.max_new_tokens}.", file=sys.stderr)
    said = {name: value for name, value in asdict(response).items() if name != "logprobs"}
    return Report("", {"model": args.model, **said})


def _server(args: argparse.Namespace) -> Any:
    from mpo.generation.server import ServerGenerator

    refuse(args, LOCAL, "has no effect on a server, which has loaded its model")
    return ServerGenerator(args.model, args.model_name, max_tiles=args.max_tiles)


def _local(args: argparse.Namespace, question: Any) -> Any:
    from mpo.encoding.chat import is_processor
    from mpo.generation.open import open_local
    from mpo.models.export.trained import is_qlora
    from mpo.training.features.use import with_cached_features

    refuse(args, ["model_name"], f"needs the address of a server, and MODEL is {args.model}")
    opened = open_local(args.model, base=args.base, dtype=args.dtype or "auto", device=args.device, max_tiles=args.max_tiles)
    if question is not None and (question.images or question.videos) and not is_processor(opened.processor):
        given = "--image" if question.images else "--video"
        raise ValueError(f"{args.model} is a text model and takes no images. Leave {given} out.")
    if is_qlora(Path(args.model)):
        print(f"mpo generate: {args.model} was trained on 4-bit weights; it is loaded on the original ones.", file=sys.stderr)
    return with_cached_features(opened, args.vision_feature_cache)


def _stdin() -> str:
    try:
        return sys.stdin.read().strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"stdin is not UTF-8 (byte {error.start + 1}). Save the question as UTF-8.") from None


def _print(text: str) -> None:
    print(visible(text), end="", flush=True)
