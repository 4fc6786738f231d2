"""Bring corrections back: into a line, the file's own format, or records on their way through a pipeline."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any

from mpo.data.formats import FORMATS, detect
from mpo.io import BadRecord, atomic_write, json_kind, parse_json, refuse_existing, write_text
from mpo.review.agreement import summary
from mpo.review.documents import VERDICTS, at, front, kind_of, last_user, read_line, shaped
from mpo.review.facets import keys
from mpo.review.files import Records, plain
from mpo.review.log import Event, Log

FIELD = "review"
"""Name, in a record's ``metadata``, of who changed it, when, and what it was."""
ROWS = 256


class Corrected:
    """Records with the decisions of reviews: corrected, or left out where they were rejected.

    Iterate over it, again if needed; then `counts` has the numbers of records by what became of them, ``unmatched`` among them:
    decisions whose record was not there, or not with the content that was reviewed, whose ids are in `unmatched`.
    """

    def __init__(self, records: Iterable[Any], log: Log) -> None:
        self.records, self.counts, self.unmatched = records, Counter[str](), list[str]()
        self._decisions: dict[str, list[Event]] = {}
        self._open, self._seen = 0, Counter[str]()
        for place, labels in sorted(log.labels().items()):
            event = log.final(place, labels)
            if event is None:
                self._open += 1
            else:
                self._decisions.setdefault(event["key"], []).append(event)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.counts, self._seen = Counter(disagreeing=self._open), Counter()
        for record in self.records:
            found = self.one(record)
            if found is not None:
                yield found
        self.finish()

    def one(self, record: Mapping[str, Any]) -> dict[str, Any] | None:
        """A record as its decision makes it, None if that is to leave it out. Equal ones have their decisions in order."""
        key = read_line(record).key()
        own = self._decisions.get(key, ())
        event = own[self._seen[key]] if self._seen[key] < len(own) else None
        self._seen[key] += 1
        if event is None:
            self.counts["unreviewed"] += 1
            return dict(record)
        self.counts["reject" if event["action"] == "reject" else "edit" if event["edits"] else event["action"]] += 1
        return None if event["action"] == "reject" else changed(record, event)

    def finish(self) -> None:
        """Count the decisions that no record had."""
        left = [event for key, own in self._decisions.items() for event in own[self._seen[key] :]]
        self.counts["unmatched"] = len(left)
        self.unmatched = [str(event.get("id") or event["placed"] + 1) for event in left]

    def __str__(self) -> str:
        said = ", ".join(f"{count:,} {name}" for name, count in self.counts.items() if count and name != "unreviewed")
        lost = f", the first about {self.unmatched[0]!r}" if self.unmatched else ""
        return f"review: {said or 'no decision'}{lost}"


def apply(records: Iterable[Any], log: str | Path) -> Corrected:
    """Apply the decisions of a log to records on their way through a pipeline.

    A decision is about a record's content: its id, its texts and the names of its images. It is not applied to a record that has
    the same id and says something else; `Corrected.counts` and `Corrected.unmatched` tell how many there were. Decisions that
    reviewers disagree in, and skipped ones, change nothing.

    Args:
        records: mappings, in something that can be iterated over again.
        log: the log of `mpo review` about these records, or about a file of them.

    Raises:
        ValueError: for a log that is not there.
        BadRecord: for a damaged log.
    """
    return Corrected(records, _existing(Path(log)))


def _existing(path: Path) -> Log:
    log = Log(path) if path.is_file() else None
    if log is None or not log.events:
        what = f"There is no log {path}" if log is None else f"{path} is empty"
        raise ValueError(f"{what}. Give the log of mpo review, FILE.review.jsonl.")
    return log.by_content()


def changed(record: Mapping[str, Any], event: Event) -> dict[str, Any]:
    """A record with a decision to keep it, and with its provenance if that changes it."""
    new = corrected(record, event["action"], event["edits"])
    if new == record:
        return new
    about: Event = {name: event[name] for name in ("by", "at", "action", "uid") if name in event}
    about["was"] = [{"path": list(edit["paths"][0]), "value": edit["old"]} for edit in event["edits"]]
    about["was"] += [{"path": [name], "value": value} for name, value in record.items() if name not in new]
    given = new.get("metadata")
    inner: Any = {} if given in (None, "") else given
    if isinstance(inner, str):
        with suppress(ValueError, RecursionError):
            inner = json.loads(inner)
    if not isinstance(inner, Mapping):
        inner = {"metadata": given}
    inner = {**inner, FIELD: about | ({"earlier": inner[FIELD]} if FIELD in inner else {})}
    new["metadata"] = json.dumps(inner, ensure_ascii=False, default=str) if isinstance(given, str) and given else inner
    return new


def export(records: Records, log: Log, target: Path) -> dict[str, Any]:
    """Write the corrected records in the format of their file.

    A record that nobody changed keeps its bytes, and its place; a changed one has its provenance in ``metadata``; rejected ones are
    in ``TARGET.rejected.jsonl`` with the reasons. ``TARGET.review.json`` has what is returned: counts, reviewers, their agreement
    and position bias, every decision, and the disagreements, whose records stay as they are.

    Raises:
        ValueError: for an existing target, and one of another type; Stale for a decision that does not fit its record.
    """
    suffix = "".join(target.suffixes[-2:] if target.suffix == ".gz" else target.suffixes[-1:]).lower()
    if suffix != records.suffix:
        raise ValueError(
            f"--export {target} ends in {suffix or 'nothing'}, but the data keep their format. End it in {records.suffix}."
        )
    rejected, about = (target.with_name(f"{target.name}.{end}") for end in ("rejected.jsonl", "review.json"))
    for one in (target, rejected, about):
        refuse_existing(one)
    labels = log.labels()
    for place in range(len(records)):  # what was settled without the label of anyone
        if log.settled(place) is not None:
            labels.setdefault(place, {})
    final = {place: event for place, own in labels.items() if (event := log.final(place, own)) is not None}
    counts: Counter[str] = Counter(records=len(records))
    _check_lines(records, final)
    with atomic_write(rejected, durable=True) as others, atomic_write(target, "wb", durable=True) as file:

        def outcome(place: int, line: Any) -> Any:
            """The new line, None for a rejected one, the line itself for one that stays as it is."""
            event = final.get(place)
            if event is None:
                counts["disagreeing" if place in labels else "unreviewed"] += 1
                return line
            if event["action"] == "reject":
                counts["rejected"] += 1
                told = {name: event.get(name) for name in ("by", "at", "reason")}
                others.write(json.dumps({"where": records.where(place), **told, "record": plain(line)}) + "\n")
                return None
            new = changed(line, event)
            counts["accepted" if new == line else "changed"] += 1
            return line if new == line else new

        if records.suffix == ".parquet":
            _write_parquet(records, file, outcome)
        else:
            zipped = records.suffix.endswith(".gz")
            with gzip.GzipFile("", "wb", fileobj=file, mtime=0) if zipped else nullcontext(file) as to:
                _write_lines(records, to, outcome, final)
    counts["written"] = len(records) - counts["rejected"]
    report = {"file": str(records.path), "content": records.content, "log": str(log.path), "counts": dict(counts)}
    report |= _told(log, final)
    write_text(about, json.dumps(report, indent=1) + "\n", durable=True)
    if not counts["rejected"]:
        rejected.unlink()
    return report


def _told(log: Log, final: Mapping[int, Event]) -> dict[str, Any]:
    told = {**summary(log)}
    told["disagreements"] = [place + 1 for place in told["disagreements"]]
    names = ("id", "action", "by", "at", "reason", "uid", "edits")
    told["decisions"] = [
        {"place": place + 1, **{name: event.get(name) for name in names}} for place, event in sorted(final.items())
    ]
    events = (event for stack in log.stacks.values() for event in stack)
    told["unmatched"] = [{"id": event.get("id"), "by": event["by"]} for event in (*events, *log.lost) if event["place"] < 0]
    return told


def _check_lines(records: Records, final: Mapping[int, Event]) -> None:
    for place, event in final.items():
        if event["action"] != "reject":
            try:
                corrected(records.line(place), event["action"], event["edits"])
            except ValueError as error:
                raise Stale(f"{records.where(place)}: the decision of {event['by']} does not fit: {error}") from error


def _write_lines(records: Records, to: Any, outcome: Any, final: Mapping[int, Event]) -> None:
    separator = b"[\n" if records.is_array else b""
    for place in range(len(records)):
        try:
            raw = records.raw(place)
            line = records.line(place) if place in final else {}
        except BadRecord as error:
            if place in final and final[place]["action"] == "reject":
                line = {"line": raw.decode("utf-8", "backslashreplace") or error.reason}
            elif place in final:
                raise
        new = outcome(place, line)
        if new is None:
            continue
        to.write(separator + (raw if new is line else as_written(new, line, raw)))
        separator = b",\n" if records.is_array else b""
    if records.is_array:
        to.write(b"\n]\n" if separator == b",\n" else b"[]\n")


def as_written(new: Mapping[str, Any], line: Mapping[str, Any], raw: bytes) -> bytes:
    """A changed line in the manner of the original: its separators, its escapes, its end."""
    text = raw.rstrip(b"\r\n")
    end = raw[len(text) :]
    for ascii in (False, True):
        for separators in ((", ", ": "), (",", ":")):
            if json.dumps(line, ensure_ascii=ascii, separators=separators).encode("utf-8", "surrogatepass") == text:
                return json.dumps(new, ensure_ascii=ascii, separators=separators).encode("utf-8", "surrogatepass") + end
    return json.dumps(new, ensure_ascii=text.isascii()).encode("utf-8", "surrogatepass") + end


def _write_parquet(records: Records, file: Any, outcome: Any) -> None:
    """Write rows with the same schema; a changed one tells its provenance in a column ``metadata``, as JSON."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    with pq.ParquetFile(records.path) as source:
        schema = source.schema_arrow
        if "metadata" not in schema.names:
            schema = schema.append(pa.field("metadata", pa.string()))
        of_text = pa.types.is_string(schema.field("metadata").type) or pa.types.is_large_string(schema.field("metadata").type)
        place = 0
        with pq.ParquetWriter(file, schema) as writer:
            for batch in source.iter_batches(ROWS):
                rows = []
                for line in batch.to_pylist():
                    new = outcome(place, line)
                    place += 1
                    if new is not None:
                        if new is not line and not of_text:
                            new["metadata"] = line.get("metadata")  # its columns have no room: the report tells it
                        elif isinstance(new.get("metadata"), Mapping):
                            new["metadata"] = json.dumps(new["metadata"], ensure_ascii=False, default=str)
                        rows.append(new)
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def opened(records: Records, log: Log, others: Iterable[Path] = ()) -> int:
    """Begin with a file's log, and add the decisions of other logs. Returns the number of decisions without their record."""
    of_file = cache(lambda: keys(records))  # read once, and only if it is needed
    lost = log.open_file(records.content, records.path.name, of_file, records.state)
    for path in others:
        log.take(_existing(path), of_file(), str(path))
    return lost + len(log.lost)


# The line that edits, and a swap of the completions, make of a line


class Stale(ValueError):
    """A decision that was made about another content of a record."""


def put(value: Any, path: Sequence[str | int], new: Any) -> Any:
    """Return a value, changed in place where it can be, with another one at a path."""
    if not path:
        return new
    if isinstance(value, str):
        return json.dumps(put(parse_json(value, "the text"), path, new), ensure_ascii=False)
    value[path[0]] = put(at(value, path[:1]), path[1:], new)
    return value


@shaped()
def corrected(line: Mapping[str, Any], action: str, edits: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The line that edits (``paths``, the ``old`` value there, the new ``value``) make of a line, and then ``swap``.

    A swap exchanges all that is said of the chosen and of the rejected completion, and drops ``margin``, by how much the one was
    said to be better. Raises Stale for another value than the old one.
    """
    from mpo.pipelines.mmpr.verify import BY_PERSON  # its imports take a second

    new: dict[str, Any] = _copy(line)
    for edit in edits:
        for path in edit["paths"]:
            found, value = at(new, path), edit["value"]
            before = front(found) if isinstance(found, str) and isinstance(edit["old"], str) and found != edit["old"] else ""
            if before and found == before + edit["old"]:
                value = before + value
            elif found != edit["old"]:
                raise Stale(f"{'/'.join(map(str, path))} is {found!r:.60} and was {edit['old']!r:.60} when it was edited.")
            put(new, path, value)
            if path[-1] == "verdict":
                put(new, [*path[:-1], "answer"], at(new, [*path[:-1], "answer"]))  # pairs are told by it
                put(new, [*path[:-1], "method"], BY_PERSON)
    judged = new.get("responses")
    if "accuracy" in new and isinstance(judged, list) and judged:
        new["accuracy"] = sum(one.get("verdict") == "correct" for one in judged) / len(judged)
    return _swapped(new) if action == "swap" else new


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _copy(one) for name, one in value.items()}
    return [_copy(one) for one in value] if isinstance(value, list | tuple) else value


def _swapped(new: dict[str, Any]) -> dict[str, Any]:
    name = detect(new).NAME if kind_of(new) == "pair" else ""
    if name in ("", "vlfeedback"):
        raise ValueError("only a chosen and a rejected completion can be swapped. Edit the record, or reject it.")
    if name == "swift":
        start = last_user(new)
        if new.get("rejected_response") not in (None, "", []):
            tail, other = new["messages"][start:], new["rejected_response"]
            single = isinstance(other, str) and len(tail) == 1 and isinstance(tail[0].get("content"), str)
            new["rejected_response"] = tail[0]["content"] if single else tail
            other = {"role": "assistant", "content": other} if isinstance(other, str) else other
            new["messages"][start:] = [other] if isinstance(other, Mapping) else other
        else:
            new["messages"], new["rejected_messages"] = new["rejected_messages"], new["messages"]
    new = _turned(new, FORMATS[name].USES)
    for own in ("text", "metadata") if name == "rlhf_v" else ("metadata",):
        with suppress(ValueError):  # a text that holds no JSON
            given = new.get(own)
            inner = parse_json(given, own) if isinstance(given, str) else given
            if isinstance(inner, dict) and (turned := _turned(inner)) != inner:
                new[own] = json.dumps(turned, ensure_ascii=False) if isinstance(given, str) else turned
    metas: Any = [new.get(f"{side}_meta") for side in ("chosen", "rejected")]
    if all(isinstance(one, dict) for one in metas) and "negative" in metas[0]:  # it says why a completion is the rejected one
        metas[1]["negative"] = metas[0].pop("negative")
    new.pop("margin", None)
    return new


def _turned(own: Mapping[str, Any], kept: Sequence[str] = ()) -> dict[str, Any]:
    """Let what is said of one completion be said of the other; a name for one side alone turns, but for those `kept`."""
    sides = {"chosen": "rejected", "rejected": "chosen"}
    names = {name: re.sub("chosen|rejected", lambda found: sides[found[0]], name) for name in own}
    return {name if names[name] in own or name in kept else names[name]: own.get(names[name], value) for name, value in own.items()}


def new_value(old: Any, given: Any) -> Any:
    """What is put in the place of a value for what a person wrote: a number stays one where it can.

    Raises:
        ValueError: for anything but text, or a list of texts for a list.
    """
    if isinstance(old, list) or (old is None and isinstance(given, list)):
        if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
            raise ValueError(f"expected a list of texts, got {json_kind(given)}.")
        kept = {str(one): one for one in old or () if not isinstance(one, str)}
        return [kept.get(one, one) for one in given]
    if not isinstance(given, str):
        raise ValueError(f"expected text, got {json_kind(given)}.")
    if given.encode("utf-8", "replace") != given.encode("utf-8", "surrogatepass"):
        raise ValueError("the text has half of a character (a lone surrogate). Write it again.")
    if isinstance(old, int | float) and not isinstance(old, bool):
        try:
            found = parse_json(given, "the number")
        except BadRecord:
            return given
        return found if isinstance(found, int | float) and not isinstance(found, bool) else given
    return given


def refused(line: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Why a corrected line cannot be read as what it was, if the line itself could be; files are not looked for."""
    found = [_reason(one) for one in (line, new)]
    return found[1] if found[1] != found[0] else None


def _reason(line: Mapping[str, Any]) -> str | None:
    from mpo.data.records import to_records

    kind = kind_of(line)
    if kind in ("pair", "conversation"):
        try:
            to_records(line, where="", find=lambda path, _: path, kind=kind)
        except BadRecord as error:
            return error.reason
        return None
    texts = [one for one in read_line(line).turns if any(part.get("text", "").strip() for part in one["parts"])]
    if kind == "question" and not texts:
        return "a question needs a text."
    if kind == "responses" and any(one.get("verdict") not in (None, *VERDICTS) for one in line["responses"]):
        return f"a verdict is one of {', '.join(VERDICTS)}."
    return None
