"""`mpo convert`: convert a checkpoint between the official format and transformers'."""

import argparse
from pathlib import Path

EXPLANATION = """\
Convert an InternVL checkpoint between the official format and transformers'.

The official format (InternVLChatModel, OpenGVLab/InternVL3-8B) needs the Python code that comes with it;
transformers' format (OpenGVLab/InternVL3-8B-hf) does not. SOURCE is detected and written in the other format.
Supported language models: InternLM2 (as Llama), Llama, Qwen2 and Qwen2.5, Qwen3 dense and MoE, with both vision
towers. Names and shapes of tensors are checked, and their values are preserved bit for bit. Only one shard is in
memory at a time. `mpo train` and mpo.models.load_internvl also read the official format directly; converting it once
saves the conversion at every load.
"""

EXAMPLES = """\
examples
  mpo convert InternVL2_5-8B InternVL2_5-8B-hf              convert to transformers' format
  mpo convert runs/first/final back --like InternVL2_5-8B   convert to the official format, copy Python files from InternVL2_5-8B
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = EXPLANATION
    parser.epilog = EXAMPLES
    parser.add_argument("source", metavar="SOURCE", type=Path, help="folder of the checkpoint")
    parser.add_argument("target", metavar="TARGET", type=Path, help="folder to create")
    parser.add_argument("--like", metavar="DIR", type=Path, help="official checkpoint to copy config, tokenizer and code from")
    parser.add_argument("--shard-gb", metavar="GB", type=float, default=5.0, help="maximum size of a weight shard (default: 5)")
    parser.add_argument(
        "--compare",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compare the logits of both formats (default: if memory allows)",
    )


def run(args: argparse.Namespace) -> int:
    from mpo.models.official.convert import convert

    done = convert(args.source, args.target, like=args.like, shard_gb=args.shard_gb, compare=args.compare)
    format_name = "the official" if done.form == "official" else "transformers'"
    print(f"{done.folder}: {done.tensors} tensors in {format_name} format")
    if done.difference is None:
        print("Names, shapes and dtypes agree. Logits were not compared: --compare needs memory for two copies of the model.")
    else:
        print(f"Logits of both formats agree to {done.difference:.1e} of the largest logit (random input, float32).")
    if done.form == "official" and not any(done.folder.glob("modeling_*.py")):
        print("The model's Python files are missing. Use --like DIR to copy them from the original checkpoint.")
    return 0
