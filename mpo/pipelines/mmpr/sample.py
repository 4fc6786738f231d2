"""Sample responses to questions, with a prompt for reasoning, from one model or several, as many as a question needs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mpo.generation.generator import Decoding, Generator, Request, Response
from mpo.pipelines import sample as plain
from mpo.pipelines.ledger import content_hash
from mpo.pipelines.mmpr.prompts import PROMPTS, find_prompt, render
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
        prompt: as in `mpo.pipelines.mmpr.prompts.find_prompt`.
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
            for one in parts if self._prompt.reasons else ():
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
