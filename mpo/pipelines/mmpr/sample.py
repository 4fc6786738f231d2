"""Sample responses to questions, with a prompt for reasoning, from one model or several, as many as a question needs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mpo.generation.generator import Decoding, Generator, Request, Response
from mpo.io import did_you_mean
from mpo.pipelines import sample as plain
from mpo.pipelines.ledger import content_hash
from mpo.pipelines.step import Record, Step

SHORT = re.compile(
    r"\s*(?:(?:please )?answer (?:the question )?(?:using|with) (?:only )?a (?:single|short) word or phrase"
    r"|(?:please )?answer with the (?:option['’]?s )?letter (?:of|from) the (?:given|correct) (?:choices?|options?)(?: directly)?"
    r"|请?(?:直接|仅|只)?用(?:一个(?:单?词)(?:或短语)?|选项字母)回答(?:问题)?)\s*[.。]?\s*$",
    re.IGNORECASE,
)
"""Instructions of benchmarks for short answers, which contradict a prompt for reasoning: it takes their place."""


class Sample(Step):
    """Add ``responses`` to a question: ``text``, ``finish_reason``, ``model``, ``seed``, ``sample``; ``asked``, what was asked; and
    ``shown``, hashes of the image files.

    Several, one after another, fill one pool: of other models, or of the same one with another seed, where needed (`until`).

    Args:
        generator: the model to ask.
        prompt: as in `find_prompt`.
        name: name of the model in the output; None for the generator's own.
        until: ask only questions with fewer right, or fewer wrong responses, as `Verify` has judged them; None to ask all.
        sampling: settings of `mpo.generation.generator.Generator.generate`: n, temperature, top_k, max_new_tokens, seed, ...

    Raises:
        ValueError: for settings without a meaning.
    """

    verb = "sample"

    def __init__(
        self,
        generator: Generator,
        *,
        prompt: str = "en",
        name: str | None = None,
        until: Sequence[int] | None = None,
        **sampling: Any,
    ) -> None:
        if until is not None and (len(until) != 2 or min(until) < 1):
            raise ValueError(f"Expected until to be numbers of right and of wrong responses, 1 or more; got until={until!r}.")
        self._prompt = find_prompt(prompt)
        self.generator, self.name, self.until = generator, name, until
        self.prompt = prompt if prompt in PROMPTS else self._prompt.template
        self.sampling = asdict(Decoding(**sampling))
        self._plain = plain.Sample(generator, system=self._prompt.system)

    def _request(self, record: Record) -> Request:
        hidden = False
        if record.get("messages"):
            *before, last = Request(record["messages"], record.get("images", ()), videos=record.get("videos", ())).messages
            parts = [dict(one) for one in last["content"]]
            for one in parts if self._prompt.format != "any" else ():  # it asks for reasoning
                one.update({"text": SHORT.sub("", one["text"])} if one["type"] == "text" else {})
            text = "".join(one.get("text") or "" for one in parts)
            record = {**record, "messages": [*before, {**last, "content": parts}]} if text.strip() else record
            hidden = any(choice not in text for choice in record.get("choices") or ())
        return self._plain.request(record, render(self._prompt.template, record, plain.CHOICES if hidden else ""))

    def requests(self, record: Record) -> list[Request]:
        """One request, unless there are enough responses."""
        verdicts = [response["verdict"] for response in record.get("responses", ()) if "verdict" in response]
        right = verdicts.count("correct")
        if self.until is not None and right >= self.until[0] and len(verdicts) - right >= self.until[1]:
            return []
        request = self._request(record)
        if record.get("asked", asked_of(request)) != asked_of(request):
            raise ValueError("it has responses to another prompt, which cannot be paired with those to this one. Use one prompt.")
        return [request]

    def finish(self, record: Record, responses: Sequence[Sequence[Response]]) -> Record:
        """The question with its responses so far."""
        about = {"model": model_name(self), "seed": self.sampling["seed"]}
        new = [
            {"text": one.text, "finish_reason": one.finish_reason, **about, "sample": number}
            for several in responses
            for number, one in enumerate(several)
        ]
        asked = {"asked": record.get("asked") or asked_of(self._request(record)), "format": self._prompt.format}
        if files := [file for name in ("images", "videos") for file in record.get(name) or ()]:
            asked["shown"] = [content_hash(file) if isinstance(file, str) else None for file in files]
        return {**record, **asked, "responses": [*record.get("responses", ()), *new]}


def model_name(step: Any) -> str:
    """The name of the model that a step asks."""
    return str(step.name or getattr(step.generator, "name", None) or "local")


def asked_of(request: Request) -> dict[str, str]:
    """What MMPR's lines hold of a request: ``question`` with placeholders, and ``system``. Raises ValueError for several turns."""
    asked = [
        (message["role"], "".join(one["text"] if one["type"] == "text" else f"<{one['type']}>\n" for one in message["content"]))
        for message in request.messages
    ]
    if [role for role, _ in asked] not in (["user"], ["system", "user"]):
        raise ValueError("the question has several turns, and MMPR's lines hold one. Leave it out.")
    return {"question" if role == "user" else "system": text for role, text in asked}


# Prompts: Jinja templates of a question and its choices


class Prompt(NamedTuple):
    """The template of the user's turn, the format of the final answer (`mpo.pipelines.mmpr.verify.judge`), and the system turn."""

    template: str
    format: str = "line"
    system: str | None = None


_PLAIN = "{{ question }}{% if choices %}\n{{ choices }}{% endif %}"
_STEPS = f"{_PLAIN}\n\nWork this out step by step before you give the result, and explain each step."
_LINE, _BOXED = "Final answer: RESULT", "Answer: \\boxed{RESULT}"
_LAST = " Close with a last line that has the result and nothing else:\n"
PROMPTS = {
    "plain": Prompt(_PLAIN, "any"),
    "en": Prompt(_STEPS + _LAST + _LINE),
    "en_v2": Prompt(_STEPS + _LAST + _BOXED, "boxed"),
    "en_r1": Prompt(
        _PLAIN,
        "boxed",
        "Think about the question between <think> and </think> first, for as long as it takes, and check your steps. "
        f"Then summarize your reasoning.{_LAST}{_BOXED}",
    ),
    "zh": Prompt(f"{_PLAIN}\n\n请先一步一步地推理并说明每一步，再给出结果。最后一行只写结果，格式为：\n答案：结果"),
    "background": Prompt(
        f"{_PLAIN}\n\nFirst recall the background knowledge that the question needs, such as definitions, laws and formulas. "
        f"Then apply it to what the image shows, step by step.{_LAST}{_LINE}"
    ),
    "describe": Prompt(
        f"{_PLAIN}\n\nFirst describe what the image shows as far as it matters here: texts, numbers, axes, objects and their "
        f"places. Then reason from your description, step by step.{_LAST}{_LINE}"
    ),
    "grounded": Prompt(
        f"{_PLAIN}\n\nReason step by step, and give each object that you mention its place in the image as "
        f"<ref>object</ref><box>[[x1, y1, x2, y2]]</box>, in thousandths of width and height.{_LAST}{_LINE}"
    ),
}
"""Prompts of the structure of InternVL's pipeline; ``background``, ``describe`` and ``grounded`` are the styles of the paper, for
science; for charts, text and documents; and for general questions."""
_compiled = cache(ImmutableSandboxedEnvironment(undefined=StrictUndefined).from_string)


def find_prompt(given: str) -> Prompt:
    """Return a prompt by its name, its text (a template with ``{{ question }}``), or the path of a file of it.

    Raises:
        ValueError: for an unknown name, and a template that does not render, or not with the question once.
    """
    if given in PROMPTS:
        return PROMPTS[given]
    if "{{" not in given and not Path(given).is_file():
        found = f"prompt={given!r} is not the name of a prompt, a file, or a template with {{{{ question }}}}."
        raise ValueError(found + did_you_mean(given, PROMPTS, most=20))
    prompt = Prompt(given if "{{" in given else Path(given).read_text(encoding="utf-8"), "any")
    if any(render(prompt.template, {}, choices).count(plain.QUESTION) != 1 for choices in ("", plain.CHOICES)):
        raise ValueError(f"prompt={given!r:.200} must show the question once. Write {{{{ question }}}} in it.")
    return prompt


def render(template: str, record: Mapping[str, Any], choices: str) -> str:
    """Render a template, with what `mpo.pipelines.sample` replaces for the question. Raises ValueError if it does not render."""
    known = {name: record.get(name) for name in ("kind", "unit", "source")} | {"metadata": record.get("metadata", {})}
    try:
        return _compiled(template).render(question=plain.QUESTION, choices=choices, **known)
    except TemplateError as error:
        raise ValueError(f"the prompt does not render: {error}. It may use question, choices, {', '.join(known)}.") from None
