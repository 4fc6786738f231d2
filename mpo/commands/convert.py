"""`mpo convert`: between the official form of a checkpoint and transformers'."""

import argparse
from pathlib import Path

EXPLANATION = """\
InternVL checkpoints come in two forms: the official one (InternVLChatModel, OpenGVLab/InternVL3-8B), which runs code
that comes with it, and transformers' (OpenGVLab/InternVL3-8B-hf). This command writes the one that SOURCE is not.
Language models: InternLM2 (as a Llama), Llama, Qwen2 and Qwen2.5, Qwen3 dense and MoE; both vision towers. Tensors
are checked by name and shape, keep every bit, and go through memory one shard at a time. `mpo train` and
mpo.models.load_internvl take the official form as it is; converting once saves them the work.
"""

EXAMPLES = """\
examples
  mpo convert InternVL2_5-8B InternVL2_5-8B-hf            to transformers' form
  mpo convert runs/first/final back --like InternVL2_5-8B   to the official form, with that checkpoint's Python files
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = EXPLANATION
    parser.epilog = EXAMPLES
    parser.add_argument("source", metavar="SOURCE", type=Path, help="the checkpoint's folder")
    parser.add_argument("target", metavar="TARGET", type=Path, help="a new folder")
    parser.add_argument("--like", metavar="DIR", type=Path, help="an official checkpoint, for config, tokenizer and code")
    parser.add_argument("--shard-gb", metavar="GB", type=float, default=5.0, help="size of a file of weights (default 5)")
    parser.add_argument(
        "--compare",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compute logits with both forms and compare them (default: where memory allows)",
    )


def run(args: argparse.Namespace) -> int:
    from mpo.models.official.convert import convert

    done = convert(args.source, args.target, like=args.like, shard_gb=args.shard_gb, compare=args.compare)
    whose = "the official" if done.form == "official" else "transformers'"
    print(f"{done.folder}: {done.tensors} tensors in {whose} form")
    if done.difference is None:
        print("Names, shapes and dtypes agree; logits were not compared (--compare does, and needs the model twice in memory).")
    else:
        print(f"Logits of both forms agree to {done.difference:.1e} of the largest one (random input, float32).")
    if done.form == "official" and not any(done.folder.glob("modeling_*.py")):
        print("Its Python files are not there; --like DIR copies those of the checkpoint it came from.")
    return 0
