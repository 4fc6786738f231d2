"""Find completions to inspect: refusals and unfinished texts. The rules look at the form of the text and are sometimes wrong."""

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
"""Number of first characters in which a refusal must begin; later, such words are usually part of a completion."""

ENDS = ".!?。！？…．:;\"'”’」』)]}）】>*`|$~_%°"
"""Characters that a finished completion may end with."""
OPEN_WORDS = frozenset(
    "a an the and or but so of to in on at by for with from as is are was were be that which this these than then "
    "because if when while where it its their his her our your we can will would should".split()
)
"""Words that no sentence ends with."""
LONG_LINE = 8
"""Number of words above which a last line is a sentence and not a list item or a name."""
_ANSWER_LINE = re.compile(r"answer\b.{0,20}[:：]|答案", re.IGNORECASE)


def refusal(completion: str) -> str | None:
    """Return the words with which a completion refuses, or None.

    >>> refusal("I'm sorry, but I can't see the image.")
    "I'm sorry, but I"
    >>> refusal("The sign says sorry.")
    """
    found = _REFUSAL.search(completion[:REFUSAL_WITHIN].replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
    return None if found is None else found.group()


def unfinished(completion: str) -> str | None:
    r"""Return the reason why a completion looks unfinished, or None.

    >>> unfinished("So the area is \\boxed{12")
    'a \\boxed{ that is not closed'
    >>> unfinished("First we look at the height of the bar and the")
    "ends with 'the'"
    >>> unfinished("Two and three make five.\nFinal answer: 5")
    """
    text = completion.rstrip()
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
