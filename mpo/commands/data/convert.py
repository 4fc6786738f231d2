"""Convert pairs or conversations to TRL's or MMPR's JSONL, Parquet or save_to_disk.

The name of the target decides which: .jsonl has TRL's columns (--output-format mmpr: MMPR's fields), .parquet has TRL's
columns with the images inside, a name without an ending is a folder of save_to_disk. The target is read again and
compared, record by record and image by image. Columns that the form cannot hold are listed. MMPR's lines keep other
fields of a record at the top level as in its file, or in one object `metadata` where their names would mean something
else.
"""

from typing import Any

from mpo.commands.data.files import INPUT, OUTPUT, SPLIT, TARGET, load, write, written_data, written_text
from mpo.commands.flags import Args, flags
from mpo.commands.outcome import Failed, Report
from mpo.commands.outputs import refuse_targets

EXAMPLES = """\
mpo data convert mmpr/annotations/m3cot.jsonl m3cot.parquet --image-root mmpr/images
mpo data convert m3cot.parquet m3cot.jsonl --output-format mmpr     write the images to m3cot_images/
mpo data convert pairs.jsonl portable.jsonl --images copy           copy every image next to the file
"""
ARGUMENTS = {**INPUT, **SPLIT, **TARGET, **OUTPUT, **flags(check=True)}


def run(args: Args) -> Report:
    refuse_targets({"TARGET": args.target})
    pairs = load(args)
    written = write(pairs, args.target, args)
    if not args.check:
        return Report(written_text(written), {**written_data(written), "checked": False})
    from mpo.curation.write import first_difference, not_kept
    from mpo.data import load_conversations, load_preferences

    read = load_conversations if "messages" in pairs.column_names else load_preferences
    again = read(written.path, **({"image_root": written.image_root} if written.image_root else {}))
    dropped = not_kept(written)
    found = first_difference(_bare(pairs, dropped), _bare(again, dropped))
    if found is not None:
        raise Failed(f"{written.path} differs from {args.path}: {found}. The new file was not deleted. Please report this.")
    checked = f"Read again: {len(again):,} {written.unit}, the same as in {args.path}."
    return Report(f"{written_text(written)}\n{checked}", {**written_data(written), "checked": True})


def _bare(pairs: Any, dropped: list[str]) -> Any:
    return pairs.remove_columns([name for name in dropped if name in pairs.column_names])
