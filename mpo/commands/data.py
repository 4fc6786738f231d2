"""Validate, inspect, convert, mix, split, deduplicate and filter preference data.

PATH is anything that data.path of `mpo train` accepts: a JSONL, Parquet or tar file, a folder of save_to_disk, a data
set on the Hub, MMPR's meta.json, or the YAML of a mixture (see mix). The format is detected; --format sets it. Nothing
is edited in place: results are written to new files.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from mpo.commands.flags import REQUIRED, Args, Words, action, arg, flags, path, refuse_replacing, refuse_targets
from mpo.commands.models import open_model, refuse_unfit
from mpo.commands.outcome import Failed, Report
from mpo.commands.records import INPUT, OUTPUT, SPLIT, TARGET, ids, load, processes, processor_of, write, written_data, written_text
from mpo.io import write_json_lines, write_text


@action(
    {
        **INPUT,
        **SPLIT,
        **flags("--num-proc", "--model", "--max-tiles", "--max-length", "--min-frames", "--max-frames", "--eval-path"),
        **flags(output=Path("bad_records.jsonl")),
    },
    "mpo data validate pairs.jsonl --model OpenGVLab/InternVL3-1B-Instruct    find problems that stop training",
    "mpo data validate pairs.jsonl --image-root /data/images --model OpenGVLab/InternVL3-1B-Instruct --max-length 8192",
    "mpo data validate train.jsonl --eval-path eval.jsonl && mpo train data.path=train.jsonl data.eval_path=eval.jsonl",
)
def validate(args: Args) -> Report:
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
    refuse_replacing("--output", args.output, '{"where": ')
    from mpo.curation.examine import PROBLEMS
    from mpo.curation.validate import validate

    processor = processor_of(args)
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


@action(
    {**INPUT, **SPLIT, **flags("--num-proc", "--model", "--max-tiles", "--html")},
    "mpo data stats pairs.jsonl --html stats.html                       show lengths, length gaps and word overlap, by source",
    "mpo data stats pairs.jsonl --model OpenGVLab/InternVL3-1B-Instruct --num-proc 8",
)
def stats(args: Args) -> Report:
    """Print statistics: lengths, tiles, length gaps, word overlap.

    Of conversations: turns, words of the user and the assistant, images and, with --model, tokens and tiles.

    For all pairs and by source: words of questions and completions (with --model also tokens and tiles), how much longer
    chosen completions are than rejected ones, and how many words both share. If most chosen completions are the longer
    ones, the model learns length; if the two share almost no words, it learns little but style.
    """
    refuse_replacing("--html", args.html, "<!doctype html>")
    from mpo.curation.stats import compute_stats, stats_data, stats_page, stats_text

    records = load(args)
    is_pair = "messages" not in records.column_names
    if args.html and not is_pair:
        raise ValueError(f"--html has plots of pairs, and {args.path} holds conversations. Leave it out, or use --json.")
    found = compute_stats(records, processor_of(args), num_proc=processes(args))
    if args.html:
        write_text(args.html, stats_page(found, str(args.path)))
    return Report(stats_text(found), {"path": args.path, **stats_data(found), **({"html": args.html} if is_pair else {})})


@action(
    {**INPUT, **SPLIT, **flags("--model", "--max-tiles", "--shuffle", "--id", "--html", limit=3, seed=0)},
    "mpo data show pairs.jsonl --model OpenGVLab/InternVL3-1B-Instruct  show the first three as the model sees them",
    "mpo data show pairs.jsonl --limit 10 --shuffle --seed 1            show ten at random",
    "mpo data show pairs.jsonl --id m3cot-17 --model OpenGVLab/InternVL3-1B-Instruct",
    "mpo data show pairs.jsonl --limit 50 --html show.html              write an HTML page with the images",
)
def show(args: Args) -> Report:
    """Print a few records, pairs or conversations, as the model sees them.

    With --model: the rendered prompt with its image tokens, and the completions with the labelled tokens (those of the
    loss) between angle quotation marks.
    """
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
    selected, processor = pairs.select(indices), processor_of(args)
    if args.html:
        write_text(args.html, show_page(selected, str(args.path), processor))
        text = f"{args.html}: {len(selected):,} records"
    else:
        text = "" if args.json else show_text(selected, processor)
    return Report(text, {"path": args.path, "records": show_data(selected, processor) if args.json else [], "html": args.html})


@action(
    {**INPUT, **SPLIT, **TARGET, **OUTPUT, **flags(check=True)},
    "mpo data convert pairs.jsonl pairs.parquet                         write Parquet with the images inside",
    "mpo data convert mmpr/annotations/m3cot.jsonl m3cot.parquet --image-root mmpr/images",
    "mpo data convert m3cot.parquet m3cot.jsonl --output-format mmpr     write the images to m3cot_images/",
    "mpo data convert pairs.jsonl portable.jsonl --images copy           copy every image next to the file",
)
def convert(args: Args) -> Report:
    """Convert pairs or conversations to TRL's or MMPR's JSONL, Parquet or save_to_disk.

    The name of the target decides which: .jsonl has TRL's columns (--output-format mmpr: MMPR's fields), .parquet has TRL's
    columns with the images inside, a name without an ending is a folder of save_to_disk. The target is read again and
    compared, record by record and image by image. Columns that the form cannot hold are listed. MMPR's lines keep other
    fields of a record at the top level as in its file, or in one object `metadata` where their names would mean something
    else.
    """
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
    kept = [one.remove_columns([name for name in dropped if name in one.column_names]) for one in (pairs, again)]
    found = first_difference(*kept)
    if found is not None:
        raise Failed(f"{written.path} differs from {args.path}: {found}. The new file was not deleted. Please report this.")
    checked = f"Read again: {len(again):,} {written.unit}, the same as in {args.path}."
    return Report(f"{written_text(written)}\n{checked}", {**written_data(written), "checked": True})


@action(
    {
        "mixture": arg("YAML or JSON file that describes the mixture, see above", "MIXTURE", type=path),
        "target": arg("new file or folder to write (default: only print the table)", "TARGET", type=path, nargs="?"),
        "eval_target": arg("new file or folder for the evaluation part (eval_size)", "EVAL", type=path, nargs="?"),
        **flags("--shuffle", seed=Words("as in the mixture")),
        **OUTPUT,
    },
    "mpo data mix mixture.yaml mixed.parquet                            write several sources as one data set",
    "mpo data mix mixture.yaml                                          print only the table",
    "mpo data mix mixture.yaml mixed.parquet eval.parquet               for a mixture with an eval_size",
    "mpo data mix MMPR-v1.2/meta.json                                   print the pairs of each source of MMPR",
)
def mix(args: Args) -> Report:
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


@action(
    {
        **INPUT,
        "target": arg("new file or folder for the training part", "TARGET", type=path),
        "eval_target": arg("new file or folder for the evaluation part", "EVAL", type=path),
        **flags("--num-proc", eval_size=0.01, eval_by="both", seed=0),
        **OUTPUT,
    },
    "mpo data split pairs.jsonl train.jsonl eval.jsonl                  split off 1 % of the pairs for evaluation",
    "mpo data split pairs.jsonl train.parquet eval.parquet --eval-size 500 --eval-by image --seed 3",
)
def split(args: Args) -> Report:
    """Split a data set into a training and an evaluation part.

    PATH holds pairs or conversations. The parts share no question (of a conversation: its first) and no image. Records
    that share one, directly or through other records, are a connected component and stay in one part. A question that
    many records have (Describe this image.) connects all of them; use --eval-by image to compare only images.
    """
    refuse_targets({"TARGET": args.target, "EVAL": args.eval_target})
    from mpo.data.eval_part import split_eval

    parts = split_eval(load(args), args.eval_size, seed=args.seed, by=args.eval_by, num_proc=processes(args))
    written = [write(part, target, args) for part, target in zip(parts, (args.target, args.eval_target), strict=True)]
    train, evaluation = map(written_data, written)
    return Report("\n".join(map(written_text, written)), {"train": train, "eval": evaluation})


MOST_LINES = 5
"""Maximum number of removed records printed; the file of --removed has all."""


@action(
    {**INPUT, **TARGET, **flags("--exact", "--removed", "--num-proc", threshold=0.9, image_bits=3), **OUTPUT},
    "mpo data dedupe pairs.jsonl unique.jsonl                           remove exact and near duplicates",
    "mpo data dedupe pairs.jsonl unique.parquet --exact",
    "mpo data dedupe pairs.jsonl unique.jsonl --threshold 0.8 --removed duplicates.jsonl",
)
def dedupe(args: Args) -> Report:
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


LIMITS = {"line": "10000", "zeros": "100", "run": "64", "lines": "0.3", "loop": "35", "ngrams": "60"}


@action(
    {
        "path": arg("conversations or preferences: JSONL, JSON, Parquet, or a folder of them", "PATH"),
        **flags("--metadata", "--drop-bad", "--retry-dropped", "--workers", output=REQUIRED),
        **flags("--model", "--model-name", "--prices", "--device"),
        **flags(heuristics=True, repetition=Words("with --model"), quality=Words("with --model")),
        **flags(**{f"max_{name}": Words(value) for name, value in LIMITS.items()}),
        **flags(min_repetition=Words("3"), min_quality=Words("7"), domain=Words("general"), unscored=Words("keep")),
    },
    "mpo data filter chat.jsonl --output filtered                       drop completions that degenerate, into files with reasons",
    "mpo data filter chat.jsonl --output judged --model http://localhost:8000/v1 --prices 0.15 0.6",
    "mpo data filter pairs.jsonl --output judged --model runs/first --no-quality --max-loop off",
    "mpo data filter data/ --output judged --model http://localhost:8000/v1 --domain math --domain forum=writing",
)
def filter(args: Args) -> Report:
    """Remove conversations or pairs by their form, and by scores of a language model.

    As for InternVL 2.5, in the folder --output, which the same command goes on with after an interruption:

      heuristics    long lines, runs of zeros or of one character, repeated lines, loops, repeated n-grams
      repetition    a score of --model from 0 to 10; below 3 dropped
      quality       a score of --model from 0 to 10; below 7 dropped; records with images are not judged

    Texts are the turns of the assistant. Of a pair, both completions are checked, but for quality the chosen one alone. The folder
    kept has the files of PATH without the dropped lines, the others as they are, with their image paths; dropped.jsonl has the
    dropped ones with all reasons, report.json the counts by rule and by source.
    """
    from mpo.curation.judge import OTHERS, Form, Quality, Repetition, Source, filter_records

    limits = {name: value for name in LIMITS if (value := getattr(args, f"max_{name}")) is not None}
    judges = {Repetition: args.repetition, Quality: args.quality}
    judges = {judge: bool(args.model) if wanted is None else wanted for judge, wanted in judges.items()}
    for names, needed, there in (
        ([f"max_{name}" for name in limits], "--heuristics", args.heuristics),
        (["repetition", "quality", "model_name", "prices", "device"], "--model", args.model),
        (["model", "unscored"], "--repetition or --quality", any(judges.values())),
        (["min_repetition"], "--repetition", judges[Repetition]),
        (["min_quality", "domain"], "--quality", judges[Quality]),
    ):
        if not there and (given := [name for name in names if getattr(args, name) not in (None, False)]):
            raise ValueError(f"--{given[0].replace('_', '-')} needs {needed}. Give both, or none.")
    if args.model:
        refuse_unfit(args, args.model)
    source = Source(args.path, metadata=args.metadata or (), keep_bad=args.drop_bad)
    steps: list[Any] = [
        Form({name: None if value == "off" else value for name, value in limits.items()}, heuristics=args.heuristics)
    ]
    unscored, generator = args.unscored or "keep", open_model(args, args.model) if any(judges.values()) else None
    domains = dict((OTHERS, *one.rsplit("=", 1))[-2:] for one in args.domain or ())
    if len(domains) < len(args.domain or ()):
        raise ValueError(f"--domain is given twice for one source, or for all: {', '.join(args.domain)}. Keep one of them.")
    known = {one["source"] for one in source} if domains.keys() - {OTHERS} else set()
    if unknown := sorted(domains.keys() - {OTHERS, *known}):
        raise ValueError(f"--domain names the source {unknown[0]!r}; {args.path} has {', '.join(sorted(known))}. Name one of them.")
    own = {Repetition: {"threshold": args.min_repetition}, Quality: {"threshold": args.min_quality, "domains": domains}}
    for judge in [judge for judge, wanted in judges.items() if wanted]:
        steps += [judge(generator, **own[judge], on_unscored=unscored, again=again) for again in (False, True)]
    settings = {"drop_bad": args.drop_bad, "retry_dropped": args.retry_dropped, "workers": args.workers or 1}
    report = filter_records(source, steps, args.output, on_unscored=unscored, **settings)
    rows = {"all": {name: value for name, value in report.items() if isinstance(value, int)}, **report["by_source"]}
    lines = [f"{name}: {', '.join(f'{count:,} {what}' for what, count in row.items())}" for name, row in rows.items()]
    spent = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in report["spent"].items())
    return Report("\n".join([*lines, *[f"spent: {spent}"] * bool(spent), f"{args.output}/report.json"]), report)
