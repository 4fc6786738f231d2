"""Answers to look at: refusals, and answers that stop half-way. They are found by their form, and some wrongly."""

from __future__ import annotations

import re

REFUSALS = (
    r"i(?:'m| am) (?:really |very |so )?sorry,? (?:but )?(?:i|as an)\b",
    r"(?:sorry|apologies|unfortunately),? (?:but )?i (?:can(?:'t|not)|am (?:not able|unable)|do(?:n't| not) have)",
    r"i (?:can(?:'t|not)|am (?:not able|unable) to|won't) (?:assist|help|answer|provide|comply|fulfil|see|view|process|identify)",
    r"as an? (?:ai|artificial intelligence|(?:large )?language model)\b",
    r"i do(?:n't| not) have (?:access to|the ability to)",
    r"我(?:无法|不能)(?:回答|提供|协助|帮助|查看|看到)",
    r"(?:抱歉|对不起)[,,]?\s*我(?:无法|不能)",
    r"作为(?:一个|一名)?(?:人工智能|ai|语言模型)",
)
_REFUSAL = re.compile("|".join(REFUSALS), re.IGNORECASE)
REFUSAL_WITHIN = 160
"""Characters from the start in which a refusal begins; later on, such words are mostly part of an answer."""

ENDS = ".!?。！？…．:;\"'”’」』)]}）】>*`|$~_%°"
"""What a finished answer may end with."""
OPEN_WORDS = frozenset(
    "a an the and or but so of to in on at by for with from as is are was were be that which this these than then "
    "because if when while where it its their his her our your we can will would should".split()
)
"""Words that no sentence ends with."""
LONG_LINE = 8
"""Words of a last line that is a sentence rather than an item or a name."""
_ANSWER_LINE = re.compile(r"answer\b.{0,20}[:：]|答案", re.IGNORECASE)


def refusal(answer: str) -> str | None:
    """The words with which an answer refuses, or None.

    >>> refusal("I'm sorry, but I can't see the image.")
    "I'm sorry, but I"
    >>> refusal("The sign says sorry.")
    """
    found = _REFUSAL.search(answer[:REFUSAL_WITHIN].replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
    return None if found is None else found.group()


def unfinished(answer: str) -> str | None:
    r"""Why an answer looks cut off, or None.

    >>> unfinished("So the area is \\boxed{12")
    'a \\boxed{ that is not closed'
    >>> unfinished("First we look at the height of the bar and the")
    "ends with 'the'"
    >>> unfinished("Two and three make five.\nFinal answer: 5")
    """
    text = answer.rstrip()
    if _open_box(text):
        return r"a \boxed{ that is not closed"
    if text.count("```") % 2:
        return "a ``` that is not closed"
    if text.count("<think>") > text.count("</think>"):
        return "a <think> that is not closed"
    if not text or text[-1] in ENDS:
        return None
    last = text.rsplit("\n", 1)[-1]
    words = last.split()
    if text[-1] in ",，、" or (len(text.split()) > 1 and words[-1].lower() in OPEN_WORDS):
        return f"ends with {words[-1]!r}"
    if len(words) > LONG_LINE and not _ANSWER_LINE.search(last):
        return f"its last sentence has no end: ...{last[-40:]!r}"
    return None


def _open_box(text: str) -> bool:
    start = text.rfind(r"\boxed{")
    if start < 0:
        return False
    depth = 0
    for character in text[start + len(r"\boxed") :]:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if not depth:
            return False
    return True
