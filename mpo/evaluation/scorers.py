"""Scorers for best of N: what they give the responses to a question, higher for better ones."""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from mpo.generation.generator import Generator, Request
from mpo.generation.local import LocalGenerator
from mpo.io import did_you_mean
from mpo.pipelines.ledger import content_hash
from mpo.schema import Question

Scorer = Callable[[Question, Sequence[str]], Sequence[float]]
"""Takes a question and responses to it; returns a number for each. Its ``identity()``, if any, tells it from others."""
GOOD, BAD = "+", "-"
UNSCORED = -1e30
"""The score of an empty response, below every other: there are no tokens to score, and JSON holds no infinity."""


def asked(question: Question) -> Request:
    """The request of a question."""
    return Request(question.messages, question.images, videos=question.videos)


class MeanLogProb:
    """The mean log-prob of a response's tokens under a model.

    Args:
        model: the model, in this process.
    """

    def __init__(self, model: LocalGenerator) -> None:
        self.model = model

    def identity(self) -> Any:
        """What tells it from other scorers."""
        return {"class": type(self).__name__, "model": self.model.identity()}

    def __call__(self, question: Question, responses: Sequence[str]) -> list[float]:
        """The mean for each response; `UNSCORED` for an empty one."""
        return [float(one.mean()) if len(one) else UNSCORED for one in logprobs(self.model, question, responses)]


class ImplicitReward:
    """The reward of a model trained with preferences: beta (log pi(y|x) - log ref(y|x)) (arXiv 2305.18290, section 4).

    Args:
        model: the trained model, in this process.
        reference: the model that it was trained from.
        beta: as in training; it changes no ranking.
    """

    def __init__(self, model: LocalGenerator, reference: LocalGenerator, *, beta: float = 0.1) -> None:
        self.model, self.reference, self.beta = model, reference, beta

    def identity(self) -> Any:
        """What tells it from other scorers."""
        models = {"model": self.model.identity(), "reference": self.reference.identity()}
        return {"class": type(self).__name__, "beta": self.beta, **models}

    def __call__(self, question: Question, responses: Sequence[str]) -> list[float]:
        """The reward of each response; `UNSCORED` for an empty one, which would be above all that training has made less likely."""
        own, other = (logprobs(one, question, responses) for one in (self.model, self.reference))
        return [self.beta * float(a.sum() - b.sum()) if len(a) else UNSCORED for a, b in zip(own, other, strict=True)]


def logprobs(model: LocalGenerator, question: Question, responses: Sequence[str]) -> list[Any]:
    """The log-probs of the tokens of each response, none of an empty one; each distinct text is computed once."""
    import torch

    texts = [*dict.fromkeys(text for text in responses if text.strip())]
    found = model.logprobs([asked(question)], [texts])[0] if texts else []
    by_text = dict(zip(texts, found, strict=True))
    return [by_text.get(text, torch.zeros(0)) for text in responses]


class ProcessReward:
    """A process reward model in the form of VisualPRM (arXiv 2503.10291): the mean over steps of the probability of "+".

    The model is told the question and the first step, and says "+" or "-"; the next step is the next turn. Earlier steps
    stand there as "+". Where a server gives no log-probs, a step counts 1 or 0.

    Args:
        generator: the model, in this process or on a server.
        max_steps: a response is split at blank lines, or at line ends without any, and merged evenly to at most so many.
    """

    def __init__(self, generator: Generator, *, max_steps: int = 12) -> None:
        self.generator, self.max_steps = generator, max_steps

    def identity(self) -> Any:
        """What tells it from other scorers."""
        return {"class": type(self).__name__, "max_steps": self.max_steps, "model": self.generator.identity()}

    def __call__(self, question: Question, responses: Sequence[str]) -> list[float]:
        """The score of each response, 0 to 1."""
        each = [[self._request(question, steps, end) for end in range(len(steps))] for steps in map(self.steps, responses)]
        flat = [request for requests in each for request in requests]
        said = iter(self.generator.generate(flat, temperature=0.0, max_new_tokens=1, logprobs=True) if flat else [])
        scores = [[self._score(next(said)[0]) for _ in requests] for requests in each]
        return [math.fsum(own) / len(own) if own else 0.0 for own in scores]

    def steps(self, response: str) -> list[str]:
        """Split a response into steps."""
        parts = [part.strip() for part in re.split(r"\n\s*\n", response.strip()) if part.strip()]
        if len(parts) < 2:
            parts = [part.strip() for part in response.splitlines() if part.strip()]
        size = min(len(parts), self.max_steps)
        bounds = [len(parts) * place // size for place in range(size + 1)] if size else []
        return ["\n".join(parts[start:end]) for start, end in zip(bounds, bounds[1:], strict=False)]

    def _request(self, question: Question, steps: Sequence[str], end: int) -> Request:
        first = asked(question).messages
        content = [{"type": "text", "text": "### Question:\n"}, *first[-1]["content"]]
        content.append({"type": "text", "text": f"\n\n### Solution Process:\n{steps[0]}"})
        turns: list[Any] = [*first[:-1], {"role": "user", "content": content}]
        for step in steps[1 : end + 1]:
            turns += [{"role": "assistant", "content": GOOD}, {"role": "user", "content": step}]
        return Request(turns, question.images, videos=question.videos)

    @staticmethod
    def _score(response: Any) -> float:
        said = response.text.strip()[:1]
        chance = math.exp(response.logprobs[0]) if response.logprobs else 1.0
        return chance if said == GOOD else 1 - chance if said == BAD else 0.0


class OwnScorer:
    """A function of the user's own, known by its name and the contents of its file, so that an edited one scores anew."""

    def __init__(self, name: str, function: Scorer, source: str | None) -> None:
        self.name, self.function, self.source = name, function, source

    def identity(self) -> Any:
        """What tells it from other scorers."""
        return {"name": self.name, "source": self.source and content_hash(Path(self.source).read_bytes())}

    def __call__(self, question: Question, responses: Sequence[str]) -> Sequence[float]:
        """What the function gives."""
        return self.function(question, responses)


def load_scorer(name: str) -> OwnScorer:
    """Import a function of the user's own by ``module:function`` or ``path/to/file.py:function``, or a class without arguments.

    Raises:
        ValueError: for a name of another form, and for what does not import or cannot be called with a question and responses.
    """
    module, _, attribute = name.rpartition(":")
    if not module or not attribute:
        forms = "logprob, reward, prm=MODEL, or MODULE:FUNCTION or FILE.py:FUNCTION of your own"
        raise ValueError(f"Scorer {name!r} is unknown. Give {forms}.{did_you_mean(name, ('logprob', 'reward', 'prm=MODEL'))}")
    try:
        source = _module(module)
        found: Any = getattr(source, attribute)
        found = found() if isinstance(found, type) else found
        inspect.signature(found).bind(None, ())
    except Exception as error:  # a user's file may raise anything
        said = f"Scorer {name!r} cannot be used: {type(error).__name__}: {error}."
        raise ValueError(
            f"{said} Give a function of a Question and a list of responses, which returns a number for each."
        ) from None
    return OwnScorer(name, found, getattr(source, "__file__", None))


def _module(name: str) -> Any:
    if not name.endswith(".py"):
        sys.path.insert(0, "")  # modules in the current folder, which a command does not see otherwise
        try:
            return import_module(name)
        finally:
            sys.path.remove("")
    path = Path(name).absolute()
    unique = f"_scorer_{content_hash(str(path).encode())}"
    spec = spec_from_file_location(unique, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    module = sys.modules[unique] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
