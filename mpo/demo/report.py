"""Stage 8: a self-contained HTML report."""

from __future__ import annotations

import json
import os
import platform
import random
from collections.abc import Iterable, Sequence
from html import escape
from importlib.metadata import version
from typing import Any

from mpo.demo.figures import accuracy_figure, margin_figure, png_url, rewards_figure, terms_figure
from mpo.demo.folder import DemoFolder
from mpo.demo.page import STYLE
from mpo.demo.settings import DemoSettings
from mpo.demo.summary import CONTROL, percent
from mpo.io import read_json_lines, write_text

SAMPLES = 12


def write_report(folder: DemoFolder, settings: DemoSettings) -> dict[str, Any]:
    """Write `report.html` from the results of the other stages.

    Returns:
        The size of the page in bytes.
    """
    stages = folder.read_progress()
    numbers = {name: stage["numbers"] for name, stage in stages.items() if stage["done"]}
    log = [entry for entry in json.loads(folder.mpo_log.read_text(encoding="utf-8"))["log_history"] if "loss" in entry]
    page = "\n".join(
        [
            "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>mpo demo</title>",
            f"<style>{STYLE}</style></head><body><main>",
            _opening(numbers, settings),
            _figures(numbers, log),
            _samples(folder, settings),
            _tables(numbers, stages, settings),
            "</main></body></html>",
        ]
    )
    write_text(folder.report, page)
    return {"bytes": len(page.encode())}


def _opening(numbers: dict[str, Any], settings: DemoSettings) -> str:
    before, after, paired = numbers["before"], numbers["after"], numbers["after"]["paired"]
    share_before, share_after = (n["correct"] / n["total"] for n in (before, after))
    return f"""
<h1>A small InternVL learns from its own responses</h1>
<p class='result'><span>{100 * share_before:.1f} %</span> &rarr; <strong>{100 * share_after:.1f} %</strong></p>
<p>Correct responses to {after["total"]:,} evaluation questions about unseen handwriting, before and after Mixed Preference
Optimization (MPO): {percent(before["correct"], before["total"])} and {percent(after["correct"], after["total"])} with 95 %
Wilson intervals, a change of {100 * (share_after - share_before):+.1f} points. {paired["gained"]} questions were gained and
{paired["lost"]} lost (exact McNemar test, p = {paired["p_value"]:.2g}). {escape(CONTROL)}</p>
<p>The model first saw {settings.worked_examples:,} worked examples made of {settings.worked_sources} handwritten digits. It then
sampled {settings.responses_per_question} responses to each of {settings.questions:,} further questions. Only the ground truth of
these questions was known; it separates correct from incorrect responses. MPO trained on
{numbers["pair"]["pairs_total"]:,} pairs of a correct and an incorrect one. No handwritten digit is in more than one of
the three sets.</p>"""


def _figures(numbers: dict[str, Any], log: Sequence[dict[str, float]]) -> str:
    figures = [
        _figure(
            "Accuracy on evaluation images",
            accuracy_figure(numbers["before"], numbers["after"]),
            "Greedy responses; error bars are 95 % intervals. 'Digits read' counts responses whose first line names the digits.",
        ),
        _figure("Terms of the loss", terms_figure(log), "Terms are unweighted; means over the pairs of a logging window."),
        _figure(
            "Rewards and delta",
            rewards_figure(log),
            "A reward is 0.1 times the log-ratio of policy and reference. Delta, which the quality loss subtracts, is the running "
            "mean of all rewards.",
        ),
        _figure(
            "Margin",
            margin_figure(log),
            "Reward of the chosen minus reward of the rejected completion, and the fraction of pairs in which it is positive.",
        ),
    ]
    return f"<section class='figures'>{''.join(figures)}</section>"


def _figure(title: str, url: str, caption: str) -> str:
    return (
        f"<figure><h2>{escape(title)}</h2><img src='{url}' alt='{escape(title)}'>"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _samples(folder: DemoFolder, settings: DemoSettings) -> str:
    pairs = read_json_lines(folder.pairs)
    random.Random(settings.seed).shuffle(pairs)
    one_each = list({pair["image"]: pair for pair in pairs}.values())[:SAMPLES]
    return f"""
<h2>{len(one_each)} of the pairs it was trained on</h2>
<p>Both completions are the model's own responses. Only the ground truth, in brackets, was known. The final answer of the
chosen response is correct, but its reading or reasoning may not be: only the final answer is checked.</p>
<section class='cards'>{"".join(_card(folder, pair) for pair in one_each)}</section>"""


def _card(folder: DemoFolder, pair: dict[str, Any]) -> str:
    negative = pair["rejected_meta"]["negative"].replace("_", " ")
    return f"""
<article><img src='{png_url((folder.data / pair["image"]).read_bytes())}' alt='handwritten digits'>
<p class='question'>{escape(pair["question"])} <span>({escape(pair["answer_gt"])})</span></p>
<h3 class='chosen'>chosen</h3><pre>{escape(pair["chosen"])}</pre>
<h3 class='rejected'>rejected: {escape(negative)}</h3><pre>{escape(pair["rejected"])}</pre></article>"""


def _tables(numbers: dict[str, Any], stages: dict[str, Any], settings: DemoSettings) -> str:
    before, after, pair = numbers["before"], numbers["after"], numbers["pair"]
    images, sources = numbers["data"]["images"], numbers["data"]["sources"]
    data = [(name.replace("_", "-"), f"{images[name]:,} images of {sources[name]:,} digits") for name in images]
    pairing = [
        ("responses sampled", f"{numbers['sample']['responses']:,}"),
        *((f"of these {name.replace('_', ' ')}", f"{count:,}") for name, count in pair["responses"].items()),
        ("questions with only correct responses", f"{pair['all_right']:,}"),
        ("questions with only incorrect responses", f"{pair['all_wrong']:,}"),
        ("questions with pairs", f"{pair['paired']:,}"),
        *((f"pairs, {name.replace('_', ' ')}", f"{count:,}") for name, count in pair["pairs"].items()),
    ]
    measured = [
        ("correct before", percent(before["correct"], before["total"])),
        ("correct after", percent(after["correct"], after["total"])),
        ("digits read before", percent(before["read"], before["total"])),
        ("digits read after", percent(after["read"], after["total"])),
        ("without a final answer, before / after", f"{before['unparsable']} / {after['unparsable']}"),
    ]
    model = [
        ("parameters", f"{numbers['warm_up']['parameters']:,}"),
        ("tokens in the vocabulary", f"{numbers['warm_up']['tokens']:,}"),
        ("warm-up steps", f"{numbers['warm_up']['steps']:,}"),
        ("MPO steps", f"{numbers['mpo']['steps']:,}"),
        ("seed", str(settings.seed)),
    ]
    times = [(name.replace("_", " "), f"{stage['seconds']:.0f} s") for name, stage in stages.items() if stage["done"]]
    times.append(("total", f"{sum(stage['seconds'] for stage in stages.values()) / 60:.1f} min"))
    software = [(name, version(name)) for name in ("mpo-trainer", "torch", "transformers", "trl")]
    software += [("python", platform.python_version()), ("machine", f"{platform.machine()}, {os.cpu_count()} CPU cores")]
    tables = (
        ("Data", data),
        ("Model", model),
        ("Pairs", pairing),
        ("Evaluation questions", measured),
        ("Time", times),
        ("Software", software),
    )
    return "<section class='tables'>" + "".join(_table(title, rows) for title, rows in tables) + "</section>"


def _table(title: str, rows: Iterable[tuple[str, str]]) -> str:
    lines = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<div><h2>{title}</h2><table>{lines}</table></div>"
