"""Measure a model: responses in both forms, and the reward margin on evaluation pairs."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comparison.settings import Settings
from comparison.task import PROMPTS, questions
from mpo import MPOConfig, MPOTrainer
from mpo.data import load_preferences
from mpo.demo.stages import reads_digits
from mpo.generation.local import LocalGenerator
from mpo.io import read_json_lines
from mpo.models.loading import LoadedModel, load_model
from mpo.schema import Question
from mpo.verification import verify

RESPONSES_PER_BATCH = 250


def generator_of(loaded: LoadedModel) -> LocalGenerator:
    """A generator for a loaded model."""
    return LocalGenerator(loaded.model, loaded.processor, responses_per_batch=RESPONSES_PER_BATCH)


def measure(model: Path, folder: Path, settings: Settings) -> dict[str, dict[str, Any]]:
    """Generate greedy responses to the evaluation questions, in each form of `PROMPTS`.

    Args:
        model: folder of the model.
        folder: folder of the seed.
        settings: sizes of the comparison.

    Returns:
        For each form: `correct` (0 or 1 per question), `unparsable` (number of responses without a final answer; they count as
        wrong), `tokens` (their mean length), `read` (number of responses whose first line names the digits).
    """
    lines = read_json_lines(folder / "eval.jsonl")
    loaded = load_model(str(model), dtype="float32")
    measured = {}
    for form in PROMPTS:
        asked = questions(lines, form, folder)
        sampled = generator_of(loaded).generate(asked, temperature=0.0, max_new_tokens=settings.max_new_tokens)
        texts = [responses[0].text for responses in sampled]
        found = [
            verify(text, Question(request.messages, ground_truths=[line["ground_truth"]]))
            for line, request, text in zip(lines, asked, texts, strict=True)
        ]
        measured[form] = {
            "correct": [int(verdict.correct) for verdict in found],
            "unparsable": sum(verdict.method == "none" for verdict in found),
            "tokens": _mean_tokens(loaded, texts),
            "read": sum(reads_digits(text, line["digits"]) for text, line in zip(texts, lines, strict=True)),
        }
    return measured


def _mean_tokens(loaded: LoadedModel, responses: Sequence[str]) -> float:
    return sum(len(ids) for ids in loaded.processor.tokenizer(list(responses), add_special_tokens=False)["input_ids"]) / len(
        responses
    )


def reward_margin(model: Path, folder: Path) -> float:
    """Mean difference of the rewards of chosen and rejected completions, on pairs of evaluation questions.

    Rewards are 0.1 (log pi - log ref) with the warmed-up model as the reference, for every method.
    """
    policy, reference = (load_model(str(path), dtype="float32") for path in (model, folder / "warm"))
    pairs = load_preferences(folder / "eval_pairs.jsonl", image_root=folder)
    with tempfile.TemporaryDirectory() as output:
        trainer = MPOTrainer(
            model=policy.model,
            ref_model=reference.model,
            args=MPOConfig(output, per_device_eval_batch_size=32, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True),
            train_dataset=pairs,
            eval_dataset=pairs,
            processing_class=policy.processor,
        )
        return float(trainer.evaluate()["eval_rewards/margins"])
