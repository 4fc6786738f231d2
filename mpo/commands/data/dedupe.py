"""Remove exact and near duplicates.

PATH holds pairs or conversations. The first record of each group is kept. Exact duplicates have the same question,
images and completions (of a conversation: all that follows the first question, with flags of turns, tools and their
calls). Near duplicates (unless --exact) have texts whose 5-character sequences overlap by --threshold, case and
punctuation aside, with the same numbers and signs, and the same images: equal files, or pixels that differ only by
JPEG or WebP compression or by downscaling (to at least three quarters of the size, in proportion). An image with
another colour, label or bar is a different image. Duplicates of drawings are often not recognised, and are then kept.
Images are compared if their 64-bit difference hashes are nearly equal. The file of --removed lists every removed
record, the one that it repeats, and the reason.
"""

from mpo.commands.data.files import INPUT, OUTPUT, TARGET, ids, load, processes, write, written_data, written_text
from mpo.commands.flags import Args, flags
from mpo.commands.outcome import Report
from mpo.commands.outputs import refuse_targets
from mpo.io import write_json_lines

EXAMPLES = """\
mpo data dedupe pairs.jsonl unique.jsonl
mpo data dedupe pairs.jsonl unique.parquet --exact
mpo data dedupe pairs.jsonl unique.jsonl --threshold 0.8 --removed duplicates.jsonl
"""
MOST_LINES = 5
"""Maximum number of removed records printed; the file of --removed has all."""
ARGUMENTS = {**INPUT, **TARGET, **flags("--exact", "--removed", "--num-proc", threshold=0.9, image_bits=3), **OUTPUT}


def run(args: Args) -> Report:
    removed = args.removed or args.target.with_name(f"{args.target.name}.removed.jsonl")
    refuse_targets({"TARGET": args.target, "--removed": removed})
    from mpo.curation.dedupe import find_duplicates, without

    pairs = load(args)
    found = find_duplicates(
        pairs, near=not args.exact, threshold=args.threshold, image_bits=args.image_bits, num_proc=processes(args)
    )
    written = write(without(pairs, found), args.target, args)
    names = ids(pairs)
    lines = [{"id": names[one.index], "same_as": names[one.same_as], "reason": one.reason} for one in found]
    write_json_lines(removed, lines)
    exact = sum(one.reason.startswith("the same") for one in found)
    unit = written.unit
    counts = f"{exact:,} exact duplicates, {len(found) - exact:,} near ones ({removed})"
    text = [written_text(written), f"Removed {len(found):,} of {len(pairs):,} {unit}: {counts}"]
    text += [f"  {line['id']} duplicates {line['same_as']}: {line['reason']}" for line in lines[:MOST_LINES]]
    data = {unit: len(pairs), "exact": exact, "near": len(found) - exact, "removed": removed, "written": written_data(written)}
    return Report("\n".join(text), data)
