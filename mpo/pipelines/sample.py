"""Sample responses of a model to questions."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mpo.data.questions import BAD
from mpo.generation.generator import Decoding, Generator, Request, Response
from mpo.pipelines.step import Record, Step

QUESTION, CHOICES = "{question}", "{choices}"


class Sample(Step):
    """Give each question a list of ``responses``, with ``text`` and ``finish_reason``.

    Args:
        generator: the model to ask.
        prompt: text of the last turn, in which ``{question}`` is replaced by the question and ``{choices}`` by its choices, a
            line each (``A. ...``).
        system: the system prompt; None for that of the question or the chat template.
        sampling: settings of `mpo.generation.generator.Generator.generate`: n, temperature, max_new_tokens, ...

    Raises:
        ValueError: for settings without a meaning, and a prompt without ``{question}``.
    """

    verb, slow = "sample", False

    def __init__(self, generator: Generator, *, prompt: str = QUESTION, system: str | None = None, **sampling: Any) -> None:
        check_prompt(prompt)
        self.generator, self.prompt, self.system = generator, prompt, system
        self.sampling = asdict(Decoding(**sampling))

    def requests(self, record: Record) -> list[Request]:
        """One request: the question's messages, with the prompt around the text of the last turn."""
        return [self.request(record, self.prompt)]

    def request(self, record: Record, prompt: str) -> Request:
        """The request with a prompt of the question's own."""
        check_prompt(prompt)
        if not record.get("messages"):
            bad = record.get("metadata", {}).get(BAD)
            raise ValueError(bad or "the question has no 'messages'. Load questions with mpo.data.load_questions.")
        messages = Request(record["messages"], record.get("images", ()), videos=record.get("videos", ())).messages
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        if system and messages[0]["role"] == "system":
            raise ValueError("the question has a system prompt, and the step another. Leave one of them out.")
        *before, last = messages
        content: list[dict[str, Any]] = list(last["content"])
        texts = [place for place, part in enumerate(content) if part["type"] == "text"]
        if not texts:
            raise ValueError("the last turn of the question has no text.")
        start, end = _around(prompt, record.get("choices") or (), "".join(content[place]["text"] for place in texts))
        content[texts[0]] = {"type": "text", "text": start + content[texts[0]]["text"]}
        content[texts[-1]] = {"type": "text", "text": content[texts[-1]]["text"] + end}
        asked = [*system, *before, {"role": last["role"], "content": content}]
        return Request(asked, record.get("images", ()), metadata=record["id"], videos=record.get("videos", ()))

    def finish(self, record: Record, responses: Sequence[Sequence[Response]]) -> Record:
        """The question with its responses."""
        # Not their tokens: of samples that came together a server says the sum, and those asked again after a kill come alone.
        sampled = [{"text": response.text, "finish_reason": response.finish_reason} for response in responses[0]]
        return {**record, "responses": sampled}


def check_prompt(prompt: str) -> None:
    """Refuse a prompt that has the question not at all, or several times."""
    if prompt.count(QUESTION) != 1:
        raise ValueError(f"Expected a prompt with {QUESTION} once; got {prompt!r}.")


def _around(prompt: str, choices: Sequence[str], question: str) -> list[str]:
    if CHOICES not in prompt:
        if hidden := next((choice for choice in choices if choice not in question), None):
            raise ValueError(f"the text of the question lacks its choice {hidden!r}. Put {CHOICES} into the prompt.")
    elif not choices:
        raise ValueError(f"the prompt has {CHOICES}, and the question has no choices.")
    lines = "\n".join(f"{chr(ord('A') + place)}. {choice}" for place, choice in enumerate(choices))
    return [part.replace(CHOICES, lines) for part in prompt.split(QUESTION)]
