"""Report the results of benchmarks/gpu.py: speeds with the FLOPs counted by step.py, a profile by kernel, and tables."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
MFU, RATIO = 0.45, 0.1  # goals at 8B: smallest MFU of our sides; largest deviation of time ratios from FLOP ratios


# --- Speeds


def case_key(case: dict[str, Any]) -> str:
    """The name of a case."""
    return f"{case['shape']} {case['tune']} {case['pairs']}" + " checkpointing" * case["checkpointing"]


def counted() -> dict[str, dict[str, Any]]:
    """Read the FLOPs and tokens per pair of each side, by case."""
    newest = max(RESULTS.glob("step_counted_gpu_*.json"))
    return {case_key(found["case"]): found["per_pair"] for found in json.loads(newest.read_text())["counted"]}


def speeds(step: dict[str, Any], counts: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield a row for each side that a step timed.

    Useful tokens: the prompt once for all its completions, each completion once, as in packed rows; the same for all sides.
    MFU: FLOPs per second of the loss and its gradients as that side computes them (with the vision tower; shared computations of
    packed rows or a frozen tower once; without recomputation by checkpointing), over the rate of a matrix product in the same
    process.

    Args:
        step: the JSON of a step.
        counts: from `counted`.
    """
    for found in step.get("cases", []):
        case, sides = found["case"], found["sides"]
        executed, once = counts[case_key(case)], counts[case_key({**case, "checkpointing": False})]
        for side, timed in sides.items():
            row = {
                "case": case_key(case),
                "side": side,
                "peak_gib": timed.get("peak_gib"),
                "out_of_memory": "median_s" not in timed,
            }
            if "median_s" in timed:
                rate = case["pairs"] / timed["median_s"]
                row["pairs_per_s"], row["useful_tokens_per_s"] = rate, rate * once["cached"]["text_tokens"]
                if side in once:  # the FLOPs of cached features are counted in other settings
                    row["mfu"] = rate * once[side]["flops"] / (step["matrix_tflops"] * 1e12)
                if side != "trl" and "median_s" in sides.get("trl", {}):
                    row["time_ratio"] = sides["trl"]["median_s"] / timed["median_s"]
                    row["flop_ratio"] = executed["trl"]["flops"] / executed[side]["flops"]
            yield row


def goals(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """Check which goals are reached."""
    found = {}
    for row in (row for row in rows if row["case"].startswith("8B") and "time_ratio" in row):
        what, off = f"{row['case']}, {row['side']}: ", row["time_ratio"] / row["flop_ratio"] - 1
        found[f"{what}MFU {row['mfu']:.0%}, at least {MFU:.0%}"] = row["mfu"] >= MFU
        found[f"{what}time ratio {off:+.0%} off the FLOP ratio, at most {RATIO:.0%}"] = abs(off) <= RATIO
    return found


# --- Profile


def read_trace(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarise a Chrome trace of torch.profiler: the device and the host's waits. Without a GPU, operators count as kernels.

    Args:
        events: events of the trace; complete ones (``"ph": "X"``) have ``ts`` and ``dur`` in microseconds.
    """
    events = [event for event in events if event.get("ph") == "X"]
    kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    kernels = sorted(kernels or [event for event in events if event.get("cat") == "cpu_op"], key=lambda event: event["ts"])
    waits = [
        event
        for event in events
        if (event.get("cat") in ("cuda_runtime", "cuda_driver") and "Synchronize" in event["name"])
        or event["name"] in ("aten::item", "aten::nonzero", "cudaMemcpy", "cudaMalloc", "cudaFree")
    ]
    gaps: list[dict[str, Any]] = []
    end, before = (kernels[0]["ts"], "") if kernels else (0.0, "")
    first = end
    for kernel in kernels:
        if kernel["ts"] > end:
            gaps.append({"ms": (kernel["ts"] - end) / 1000, "after": before[:80], "before": kernel["name"][:80]})
        if kernel["ts"] + kernel["dur"] > end:
            end, before = kernel["ts"] + kernel["dur"], kernel["name"]
    return {
        "on": kernels[0]["cat"] if kernels else "nothing",
        "span_ms": (end - first) / 1000,
        "idle_ms": sum(gap["ms"] for gap in gaps),
        "kernels": totals(kernels)[:15],
        "kernels_launched": len(kernels),
        "gaps": len(gaps),
        "longest_gaps": sorted(gaps, key=lambda gap: -gap["ms"])[:10],
        "host_waits": totals(waits),
    }


def totals(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sum up time and number of events by name, the longest first."""
    by_name: dict[str, list[float]] = defaultdict(list)
    for event in events:
        by_name[event["name"]].append(event["dur"] / 1000)
    found = [{"name": name[:160], "ms": sum(times), "count": len(times)} for name, times in by_name.items()]
    return sorted(found, key=lambda total: -float(total["ms"]))


# --- Tables


def table(columns: list[str], rows: list[list[Any]]) -> list[str]:
    """Format a Markdown table."""
    return ["", *("| " + " | ".join(map(str, row)) + " |" for row in (columns, ["---"] * len(columns), *rows))]


def number(value: float | None, digits: int = 1) -> str:
    """Format a number for a table; empty without a value."""
    return "" if value is None else f"{value:,.{digits}f}"


def page(steps: dict[str, dict[str, Any]], rows: list[dict[str, Any]], reached: dict[str, bool]) -> str:
    """Format the tables of all steps so far.

    Args:
        steps: the JSON of steps, by name.
        rows: from `speeds`.
        reached: from `goals`.
    """
    states = [[name, step["state"], step.get("why", ""), number(step.get("seconds"))] for name, step in steps.items()]
    lines = table(["step", "state", "why", "seconds"], states)
    tests = steps.get("tests", {})
    outcomes = list(tests.get("tests", {}).values())
    lines += ["", "tests/gpu: " + ", ".join(f"{outcomes.count(one)} {one}" for one in ("passed", "failed", "skipped"))]
    lines += [f"* failed: {name}" for name in tests.get("failures", {})]
    timed = [
        [
            row["case"],
            row["side"],
            "out of memory" if row["out_of_memory"] else number(row["pairs_per_s"], 2),
            *(number(row.get(name), digits) for name, digits in (("useful_tokens_per_s", 0), ("mfu", 3))),
            *(number(row.get(name), 2) for name in ("time_ratio", "flop_ratio", "peak_gib")),
        ]
        for row in rows
    ]
    lines += table(
        ["case", "side", "pairs/s", "useful tokens/s", "MFU", "TRL's time / ours", "TRL's FLOPs / ours", "peak GiB"], timed
    )
    lines += ["", *(f"* {goal}: {'reached' if so else 'NOT REACHED'}" for goal, so in reached.items())]
    compared = []
    for case in steps.get("memory", {}).get("cases", []):
        guess = case.get("estimate_mb", {})
        found = case.get("skipped") or ("out of memory" if "out_of_memory" in case else number(case.get("measured_mb"), 0))
        compared.append([case["name"], number(guess.get("total"), 0), found, number(case.get("ratio"), 3)])
        compared[-1] += [number(guess.get("with margin"), 0), number(case.get("reserved_mb"), 0)]
    lines += table(["memory of", "estimate MB", "peak MB", "estimate / peak", "estimate with margin", "reserved"], compared)
    profile = steps.get("profile", {})
    if "kernels" in profile:
        lines += ["", f"A step of {profile['span_ms']:.1f} ms, {profile['kernels_launched']} kernels ({profile['on']}), "]
        lines[-1] += f"idle {profile['idle_ms']:.1f} ms in {profile['gaps']} gaps."
        for title, key in (("kernel", "kernels"), ("the host waits in", "host_waits")):
            lines += table([title, "ms", "times"], [[f"`{e['name'][:90]}`", number(e["ms"], 2), e["count"]] for e in profile[key]])
    return "\n".join(lines) + "\n"
