"""Split a data set into a training and an evaluation part.

PATH holds pairs or conversations. The parts share no question (of a conversation: its first) and no image. Records
that share one, directly or through other records, are a connected component and stay in one part. A question that
many records have (Describe this image.) connects all of them; use --eval-by image to compare only images.
"""

from mpo.commands.data.files import INPUT, OUTPUT, load, processes, write, written_data, written_text
from mpo.commands.flags import Args, arg, flags, path
from mpo.commands.outcome import Report
from mpo.commands.outputs import refuse_targets

EXAMPLES = """\
mpo data split pairs.jsonl train.jsonl eval.jsonl --eval-size 0.01
mpo data split pairs.jsonl train.parquet eval.parquet --eval-size 500 --eval-by image --seed 3
"""
ARGUMENTS = {
    **INPUT,
    "target": arg("new file or folder for the training part", "TARGET", type=path),
    "eval_target": arg("new file or folder for the evaluation part", "EVAL", type=path),
    **flags("--num-proc", eval_size=0.01, eval_by="both", seed=0),
    **OUTPUT,
}


def run(args: Args) -> Report:
    refuse_targets({"TARGET": args.target, "EVAL": args.eval_target})
    from mpo.data.eval_part import split_eval

    parts = split_eval(load(args), args.eval_size, seed=args.seed, by=args.eval_by, num_proc=processes(args))
    written = [write(part, target, args) for part, target in zip(parts, (args.target, args.eval_target), strict=True)]
    train, evaluation = map(written_data, written)
    return Report("\n".join(map(written_text, written)), {"train": train, "eval": evaluation})
