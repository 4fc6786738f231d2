"""A callback that samples responses to fixed prompts during training."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm
from transformers import TrainerCallback
from typing_extensions import override

from mpo.data.eval_part import question_text
from mpo.encoding.turns import Record
from mpo.generation.local import LocalGenerator
from mpo.io import append_json_lines, write_text
from mpo.training.samples.prompts import checked_records, image_names
from mpo.training.samples.trackers import show_in_trackers

FILE = "samples.jsonl"
WITH_EVALUATIONS = "evaluation"
WIDTH = 110  # of a line on the console, in characters


class UsesTrainer(TrainerCallback):  # type: ignore[misc]
    """A callback that generates with the model in training."""

    trainer: Any = None
    """Set by the trainer's `train`."""

    def measured(
        self, args: Any, state: Any, control: Any, measure: Callable[[LocalGenerator], dict[str, float]]
    ) -> dict[str, float]:
        """Log what is measured with the model in training as a generator, the same on all ranks, and return it."""
        found: list[dict[str, float]] = [{}]
        with self.trainer.generating() as (model, sharded):
            if sharded or state.is_world_process_zero:
                how = {"responses_per_batch": args.per_device_eval_batch_size, "tile_budget": args.tile_budget}
                found = [measure(LocalGenerator(model, self.trainer.processing_class, sharded=sharded, **how))]
            broadcast_object_list(found)
        due = control.should_log
        self.trainer.log({**found[0]})
        control.should_log = due  # `log` resets it, and the step's own log is still to come
        return found[0]


class SampleResponses(UsesTrainer):
    """Sample responses to the same prompts before the first step, every few steps, and after the last.

    Responses are written to ``samples.jsonl`` in the run folder, to the console and, as text or a table, to the trackers of
    ``report_to``. The trainer logs ``samples/length`` (tokens), ``samples/unfinished`` (the fraction of responses that did not end
    within ``max_new_tokens``) and ``samples/repetition`` (the fraction of their 4-grams that occur earlier in the same response).
    Training is exactly the same as without it, and its time is not part of the training speed. A resumed run continues the file
    without repeating a step; a new run overwrites it.

    With DDP rank 0 generates and the others wait. Sharded weights (FSDP2, ZeRO-3) are gathered layer by layer for every token,
    which is slow: set a small ``max_new_tokens`` there.

    Args:
        records: with ``prompt`` and ``images`` as in training; every one gets a response.
        every: number of steps between samplings, or ``"evaluation"`` to sample at each evaluation.
        max_new_tokens: the longest response, in tokens.
        temperature: 0 is greedy.
        seed: random seed of the sampling, the same at every step.

    Raises:
        ValueError: for invalid settings, and records without a prompt.

    Example:
        >>> from mpo.training.samples.callback import SampleResponses
        >>> callback = SampleResponses([{"prompt": [{"role": "user", "content": "What is 2 plus 2?"}]}], every=50)
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
        self._last = -1

    @override
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer is None:
            raise ValueError("SampleResponses needs an MPOTrainer: pass it as one of its `callbacks`.")
        self._last = state.global_step or -1
        if state.is_world_process_zero:
            drop_after(Path(args.output_dir, FILE), state.global_step)
        self._sample(args, state, control, when=state.global_step == 0)

    @override
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        due = self.every != WITH_EVALUATIONS and state.global_step % int(self.every) == 0
        self._sample(args, state, control, when=due or control.should_training_stop)

    @override
    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        in_training = self.trainer is not None and self.trainer.is_in_train
        self._sample(args, state, control, when=in_training and self.every == WITH_EVALUATIONS)

    @override
    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._sample(args, state, control, when=control.should_training_stop)  # training may stop after `on_step_end`

    def _sample(self, args: Any, state: Any, control: Any, *, when: bool) -> None:
        if not when or state.global_step <= self._last:
            return
        self._last = state.global_step

        def measure(generator: LocalGenerator) -> dict[str, float]:
            rows = self._rows(generator, state.global_step)
            if state.is_world_process_zero:
                append_json_lines(Path(args.output_dir, FILE), rows)
                tqdm.write(page(rows))
                show_in_trackers(self.trainer.callback_handler.callbacks, state.global_step, rows)
            return summary(rows)

        self.measured(args, state, control, measure)

    def _rows(self, generator: LocalGenerator, step: int) -> list[dict[str, Any]]:
        sampling = {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature, "seed": self.seed}
        return [
            {
                "step": step,
                "id": str(record.get("id") or place),
                "prompt": question_text(record.get("prompt") or "", " | "),
                "images": image_names(record),
                "response": response.text,
                "tokens": response.tokens,
                "finished": response.finished,
                "repetition": repeated_fraction(response.ids),
            }
            for place, (record, (response,)) in enumerate(
                zip(self.records, generator.respond(self.records, **sampling), strict=True)
            )
        ]


def check_sampling(every: int | str, max_new_tokens: int, temperature: float) -> None:
    """Refuse invalid settings of the sampling."""
    if every != WITH_EVALUATIONS and (not isinstance(every, int) or every < 1):
        raise ValueError(
            f"Set every to a number of steps between samplings, 1 or more, or to {WITH_EVALUATIONS!r}; got every={every!r}."
        )
    if max_new_tokens < 1 or temperature < 0:
        raise ValueError(
            f"Expected max_new_tokens >= 1 and temperature >= 0; got max_new_tokens={max_new_tokens}, temperature={temperature}."
        )


def repeated_fraction(tokens: Sequence[Any], size: int = 4) -> float:
    """The fraction of n-grams of `size` tokens that occur earlier in the same text; 0 for a text shorter than `size`.

    >>> repeated_fraction([7, 7, 7, 7, 7, 7, 7, 7])  # five equal 4-grams
    0.8
    >>> repeated_fraction([1, 2, 3, 4, 1, 2, 3, 5])
    0.0
    """
    grams = [tuple(tokens[place : place + size]) for place in range(len(tokens) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The logged numbers of a step's responses: mean length in tokens, fraction of truncated ones, and mean repetition."""
    return {
        "samples/length": sum(row["tokens"] for row in rows) / len(rows),
        "samples/unfinished": sum(not row["finished"] for row in rows) / len(rows),
        "samples/repetition": sum(row["repetition"] for row in rows) / len(rows),
    }


def drop_after(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, from which training resumes and which it will write again; at 0, drop all."""
    if path.exists():
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if step and _step(line) <= step]
        write_text(path, "".join(f"{line}\n" for line in kept))


def _step(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format a step's responses for the console."""
    length, unfinished, repetition = summary(rows).values()
    lines = [
        f"Samples at step {rows[0]['step']}: {length:.0f} tokens on average, {unfinished * len(rows):.0f} of {len(rows)} "
        f"truncated, {repetition:.0%} of 4-grams repeated"
    ]
    for row in rows:
        lines.append(_line(f"  {row['id']}  {' '.join([*row['images'], row['prompt']])}"))
        end = "" if row["finished"] else ", truncated"
        lines.append(_line(f"    {row['tokens']:>4} tokens{end}: {row['response']}"))
    return "\n".join(lines)


def _line(text: str) -> str:
    head = text[: len(text) - len(text.lstrip())]
    one = head + " ".join(text.split())
    return one if len(one) <= WIDTH else one[: WIDTH - 3] + "..."
