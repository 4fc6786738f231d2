"""The group ``samples`` of a recipe: its checks, and the callbacks that it asks for."""

from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

from mpo.data import load_questions
from mpo.training.samples.accuracy import MeasureAccuracy
from mpo.training.samples.callback import WITH_EVALUATIONS, SampleResponses, check_sampling
from mpo.training.samples.prompts import first_prompts, load_prompts


def check_samples(given: Mapping[str, Any], strategy: str, eval_path: str | None, *, evaluated: bool) -> None:
    """Refuse invalid sampling settings of a job with this `eval_strategy`, this ``data.eval_path`` and, or not, evaluation data."""
    check_sampling(given.get("every", 100), given.get("max_new_tokens", 256), given.get("temperature", 0.0))
    if given.get("image_root") and not (given.get("path") or given.get("questions")):
        raise ValueError("samples.image_root needs samples.path, which is not set. Set it or remove samples.image_root.")
    if strategy != "no" and not evaluated:
        raise ValueError(f"trainer.eval_strategy={strategy} needs data to evaluate on. Set data.eval_path, or leave it out.")
    idle = strategy == "no" and (not given.get("count", 4 if given else 0) or given.get("path"))
    if idle and eval_path:
        raise ValueError(
            "data.eval_path is set, but nothing reads it: trainer.eval_strategy=no, and no samples of it are taken. Set "
            "trainer.eval_strategy=steps (or samples.count), or leave data.eval_path out."
        )
    named = "every=evaluation" if given.get("every") == WITH_EVALUATIONS else given.get("questions") and "questions"
    if named and strategy == "no":
        raise ValueError(f"samples.{named} needs evaluations. Set trainer.eval_strategy=steps, and data.eval_path.")


def sampling(given: Mapping[str, Any], data: Mapping[str, Any], eval_records: Any) -> list[TrainerCallback]:
    """Return the callbacks that sample responses, and that measure accuracy on questions, if any."""
    path, root, count = given.get("path"), given.get("image_root"), given.get("count", 4)

    def named(*names: str) -> dict[str, Any]:
        return {name: given[name] for name in names if name in given}

    found: list[TrainerCallback] = []
    if count and (path or eval_records):
        own = {name: data.get(name) for name in ("tiles", "metadata")}
        records = (
            load_prompts(path, image_root=root, count=count, **own)
            if path
            else first_prompts(eval_records, count, on_bad_record=data.get("on_bad_record") or "raise")
        )
        found.append(SampleResponses(records, **named("every", "max_new_tokens", "temperature")))
    if given.get("questions"):
        questions = load_questions(given["questions"], image_root=root)
        found.append(MeasureAccuracy(questions, **named("mode", "max_new_tokens")))
    return found
