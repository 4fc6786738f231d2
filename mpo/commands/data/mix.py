"""Write a mixture of several sources as one data set.

The pairs are those that training with data.mix=MIXTURE would draw; the table shows how many are of each source.
MIXTURE is MMPR's meta.json, or a YAML or JSON file. Paths and patterns (*.jsonl) are relative to its folder if they
exist there:

  sources:
    - {path: m3cot.jsonl, image_root: images/m3cot, repeat_time: 2}
    - {path: charts.jsonl, image_root: images/charts, repeat_time: 0.1, cap: 5000, tiles: {max: 12}}
  sampling: null     # null: weight if sources have one, else repeat_time; sqrt: by the square root of the sizes
  size: null         # total number of pairs, with sampling weight or sqrt
  eval_size: null    # size of the evaluation part (shares no question or image with the rest): fraction or number of pairs
  seed: 0
"""

from dataclasses import asdict

from mpo.commands.data.files import OUTPUT, write, written_data, written_text
from mpo.commands.flags import Args, Words, arg, flags, path
from mpo.commands.outcome import Report
from mpo.commands.outputs import refuse_targets

EXAMPLES = """\
mpo data mix mixture.yaml                      print only the table
mpo data mix mixture.yaml mixed.parquet
mpo data mix mixture.yaml mixed.parquet eval.parquet     for a mixture with an eval_size
mpo data mix MMPR-v1.2/meta.json                         print the pairs of each source of MMPR
"""
ARGUMENTS = {
    "mixture": arg("YAML or JSON file that describes the mixture, see above", "MIXTURE", type=path),
    "target": arg("new file or folder to write (default: only print the table)", "TARGET", type=path, nargs="?"),
    "eval_target": arg("new file or folder for the evaluation part (eval_size)", "EVAL", type=path, nargs="?"),
    **flags("--shuffle", seed=Words("as in the mixture")),
    **OUTPUT,
}


def run(args: Args) -> Report:
    refuse_targets({"TARGET": args.target, "EVAL": args.eval_target})
    import numpy as np

    from mpo.data.load import mix
    from mpo.data.mixture_file import read_mixture

    settings = read_mixture(args.mixture)
    if args.seed is not None:
        settings["seed"] = args.seed
    if args.target is not None and bool(settings.get("eval_size")) != (args.eval_target is not None):
        found = settings.get("eval_size")
        raise ValueError(f"{args.mixture} has eval_size={found}. Give EVAL if eval_size is set, and leave it out otherwise.")
    mixture = mix(**settings)
    written = []
    if args.target is not None:
        train = mixture.train
        if args.shuffle:
            train = train.select(np.random.default_rng(settings.get("seed", 0)).permutation(len(train)))
        written.append(write(train, args.target, args))
        if mixture.eval is not None:
            written.append(write(mixture.eval, args.eval_target, args))
    return Report(
        "\n".join([mixture.describe(), *map(written_text, written)]),
        {"mixture": args.mixture, "sources": list(map(asdict, mixture.taken)), "written": list(map(written_data, written))},
    )
