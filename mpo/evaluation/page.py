"""The results of an evaluation as a self-contained page: tables, plots and the answers that changed, with their images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING, Any

from mpo.figure import data_url, new_figure, png_of, small_url
from mpo.pipelines.report import html_page, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_CHANGED = 20
"""Maximum number of answers that are shown for each comparison."""
SIDE = 240
STYLE = "body{max-width:75em}td.text{white-space:pre-wrap;max-width:28em;overflow-wrap:anywhere}"
STYLE += ".right{background:#e6f4ea}.wrong{background:#fce8e6}"


def percent(row: Mapping[str, Any], name: str = "score", *, sign: bool = False) -> str:
    """A score with its interval, in percent.

    >>> percent({"score": 0.5, "interval": (0.4, 0.6)})
    '50.0 (40.0 to 60.0)'
    """
    low, high = (100 * bound for bound in row["interval"])
    return f"{100 * row[name]:{'+' if sign else ''}.1f} ({low:{'+' if sign else ''}.1f} to {high:{'+' if sign else ''}.1f})"


def drawn(name: str) -> str:
    """A name as matplotlib draws it: no formula between dollar signs, and no line that the legend leaves out."""
    return f"{' ' if name.startswith('_') else ''}{name}".replace("$", r"\$")


def figure_name(row: Mapping[str, Any]) -> str:
    """The name of a figure with its number of samples."""
    return row["figure"] if row["figure"] == "greedy" else f"{row['figure']}@{row['k']}"


def table_of(results: Mapping[str, Any]) -> str:
    """The results as lines of text."""
    rows = [("model", "benchmark", "mode", "figure", "%, 95 % interval", "questions", "unparsable", "dropped")]
    largest = max((row["k"] for row in results["results"]), default=1)  # the whole curves are in results.json
    for row in results["results"]:
        if row["figure"] == "greedy" or row["k"] == largest:
            values = (percent(row), str(row["total"]), str(row["unparsable"]), str(row["dropped"]))
            rows.append((row["model"], row["benchmark"], row["mode"], figure_name(row), *values))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    for row in results["comparisons"]:
        what = f"{row['after']} against {row['before']}, {row['benchmark']}, {row['mode']}, {figure_name(row)}"
        lines.append(f"{what}: {percent(row, 'difference', sign=True)}, p = {row['p_value_holm']:.3g}: {row['verdict']}")
    for name, one in results.get("contamination", {}).items():
        seen = f"{one['both']} with an image, {one['questions']} by their text, {one['images']} by an image"
        lines.append(f"Of the {one['total']} questions of {name}, the training data have {seen}.")
    return "\n".join(lines)


def page_of(results: Mapping[str, Any], answers: Sequence[Mapping[str, Any]], records: Mapping[str, Mapping[str, Any]]) -> str:
    """Write the page, of what `mpo.evaluation.run.evaluate` returns, its answers.jsonl, and the records by benchmark and id."""
    parts = [f"<pre>{escape(table_of(results))}</pre>"]
    plots = {"Scores": scores_plot, "Samples": curves_plot, "Differences": changes_plot}
    for title, plot in plots.items():
        if figure := plot(results):
            parts.append(f"<h2>{title}</h2><img alt='{title}' src='{data_url(png_of(figure, dpi=110), 'image/png')}'>")
    by_model: dict[tuple[str, str, str], dict[str, Any]] = {}
    for one in answers:
        by_model.setdefault((one["model"], one["benchmark"], one["mode"]), {})[one["id"]] = one
    for row in results["comparisons"]:
        if row["figure"] == "greedy":
            before, after = (by_model.get((row[which], row["benchmark"], row["mode"]), {}) for which in ("before", "after"))
            parts.append(_changed(row, before, after, records.get(row["benchmark"], {})))
            parts.append(table({name: percent(one, "difference", sign=True) for name, one in row["subjects"].items()}))
    return html_page("Evaluation", "".join(parts), STYLE)


def _changed(row: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any], records: Mapping[str, Any]) -> str:
    both = [name for name in before if name in after and _score(before[name]) != _score(after[name])]
    both.sort(key=lambda name: _score(after[name]) - _score(before[name]))
    lines = []
    for name in [*both[: MAX_CHANGED // 2], *both[MAX_CHANGED // 2 :][-(MAX_CHANGED // 2) :]]:
        record = records.get(name, {})
        shown = [*map(thumbnail, record.get("images", ())), *map(still, record.get("videos", ()))]
        images = "".join(f"<img alt='' src='{url}'>" for url in shown if url)
        asked = " ".join(part["text"] for part in _parts(record) if part.get("type") == "text")
        cells = f"<td>{escape(name)}</td><td class='text'>{images}<br>{escape(asked)}</td>"
        cells += f"<td class='text'>{escape(', '.join(before[name]['ground_truths']))}</td>"
        for one in (before[name], after[name]):
            text, good = (one["greedy"][0]["text"] if one["greedy"] else "no response"), _score(one) == 1
            cells += f"<td class='text {'right' if good else 'wrong'}'>{escape(text[:2000])}</td>"
        lines.append(f"<tr>{cells}</tr>")
    title = f"{len(both)} answers changed: {row['after']} against {row['before']}, {row['benchmark']}, {row['mode']}"
    head = "".join(f"<th>{escape(name)}</th>" for name in ("id", "question", "ground truth", row["before"], row["after"]))
    return f"<h2>{escape(title)}</h2><table><tr>{head}</tr>{''.join(lines)}</table>" if lines else ""


def _score(answer: Mapping[str, Any]) -> float:
    return float(answer["greedy"][0]["score"]) if answer["greedy"] else 0.0


def _parts(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages = record.get("messages") or [{}]
    content = messages[-1].get("content") or []
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def thumbnail(image: Any) -> str | None:
    """A small image as a data URL; None for one that does not decode any more."""
    from PIL import Image

    try:
        with Image.open(BytesIO(image) if isinstance(image, bytes) else image) as opened:
            return small_url(opened, SIDE)
    except (OSError, ValueError):
        return None


def still(video: Any) -> str | None:
    """A small frame from the middle of a video as a data URL; None for one that does not decode any more."""
    from mpo.data.video import frames_of, open_frames

    try:
        return small_url(open_frames(str(video), frames_of(str(video), min_frames=1, max_frames=1))[0], SIDE)
    except (OSError, ValueError):
        return None


def _points(rows: Sequence[Mapping[str, Any]], value: str, labels: Sequence[str], xlabel: str) -> Figure:
    figure = new_figure(8, 1 + 0.3 * len(rows))
    axes = figure.subplots()
    for place, row in enumerate(rows):
        low, high = row["interval"]
        axes.plot([100 * low, 100 * high], [place, place], color="#666")
        axes.plot([100 * row[value]], [place], "o", color="#1565c0")
    axes.set_yticks(range(len(rows)), map(drawn, labels))
    axes.set_xlabel(drawn(f"{xlabel}, 95 % interval"))
    axes.margins(y=0.2)
    axes.invert_yaxis()
    return figure


def scores_plot(results: Mapping[str, Any]) -> Figure | None:
    """Draw greedy scores with their intervals; None without scores."""
    rows = [row for row in results["results"] if row["figure"] == "greedy"]
    labels = [f"{row['model']}, {row['benchmark']}, {row['mode']}" for row in rows]
    return _points(rows, "score", labels, "score in percent") if rows else None


def changes_plot(results: Mapping[str, Any]) -> Figure | None:
    """Draw differences to the first model with their intervals; None for one model."""
    rows = results["comparisons"]
    if not rows:
        return None
    labels = [f"{row['after']}, {row['benchmark']}, {row['mode']}, {figure_name(row)}" for row in rows]
    figure = _points(rows, "difference", labels, f"difference to {rows[0]['before']} in points")
    figure.axes[0].axvline(0, color="#c62828", linewidth=1)
    return figure


def curves_plot(results: Mapping[str, Any]) -> Figure | None:
    """Draw scores by the number of samples; None without samples."""
    curves: dict[tuple[str, str], dict[str, list[Any]]] = {}
    for row in results["results"]:
        if row["figure"] != "greedy":
            which = curves.setdefault((row["benchmark"], row["mode"]), {})
            which.setdefault(f"{row['model']}: {row['figure']}", []).append(row)
    if not curves:
        return None
    figure = new_figure(5 * len(curves), 4)
    for axes, (name, lines) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for label, rows in lines.items():
            axes.plot([row["k"] for row in rows], [100 * row["score"] for row in rows], "o-", label=drawn(label))
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks := sorted({row["k"] for rows in lines.values() for row in rows}), [str(k) for k in ticks])
        axes.set(title=drawn(", ".join(name)), xlabel="samples", ylabel="score in percent")
        axes.legend(fontsize="small")
    return figure
