"""Evaluate models on benchmarks: one set of responses in a ledger, and every figure from it."""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

from mpo.data.eval_part import content_text
from mpo.evaluation.results import GREEDY, SAMPLED, cluster_of, judged, summarize, write_results
from mpo.evaluation.scorers import ImplicitReward, MeanLogProb, ProcessReward, Scorer
from mpo.evaluation.statistics import smallest_difference
from mpo.generation.generator import Generator, Response
from mpo.io import read_json_object
from mpo.pipelines.flow import BadStep
from mpo.pipelines.job import MARKS, OF_ANSWER, SETTINGS, Job
from mpo.pipelines.ledger import content_hash
from mpo.pipelines.mmpr.verify import unanswerable
from mpo.pipelines.sample import CHOICES, QUESTION, Sample
from mpo.pipelines.step import Record, Step, question_of, to_record
from mpo.schema import Question

REASON = (
    "\n\nThink about it step by step and write down your reasoning. Do not repeat yourself; where you are not sure, decide for the "
    "likeliest. End with one line of its own: "
)
DIRECT = {
    "choice": "Answer with the letter of the right choice alone.",
    "choices": "Answer with the letters of all right choices alone, with commas between them.",
    "box": "Answer with its box alone, as [x1, y1, x2, y2], in coordinates from 0 to 1000.",
    "yes_no": "Answer with yes or no alone.",
    "": "Answer with a word, a number or a short phrase alone.",
}
CHAIN = {
    "choice": r"Answer: \boxed{LETTER}, with the letter of the right choice.",
    "choices": r"Answer: \boxed{LETTERS}, with the letters of all right choices and commas between them.",
    "box": "Answer: [x1, y1, x2, y2], the box in coordinates from 0 to 1000.",
    "yes_no": r"Answer: \boxed{yes} or Answer: \boxed{no}.",
    "": r"Answer: \boxed{ANSWER}, with the final answer alone.",
}
MODES = {"direct": DIRECT, "cot": {kind: REASON + end for kind, end in CHAIN.items()}, "plain": {"": ""}}
"""How questions are asked: for the answer alone, or for a chain of thought that ends with it (the structure of InternVL 2.5's
evaluation, arXiv 2412.05271, section 4; in other words), or as they are, for a model that was trained on them in one form."""
NOT_ASKED = {*OF_ANSWER} - {"kind"}
"""What no prompt says of the answer."""
JOBS = "jobs"


class Respond(Sample):
    """Ask a question in one of the `MODES`, and keep the texts of the responses in a `field` of its record."""

    def __init__(self, generator: Generator, *, mode: str, field: str, **sampling: Any) -> None:
        super().__init__(generator, **sampling)
        if mode not in MODES:
            raise ValueError(f"Expected mode to be one of {', '.join(MODES)}; got {mode!r}.")
        self.mode, self.field, self.verb = mode, field, field  # type: ignore[misc]

    def requests(self, record: Record) -> list[Any]:
        """One request, whose end says how to answer a question of its kind."""
        choices, ends = record.get("choices") or (), MODES[self.mode]
        kind = record.get("kind") or ""
        kind = "choice" if choices and kind != "choices" else kind
        said = "".join(content_text(turn["content"]) for turn in (record.get("messages") or ())[-1:])
        labelled = (rf"\b{chr(65 + place)}[).:：、．]+ *{re.escape(one)}(?!\w)" for place, one in enumerate(choices))
        listed = f"\n{CHOICES}" if choices and not all(re.search(label, said) for label in labelled) else ""
        return [self.request(record, f"{QUESTION}{listed}\n{ends.get(kind, ends[''])}".rstrip("\n"))]

    def finish(self, record: Record, responses: Sequence[Sequence[Response]]) -> Record:
        """The question with the texts of its responses."""
        return {**record, self.field: [one.text for one in responses[0]]}


class Rank(Step):
    """Give each sampled response of a question a number from a scorer (`mpo.evaluation.scorers`), for best of N."""

    verb = "rank"

    def __init__(self, name: str, scorer: Scorer) -> None:
        self.name, self._scorer = name, scorer
        self.scorer = getattr(scorer, "identity", lambda: repr(name))()

    def finish(self, record: Record, responses: Sequence[Sequence[Response]]) -> Record:
        """The ranks of the responses, by the record's id."""
        try:
            given = self._scorer(question_of(record), record[SAMPLED])
            ranks = [] if isinstance(given, Mapping | Set) else [float(one) for one in given]
        except (ValueError, ConnectionError):  # a question that cannot be scored is dropped
            raise
        except Exception as error:
            raise BadStep(f"Scorer {self.name} failed for question {record['id']!r}: {error!r}. Fix it, and run again.") from error
        if len(ranks) != len(record[SAMPLED]) or not all(map(math.isfinite, ranks)):
            count, said = len(record[SAMPLED]), f"question {record['id']!r}; it gave {given!r:.200}"
            raise BadStep(f"Scorer {self.name} must give {count} finite numbers in order, one per response, for {said}.")
        return {"id": record["id"], "key": record.get("key"), "ranks": ranks}


def evaluate(
    models: Mapping[str, Callable[[], Generator]],
    benchmarks: Mapping[str, Iterable[Question]],
    folder: str | Path,
    *,
    modes: Sequence[str] = ("direct",),
    k: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 1024,
    seed: int = 0,
    scorers: Mapping[str, Callable[[Generator], Scorer]] | None = None,
    workers: int = 1,
    retry_dropped: bool = False,
    progress: bool = True,
    contamination: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Ask models the questions of benchmarks, and compare them with the first model.

    Args:
        models: what opens each model, by its name. Each is opened once and let go before the next.
        benchmarks: the questions of each, all with ground truths, in something that can be iterated over again.
        folder: where results, ledgers and the page go; the same call goes on after an interruption.
        modes: ``direct``, ``cot`` (chain of thought) or both.
        k: number of samples beside the greedy response; 1 for none.
        temperature, top_p, seed: of the samples.
        max_new_tokens: the longest response, in tokens.
        scorers: for best of N: what makes the scorer of each name (`mpo.evaluation.scorers`) for a measured model.
        workers: number of processes that ask a server.
        retry_dropped: ask again what got no response.
        progress: show how far it is.
        contamination: what `mpo.curation.dedupe.find_contamination` says of each benchmark, to keep with the results.

    Returns:
        what `results.json` holds: ``results``, a row for each model, benchmark, mode, figure and k; ``comparisons``;
        ``contamination``, where it is given.

    Raises:
        ValueError: for questions without a ground truth, naming the first, unknown modes, and what a `Job` refuses.
    """
    _check(models, benchmarks, modes, k)
    if scorers and k == 1:
        raise ValueError("Best of N needs several samples per question. Give k (--n), such as 8.")
    folder = Path(folder).absolute()
    data = {name: checked_questions(name, questions) for name, questions in benchmarks.items()}
    if progress:
        _say_power(data)
    names = [(model, benchmark, mode) for model in models for benchmark in data for mode in modes]
    folders = {one: folder / JOBS / "/".join(slug(part) for part in one) for one in names}
    if len({*folders.values()}) < len(folders):
        raise ValueError(f"Two models, or two benchmarks, have the same name in files: {', '.join({*models, *data})}. Rename one.")
    common = {"max_new_tokens": max_new_tokens}
    sampling = {"n": k, "temperature": temperature, "top_p": top_p, "seed": seed, **common} if k > 1 else None
    runs: dict[str, Any] = {"workers": workers, "retry_dropped": retry_dropped, "progress": progress}
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for model, open_model in models.items():
        generator = open_model()
        # Refused before anything is paid. None: it says nothing about this model.
        rankings = {name: one for name, of in (scorers or {}).items() for one in [of(generator)] if one is not None}
        for benchmark, records in data.items():
            for mode in modes:
                if progress:
                    number = len(records) * (1 + (k if sampling else 0))
                    print(f"{model}, {benchmark}, {mode}: {number:,} responses", file=sys.stderr)
                place = folders[model, benchmark, mode]
                steps = [Respond(generator, mode=mode, field=GREEDY, temperature=0.0, **common)]
                steps += [Respond(generator, mode=mode, field=SAMPLED, **sampling)] if sampling else []
                asked = [{name: value for name, value in record.items() if name not in NOT_ASKED} for record in records]
                Job(steps, asked, place).run(**runs)
                answered = read(place / "output.jsonl")
                given = (rankings, records, answered, place, (generator, mode))
                ranks = _ranks(*given, retry_dropped=retry_dropped, progress=progress)
                found[model, benchmark, mode] = [judged(record, answered.get(record["id"]), ranks) for record in records]
        del generator, rankings, steps, given  # the next one is opened without it
    results = summarize(found, k) | ({"contamination": dict(contamination)} if contamination else {})
    by_id = {name: {record["id"]: record for record in records} for name, records in data.items()}
    return write_results(folder, results, found, by_id)


def _say_power(data: Mapping[str, Sequence[Record]]) -> None:
    for name, records in data.items():
        images = len({cluster_of(record) for record in records})
        said = f"{name}: {len(records):,} questions, {images:,} of them independent: two models must differ by"
        least = f"{100 * smallest_difference(images):.1f} points"
        print(
            f"{said} {least} to be told apart in 4 of 5 evaluations (if a fifth of the verdicts change, or so many).",
            file=sys.stderr,
        )


def _check(models: Mapping[str, Any], benchmarks: Mapping[str, Any], modes: Sequence[str], k: Any) -> None:
    if not (models and benchmarks and modes) or isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(
            f"Expected a model, a benchmark and a mode, and k of 1 or more; got {[*models]}, {[*benchmarks]}, {modes}, {k=}."
        )
    if wrong := [mode for mode in modes if mode not in MODES] or [mode for mode in {*modes} if [*modes].count(mode) > 1]:
        raise ValueError(f"Expected modes to be different ones of {', '.join(MODES)}; got {wrong[0]!r}.")


def _ranks(
    rankings: Mapping[str, Scorer], records: Sequence[Record], answered: Any, place: Path, asked: tuple[Generator, str], **runs: Any
) -> dict[str, dict[str, list[float]]]:
    """The ranks of the samples of each question, by scorer and id. Those that no job of this scorer has ranked get one.

    Models are asked about the prompts that the samples answer, and process reward models about the questions with their choices.
    """
    ranks: dict[str, dict[str, list[float]]] = {}
    marks = np.fromfile(place / MARKS, np.uint64)[::2].tolist()  # of all but the id and the answers, and of images by contents
    for name, scorer in rankings.items():
        keys, whole = dict[str, str](), list[Record]()
        of_model = isinstance(scorer, MeanLogProb | ImplicitReward | ProcessReward)
        asker = Respond(asked[0], mode="plain" if isinstance(scorer, ProcessReward) else asked[1], field=SAMPLED)
        for mark, record in zip(marks, records, strict=True):
            if record["id"] in answered:
                prompt = [*asker.requests(record)[0].messages] if of_model else record["messages"]
                one = {**record, "messages": prompt, SAMPLED: answered[record["id"]][SAMPLED]}
                about = prompt if of_model else record["id"]
                keys[record["id"]] = _short([mark, about, one[SAMPLED], [record.get(field) for field in OF_ANSWER]])
                whole.append(one)
        try:
            step, away = Rank(name, scorer), None
        except ConnectionError as error:  # of a server that is not needed where it has ranked all
            step, away = None, error
        known = _known(place, slug(name), step and step.scorer, retry_dropped=runs["retry_dropped"])
        if left := [{**one, "key": keys[one["id"]]} for one in whole if keys[one["id"]] not in known]:
            if step is None:
                raise away or ValueError(name)
            folder = place / f"rank-{slug(name)}-{_short([one['key'] for one in left])}-{_short(step.scorer)}"
            Job([step], left, folder).run(**runs)
            known |= {one["key"]: one["ranks"] for one in read(folder / "output.jsonl").values()}
        ranks[name] = {key: known[of] for key, of in keys.items() if known.get(of)}
    return ranks


def _known(place: Path, name: str, scorer: Any, *, retry_dropped: bool) -> dict[str, list[float]]:
    """The ranks that finished jobs of a scorer (None: the only one of this name) have given, by the key of what they ranked.

    What they dropped has none.
    """
    by_scorer: dict[str, list[Path]] = {}
    for one in sorted(place.glob(f"rank-{name}-*/report.json")):
        by_scorer.setdefault(_short(read_json_object(one.parent / SETTINGS)["steps"]["rank"]["scorer"]), []).append(one.parent)
    chosen = next(iter(by_scorer)) if scorer is None and len(by_scorer) == 1 else _short(scorer)
    found: dict[Any, list[float]] = {}
    for folder in by_scorer.get(chosen, ()):
        lost = [] if retry_dropped else [one["record"] for one in read(folder / "dropped.jsonl").values()]
        for ranked in (*lost, *read(folder / "output.jsonl").values()):
            found[ranked.get("key")] = ranked.get("ranks") or found.get(ranked.get("key"), [])
    return found


def _short(value: Any) -> str:
    return content_hash(json.dumps(value, sort_keys=True).encode())[:12]


def slug(name: str) -> str:
    """A name as the name of a folder."""
    return re.sub(r"[^\w.@-]+", "-", name).strip("-.") or "-"


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The records of a file that a job wrote, by id."""
    with open(path) as file:
        return {record["id"]: record for record in map(json.loads, file)}


def checked_questions(name: str, questions: Iterable[Question]) -> list[dict[str, Any]]:
    """The questions as records. Raises ValueError for none, and for those that cannot be judged, naming the first."""
    records = [to_record(question, place) for place, question in enumerate(questions)]
    if not records:
        raise ValueError(f"Benchmark {name} has no questions.")
    twice = [one for one, count in Counter(record["id"] for record in records).items() if count > 1]
    if twice:
        raise ValueError(
            f"{len(twice)} ids of {name} are those of several questions; the first is {twice[0]!r}. Give each its own."
        )
    without = [record["id"] for record in records if not any(truth.strip() for truth in record.get("ground_truths") or ())]
    if without:
        raise ValueError(
            f"{len(without)} of {len(records)} questions of {name} have no ground truth; the first is {without[0]!r}. Give each an "
            "'answer', or another split: those of some test sets are not published."
        )
    bad = [(record["id"], reason) for record in records if (reason := unanswerable(question_of(record)))]
    if bad:
        (first, reason), *_ = bad
        raise ValueError(f"{len(bad)} of {len(records)} questions of {name} cannot be judged; the first is {first!r}: {reason}")
    return records
