"""Print a few records, pairs or conversations, as the model sees them.

With --model: the rendered prompt with its image tokens, and the completions with the labelled tokens (those of the
loss) between angle quotation marks.
"""

from mpo.commands.data.files import INPUT, SPLIT, ids, load, load_processor
from mpo.commands.flags import Args, flags
from mpo.commands.outcome import Report
from mpo.commands.outputs import refuse_replacing
from mpo.io import write_text

EXAMPLES = """\
mpo data show pairs.jsonl                                          show the first three
mpo data show pairs.jsonl --limit 10 --shuffle --seed 1            show ten at random
mpo data show pairs.jsonl --id m3cot-17 --model OpenGVLab/InternVL3-1B-Instruct
mpo data show pairs.jsonl --limit 50 --html show.html              write an HTML page with the images
"""
ARGUMENTS = {**INPUT, **SPLIT, **flags("--model", "--max-tiles", "--shuffle", "--id", "--html", limit=3, seed=0)}


def run(args: Args) -> Report:
    refuse_replacing("--html", args.html, "<!doctype html>")
    import numpy as np

    from mpo.curation.show import show_data, show_page, show_text

    pairs = load(args)
    if args.id:
        names = ids(pairs)
        if missing := [name for name in args.id if name not in names]:
            raise ValueError(f"No record of {args.path} has the id {missing[0]!r}. Check --id; the first id is {names[0]!r}.")
        indices = [index for index, name in enumerate(names) if name in args.id]
    else:
        indices = np.random.default_rng(args.seed).permutation(len(pairs)).tolist() if args.shuffle else list(range(len(pairs)))
        indices = indices[: args.limit]
    selected, processor = pairs.select(indices), load_processor(args)
    if args.html:
        write_text(args.html, show_page(selected, str(args.path), processor))
        text = f"{args.html}: {len(selected):,} records"
    else:
        text = "" if args.json else show_text(selected, processor)
    return Report(text, {"path": args.path, "records": show_data(selected, processor) if args.json else [], "html": args.html})
