"""Join a vision tower and a language model into an InternVL with a new projector, for stage 1 of its training.

VISION is an InternViT, official or in transformers' format, or an InternVL, whose tower is taken (a tower trained beside a small
language model serves a large one). LANGUAGE is a chat model with ChatML turns: Qwen2, Qwen2.5, Qwen3, InternLM2, InternLM3, Llama.
Both are folders or names on the Hub. The folder that is written holds transformers' format; `mpo sft` trains it
(method=internvl2_5_stage1).
"""

from mpo.commands.flags import REQUIRED, Args, arg, flags, refuse_targets
from mpo.commands.outcome import Report

EXAMPLES = """\
mpo join InternViT-300M-448px-V2_5 Qwen2.5-0.5B-Instruct --output joined    begin with the parts of InternVL2.5-1B
mpo join runs/2 Qwen2.5-72B-Instruct --output larger                        take a trained tower to a larger language model
"""
ARGUMENTS = {
    "vision": arg("folder or name of the vision tower", "VISION"),
    "language": arg("folder or name of the language model", "LANGUAGE"),
    **flags(output=REQUIRED, dtype="auto", max_tiles=12, seed=0),
}


def run(args: Args) -> Report:
    refuse_targets({"--output": args.output})
    from mpo.models.joining import save_joined
    from mpo.preflight.structure import count_parameters

    settings = {"dtype": args.dtype, "max_tiles": args.max_tiles, "seed": args.seed}
    model = save_joined(args.vision, args.language, args.output, **settings).model
    counts = {part: count for part, (count, _) in count_parameters(model).items() if count}
    dtype = str(model.dtype).removeprefix("torch.")
    said = ", ".join(f"{part} {count:,}" for part, count in counts.items())
    line = f"{args.output}: an InternVL of {sum(counts.values()):,} parameters in {dtype} ({said})"
    return Report(
        f"{line}\nTrain its projector: mpo sft method=internvl2_5_stage1 model.name_or_path={args.output} data.path=...",
        {"folder": args.output, "dtype": dtype, "parameters": counts, "tokens_per_tile": model.config.image_seq_length},
    )
