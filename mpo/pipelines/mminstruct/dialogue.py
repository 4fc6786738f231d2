"""What is wrong with a round of a dialogue, beside what is wrong with any instruction."""

from __future__ import annotations

import re

from mpo.data.similar import normalised
from mpo.pipelines.mminstruct.generate import question_key, same_answer
from mpo.pipelines.mminstruct.language import CJK, IDEOGRAPHS, found_in, words
from mpo.pipelines.step import Record

_WORD = re.compile(f"{CJK.pattern}|[^\\W{IDEOGRAPHS}]+")
_JOINING = r"(?:is|are|was|were|has|have|had|shows?|reads?|says?)"
_NEAR = rf"(?:\s+(?!(?:and|or|with|of|in|on|at|by|to|from|is|are)\b|{_JOINING}\b)\w+)?\s+"


def find_round_fault(item: Record) -> str | None:
    """Why a round of a dialogue cannot be used: its kind, a colon, and the reason; None for a good one.

    The first one stands by itself. A later one asks what no earlier one has asked, and nothing that was said before: it needs the
    image too.

    Args:
        item: with ``type``, ``question``, ``answer`` and ``earlier``, the rounds before it with the same fields.

    >>> first = {"type": "short", "question": "What colour is the car?", "answer": "red"}
    >>> find_round_fault({"type": "judgement", "question": "Is the car red?", "answer": "Yes", "earlier": [first]})
    "leak: an earlier round says that: 'red'"
    """
    question, answer, earlier = item["question"], item["answer"], item.get("earlier") or []
    if not earlier:
        of_nothing = found_in(question, "of_earlier") or (found_in(question, "pronoun") if not content(question) else None)
        return f"dialogue: the first round speaks of something earlier ({of_nothing.strip()!r})" if of_nothing else None
    key = question_key(question, loose=True)
    for one in earlier:
        same = key == question_key(one["question"], loose=True)
        if same and (item["type"] == "long" or same_answer(answer, one["answer"])):
            return "repeat: an earlier round asks the same"
        if same and one is earlier[-1]:
            return f"contradiction: the round before has the same question and the answer {one['answer']!r:.60}"
        if item["type"] == "judgement" and one["type"] == "short" and _says(one, question):
            return f"leak: an earlier round says that: {one['answer']!r:.60}"
    if item["type"] == "short":
        for text in (text for one in earlier for text in (one["question"], one["answer"])):
            if said := said_beside(answer, question, text):
                return f"leak: an earlier round says the answer: {said!r:.60}"
    return None


def content(question: str) -> list[str]:
    """The words of a question that say what it is about, characters in Chinese."""
    plain = CJK.sub(" ", question_key(question, loose=True)).split()
    rest = "".join(CJK.findall(question_key(question, loose=True)))
    for one in sorted(words("general_zh"), key=len, reverse=True):
        rest = rest.replace(one, "")
    return [*(word for word in plain if word not in words("general")), *rest]


def _says(one: Record, question: str) -> bool:
    """Whether a judgement asks no more than what a round says: its words, and its answer."""
    asked, before, said = {*content(question)}, {*content(one["question"])}, {*content(one["answer"])}
    return bool(before) and before <= asked <= before | said and bool(said & asked)


def said_beside(answer: str, question: str, text: str) -> str | None:
    """Where a text has an answer beside a word of the question: "red car", "the car is red"."""
    said = re.sub(r"^(?:an?|the) (?=\w)", "", normalised(answer))
    if not said or said not in normalised(text) or said in ("a", "i") or (CJK.search(said) and len(said) < 2):
        return None
    named = [word for word in content(question) if not CJK.match(word) and word not in said.split()]
    characters = "".join(word for word in content(question) if CJK.match(word))
    pairs = {characters[at : at + 2] for at in range(len(characters) - 1)} - {said}
    patterns = [
        rf"\b{re.escape(said)}{_NEAR}{re.escape(word)}\b|\b{re.escape(word)}\s+{_JOINING}\s+(?:an? |the )?{re.escape(said)}\b"
        for word in named
    ]
    patterns += [rf"\b(?:is|are|was|were) (?:the )?{re.escape(word)} {re.escape(said)}\b" for word in named[: len(named) == 1]]
    patterns += [f"{re.escape(said)}[个只张根条名位辆棵种幅枚]?的?{pair}|{pair}[是为有]?{re.escape(said)}" for pair in pairs]
    clauses = [normalised(clause) for clause in re.split(r"[.,;:!?。，；：！？、\n]+", text)]
    return next((found[0] for one in patterns for clause in clauses if (found := re.search(one, clause))), None)
