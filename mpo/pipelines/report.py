"""What a job has done, as numbers, as a page and as a progress bar."""

import re
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from tqdm.auto import tqdm

MAX_REASONS = 1000
"""Maximum number of different reasons of each step that are counted; further ones are counted together."""
EVERY_SECONDS = 30.0
"""Between two lines of progress where stderr is no terminal."""


def count_reason(counts: Counter[str], step: str, reason: str) -> None:
    """Count a reason for which a record was dropped. Reasons that differ in numbers, paths or quotes only are the same."""
    masked = re.sub(r"'[^']*'|\"[^\"]*\"|\S*[0-9/]\S*", "*", " ".join(reason.split()))[:120]
    start = f"{step}/reason/"
    known = start + masked in counts or sum(one.startswith(start) for one in counts) < MAX_REASONS
    counts[start + (masked if known else "other")] += 1


def make_report(counts: Mapping[str, Any], steps: Sequence[str]) -> dict[str, Any]:
    """Arrange counts as a report.

    Args:
        counts: ``records``, ``output``, ``dropped`` (numbers of input records), and by step, after its name and a slash: ``in``,
            ``out``, ``dropped`` (numbers of records), ``responses``, ``finish_reason/...``, ``reason/...``, and a measure's ``sum``
            and ``number``; the mean of no values is None.
        steps: names of the steps.
    """
    report: dict[str, Any] = {name: counts.get(name, 0) for name in ("records", "output", "dropped")}
    report["steps"] = []
    for step in steps:
        row: dict[str, Any] = {"step": step, **{name: counts.get(f"{step}/{name}", 0) for name in ("in", "out", "dropped")}}
        for name, value in sorted(counts.items()):
            at, _, rest = name.partition("/")
            kind, _, which = rest.partition("/")
            if at != step or which == "number":
                continue
            if which == "sum":
                number = counts.get(f"{step}/{kind}/number", 0)
                row[kind] = value / number if number else None
            elif which:
                row.setdefault(f"{kind}s", {})[which] = value
            else:
                row[kind] = value
        report["steps"].append(row)
    return report


def summarize(report: Mapping[str, Any]) -> str:
    """Summarize a report in a few lines."""
    lines = [f"{report['records']:,} records: {report['output']:,} in the output, {report['dropped']:,} dropped"]
    lines += [f"  unused responses, to what is gone or has changed: {report['unused']:,}"] if "unused" in report else []
    for row in report["steps"]:
        shown = [
            f"{value:,.4g} {name}" if isinstance(value, float) else f"{value:,} {name.replace('_', ' ')}"
            for name, value in row.items()
            if isinstance(value, int | float)
        ]
        lines.append(f"  {row['step']}: {', '.join(shown)}")
        reasons = sorted(row.get("reasons", {}).items(), key=lambda one: -one[1])
        lines += [f"    {number:,} dropped: {reason}" for reason, number in reasons[:5]]
    return "\n".join(lines)


STYLE = "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
STYLE += "td,th{border:1px solid #ccc;padding:.2em .6em;text-align:left;vertical-align:top}pre{white-space:pre-wrap}"


def page(report: Mapping[str, Any], settings: Mapping[str, Any], outputs: Sequence[bytes], dropped: Sequence[bytes]) -> str:
    """Write a report as a self-contained HTML page, with the first lines of both files."""
    total = f"{report['records']:,} records = {report['output']:,} in the output + {report['dropped']:,} dropped"
    unused = f"; unused responses, to what is gone or has changed: {report['unused']:,}" if "unused" in report else ""
    body = f"{table(report['steps'])}<h2>Settings</h2>{table(settings)}"
    for name, lines in (("output.jsonl", outputs), ("dropped.jsonl", dropped)):
        shown = "".join(f"<pre>{escape(line.decode(errors='ignore'))}</pre>" for line in lines)
        body += f"<h2>First lines of {name}</h2>{shown}" if lines else ""
    return html_page(total + unused, body)


def html_page(title: str, body: str, style: str = "") -> str:
    """A self-contained HTML page of a title, a body, and styles beside `STYLE`."""
    head = f"<meta charset='utf-8'><title>{escape(title)}</title><style>{STYLE}{style}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body><h1>{escape(title)}</h1>{body}</body></html>\n"


def table(value: Any) -> str:
    """Write values as HTML: a mapping as a table, with what it holds in its cells."""
    if isinstance(value, Mapping):
        rows = "".join(f"<tr><th>{escape(str(name))}</th><td>{table(inner)}</td></tr>" for name, inner in value.items())
        return f"<table>{rows}</table>"
    if isinstance(value, list):
        return "".join(table(inner) for inner in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"
    return escape(str(value))


class Progress:
    """A bar on a terminal; elsewhere a line on stderr, every 30 seconds. `done` of the `total` records were finished before."""

    def __init__(self, total: int, done: int, *, show: bool = True) -> None:
        ipython = sys.modules.get("IPython")  # a notebook shows a bar too
        quiet = not show or not (sys.stderr.isatty() or (ipython is not None and ipython.get_ipython() is not None))
        self._bar = tqdm(total=total, initial=done, unit="record", disable=quiet, dynamic_ncols=True)
        self._total, self._first, self._show = total, done, show
        self._start = self._last = time.monotonic()
        self._quiet, self._done = quiet, done
        self._said: list[str] = []

    def update(self, counts: Mapping[str, Any], spent: Mapping[str, Any]) -> None:
        """Show how far the job is, by counts as in `make_report` and what was ``spent`` as in `mpo.pipelines.job.Job.run`."""
        now, self._said = time.monotonic(), self._text(counts, spent)
        self._done = counts.get("records", 0)
        if not self._quiet:
            self._bar.set_postfix_str(", ".join(self._said), refresh=False)
            self._bar.update(self._done - self._bar.n)
        elif self._show and now - self._last >= EVERY_SECONDS:
            self._last = now
            self._print()

    @staticmethod
    def _text(counts: Mapping[str, Any], spent: Mapping[str, Any]) -> list[str]:
        tokens = spent.get("prompt_tokens", 0) + spent.get("completion_tokens", 0)
        said = [f"{spent['requests']:,} requests"] if "requests" in spent else []
        said += [f"{tokens:,} tokens"] * bool(tokens) + [f"cost {spent.get('cost', 0):,.2f}"] * ("cost" in spent)
        said += [f"{counts['dropped']:,} dropped"] * bool(counts.get("dropped"))
        for name, number in counts.items():
            if name.endswith("/number") and number:
                said.append(f"{name.split('/')[-2]} {counts[f'{name[:-7]}/sum'] / number:.3f}")
        return said

    def _print(self) -> None:
        rate = (self._done - self._first) / max(time.monotonic() - self._start, 1e-9)
        left = f"{(self._total - self._done) / rate / 60:,.0f} min left" if rate else "time left unknown"
        said = [f"{self._done:,} of {self._total:,} records", f"{rate:.3g} a second", left, *self._said]
        print(", ".join(said), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Remove the bar, or print the last line."""
        self._bar.close()
        if self._quiet and self._show:
            self._print()
