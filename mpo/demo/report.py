"""Stage 10: the result as text, and as a self-contained HTML report."""

import os
import platform
import random
from collections.abc import Mapping, Sequence
from html import escape
from importlib.metadata import version
from typing import Any

from mpo.demo.figures import AFTER, GREY, INK, THIRD, accuracy_figure, curves_figure, png_url
from mpo.demo.folder import DemoFolder, DemoSettings
from mpo.evaluation.statistics import wilson_interval
from mpo.io import read_json_lines, write_text
from mpo.pipelines.report import table

SAMPLES = 12


def percent(successes: int, trials: int) -> str:
    """Format a proportion in percent with its 95 % interval.

    >>> percent(50, 100)
    '50.0 % (40.4 to 59.6)'
    """
    low, high = wilson_interval(successes, trials)
    return f"{successes / trials:.1%} ({low * 100:.1f} to {high * 100:.1f})".replace("%", " %")


def verdict(numbers: Mapping[str, Any]) -> str:
    """Say what the run shows about MPO and its control.

    >>> verdict({"after": {"correct": 496, "total": 1000}, "control": {"correct": 518, "paired": {"p_value": 0.2}}})
    'MPO less the control: -2.2 points (p = 0.2): this run does not decide between them.'
    """
    after, control = numbers["after"], numbers["control"]
    points, p_value = 100 * (after["correct"] - control["correct"]) / after["total"], control["paired"]["p_value"]
    result = "this run does not decide between them"
    if p_value < 0.05:
        result = f"MPO is {'better' if points > 0 else 'worse'} than SFT on the chosen completions in this run"
    return f"MPO less the control: {points:+.1f} points (p = {p_value:.2g}): {result}."


def summarize(progress: dict[str, Any]) -> str:
    """Summarize the accuracy of start, control and MPO in the result of `run_demo`, with intervals and p-values."""
    numbers = {name: stage["numbers"] for name, stage in progress.items()}
    shown = {"warmed-up model": numbers["before"], "SFT (control)": numbers["control"], "MPO": numbers["after"]}
    seconds, paired = sum(stage["seconds"] for stage in progress.values()), numbers["after"]["paired"]
    return "\n".join(
        [
            f"Evaluation accuracy, {numbers['after']['total']} questions, 95 % intervals (total {seconds / 60:.1f} min):",
            *(f"  {name:17}{percent(found['correct'], found['total'])}" for name, found in shown.items()),
            f"MPO less the warmed-up model: {paired['gained']} questions gained, {paired['lost']} lost, "
            f"p = {paired['p_value']:.2g} (exact McNemar test)",
            verdict(numbers),
            "The control is SFT on the chosen completions: same start, pairs, steps and rate. See docs/when-mpo-helps.md.",
        ]
    )


def write_report(folder: DemoFolder, settings: DemoSettings) -> dict[str, Any]:
    """Write `report.html` from the results of the other stages."""
    stages = folder.read_progress()
    numbers = {name: stage["numbers"] for name, stage in stages.items() if stage["done"]}
    log = [entry for entry in folder.log()["log_history"] if "loss" in entry]
    page = f"""<!doctype html><html lang='en'><head><meta charset='utf-8'><title>mpo demo</title>
<style>{STYLE}</style></head><body><main>
{_opening(numbers, settings)}
{_figures(numbers, log)}
{_samples(folder, settings)}
{_tables(numbers, stages, settings)}
</main></body></html>"""
    write_text(folder.report, page)
    return {"bytes": len(page.encode())}


def _opening(numbers: dict[str, Any], settings: DemoSettings) -> str:
    before, after, control = numbers["before"], numbers["after"], numbers["control"]
    share_before, share_control, share_after = (n["correct"] / n["total"] for n in (before, control, after))
    paired = after["paired"]
    return f"""
<h1>A small InternVL learns from its own responses</h1>
<p class='result'><span>{100 * share_before:.1f} %</span> &rarr; <strong>{100 * share_after:.1f} %</strong>
<small>control: {100 * share_control:.1f} %</small></p>
<p>Correct responses to {after["total"]:,} evaluation questions about unseen handwriting, before and after Mixed Preference
Optimization (MPO): {percent(before["correct"], before["total"])} and {percent(after["correct"], after["total"])} with 95 %
Wilson intervals, a change of {100 * (share_after - share_before):+.1f} points. {paired["gained"]} questions were gained and
{paired["lost"]} lost (exact McNemar test, p = {paired["p_value"]:.2g}).</p>
<p>The control is plain fine-tuning (SFT) on the chosen completions alone, from the same model, with the same pairs, steps and rate:
{percent(control["correct"], control["total"])}. {escape(verdict(numbers))} MPO's preference terms have a quarter
of their published weight (<code>loss=mpo_light</code>): over three seeds that was as good as SFT; the published weights were not.
When preference terms help, and when they do not: docs/when-mpo-helps.md.</p>
<p>The model first saw {settings.worked_examples:,} worked examples made of {settings.worked_sources} handwritten digits. It then
sampled {settings.responses_per_question} responses to each of {settings.questions:,} further questions. Only the ground truth of
these questions was known; it separates correct from incorrect responses. MPO trained on
{numbers["pair"]["pairs_total"]:,} pairs of a correct and an incorrect one. No handwritten digit is in more than one of
the three sets.</p>"""


CURVES = {
    "Terms of the loss": (
        "Terms are unweighted; means over the pairs of a logging window.",
        {
            "loss": ("loss = 0.2 preference + 0.05 quality + generation", INK),
            "loss/sigmoid": ("preference (DPO)", AFTER),
            "loss/bco_pair": ("quality (BCO)", THIRD),
            "loss/sft": ("generation (SFT)", GREY),
        },
        "nats",
    ),
    "Rewards and delta": (
        "A reward is 0.1 times the log-ratio of policy and reference. Delta, which the quality loss subtracts, is the running mean "
        "of all rewards.",
        {
            "rewards/chosen": ("reward of chosen", AFTER),
            "rewards/rejected": ("reward of rejected", THIRD),
            "reward_shift": ("reward shift delta (running mean)", INK),
        },
        "reward",
    ),
    "Margin": (
        "Reward of the chosen minus reward of the rejected completion, and the fraction of pairs in which it is positive.",
        {"rewards/margins": ("margin (left)", AFTER), "rewards/accuracies": ("chosen above rejected (right)", GREY)},
        "margin",
    ),
}
"""Title of each plot of training, its caption, its curves and the unit of its axis."""


def _figures(numbers: dict[str, Any], log: Sequence[dict[str, float]]) -> str:
    models = {label: numbers[stage] for label, stage in (("start", "before"), ("SFT (control)", "control"), ("MPO", "after"))}
    caption = "Greedy responses; error bars are 95 % intervals. 'Digits read' counts responses whose first line names the digits."
    figures = {"Accuracy on evaluation images": (accuracy_figure(models), caption)}
    figures |= {title: (curves_figure(log, curves, unit), said) for title, (said, curves, unit) in CURVES.items()}
    shown = (
        f"<figure><h2>{title}</h2><img src='{url}' alt='{title}'><figcaption>{escape(caption)}</figcaption></figure>"
        for title, (url, caption) in figures.items()
    )
    return f"<section class='figures'>{''.join(shown)}</section>"


def _samples(folder: DemoFolder, settings: DemoSettings) -> str:
    pairs = read_json_lines(folder.pairs)
    random.Random(settings.seed).shuffle(pairs)
    one_each = list({pair["image"]: pair for pair in pairs}.values())[:SAMPLES]
    cards = (
        f"""
<article><img src='{png_url((folder.root / pair["image"]).read_bytes())}' alt='handwritten digits'>
<p class='question'>{escape(pair["question"])} <span>({escape(pair["answer_gt"])})</span></p>
<h3 class='chosen'>chosen</h3><pre>{escape(pair["chosen"])}</pre>
<h3 class='rejected'>rejected: {escape(pair["rejected_meta"]["negative"].replace("_", " "))}</h3>
<pre>{escape(pair["rejected"])}</pre></article>"""
        for pair in one_each
    )
    return f"""
<h2>{len(one_each)} of the pairs it was trained on</h2>
<p>Both completions are the model's own responses. Only the ground truth, in brackets, was known. The final answer of the
chosen response is correct, but its reading or reasoning may not be: only the final answer is checked.</p>
<section class='cards'>{"".join(cards)}</section>"""


def _tables(numbers: dict[str, Any], stages: dict[str, Any], settings: DemoSettings) -> str:
    before, control, after, pair = (numbers[name] for name in ("before", "control", "after", "pair"))
    images, sources = numbers["data"]["images"], numbers["data"]["sources"]
    tables: dict[str, dict[str, Any]] = {
        "Data": {name.replace("_", "-"): f"{images[name]:,} images of {sources[name]:,} digits" for name in images},
        "Model": {
            "parameters": numbers["warm_up"]["parameters"],
            "tokens in the vocabulary": numbers["warm_up"]["tokens"],
            "warm-up steps": numbers["warm_up"]["steps"],
            "MPO steps": numbers["mpo"]["steps"],
            "seed": str(settings.seed),
        },
        "Pairs": {
            "responses sampled": numbers["sample"]["responses"],
            **{f"of these {name.replace('_', ' ')}": count for name, count in pair["responses"].items()},
            "questions with only correct responses": pair["all_right"],
            "questions with only incorrect responses": pair["all_wrong"],
            "questions with pairs": pair["paired"],
            **{f"pairs, {name.replace('_', ' ')}": count for name, count in pair["pairs"].items()},
        },
        "Evaluation questions": {
            f"{what} {when}": percent(one[key], one["total"])
            for what, key in (("correct", "correct"), ("digits read", "read"), ("without a final answer", "unparsable"))
            for when, one in (("before", before), ("after MPO", after), ("after SFT", control))
        },
        "Time": {
            **{name.replace("_", " "): f"{stage['seconds']:.0f} s" for name, stage in stages.items() if stage["done"]},
            "total": f"{sum(stage['seconds'] for stage in stages.values()) / 60:.1f} min",
        },
        "Software": {
            **{name: version(name) for name in ("mpo-trainer", "torch", "transformers", "trl")},
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        },
    }

    shown = (f"<div><h2>{title}</h2>{table(rows)}</div>" for title, rows in tables.items())
    return f"<section class='tables'>{''.join(shown)}</section>"


STYLE = """
:root { color-scheme: light; --ink: #1f2933; --soft: #52606d; --line: #dde3ea; --good: #1f7a4d; --bad: #b3261e; }
body { margin: 0; background: #f6f8fa; color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 30px; margin: 0 0 8px; }
h2 { font-size: 18px; margin: 0 0 8px; }
main > p { max-width: 78ch; }
.result { font-size: 46px; line-height: 1.2; margin: 12px 0; color: var(--soft); }
.result strong { color: #2563a8; }
.result small { font-size: 20px; margin-left: 16px; }
.figures, .cards, .tables { display: grid; gap: 16px; margin: 24px 0 36px; }
.figures { grid-template-columns: repeat(2, minmax(0, 1fr)); }
.cards { grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); }
.tables { grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); align-items: start; }
figure, article, .tables > div { margin: 0; padding: 16px; background: #fff; border: 1px solid var(--line); border-radius: 8px; }
figure img { width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: 14px; }
article img { width: 192px; max-width: 100%; border: 1px solid var(--line); }
.question { margin: 8px 0; font-weight: 600; }
.question span { color: var(--soft); font-weight: 400; }
h3 { margin: 8px 0 2px; font-size: 13px; }
.chosen { color: var(--good); }
.rejected { color: var(--bad); }
pre { margin: 0; font: 13px/1.45 ui-monospace, monospace; white-space: pre-wrap; }
table { width: 100%; border-collapse: collapse; font-size: 14px; }
th, td { padding: 3px 0; text-align: left; font-weight: 400; border-top: 1px solid var(--line); }
td { text-align: right; font-variant-numeric: tabular-nums; }
@media (max-width: 760px) { .figures { grid-template-columns: 1fr; } }
"""
