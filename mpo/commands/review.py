"""Show records in a browser and correct them: preference pairs, conversations, questions, responses with their verdicts.

FILE is JSONL, a JSON array or Parquet in any format that mpo reads, or the folder of a pipeline or an evaluation. Decisions are
in FILE.review.jsonl, on disk before the page says that they are saved; the same command goes on. Keys: a accept, s swap, e edit,
r reject, k skip, u undo; ? shows all of them. With --export nothing is served: the corrected records are written in the format of
FILE. With several --reviewer each has a link of their own, and sees what the others decided after deciding.

The page is for this machine. --host ADDRESS lets others in: everyone who reaches the port and has a link can read the
records and their images and decide, and what is sent is not encrypted. ssh -L 8765:127.0.0.1:8765 needs no --host.
"""

import getpass
import sys
from typing import Any

from mpo.commands.flags import Args, Words, arg, flags, path
from mpo.commands.outcome import Report

EXAMPLES = """\
mpo review pairs.jsonl                                             print a link, and serve its page
mpo review pairs.jsonl --reviewer anna --reviewer ben              two people, double blind
mpo review pairs.jsonl --export corrected.jsonl                    write the corrected pairs
mpo review pairs.jsonl --from-log anna.review.jsonl --export corrected.jsonl
mpo review verified --port 8765                                    responses and verdicts of mpo mmpr verify
mpo mmpr pair verified --output pairs --review verified/output.jsonl.review.jsonl
"""
ARGUMENTS = {
    "file": arg("records: JSONL, JSON, Parquet, or the folder of a job", "FILE", type=path),
    **flags("--image-root", "--export", "--from-log", reviewer=Words("your login name")),
    **flags(port=Words("a free one", 0), host="127.0.0.1"),
}


def run(args: Args) -> Report:
    names = args.reviewer or [_user()]
    if twice := [name for name in names if names.count(name) > 1 or not name.strip() or not name.isprintable() or len(name) > 100]:
        raise ValueError(f"--reviewer {twice[0]!r} is given twice, empty, not printable, or longer than 100 characters.")
    if args.export:
        return _export(args)
    try:
        from mpo.review.server import Review, Server
    except ImportError as error:
        raise ValueError(f"mpo review needs {error.name}. Install it: pip install 'mpo-trainer[review]'") from None
    review = Review(args.file, image_root=args.image_root, reviewers=names, others=args.from_log or ())
    try:
        server = Server(review, args.host, args.port)
    except ValueError:
        review.close()
        raise
    links = server.links()
    print(f"{review.records.path}: decisions are saved in {review.log.path}", file=sys.stderr)
    if review.log.recovered:
        print("The last line of the log was not whole, as its process was killed: that decision was not saved.", file=sys.stderr)
    if not server.is_local:
        print(
            f"--host {args.host}: everyone who reaches port {server.port} and has a link can read these records and their images, "
            "and decide. What is sent is not encrypted: use it in a network that you trust.",
            file=sys.stderr,
        )
    width = max(map(len, links))
    for name, link in links.items():
        print(f"{name:{width}}  {link}", file=sys.stderr, flush=True)
    print("Ctrl-C ends it.", file=sys.stderr, flush=True)
    server.run()
    return Report("", {"file": str(review.records.path), "log": str(review.log.path)})


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without users
        return "reviewer"


def _export(args: Args) -> Report:
    from mpo.review.agreement import rows
    from mpo.review.corrections import export, opened
    from mpo.review.files import Records
    from mpo.review.log import Log, log_of

    records = Records(args.file, args.image_root)
    own = log_of(records.path)
    if not own.exists() and not args.from_log:
        raise ValueError(f"There is no log {own}: nothing was reviewed. Run mpo review {args.file}, or give --from-log.")
    log = Log(own)
    opened(records, log, args.from_log or ())
    report: dict[str, Any] = export(records, log, args.export)
    counts = report["counts"]
    lines = [f"{args.export}: {counts['written']:,} of {counts['records']:,} records"]
    lines += [f"  {name}: {value:,}" for name, value in counts.items() if name not in ("written", "records")]
    lines += [f"{name}: {text}" for name, text in rows(report)]
    if report["unmatched"]:
        lines.append(f"{len(report['unmatched']):,} decisions are about records that {args.file} does not have any more")
    lines.append(f"{args.export}.review.json")
    return Report("\n".join(lines), report)
