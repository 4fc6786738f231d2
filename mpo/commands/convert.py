"""Convert a checkpoint between the official format and transformers'.

The official format (InternVLChatModel, OpenGVLab/InternVL3-8B) needs the Python code that comes with it;
transformers' format (OpenGVLab/InternVL3-8B-hf) does not. SOURCE is detected and written in the other format.
Supported language models: InternLM2 (as Llama), Llama, Qwen2 and Qwen2.5, Qwen3 dense and MoE, with both vision
towers. An official LLaVA-1.5, with or without an MMFuser (arXiv 2410.11829), is written in transformers' format.
Names and shapes of tensors are checked, and their values are preserved bit for bit. Only one shard is in memory at a
time. `mpo train` and mpo.models.load_internvl also read the official format directly; converting it once
saves the conversion at every load.
"""

from dataclasses import asdict

from mpo.commands.flags import Args, Words, arg, flags, path, refuse_unwritable
from mpo.commands.outcome import Report

EXAMPLES = """\
mpo convert InternVL2_5-8B InternVL2_5-8B-hf              convert to transformers' format
mpo convert llava-mmfuser-7b llava-mmfuser-7b-hf          the same of a LLaVA; --tower gives a tower that it lacks
mpo convert runs/first/final back --like InternVL2_5-8B   convert to the official format, copy Python files from InternVL2_5-8B
"""
ARGUMENTS = {
    "source": arg("folder of the checkpoint", "SOURCE", type=path),
    "target": arg("folder to create", "TARGET", type=path),
    **flags("--like", "--tower", shard_gb=5.0, check=Words("if memory allows")),
}


def run(args: Args) -> Report:
    refuse_unwritable("TARGET", args.target)
    from mpo.models.official.convert import convert

    done = convert(args.source, args.target, like=args.like, shard_gb=args.shard_gb, compare=args.check, tower=args.tower)
    format_name = "the official" if done.form == "official" else "transformers'"
    lines = [f"{done.folder}: {done.tensors} tensors in {format_name} format"]
    if done.difference is None:
        needs = "" if done.llava else ": --check needs memory for two copies of the model"
        lines.append(f"Names, shapes and dtypes agree. Logits were not compared{needs}.")
    else:
        lines.append(f"Logits of both formats agree to {done.difference:.1e} of the largest logit (random input, float32).")
    if done.form == "official" and not any(done.folder.glob("modeling_*.py")):
        lines.append("The model's Python files are missing. Use --like DIR to copy them from the original checkpoint.")
    return Report("\n".join(lines), asdict(done))
