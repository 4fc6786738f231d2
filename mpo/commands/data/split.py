"""Split a data set into a training and an evaluation part.

PATH holds pairs or conversations. The parts share no question (of a conversation: its first) and no image. Records
that share one, directly or through other records, are a connected component and stay in one part. A question that
many records have (Describe this image.) connects all of them; use --eval-by image to compare only images.
"""

from __future__ import annotations

import argparse

from mpo.commands.data.files import add_input, add_output, load, processes, write, written_data, written_text
from mpo.commands.flags import add, path
from mpo.commands.outcome import Report
from mpo.commands.outputs import refuse_targets

EXAMPLES = """\
mpo data split pairs.jsonl train.jsonl eval.jsonl --eval-size 0.01
mpo data split pairs.jsonl train.parquet eval.parquet --eval-size 500 --eval-by image --seed 3
"""


def configure(parser: argparse.ArgumentParser) -> None:
    add_input(parser, split=False)
    parser.add_argument("target", metavar="TARGET", type=path, help="new file or folder for the training part")
    parser.add_argument("eval_target", metavar="EVAL", type=path, help="new file or folder for the evaluation part")
    add(parser, "--eval-size", default=0.01)
    add(parser, "--eval-by", default="both")
    add(parser, "--seed", default=0)
    add(parser, "--num-proc")
    add_output(parser)


def run(args: argparse.Namespace) -> Report:
    refuse_targets({"TARGET": args.target, "EVAL": args.eval_target})
    from mpo.data.eval_part import split_eval

    parts = split_eval(load(args), args.eval_size, seed=args.seed, by=args.eval_by, num_proc=processes(args))
    written = [write(part, target, args) for part, target in zip(parts, (args.target, args.eval_target), strict=True)]
    train, evaluation = map(written_data, written)
    return Report("\n".join(map(written_text, written)), {"train": train, "eval": evaluation})
