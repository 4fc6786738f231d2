"""Which jobs are run: the exploration, one thing at a time, and the registered run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preference.jobs import METHODS, Job

EXPLORING = 100
"""Seed of the exploration; a second one repeats what decides."""


@dataclass(frozen=True)
class Planned:
    """A job with its name, task and seed."""

    name: str
    task: str
    seed: int
    job: Job


def _planned(group: str, task: str, label: str, seed: int = EXPLORING, **settings: Any) -> Planned:
    return Planned(f"{group}_{task}_{label}" + ("" if seed == EXPLORING else f"_{seed}"), task, seed, Job(**settings))


MPO: tuple[float, float, float] = (0.8, 0.2, 1.0)
GENTLE: tuple[float, float, float] = (0.08, 0.02, 1.0)
SFT: tuple[float, float, float] = (0.0, 0.0, 1.0)


def _exploration() -> Iterator[Planned]:
    # The rate, with the optimum inside, in the task whose responses are all of one kind.
    for method, rates in (
        ("sft", (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)),
        ("mpo", (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)),
        ("dpo", (1e-5, 1e-4)),
    ):
        for rate in rates:
            yield _planned("rate", "reason", f"{method}_{rate:.0e}", rate=rate, **METHODS[method])
    # The same where the model mostly answers at once, and seldom reasons.
    for method, rates in (("sft", (1e-4, 3e-4, 1e-3)), ("mpo", (3e-5, 1e-4, 3e-4, 1e-3)), ("dpo", (3e-5, 1e-4))):
        for rate in rates:
            yield _planned("rate", "strategy", f"{method}_{rate:.0e}", rate=rate, **METHODS[method])
    # SFT is averaged over each completion, so that tokens of short ones weigh more: less of it, or an average over tokens.
    for label, settings in (("mpo_wg_0.1", {"weights": (0.8, 0.2, 0.1)}), ("mpo_token", {"average": "token"})):
        for rate in (1e-4, 3e-4):
            yield _planned("average", "strategy", f"{label}_{rate:.0e}", rate=rate, **settings)
    yield _planned("average", "strategy", "sft_token_3e-04", rate=3e-4, weights=SFT, average="token")
    # Weights, and beta with the weights that keep the first gradient: does a margin that saturates help?
    for weights in ((0.2, 0.05, 1.0), GENTLE):
        yield _planned("weights", "reason", f"{weights[0]:g}", rate=1e-4, weights=weights)
    for beta in (1.0, 3.0):
        yield _planned("matched", "reason", f"beta_{beta:g}", rate=1e-4, beta=beta, weights=(0.08 / beta, 0.02 / beta, 1.0))
    for beta in (0.02, 0.5, 2.0):
        yield _planned("beta", "reason", f"{beta:g}", rate=1e-4, beta=beta)
    for beta, rate in ((3.0, 3e-4), (10.0, 1e-4), (10.0, 3e-4)):
        yield _planned(
            "matched", "reason", f"beta_{beta:g}_{rate:.0e}", rate=rate, beta=beta, weights=(0.08 / beta, 0.02 / beta, 1.0)
        )
    for beta in (1.0, 3.0):
        yield _planned("strong", "reason", f"beta_{beta:g}", rate=1e-4, beta=beta, weights=(0.8 / beta, 0.2 / beta, 1.0))
        yield _planned("strong", "strategy", f"beta_{beta:g}", rate=1e-4, beta=beta, weights=(0.8 / beta, 0.2 / beta, 0.1))
    # Pairs: batch, number, accuracy of their questions, share of tokens that they share.
    for batch in (128,):
        for method in ("sft", "mpo"):
            yield _planned("batch", "reason", f"{method}_{batch}", rate=3e-4, batch=batch, steps=50, **METHODS[method])
    for batch in (64, 256, 32):  # as many pairs at each, from a start that was warmed up again
        for method in ("sft", "dpo_sft", "mpo"):
            yield _planned("batches", "reason", f"{method}_{batch}", rate=3e-4, batch=batch, steps=3200 // batch, **METHODS[method])
    for method in ("sft", "mpo"):
        yield _planned("pairs", "reason", f"{method}_16_a_question", rate=1e-4, max_pairs=16, **METHODS[method])
        yield _planned("pairs", "reason", f"{method}_300_questions", rate=1e-4, questions=300, **METHODS[method])
        yield _planned("steps", "reason", f"{method}_400", rate=1e-4, steps=400, **METHODS[method])
    for method in ("sft", "mpo"):
        yield _planned("accuracy", "reason", f"{method}_0.2_0.8", rate=1e-4, accuracy=(0.2, 0.8), **METHODS[method])
        for choose in ("near", "far"):
            yield _planned("choose", "reason", f"{method}_{choose}", rate=1e-4, max_pairs=2, choose=choose, **METHODS[method])
        yield _planned("rounds", "reason", f"{method}_2", rate=1e-4, rounds=2, **METHODS[method])
    for method, rates in (("sft", (1e-4, 3e-4)), ("mpo", (1e-4,)), ("dpo", (3e-5,))):
        for rate in rates:
            yield _planned("rate", "cool", f"{method}_{rate:.0e}", rate=rate, **METHODS[method])
    # A start that was warmed up less, and completions with 40 meaningless words before the final answer.
    for method in ("sft", "mpo"):
        yield _planned("warm_up", "reason", f"{method}_4_epochs", rate=1e-4, epochs=4.0, **METHODS[method])
    for method in ("sft", "mpo"):
        yield _planned("filler", "filler", method, rate=1e-4, **METHODS[method])


EXPLORATION = list(_exploration())


# --- The registered run: ../methods2.md

REGISTERED = {**METHODS, "mpo_wg_0.1": {"weights": (0.8, 0.2, 0.1)}, "mpo_beta_1": {"weights": (0.08, 0.02, 1.0), "beta": 1.0}}
TASKS_REGISTERED = ("strategy", "reason")
GRID = (3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
FIRST = (3e-5, 1e-4, 3e-4)
CHOOSING, SEEDS = 0, (1, 2, 3, 4, 5)


def registered_job(task: str, method: str, rate: float, seed: int) -> Planned:
    """A job of the registered run."""
    return Planned(f"{task}_{method}_{rate:.0e}_{seed}", task, seed, Job(rate=rate, **REGISTERED[method]))


def validation(results: Path, planned: Planned) -> float | None:
    """Right responses to the validation questions, the first half; None for a job that is not done."""
    path = results / f"{planned.name}.json"
    if not path.is_file():
        return None
    correct = json.loads(path.read_text())["correct"]
    return float(correct[: len(correct) // 2].count("1"))


def tried_rates(results: Path, task: str, method: str) -> tuple[list[Planned], float | None]:
    """The jobs of seed 0 that choose a rate, as far as they are known, and the rate once it is chosen.

    Three rates are tried first; while the best is the lowest or the highest of those tried, the next one of the grid is tried too.
    In case of ties the lowest is taken.
    """
    low, high = GRID.index(FIRST[0]), GRID.index(FIRST[-1])
    while True:
        jobs = [registered_job(task, method, rate, CHOOSING) for rate in GRID[low : high + 1]]
        found = [validation(results, job) for job in jobs]
        known = [value for value in found if value is not None]
        if len(known) < len(jobs):
            return jobs, None
        best = low + known.index(max(known))
        if best == low and low > 0:
            low -= 1
        elif best == high and high < len(GRID) - 1:
            high += 1
        else:
            return jobs, GRID[best]


def registered(results: Path) -> list[Planned]:
    """The registered jobs as far as they are known: rates first, then the seeds with the rates chosen.

    Args:
        results: folder of the JSON files of finished jobs.
    """
    jobs = []
    for task in TASKS_REGISTERED:
        tried = {method: tried_rates(results, task, method) for method in REGISTERED}
        jobs += [job for some, _ in tried.values() for job in some]
        if all(rate is not None for _, rate in tried.values()):
            rates = {method: rate for method, (_, rate) in tried.items() if rate is not None}
            jobs += [registered_job(task, method, rate, seed) for seed in SEEDS for method, rate in rates.items()]
    return jobs
