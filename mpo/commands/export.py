"""Export a trained model or adapter to a folder that from_pretrained, vLLM and LMDeploy can load.

RUN_OR_CHECKPOINT is a folder written by `mpo train` or MPOTrainer.save_model, or one of its checkpoints. A LoRA
adapter is merged into its base model. Weights are cast and sharded, and config, tokenizer, processor and chat
template are copied. The exported model is then loaded again, and its logits for a question about an image are
compared with those of the trained model. TARGET is created only after this comparison.

A QLoRA adapter is merged into the base model's original weights in the export's dtype, not into the 4-bit weights it
was trained with, so evaluate the exported model. Merging in bfloat16 rounds: a change smaller than 1/256 of a weight
can be lost. The report shows how much the adapter changes the logits and warns when rounding changes them more; use
--dtype float32 to keep the whole change.
"""

from __future__ import annotations

import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING

from mpo.commands.flags import Args, arg, flags, path, refuse_unwritable
from mpo.commands.outcome import Report

if TYPE_CHECKING:
    from mpo.models.export.run import Export

EXAMPLES = """\
mpo export runs/lora InternVL3-8B-mpo --dtype bfloat16                         export to transformers' format
mpo export runs/lora out --output-format official --like models/InternVL3-8B   export to the official format, for LMDeploy
mpo export runs/lora/checkpoint-400 out --base models/InternVL3-8B-hf          export an adapter whose base model has moved
"""
ARGUMENTS = {
    "source": arg("folder of a trained model or adapter", "RUN_OR_CHECKPOINT", type=path),
    "target": arg("folder to create", "TARGET", type=path),
    **flags("--base", "--like", dtype="auto", shard_gb=5.0, check=True),
    **flags(output_format="transformers", choices=("transformers", "official")),
}


def run(args: Args) -> Report:
    refuse_unwritable("TARGET", args.target)
    from mpo.models.export.run import export
    from mpo.models.export.trained import is_qlora

    how = {"like": args.like, "check": args.check, "shard_gb": args.shard_gb, "dtype": args.dtype, "form": args.output_format}
    done = export(args.source, args.target, base=args.base, **how)
    qlora = is_qlora(args.source)
    return Report("\n".join(report(done, qlora=qlora)), {**asdict(done), "qlora": qlora, "serve": serving(done)})


def report(done: Export, *, qlora: bool = False) -> list[str]:
    """Describe an export; `qlora`: the adapter was trained on 4-bit weights."""
    format_name = "the official" if done.form == "official" else "transformers'"
    files = "1 file" if done.files == 1 else f"{done.files} files"
    lines = [f"{done.folder}: {done.tensors} tensors in {format_name} format, {done.dtype}, {done.bytes / 1e9:.2f} GB in {files}"]
    if done.base is not None:
        lines.append(f"The adapter is merged into {done.base}.")
        if qlora:
            lines.append("The adapter was trained on 4-bit weights; the export has none. Evaluate the exported model.")
    found = done.comparison
    if found is None:
        lines.append("The exported model was not checked. Use --check to load it and compare it with the trained model.")
    else:
        size = "" if found.roundings is None else f", {found.roundings:.1f} times the effect of rounding to {done.dtype}"
        lines.append(f"Logits differ from the trained model's by {found.difference:.1e} of the largest logit{size}.")
        if found.moved is not None:
            lines.append(f"The adapter changes the base model's logits by {found.moved:.1e} of the largest logit.")
        if found.moved is not None and found.rounding is not None and found.moved < found.rounding:
            lines.append(
                f"WARNING: rounding to {done.dtype} changes them more ({found.rounding:.1e}). Use --dtype float32 to keep "
                "the adapter's change."
            )
        first, second = found.responses
        lines.append(f"Both models respond {first!r}." if first == second else f"Trained: {first!r}. Exported: {second!r}.")
    if done.official_difference is not None:
        lines.append(f"Logits of both formats agree to {done.official_difference:.1e} of the largest logit (float32).")
    elif done.form == "official" and found is not None:
        lines.append("Logits of the official format were not compared: not enough memory.")
    return [*lines, "", *serving(done)]


def serving(done: Export) -> list[str]:
    """List the commands that serve the folder."""
    from mpo.models.lazily import TYPES
    from mpo.models.strict import read_config_json

    folder = shlex.quote(str(done.folder))
    if read_config_json(done.folder / "config.json").get("model_type") in TYPES:
        return ["vLLM and LMDeploy do not know models with a fuser. Use mpo generate, or transformers after import mpo."]
    if done.form == "transformers":
        return [f"vLLM:      vllm serve {folder}", "LMDeploy:  needs the official format: --output-format official"]
    lines = [f"vLLM:      vllm serve {folder} --trust-remote-code", f"LMDeploy:  lmdeploy serve api_server {folder}"]
    if not any(done.folder.glob("modeling_*.py")):
        lines.append("Both need the model's Python files, which are missing; --like DIR copies them from a checkpoint.")
    return lines
