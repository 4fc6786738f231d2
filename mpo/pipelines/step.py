"""What a pipeline is made of: steps, which map records to records."""

import inspect
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar

from mpo.generation.generator import Decoding, Generator, Request, Response
from mpo.pipelines.flow import BadStep, Dropped, Flow, Record, Result, log
from mpo.pipelines.ledger import plain
from mpo.schema import Question

__all__ = ["Dropped", "Record", "Step", "to_record"]


FILES = ("images", "videos")
"""Fields of a record that hold files, wherever they are."""


class Step:
    """Maps each record to one record, or to several (`many`), by itself or with the responses of a model.

    A subclass has plain constructor arguments, kept as attributes of the same names, and overrides `finish` and, if it asks a
    model, `requests`. Both are functions of their arguments and the constructor's alone: a job calls them again to go on, each time
    with a copy of the record.

    Attributes:
        verb: what it does, in one word: its name in files and reports.
        many: a record gives a list of outputs, whose ids are ``ID/0``, ``ID/1``, ...; otherwise one, which keeps the id.
        measure: name of a field of its outputs, a number or a boolean, whose mean is reported.
        slow: `finish` may compute for long: it runs in a thread of its own, while models are asked.
        generator: the model that it asks.
        sampling: the settings of `Generator.generate` that it asks with.
    """

    verb: ClassVar[str]
    many: ClassVar[bool] = False
    measure: ClassVar[str | None] = None
    slow: ClassVar[bool] = True
    generator: Generator | None = None
    sampling: Mapping[str, Any] = {}

    def requests(self, record: Record) -> Sequence[Request] | Request:
        """Return the request or requests about a record. Raises ValueError for a record that cannot be asked about."""
        return ()

    def finish(self, record: Record, responses: Sequence[Sequence[Response]]) -> Record | list[Record]:
        """Make the outputs from a record and the responses to its requests, `n` for each.

        Raises Dropped with the reason, where a record has no output.
        """
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """What decides its outputs, as JSON has it: the class, the constructor's arguments, the model and how it is sampled.

        Raises BadStep for an argument that is not kept or that JSON cannot hold, and a generator without an identity.
        """
        own = {name: value for name, value in vars(self).items() if name != "generator" and name[0] != "_"}
        if lost := next((name for name in _arguments(type(self)) if name not in vars(self)), None):
            raise BadStep(f"Step {self.verb!r} does not keep its argument {lost!r}. Set self.{lost} in {type(self).__name__}.")
        if self.generator is not None:
            if not callable(getattr(self.generator, "identity", None)):
                raise BadStep(f"The generator of step {self.verb!r}, a {type(self.generator).__name__}, has no identity().")
            own["generator"] = self.generator.identity()
            try:
                own["sampling"] = asdict(Decoding(**self.sampling))
            except TypeError as error:
                raise BadStep(f"Step {self.verb!r} has a wrong sampling: {error}") from None
        for name, value in own.items():
            try:
                own[name] = json.loads(json.dumps(value, default=plain, allow_nan=False))
            except (TypeError, ValueError):
                raise BadStep(
                    f"Step {self.verb!r} has {name}={value!r:.80}, which JSON cannot hold, so that no job can go on with it. Give "
                    "text, numbers, lists and dicts."
                ) from None
        return {"class": f"{type(self).__module__}.{type(self).__qualname__}", **own}

    def __call__(self, records: Iterable[Any]) -> list[Record]:
        """Apply the step to records in memory. A record that is dropped is logged with its reason.

        Args:
            records: dicts or dataclasses with an ``id``.

        Returns:
            the outputs, in order; ``input_id`` is the id of the record that an output was made of.

        Raises:
            ValueError: for a record without an id.
            ConnectionError: for a server that cannot be used.
        """
        outputs: list[Record] = []

        def emit(result: Result) -> None:
            outputs.extend(result.outputs)
            for one in result.dropped:
                log.warning("%s: record %r is dropped: %s", self.verb, one["id"], one["reason"])

        Flow([self]).run((to_record(record, place) for place, record in enumerate(records)), emit)
        return outputs


def _arguments(step: type[Step]) -> Iterator[str]:
    """Names of a constructor's arguments. ``*args`` and ``**kwargs`` are those of the next class that has a constructor."""
    passed: list[str] = []
    for owner in step.__mro__[: step.__mro__.index(Step)]:
        if "__init__" in vars(owner):
            _, *given = inspect.signature(vars(owner)["__init__"]).parameters.values()
            yield from (one.name for one in given if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD))
            passed = [one.name for one in given if one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
            if not passed:
                return
    yield from passed


def to_record(given: Any, place: int = 0) -> Record:
    """Convert a mapping or a dataclass to a record. Fields of a dataclass with their default values are left out.

    Args:
        given: the mapping or dataclass. Relative paths of images and videos become absolute.
        place: its number in the data set, for errors.

    Raises:
        ValueError: for anything else, and without an id.
    """
    if is_dataclass(given) and not isinstance(given, type):
        record = {}
        for one in fields(given):
            value = getattr(given, one.name)
            default = one.default_factory() if one.default_factory is not MISSING else one.default
            if default is MISSING or not (type(value) is type(default) and value == default):
                record[one.name] = value
    elif isinstance(given, Mapping):
        record = dict(given)
    else:
        raise ValueError(f"Record {place} is a {type(given).__name__}. Expected a dict or a dataclass, with an 'id'.")
    if not isinstance(record.get("id"), str) or not record["id"]:
        raise ValueError(f"Record {place} has the id {record.get('id')!r}. Give it one as text, unique in its data set.")
    for name in FILES:
        if isinstance(record.get(name), list | tuple):
            record[name] = [os.path.abspath(one) if isinstance(one, str | Path) else one for one in record[name]]
    return record


def settings_of(step: Step, known: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings of a step. A server that is away is the one that was asked before: what it has said needs no other answer."""
    try:
        return step.settings()
    except ConnectionError as error:
        name = ((known or {}).get("generator") or {}).get("model")
        if not isinstance(name, str) or getattr(step.generator, "name", "") is not None:
            raise
        log.warning("%s Without it, only what is in the ledger can be used.", error)
        step.generator.name = name  # type: ignore[union-attr]
        return step.settings()


def question_of(record: Mapping[str, Any]) -> Question:
    """The question of a record that was made of one."""
    return Question(**{"messages": [], **{one.name: record[one.name] for one in fields(Question) if one.name in record}})
