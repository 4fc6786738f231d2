"""How a server goes on from a prefix of the response: found out by the tokens of prompts, or the prompt is rendered here."""

import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from mpo.generation.endpoint import RefusedError, SettingsError
from mpo.generation.generator import Request
from mpo.generation.wire import Kind, chat_fields, read_usage

CONTINUES = {"flag": "goes on from a prefix with continue_final_message", "itself": "goes on from a prefix by itself"}
"""The ways of servers that do, as they are reported."""
_PROBE = "Answer: yes."
"""A prefix whose tokens are twice as many when it is there twice, on two lines."""


async def try_prefix(ask: Callable[[Mapping[str, Any]], Awaitable[Any]], kind: Kind) -> str:
    """Find out, by the tokens of prompts, whether a server goes on from a prefix.

    A turn that is closed has the tokens that close it, and those that open the next one. With P(x) tokens for the prefix x,
    2 P(x) - P(x x) - P() is their number; and where the flag is understood, the prompt with it is shorter than without.

    `ask` sends the fields of a chat request, and returns the response. Returns a key of `CONTINUES`, or why it does not.
    """

    async def tokens(prefix: str | None, *, flag: bool = False) -> int | None:
        fields = chat_fields(kind, Request.ask("Is it?", prefix=prefix), continued=flag)
        return read_usage(await ask({**fields, "max_tokens": 1, "temperature": 0.0}))[0]

    try:
        flagged = await tokens(_PROBE, flag=True)
    except RefusedError:  # an unknown field
        flagged = None
    try:
        plain = await tokens(_PROBE)
        if flagged is not None and plain is not None and flagged < plain:
            return "flag"
        counts = [await tokens(None), plain, await tokens(f"{_PROBE}\n{_PROBE}")]
    except RefusedError as error:
        return f"takes no prefix ({error})"
    if None in counts:
        return "does not say how many tokens a prompt has, so whether it goes on from a prefix is not known"
    none, once, twice = (count or 0 for count in counts)
    return "itself" if 2 * once - twice - none <= 0 else "closes a prefix and starts another turn"


def rendered(request: Request, template: Any) -> str:
    """The prompt of a request without images, with its prefix, by the model's tokenizer or processor."""
    from mpo.batching.logprobs import prompt_record
    from mpo.encoding.turns import render
    from mpo.models.control_tokens import added_start

    text = render(prompt_record(request, "the request"), template, sides=()).prompt
    tokenizer = getattr(template, "tokenizer", template)
    # Servers add the tokens that begin a text, which the template has written already.
    return text.removeprefix(tokenizer.bos_token or "") if added_start(tokenizer) else text


def load_template(template: Any) -> Any:
    """A tokenizer or processor, or that of a folder or name. Raises SettingsError if it holds none."""
    if not isinstance(template, str | os.PathLike):
        return template
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(template)
    except (OSError, ValueError) as error:
        raise SettingsError(f"template={template} holds no tokenizer ({error}). Give the model's folder.") from error
