"""Validate a data set before training; the exit status is 1 if it has problems.

PATH holds pairs or conversations, as its first record. Every record is read as training would read it, in parallel.

Problems stop training: lines that are not pairs, images and videos that are missing or cannot be decoded, placeholders
that do not match the images, empty or equal completions, records longer than --max-length or the model's context, image
tokens written in texts, questions that --eval-path has too (with the same images), lines of --eval-path that are not
pairs.

Notes do not stop training: exact duplicates, images that --eval-path has too, completions that refuse or look
unfinished, completions that differ only in white space and, with --model, other control tokens written in texts
(<|im_end|>), which the tokenizer reads as control tokens.

Fields that no format uses are listed with the number of their lines. One that may be an image, a message or text of the
prompt is a problem; --metadata FIELD says that it is none.

Every finding is written to --output with its file and line.
"""

from pathlib import Path

from mpo.commands.data.files import INPUT, SPLIT, load_processor, processes
from mpo.commands.flags import Args, flags
from mpo.commands.outcome import Report
from mpo.commands.outputs import refuse_replacing

EXAMPLES = """\
mpo data validate pairs.jsonl
mpo data validate pairs.jsonl --image-root /data/images --model OpenGVLab/InternVL3-1B-Instruct --max-length 8192
mpo data validate train.jsonl --eval-path eval.jsonl && mpo train data.path=train.jsonl data.eval_path=eval.jsonl
"""
ARGUMENTS = {
    **INPUT,
    **SPLIT,
    **flags("--num-proc", "--model", "--max-tiles", "--max-length", "--min-frames", "--max-frames", "--eval-path"),
    **flags(output=Path("bad_records.jsonl")),
}


def run(args: Args) -> Report:
    refuse_replacing("--output", args.output, '{"where": ')
    from mpo.curation.examine import PROBLEMS
    from mpo.curation.validate import validate

    processor = load_processor(args)
    report = validate(
        args.path,
        format=args.format,
        image_root=args.image_root,
        split=args.split,
        frames={"min": args.min_frames, "max": args.max_frames},
        metadata=args.metadata,
        processor=processor,
        max_length=args.max_length,
        context=_context(args.model) if args.model else None,
        evaluation=args.eval_path,
        output=args.output,
        workers=processes(args),
    )
    counts = report.counts
    data = {
        "path": report.path,
        "lines": report.lines,
        "pairs": report.pairs,
        "may_start": report.may_start,
        "problems": {kind: count for kind, count in counts.items() if kind in PROBLEMS},
        "notes": {kind: count for kind, count in counts.items() if kind not in PROBLEMS},
        "unused_fields": dict(sorted(report.unused.items())),
        "output": report.output,
    }
    return Report(report.text(), data, int(not report.may_start))


def _context(model: str) -> int | None:
    """Context length of a model in tokens; None if its config has none, or for a folder with only a processor."""
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        return None
    from mpo.models.loading import model_config

    return getattr(model_config(model).get_text_config(), "max_position_embeddings", None)
