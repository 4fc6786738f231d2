"""`mpo export`: what a run left, as a folder to load and serve."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpo.models.export.run import Export

EXPLANATION = """\
Takes the folder that `mpo train` (or MPOTrainer.save_model, or one of its checkpoints) left, and writes one that
from_pretrained, vLLM and LMDeploy load: a LoRA adapter is merged into its base, weights are cast and cut into files,
with config, tokenizer, processor and chat template. The folder is then loaded again, both models answer a question
about an image, and their logits are compared; only then it gets its name.

A QLoRA adapter is merged into its base as it was before it was held in 4 bits, in the export's dtype. It was trained
beside slightly different weights, so measure the export, not the run. Merging in bfloat16 rounds: a change smaller
than 1/256 of a weight can be lost, so the output says how far the adapter moves the logits, and warns when rounding
does more; float32 keeps all of it.
"""

EXAMPLES = """\
examples
  mpo export runs/lora InternVL3-8B-mpo --dtype bfloat16                  to transformers' form
  mpo export runs/lora out --format official --like models/InternVL3-8B      the official form, for LMDeploy
  mpo export runs/lora/checkpoint-400 out --base models/InternVL3-8B-hf     an adapter whose base has moved
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = EXPLANATION
    parser.epilog = EXAMPLES
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", type=Path, help="folder with a trained model or adapter")
    parser.add_argument("target", metavar="TARGET", type=Path, help="a new folder")
    parser.add_argument("--base", metavar="NAME_OR_PATH", help="the model it was trained from (default: what the adapter says)")
    parser.add_argument("--format", choices=["transformers", "official"], default="transformers", help="default: transformers")
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float16", "float32"], default="auto", help="default: as it is")
    parser.add_argument("--shard-gb", metavar="GB", type=float, default=5.0, help="size of a file of weights (default 5)")
    parser.add_argument("--like", metavar="DIR", type=Path, help="an official checkpoint, for config, tokenizer and code")
    parser.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="load what was written and compare its answer with the trained model's (on the CPU)",
    )


def run(args: argparse.Namespace) -> int:
    from mpo.models.export.run import export
    from mpo.models.export.trained import is_qlora

    done = export(
        args.source,
        args.target,
        base=args.base,
        form=args.format,
        dtype=args.dtype,
        shard_gb=args.shard_gb,
        like=args.like,
        check=args.check,
    )
    print("\n".join(report(done, qlora=is_qlora(args.source))))
    return 0


def report(done: Export, *, qlora: bool = False) -> list[str]:
    """What to print about an export; `qlora`: the adapter was trained on 4 bits."""
    whose = "the official" if done.form == "official" else "transformers'"
    files = "1 file" if done.files == 1 else f"{done.files} files"
    lines = [f"{done.folder}: {done.tensors} tensors in {whose} form, {done.dtype}, {done.bytes / 1e9:.2f} GB in {files}"]
    if done.base is not None:
        lines.append(f"The adapter is merged into {done.base}.")
        if qlora:
            lines.append("It was trained beside that model in 4 bits, which the export is not: measure the export, not the run.")
    found = done.comparison
    if found is None:
        lines.append("It was not loaded again (--check does, and compares it with the trained model).")
    else:
        size = "" if found.roundings is None else f", {found.roundings:.1f} times what rounding to {done.dtype} does by itself"
        lines.append(f"Loaded again, its logits differ from the trained model's by {found.difference:.1e} of the largest{size}.")
        if found.moved is not None:
            lines.append(f"The adapter moves the base's logits by {found.moved:.1e} of the largest.")
        if found.moved is not None and found.rounding is not None and found.moved < found.rounding:
            lines.append(f"Rounding to {done.dtype} does more ({found.rounding:.1e}): --dtype float32 keeps what was learned.")
        first, second = found.responses
        lines.append(f"Both answer: {first!r}" if first == second else f"Trained, it answers {first!r}; exported, {second!r}.")
    if done.official_difference is not None:
        lines.append(f"Logits of both forms agree to {done.official_difference:.1e} of the largest one (float32).")
    elif done.form == "official" and found is not None:
        lines.append("The official form was written from it; for its logits to be compared too there was not enough memory.")
    return [*lines, "", *serving(done)]


def serving(done: Export) -> list[str]:
    """Commands that serve the folder."""
    folder = shlex.quote(str(done.folder))
    if done.form == "transformers":
        return [f"vLLM:      vllm serve {folder}", "LMDeploy:  takes the official form: --format official"]
    lines = [f"vLLM:      vllm serve {folder} --trust-remote-code", f"LMDeploy:  lmdeploy serve api_server {folder}"]
    if not any(done.folder.glob("modeling_*.py")):
        lines.append("Both need its Python files, which are not there; --like DIR copies those of the checkpoint it came from.")
    return lines
