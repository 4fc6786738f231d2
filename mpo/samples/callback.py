"""The callback that asks a model in training the same prompts again and again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm
from transformers import TrainerCallback

from mpo.packing.turns import Record
from mpo.samples.answers import Answer, generate_answers, summary
from mpo.samples.journal import Journal
from mpo.samples.prompts import checked_records, image_names, prompt_text
from mpo.samples.trackers import show_in_trackers

WITH_EVALUATIONS = "evaluation"
WIDTH = 110  # of a line on the console, in characters


class SampleAnswers(TrainerCallback):  # type: ignore[misc]
    """Lets a model answer the same prompts before the first step, every so many steps, and after the last.

    Answers go to ``samples.jsonl`` in the run folder, to the console and, as text or a table, to the trackers of ``report_to``; the
    trainer logs ``samples/length`` (tokens), ``samples/unfinished`` (the share of answers that did not end within
    ``max_new_tokens``) and ``samples/repetition`` (of their 4-grams, the share that stood before in the same answer). A run
    trains exactly as without it, and its time is no part of the training speed. A resumed run goes on with the file, without a
    step twice; a fresh one begins it anew.

    With DDP the first rank answers and the others wait. Weights in pieces (FSDP2, ZeRO-3) are gathered layer by layer for every
    token, which is slow: take few tokens there.

    Args:
        records: what to ask; ``prompt`` and ``images`` as in training. All are asked.
        every: steps between; or ``"evaluation"``: with each evaluation.
        max_new_tokens: the longest answer, in tokens.
        temperature: 0 is greedy.
        seed: of the sampling, the same at every step.

    Raises:
        ValueError: for numbers that make no sense, and records without a prompt.

    Example:
        >>> from mpo.samples.callback import SampleAnswers
        >>> callback = SampleAnswers([{"prompt": [{"role": "user", "content": "What is 2 plus 2?"}]}], every=50)
        >>> trainer = MPOTrainer(..., callbacks=[callback])  # doctest: +SKIP
    """

    def __init__(
        self,
        records: Iterable[Record],
        *,
        every: int | str = 100,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        check_sampling(every, max_new_tokens, temperature)
        self.records = checked_records(records)
        self.every = every
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.seed = seed
        self.trainer: Any = None
        """Set by `MPOTrainer.train`."""
        self._last = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        if self.trainer is None:
            raise ValueError("SampleAnswers needs an MPOTrainer: pass it as one of its `callbacks`.")
        self._last = state.global_step or -1
        if state.is_world_process_zero:
            Journal(args.output_dir).begin(state.global_step)
        self._sample(args, state, control, when=state.global_step == 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        due = self.every != WITH_EVALUATIONS and state.global_step % int(self.every) == 0
        self._sample(args, state, control, when=due or control.should_training_stop)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        in_training = self.trainer is not None and self.trainer.is_in_train
        self._sample(args, state, control, when=in_training and self.every == WITH_EVALUATIONS)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        self._sample(args, state, control, when=control.should_training_stop)  # it was stopped early, after the end of a step

    def _sample(self, args: Any, state: Any, control: Any, *, when: bool) -> None:
        if not when or state.global_step <= self._last:
            return
        self._last = state.global_step
        numbers: list[dict[str, float] | None] = [None]
        with self.trainer.answering() as (model, in_pieces):
            if in_pieces or state.is_world_process_zero:
                answers = self._answers(args, model, in_pieces)
                numbers = [summary(answers)]
                if state.is_world_process_zero:
                    self._show(args, state.global_step, answers)
            broadcast_object_list(numbers)  # every rank keeps the same log
        due = control.should_log
        self.trainer.log(numbers[0])
        control.should_log = due  # a log ends it, and the step's own is still to come

    def _answers(self, args: Any, model: Any, in_pieces: bool) -> list[Answer]:
        size = args.per_device_eval_batch_size
        return [
            answer
            for start in range(0, len(self.records), size)
            for answer in generate_answers(
                model,
                self.trainer.processing_class,
                self.records[start : start + size],
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                seed=self.seed + start,
                tile_budget=args.tile_budget,
                synced=in_pieces,
            )
        ]

    def _show(self, args: Any, step: int, answers: Sequence[Answer]) -> None:
        rows = [
            {
                "step": step,
                "id": str(record.get("id") or place),
                "prompt": prompt_text(record),
                "images": image_names(record),
                "answer": answer.text,
                "tokens": answer.tokens,
                "finished": answer.finished,
                "repetition": answer.repetition,
            }
            for place, (record, answer) in enumerate(zip(self.records, answers, strict=True))
        ]
        Journal(args.output_dir).write(rows)
        tqdm.write(page(rows))
        show_in_trackers(self.trainer.callback_handler.callbacks, step, rows)


def check_sampling(every: int | str, max_new_tokens: int, temperature: float) -> None:
    """Refuse numbers that make no sense.

    Raises:
        ValueError: naming the number.
    """
    if every != WITH_EVALUATIONS and (not isinstance(every, int) or every < 1):
        raise ValueError(
            f"Answers are sampled every so many steps (1 or more), or every={WITH_EVALUATIONS!r}; got every={every!r}."
        )
    if max_new_tokens < 1 or temperature < 0:
        raise ValueError(f"max_new_tokens is 1 or more and temperature 0 or more; got {max_new_tokens} and {temperature}.")


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """A step's answers for the console."""
    unfinished = sum(not row["finished"] for row in rows)
    length = sum(row["tokens"] for row in rows) / len(rows)
    repetition = sum(row["repetition"] for row in rows) / len(rows)
    lines = [
        f"Samples at step {rows[0]['step']}: {length:.0f} tokens on average, {unfinished} of {len(rows)} cut, "
        f"{repetition:.0%} of 4-grams repeated"
    ]
    for row in rows:
        lines.append(_line(f"  {row['id']}  {' '.join([*row['images'], row['prompt']])}"))
        end = "" if row["finished"] else ", cut"
        lines.append(_line(f"    {row['tokens']:>4} tokens{end}: {row['answer']}"))
    return "\n".join(lines)


def _line(text: str) -> str:
    head = text[: len(text) - len(text.lstrip())]
    one = head + " ".join(text.split())
    return one if len(one) <= WIDTH else one[: WIDTH - 3] + "..."
