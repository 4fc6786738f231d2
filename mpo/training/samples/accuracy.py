"""A callback that measures accuracy on questions with each evaluation during training."""

from collections.abc import Iterable
from typing import Any, cast

from typing_extensions import override

from mpo.evaluation.results import GREEDY, cluster_of, score_of
from mpo.evaluation.run import Respond, checked_questions
from mpo.evaluation.statistics import clustered_interval
from mpo.generation.local import LocalGenerator
from mpo.pipelines.step import question_of
from mpo.schema import Question
from mpo.training.samples.callback import UsesTrainer
from mpo.verification import verify


class MeasureAccuracy(UsesTrainer):
    """Respond greedily to questions at each evaluation, and add how many are right to its metrics.

    ``eval_accuracy``, ``eval_accuracy_low`` and ``eval_accuracy_high`` (the 95 % interval) are logged, and
    ``metric_for_best_model="accuracy"`` with ``greater_is_better=True`` keeps the checkpoint with the best. Training is exactly the
    same as without it.

    Args:
        questions: with ground truths (`mpo.data.load_questions`).
        mode: how they are asked: ``direct`` or ``cot`` (`mpo.evaluation.run.MODES`).
        max_new_tokens: the longest response, in tokens.

    Raises:
        ValueError: for questions without a ground truth, and none; an unknown mode, and less than one token.
    """

    def __init__(self, questions: Iterable[Question], *, mode: str = "direct", max_new_tokens: int = 256) -> None:
        self.records = checked_questions("the evaluation", questions)
        self.sampling = {"temperature": 0.0, "max_new_tokens": max_new_tokens}
        self.step = Respond(cast(Any, None), mode=mode, field=GREEDY, **self.sampling)  # the generator comes with each evaluation
        self._measured: tuple[int, dict[str, float]] | None = None

    @override
    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if self.trainer is None or not self.trainer.is_in_train or metrics is None:
            return
        if self._measured is None or self._measured[0] != state.global_step:  # once for several evaluation sets
            self._measured = state.global_step, self.measured(args, state, control, self._measure)
        metrics.update(self._measured[1])

    def _measure(self, generator: LocalGenerator) -> dict[str, float]:
        responses = generator.generate([self.step.requests(record)[0] for record in self.records], **self.sampling)
        scores = []
        for record, (response,) in zip(self.records, responses, strict=True):
            question = question_of(record)
            scores.append(score_of(response.text, question, verify(response.text, question).correct))
        low, high = clustered_interval(scores, [cluster_of(record) for record in self.records])
        return {"eval_accuracy": sum(scores) / len(scores), "eval_accuracy_low": low, "eval_accuracy_high": high}
