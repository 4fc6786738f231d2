"""The strict format of InternVL's data pipeline; a response without it is a wrong-format negative, whatever it answers."""

from __future__ import annotations

from dataclasses import dataclass

TRIGGERS = ("Final answer:", "Final Answer:", "答案:", "答案：")
"""The phrases that introduce the final answer."""


@dataclass(frozen=True)
class ParsedResponse:
    """A response, split into rationale and final answer.

    Attributes:
        rationale: the reasoning before the final answer, without surrounding white space.
        answer: the final answer, one line, without surrounding white space.
    """

    rationale: str
    answer: str


def parse_response(response: str) -> ParsedResponse | None:
    r"""Parse a response that ends in a line `Final answer: ...`.

    The rules are those of the `en` prompt in InternVL's reasoning data pipeline (`utils/accuracy_reward.py`): one trigger, once or
    twice (the last one counts); at least two line breaks; reasoning before the trigger; one line after it.

    Args:
        response: the full text of the response.

    Returns:
        The parts, or None for a response of another format, which pairing treats as a wrong-format negative.

    >>> parse_response("The digits are 3 4\n3 + 4 = 7\nFinal answer: 7")
    ParsedResponse(rationale='The digits are 3 4\n3 + 4 = 7', answer='7')
    >>> parse_response("7") is None
    True
    """
    trigger = next((trigger for trigger in TRIGGERS if trigger in response), None)
    if trigger is None or response.count(trigger) > 2 or response.count("\n") < 2:
        return None
    rationale, answer = (part.strip() for part in response.rsplit(trigger, maxsplit=1))
    if not rationale or not answer or "\n" in answer:
        return None
    return ParsedResponse(rationale, answer)
