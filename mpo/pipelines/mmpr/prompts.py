"""The prompts that responses are sampled with: Jinja templates of a question and its choices."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mpo.io import did_you_mean
from mpo.pipelines.sample import CHOICES, QUESTION


class Prompt(NamedTuple):
    """The template of the user's turn, the format of the final answer (`mpo.pipelines.mmpr.verify.judge`), and the system turn."""

    template: str
    format: str = "line"
    system: str | None = None

    @property
    def reasons(self) -> bool:
        """Whether it asks for reasoning and a final answer."""
        return self.format != "any"


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
    if any(render(prompt.template, {}, choices).count(QUESTION) != 1 for choices in ("", CHOICES)):
        raise ValueError(f"prompt={given!r:.200} must show the question once. Write {{{{ question }}}} in it.")
    return prompt


def render(template: str, record: Mapping[str, Any], choices: str) -> str:
    """Render a template, with what `mpo.pipelines.sample` replaces for the question. Raises ValueError if it does not render."""
    known = {name: record.get(name) for name in ("kind", "unit", "source")} | {"metadata": record.get("metadata", {})}
    try:
        return _compiled(template).render(question=QUESTION, choices=choices, **known)
    except TemplateError as error:
        raise ValueError(f"the prompt does not render: {error}. It may use question, choices, {', '.join(known)}.") from None
