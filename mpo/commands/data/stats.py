"""Print statistics: lengths, tiles, length gaps, word overlap.

Of conversations: turns, words of the user and the assistant, images and, with --model, tokens and tiles.

For all pairs and by source: words of questions and completions (with --model also tokens and tiles), how much longer
chosen completions are than rejected ones, and how many words both share. If most chosen completions are the longer
ones, the model learns length; if the two share almost no words, it learns little but style.
"""

from mpo.commands.data.files import INPUT, SPLIT, load, load_processor, processes
from mpo.commands.flags import Args, flags
from mpo.commands.outcome import Report
from mpo.commands.outputs import refuse_replacing
from mpo.io import write_text

EXAMPLES = """\
mpo data stats pairs.jsonl
mpo data stats pairs.jsonl --model OpenGVLab/InternVL3-1B-Instruct --html stats.html --num-proc 8
"""
ARGUMENTS = {**INPUT, **SPLIT, **flags("--num-proc", "--model", "--max-tiles", "--html")}


def run(args: Args) -> Report:
    refuse_replacing("--html", args.html, "<!doctype html>")
    from mpo.curation.stats import compute_stats, stats_data, stats_page, stats_text

    records = load(args)
    is_pair = "messages" not in records.column_names
    if args.html and not is_pair:
        raise ValueError(f"--html has plots of pairs, and {args.path} holds conversations. Leave it out, or use --json.")
    found = compute_stats(records, load_processor(args), num_proc=processes(args))
    if args.html:
        write_text(args.html, stats_page(found, str(args.path)))
    return Report(stats_text(found), {"path": args.path, **stats_data(found), **({"html": args.html} if is_pair else {})})
