r"""Find the final answer of a response.

A response states its answer in a form (`Final answer: 7`, `\boxed{7}`, `<answer>7</answer>`, `the answer is 7`, `答案：7`), or is
nothing but the answer, or says it in its conclusion or its first sentence. The last statement counts, as models correct themselves.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from mpo.verification.choices import NEGATED, are_numbers, read_choice
from mpo.verification.dress import boxed, plain_sentence, undress
from mpo.verification.matching import check_rules, is_expression
from mpo.verification.number import find_numbers, read_number
from mpo.verification.prose import ASKS_YEAR, BOLD, CUE, REFUSAL, content_words, numbers_in, sentences_of, stated_number
from mpo.verification.sequences import LETTERED, MARKER, NAMED_RUN, read_boxes, read_intervals
from mpo.verification.texts import read_yes_no

_NO_CHOICE = "its number is that of no choice"
HEAD, TAIL = 20_000, 40_000
"""Of a longer response, only so many characters of its beginning and its end are read."""


@dataclass(frozen=True)
class Extraction:
    """The final answer of a response.

    Attributes:
        answer: the answer as written, without decoration; the letter of a choice; None where there is none.
        method: how it was found: `tag`, `boxed`, `label`, `statement`, `letter`, `whole`, `conclusion`, `opening`, `only`, `none`.
        reason: why there is no answer: `empty`, `unfinished reasoning`, `refusal`, `hedge`, ...; empty where there is one.
    """

    answer: str | None
    method: str
    reason: str = ""


Statement = tuple[int, str, str]
"""Where a response states its answer, the rest of that line, and the method."""
MOST_STATEMENTS = 40
"""Of more statements of one form, the last ones are read."""
_THINKING = re.compile(r"</?(?:think|thinking|thought|reasoning)>|[◁⟨]/?think[▷⟩]", re.IGNORECASE)
_TAG = re.compile(
    r"<(?:answer|final_answer|conclusion)>((?:(?!</?(?:answer|final_answer|conclusion)>)[\s\S]){0,4000})(?:</(?:answer|final_answer|conclusion)>|$)",
    re.IGNORECASE,
)
_FINAL = r"(?:(?:final|correct|right|best|most\s+appropriate|most\s+likely|most\s+accurate)[ \t]{1,3})"
_LABEL = re.compile(
    rf"(?im)(?<![A-Za-z]){_FINAL}{{0,3}}(?:answer|option|choice)(?:[ \t]{{1,3}}(?:to"
    rf"|for)[ \t][^\n:.*]{{1,80}})?[*_\"'`）) \t]{{0,6}}(?:[:：]|[ \t][-–—](?=[ \t]))"
    r"|^[ \t]{0,3}(?:#{1,6}[ \t]*|\*\*)\s?(?:final[ \t]|correct[ \t])?answer[* \t]{0,4}$|^[ \t]{0,3}####[ \t](?=\S{1,60}$)"
    r"|[【\[](?:答案|正确答案)[】\]]|(?:最终|正确|最后)?(?:的)?(?:答案|结果)(?:是|为)?[*\s]{0,4}[:：]|故?选(?:择|项)?[:：]"
)
_STATEMENT = re.compile(
    rf"(?i)(?<![A-Za-z]){_FINAL}{{0,3}}(?:answer|option|choice)s?(?:[ \t]{{1,3}}(?:to|for|of|in|from|that|here"
    rf"|which)\b[^\n.:]{{0,160}}?)?[*\"'”) \t]{{0,6}}[ \t]"
    r"(?:is|are|would[ \t]be|should[ \t]be|must[ \t]be|will[ \t]be|could[ \t]be|may[ \t]be|might[ \t]be|=)(?=[\s:*\"“'(（$\\\[])"
    rf"|(?<![A-Za-z])(?:I|we)(?:[ \t](?:would|will|should|can))?[ \t](?:choose|select|pick|conclude)\b(?:[ \t]that)?"
    r"|(?<![A-Za-z])(?:choose|select|pick)[ \t](?=(?:option|choice|answer|\(?[A-H]\b))"
    r"|(?:正确|最终|最后)?(?:的)?(?:答案|选项|结果)[ \t]?(?:应该|应当|应|就)?(?:是|为|选)|(?:应该?|故|因此|所以|我|就|则|应当)选择?"
    r"|(?<![\u4e00-\u9fff])选择?(?=[\s（(]?[A-HＡ-Ｈ])"
)
_IS_CORRECT = re.compile(
    r"(?im)(?:^|[.!?,;:。，；]\s?|\b(?:so|thus|hence|therefore|is|that|所以|因此)[,，]?[ \t])[*_\"]{0,3}(?:the[ \t])?(?:(?:options?"
    r"|choices?|answers?|选项)[ \t]?)?"
    r"[*(\[（\"]{0,4}(?-i:([A-HＡ-Ｈ]))(?![A-Za-z'’])(?:选?项)?[*)\]）\".:]{0,4}(?:[ \t][^\n.()]{0,60}?[*)\"]{0,3})?[ \t]?"
    r"(?:(?:is|seems|appears|would be|must be)(?:[ \t](?:to be|therefore|thus|also|indeed))?[ \t](?:the[ \t])?(?:only[ \t])?"
    r"(?:correct\b|(?:right|best)[ \t](?:answer|option|choice|one)|most[ \t](?:appropriate|likely|accurate|suitable))"
    r"|(?:是|为)?正确)"
)
_IS_LETTER = re.compile(
    r"(?im)\b(?:is|are)[ \t][*_\"]{0,3}[(（](?-i:([A-HＡ-Ｈ]))[)）][*_\"]{0,3}(?:[.。][*_\"]{0,3}(?=\s|$)|[ \t]*$)"
)
_OPTION = re.compile(
    r"(?i)(?<![\w])(?:option|choice|answer(?:\schoice)?|选项|选择?)[ \t]{0,2}(?:[*(\[（\"]{1,4}([A-Ha-h])\b"
    r"|(?-i:([A-HＡ-Ｈ]))(?![A-Za-z'’]))"
)
_ENDS = re.compile(r"(?<![\d\s.][.])(?<=[.!?])[*_\"')]{0,3}\s+(?=[A-Z*\"'(#])|(?<=[。！？；])")
_OTHERS = re.compile(
    r"(?i)^[\s*]{0,6}(?:not\b|n't\b|wrong|incorrect|different|(?:based|found|given|determined|obtained|clear|as follows"
    r"|because|that (?:it|we))\b|不是|不)"
)
_DOUBT = r"\b(?:doubt|tempt\w+)\b[^\n.,]{0,20}$|\bif\b[^\n.;]{0,160}[,，][^\n.;,]{0,40}\b(?:would|could|might)\b[^\n.;,]{0,20}$"
_OF_OTHERS = re.compile(
    r"(?i)\b(?:other|remaining|incorrect|wrong|available|possible|given|following|all|your"
    r"|possible)[ \t](?:\w{1,12}[ \t]){0,2}(?:answer|option|choice|solution|result)s?\b[^\n]{0,90}$"
    rf"|\b(?:if|not|isn't|cannot)\b[^\n.,]{{0,20}}$|{_DOUBT}"
)
_DESPITE = re.compile(
    r"(?im)^[^.!?\n]{0,200}?(?:can['’]t|cannot|not sure|not certain|unable|sorry)[^.!?\n]{0,200}?[,;]? (?:but|however)\b,? (?=\S)"
)
_CORRECTED = re.compile(
    r"(?m)\b(?i:but|wait|actually|rather|no|on reflection|correction|i mean)\b[,:]?"
    r"(?:[^\n.]{0,60}?(?:\bis|\bbe|['’]s|\boption|,|:|\bchoose))?"
    r"[ \t]\(?([A-H])\)?(?=\W{0,3}$|[.,;]|[ \t](?:is|seems|fits)[ \t](?!not|wrong|incorrect|too))"
)
_HEAD = re.compile(r"[*_\s(]{0,6}([A-HＡ-Ｈ])[*_)]{0,4}(?:[.:、)][*_]{0,3}[ \t][^\n]{1,80}|[.。]?[*_]{0,3})\n\s*\n")
"""A response that begins with a letter, alone in its paragraph."""
_JUDGED = re.compile(
    r"(?im)(?:^\W{0,4}|[;；,，。.]\s?)(?:option |选项)?([A-H])(?![A-Za-z'])[^\n;；，]{0,160}?(?<![A-Za-z])"
    r"(incorrect|not correct|wrong|false|no|correct|right|true|yes|错误|不正确|正确)(?![A-Za-z])"
)
_ENDS_IN_LETTER = re.compile(
    r"(?:\b(?:is|be|say|guess|choose|pick|think)|['’]s|[:：，,]|是|选|so)[ \t]{0,2}[*\"'(（]{0,3}([A-HＡ-Ｈ])[*\"')）]{0,3}[.!。]?$"
)
_EITHER = re.compile(r"\W{0,5}either\b|\W{0,5}\w{1,30} or \w{1,30}\W{0,5}$", re.IGNORECASE)
_MATH = re.compile(r"\$\$?([^$]{1,400})\$\$?|\\\[([^\]]{1,400})\\\]|\\\(((?:[^\\]|\\[^)]){1,400})\\\)")
_BLOCK = re.compile(rf"(?:(?:(?m:^){MARKER}|{LETTERED})(?=\S)[^\n]{{1,200}}(?:\n\s*|$)){{2,}}")
_ITEMS = re.compile(rf"[ \t*_:：]*\n\s*({_BLOCK.pattern})")
_LEADING_CUE = re.compile(rf"^\W{{0,5}}(?:{CUE.pattern})\W{{0,5}}", re.IGNORECASE)
_RANGE = re.compile(
    r"(?i)^\W{0,4}(?:either|between|from)\b|^\W{0,4}[\w.]{1,20}\s?\(?(?:or|/|或者?|to|–|~|至|到)\s?[\w.]{1,20}\W{0,3}(?:$|[.;,])"
)


def extract(response: str, *, kind: str | None = None, choices: Sequence[str] | None = None) -> Extraction:
    r"""Find the final answer of a response.

    Args:
        response: the full text.
        kind: the kind of answer to look for (`MATCHERS`); None for any, or a choice where there are choices.
        choices: the texts of a multiple-choice question's choices, in order: A, B, ...

    Raises:
        ValueError: for an unknown kind, or a response that is no text.

    >>> extract("3 + 4 = 7\nFinal answer: 7").answer, extract("so B is right", choices=["red", "blue"]).answer
    ('7', 'B')
    >>> extract("It could be A or B.", choices=["red", "blue"])
    Extraction(answer=None, method='none', reason='it names several choices')
    """
    check_rules(kind, choices, None)
    if not isinstance(response, str):
        raise ValueError(f"A response is a text; got {type(response).__name__}.")
    return find_answer(response, kind, choices, "")


def find_answer(response: str, kind: str | None, choices: Sequence[str] | None, asked: str) -> Extraction:
    """Do what `extract` does, knowing the question: a number that it gives is the answer only where no other one is."""
    if len(response) > HEAD + TAIL:
        response = f"{response[:HEAD]}\n{response[-TAIL:]}"
    text = re.sub(r"[ \t\u00a0]{2,}", " ", response.replace("\r", "").replace("\x00", " "))
    marks = list(_THINKING.finditer(text))
    if marks:
        if "/" not in marks[-1][0]:
            return _none("unfinished reasoning")
        text = text[marks[-1].end() :]
    kind = kind or ("choice" if choices is not None else None)
    if kind != "choice" or not text.strip():
        return _find(text, kind, choices, asked) if text.strip() else _none("empty")
    found = _judged(text, choices) or _reconsidered(text, choices) or _find(text, kind, choices, asked)
    if choices and found.answer is not None and any(re.fullmatch(r"\W?[A-H]\W?", choice.strip()) for choice in choices):
        return replace(found, answer=choices[ord(found.answer[0]) - 65])  # a letter would be taken for the text of another
    return found


def _none(reason: str) -> Extraction:
    return Extraction(None, "none", reason)


def _named(letter: str | None, choices: Sequence[str] | None, method: str) -> Extraction | None:
    """The choice of a letter; None where there is none of that letter."""
    indices = read_choice(letter, choices).indices if letter else None
    return Extraction(_letters(indices), method) if indices else None


def _judged(text: str, choices: Sequence[str] | None) -> Extraction | None:
    """The choice of a response that begins with its letter, or judges all choices and finds one right."""
    later = _CORRECTED.search(text) or any(
        method in {"tag", "boxed"} or (method != "letter" and re.search("nswer|答案", text[start : start + 40]))
        for start, _, method in _statements(text, "choice")
    )
    if (head := _HEAD.match(text)) and not later and not re.match(r"\W*([A-H])[.:、)]", text[head.end() :]):
        return Extraction(head[1], "letter") if read_choice(_tidy(head[0].strip()), choices).method == "letter" else None
    said = {found[1].upper(): found[2].lower() for found in _JUDGED.finditer(text)}
    right = [letter for letter, word in said.items() if word in {"correct", "right", "true", "yes", "正确"}]
    return _named(right[0], choices, "letter") if len(said) > 2 and len(right) == 1 and not later else None


def _reconsidered(text: str, choices: Sequence[str] | None) -> Extraction | None:
    """The choice of a last `Wait, it is D.`, with no statement after it."""
    weak = re.compile(r"(?:but|no|rather)\b(?!,? wait)", re.IGNORECASE)
    found = next((found for found in reversed(_last(_CORRECTED, text)) if not weak.match(found[0])), None)
    if found is None or any(later.start() > found.end() for pattern in (_LABEL, _STATEMENT) for later in _last(pattern, text)):
        return None
    return _named(found[1], choices, "conclusion")


def _find(text: str, kind: str | None, choices: Sequence[str] | None, asked: str) -> Extraction:
    failed = ""
    for _, stated, method in sorted(_statements(text, kind), key=lambda statement: statement[0], reverse=True):
        if found := _read(stated.strip(), method, kind, choices):
            if found.answer is not None or found.reason in {"hedge", "refusal"}:
                return found
            failed = failed or found.reason
    return _none(failed) if failed else _unstated(text.strip(), kind, choices, asked[-TAIL:])


def _statements(text: str, kind: str | None) -> Iterator[Statement]:
    for found in _last(_TAG, text):
        yield found.start(), found[1], "tag"
    for start, _, content in boxed(text):
        yield start, content, "boxed"
    for pattern, method in ((_LABEL, "label"), (_STATEMENT, "statement")):
        for found in _last(pattern, text):
            if not _OF_OTHERS.search(text[max(0, found.start() - 200) : found.start()] + found[0]):
                block = _ITEMS.match(text, found.end()) if kind == "list" else None
                yield found.start(), block[1] if block else _line_after(text, found.end()), method
    for found in (*_last(_IS_CORRECT, text), *_last(_IS_LETTER, text)) if kind == "choice" else ():
        if found.re is _IS_LETTER or not re.search(r"\b(?:not|n't|neither|if)\b", found[0]):
            yield found.start(), found[1], "letter"


def _last(pattern: re.Pattern[str], text: str) -> deque[re.Match[str]]:
    """The last matches of a pattern."""
    return deque(pattern.finditer(text), maxlen=MOST_STATEMENTS)


def _line_after(text: str, start: int) -> str:
    """The rest of a line, or the next one that has something in it."""
    after = re.sub(r"^(?:[ \t*_:：]|>(?=[ \n]))+", "", text[start : start + 1000])
    after = re.sub(r"^(?:[ \t\n*_:：#]|>(?=[ \n]))+", "", after) if not after or after[0] == "\n" else after
    if after.startswith(("$$", "\\[", "```")):
        return after.split("\n\n", 1)[0]
    return after.split("\n", 1)[0].strip()


def _read(text: str, method: str, kind: str | None, choices: Sequence[str] | None) -> Extraction | None:
    """The answer of a statement; None where it states nothing."""
    if method in {"label", "statement"}:
        if inner := boxed(text):
            text = inner[-1][2]
        elif nested := list(_STATEMENT.finditer(text)) or list(_LABEL.finditer(text)):  # "Final Answer: The final answer is 12"
            text = _line_after(text, nested[-1].end())
    if quoted := re.fullmatch(r"\"([^\"]{1,400})\"\s?[}\],].{0,200}", text):  # JSON
        text = quoted[1]
    if not text or (method == "statement" and _OTHERS.match(text)):
        return None
    if kind == "choice":
        return _choice(text, method, choices)
    sentence = _ENDS.split(text, maxsplit=1)[0].strip() if method in {"label", "statement"} else text
    if REFUSAL.search(sentence):
        return _none("refusal")
    if kind in {"number", "chart", "math"} and (number := _number(sentence, kind)) is not None:
        return Extraction(number, method) if number else _none("hedge")
    if kind in {"number", "yes_no", "box"}:
        said = read_yes_no(sentence) is not None if kind == "yes_no" else kind == "box" and read_boxes(sentence)
        return Extraction(sentence, method) if said else None
    if kind not in {"list", "interval"} and _EITHER.match(sentence) and method != "tag":
        return _none("hedge")
    return Extraction(undress(_trimmed(sentence)), method) if _trimmed(sentence) else None


def _trimmed(sentence: str) -> str:
    kept = re.sub(r"\s*\((?:because|since|as|i\.e\.)[^()]{0,400}\)\s*$", "", sentence.strip())
    return undress(kept).strip(" \t。.;,*_") or sentence.strip()


def _choice(text: str, method: str, choices: Sequence[str] | None) -> Extraction | None:
    if method != "boxed" and (found := _CORRECTED.search(text)) and (chosen := _named(found[1], choices, method)):
        return chosen
    if (doubt := re.search(r"\b(?:but|however|though|although)\b", text)) and REFUSAL.search(_ENDS.split(text[doubt.start() :])[0]):
        return _none("refusal")
    if re.search(r"\(\s?or\b", text[:20]):
        return _none("hedge")
    reason = re.split(r"\b(?:because|since|as|rather than|instead of)\b|\s\(|而不是|[,，]\s?(?:not\b|不是)", text, maxsplit=1)[0]
    if (named := read_choice(_tidy(reason), choices)).method == "letter" and len(named.indices) == 1:
        return Extraction(_letters(named.indices), method)
    for part in (
        undress(text),
        _ENDS.split(text, maxsplit=1)[0],
        re.split(r"[.,;，。；]\s|\bbecause\b|\bsince\b|[。，；]", text, maxsplit=1)[0],
    ):
        if not part.strip():
            continue
        named = read_choice(_tidy(part), choices)
        if named.both and not re.search(r"\b(?:because|since|as|not)\b", part):
            return _none(named.method)
        if len(named.indices) == 1 or (named.indices and choices is None):
            return Extraction(_letters(named.indices), method)
        if "different choices" in named.method:
            return _none(named.method)
    options = {option[1] or option[2] for option in _OPTION.finditer(text)}
    if len(options) == 1 and (chosen := _named(options.pop(), choices, method)):
        return chosen
    if REFUSAL.search(text):
        return _none("refusal")
    return _none(_NO_CHOICE) if method == "boxed" and choices and read_number(text) is not None else None


def _tidy(text: str) -> str:
    text = text.strip().lstrip("*_ ").replace("**", "").replace("\\text", "").replace("\\mathrm", "").replace("~", " ")
    return re.sub(r"^\{([^{}]*)\}$", r"\1", text).strip(" \t")


def _letters(indices: frozenset[int]) -> str:
    return ", ".join(chr(65 + index) for index in sorted(indices))


def _unstated(whole: str, kind: str | None, choices: Sequence[str] | None, asked: str) -> Extraction:
    """The answer of a response that states none in a known form."""
    whole = _DESPITE.sub("", whole) or whole
    if kind == "choice":
        return _unstated_choice(whole, choices, asked)
    kept = sentences_of(whole)
    if kind == "yes_no":
        reconsidered = re.search(r"\b(?:wait|actually|correction)\W{1,4}((?:yes|no)\b.{0,200})", whole, re.IGNORECASE)
        cues = [sentence for sentence in reversed(kept) if CUE.search(sentence)]
        for sentence in (reconsidered[1] if reconsidered else kept[0], *cues, kept[-1]):
            if read_yes_no(_without_cue(sentence)) is not None:
                return Extraction(_without_cue(sentence), "opening" if sentence is kept[0] else "conclusion")
        return _none("it says neither yes nor no")
    if kind == "box":
        return Extraction(whole, "whole") if read_boxes(whole) else _none("there is no box")
    lines = kind == "list" and re.fullmatch(r"(?:[^\n.:：]{1,40}\n+)+[^\n.:：]{1,40}", whole)
    if lines or (kind == "interval" and read_intervals(whole) and not _PROSE.search(whole)):
        return Extraction(whole, "whole")
    if kind == "list" and len(blocks := [*_BLOCK.finditer(whole)]) == 1 and not whole[blocks[0].end() :].strip():
        return Extraction(blocks[0][0].strip(), "conclusion")
    if kind in {"list", "interval"} and len(parts := _SEQUENCE.findall(kept[-1])) == 1:
        return Extraction(parts[0].strip(" $"), "conclusion")
    if kind in {"number", "chart", "math"}:
        if read_number(whole) is not None:
            return Extraction(whole, "whole")
        first, _, later = whole.partition("\n")
        if later and read_number(first) is not None and len(first.split()) < 4 and "=" not in first:
            return Extraction(first, "opening")
        spans = [next(part for part in span.groups() if part) for span in _MATH.finditer(kept[-1])]
        if kind == "math" and spans and is_expression(spans[-1]) and read_number(spans[-1]) is None:
            return Extraction(_value_side(spans[-1]), "conclusion")
        found = _unstated_number(kept, asked)
        if found.answer is not None or kind == "number":
            return found
    if REFUSAL.search(kept[0]) or REFUSAL.search(kept[-1]):
        return _none("refusal")
    if kind not in {"text", "document", "chart"} and (run := NAMED_RUN.search(plain_sentence(kept[-1]).strip(" *"))):
        return Extraction(run[0], "conclusion")
    if kind in {"expression", "math", None} and (spans := list(_MATH.finditer(whole))):
        last = next(part for part in spans[-1].groups() if part).strip()
        return Extraction(_value_side(last), "conclusion")
    if kind in {"expression", "math", None} and _PROSE.search(kept[-1]) and not _OF_VARIABLES.search(kept[-1]):
        if (shown := stated_number(kept[-1])) and is_expression(shown):
            return Extraction(shown, "conclusion")
    if len(kept) == 1 and "\n" not in whole and whole[-1] not in ":：":
        if _EITHER.match(whole):
            return _none("hedge")
        copula = _SAYS.search(whole[-400:]) if len(whole.split()) >= 4 or not whole.isascii() else None
        said = copula[1] if copula and kind in {"text", "document", "chart", "list", "interval"} else whole
        return Extraction(_trimmed(said.replace("**", "")), "opening" if copula else "whole")
    return _none("no statement of an answer")


_OF_VARIABLES = re.compile(r"[-+*/^)\d]\s?=|\d\s?[A-Za-z]\s?=")


def _value_side(equation: str) -> str:
    """The end of a chain of equations with the name it began with; a single equation as it is."""
    sides = [side.strip() for side in re.split(r"(?<![<>!\\=])=(?!=)", equation)]
    chain = len(sides) > 2 and all(sides) and len(sides[0]) < 12 and not re.search(r",|;|\bor\b|\band\b", equation)
    return f"{sides[0]} = {sides[-1]}" if chain else equation


_PROSE = re.compile(r"(?<!\\)\b[A-Za-z]{2,}[,:]?\s+[A-Za-z]{2,}|[\u4e00-\u9fff]")
_SEQUENCE = re.compile(
    r"(?:\\left)?[\[(][^\[\]()\n,，;]{1,40}(?:[,，;][^\[\]()\n,，;]{1,40}){1,50}[\])](?:\s?(?:∪|\\cup|U)\s?(?:\\left)?[\[(][^\[\]()\n]{1,80}[\])]){0,5}"
    r"|[^\s\u4e00-\u9fff$]{1,12}\s?(?:[<>≤≥]|\\[lg]eq?\b)=?\s?[a-z]\s?(?:[<>≤≥]|\\[lg]eq?\b)=?\s?[^\s$.，。]{1,12}"
)
_SAYS = re.compile(r"(?:\b(?:is|are|was|were|reads|says|shows)\s+|[:：]\s?|[是为])((?:[^\s是为]{1,40}\s?){1,8})$")


def _without_cue(sentence: str) -> str:
    """A sentence without its `Therefore,`."""
    found = _LEADING_CUE.match(sentence)
    return sentence[found.end() :] if found else sentence


def _number(sentence: str, kind: str) -> str | None:
    """The number that a statement states; empty where it hedges between two; None where there is none."""
    for text in (sentence.strip("*_ .。"), _trimmed(sentence.replace("**", "").strip())):
        prose = re.search(r"(?<![\\A-Za-z])(?!sin|cos|tan|log|sqrt)[A-Za-z]{3}|[<>≠≤≥±]|\\pm|^\d+\s?[-–]\s?\d+$", text)
        if read_number(text) is not None or (is_expression(text) and not prose):
            return text
    sentence = plain_sentence(sentence)
    if cut := re.match(r"(\W{0,3}\d[\d.,]*)\.\s+[A-Z]", sentence):
        return cut[1]
    found = numbers_in(sentence)
    if re.search(r"\b(?:either|between)\b", sentence[:40], re.IGNORECASE) or _RANGE.match(sentence):
        if len({shown for _, _, shown in found}) > 1:
            return ""
    if re.match(r"\W{0,4}at least\b", sentence):
        return ""
    if len(found) > 1 and re.fullmatch(r"[\d\s.,;/()\[\]-]+", sentence):
        return ""  # "1 3 8" is three numbers
    last = re.split(r"=|≈|\\approx\b", sentence)[-1].strip(" $\\])")
    if read_number(last) is not None:
        return last
    stated = stated_number(sentence)
    if stated and found and found[0][0] <= 3 and not re.match(r"[^=]{0,12}=", sentence[found[0][1] :]):
        return found[0][2]
    return stated


def _unstated_number(sentences: Sequence[str], asked: str) -> Extraction:
    sentences = [plain_sentence(sentence) if not BOLD.search(sentence) else sentence for sentence in sentences]
    numbered = [sentence for sentence in sentences if numbers_in(sentence)]
    if not numbered:
        ends = f"{sentences[0]}\n{sentences[-1]}"
        if re.search(r"\bthere (?:are|is|were|was) (?:no|not any)\b", ends, re.IGNORECASE):
            return Extraction("0", "opening")
        return _none("refusal" if REFUSAL.search(ends) else "no number")

    def value(shown: str | None) -> Fraction | None:
        return number.value if (number := read_number(shown or "")) else None

    def shared(sentence: str) -> int:
        return len(set(content_words(asked)) & set(content_words(sentence)))

    givens = frozenset(given for _, _, shown in find_numbers(asked) if (given := value(shown)) is not None)
    fresh = [sentence for sentence in numbered if any(value(shown) not in givens for _, _, shown in numbers_in(sentence))]
    cues = [sentence for sentence in numbered if CUE.search(sentence)]
    bold = [sentence for sentence in numbered if any(read_number(a or b) or numbers_in(a or b) for a, b in BOLD.findall(sentence))]
    last = (fresh or numbered)[-1]
    year = bool(ASKS_YEAR.search(asked))
    told = {numbered[0], numbered[-1], last, *cues[-1:], *bold[:1], *bold[-1:]}
    said = {sentence: stated_number(sentence, givens, year=year) for sentence in told}
    steps = re.match(r"\W{0,4}(?:step\s?)?\d{1,2}[.):]", sentences[0], re.IGNORECASE)
    before = re.match(r"\W*(?:initially|originally|at first|at the start)\b", sentences[0], re.IGNORECASE)
    opens = not steps and not before and numbered[0] is sentences[0] and bool(said[numbered[0]])
    opens = opens and (fresh[:1] == numbered[:1] or len(numbered) == 1)
    if bold and bold[0] is sentences[0] and not any(sentence in bold for sentence in cues if sentence is not sentences[0]):
        chosen, method = bold[0], "opening"
    elif opens and value(said[numbered[0]]) == value(said[numbered[-1]]) is not None:
        chosen, method = numbered[0], "opening"
    elif cues or bold:
        chosen, method = (cues or bold)[-1], "conclusion"
    elif opens and not ("=" in last and "=" not in numbered[0]) and shared(last) <= shared(numbered[0]):
        chosen, method = numbered[0], "opening"
    else:
        chosen, method = last, "conclusion"
    example = re.match(r"(?:for (?:instance|example)|suppose)\b", chosen, re.IGNORECASE)
    if REFUSAL.search(chosen) or example or (REFUSAL.search(sentences[0]) and not cues):
        return _none("refusal")
    shown = said[chosen]
    return Extraction(shown, method) if shown else _none("hedge" if shown == "" else "no number")


def _unstated_choice(whole: str, choices: Sequence[str] | None, asked: str) -> Extraction:
    first = whole.split("\n", 1)[0]
    kept = sentences_of(whole)
    if re.search(r"(?<!\w)\(?[A-H]\)?\s(?:or|and)\s(?:option\s)?\(?[A-H]\)?(?!\w)", kept[-1]):
        return _none("it names several choices")
    listed = len(set(re.findall(r"(?m)^\W{0,4}([A-H])[).:、]", whole))) > 1  # it repeats the choices
    named = read_choice(_tidy(whole if len(kept) == 1 else first), choices)
    if (named.both or (choices and len(named.indices) > 1)) and len(kept) == 1:
        return _none(named.method)
    if len(named.indices) == 1 and named.method == "letter" and not listed:
        return Extraction(_letters(named.indices), "letter")
    last = read_choice(_tidy(kept[-1]), choices)
    if not listed and last.method == "letter" and len(last.indices) == 1:
        return Extraction(_letters(last.indices), "letter")
    denied = re.compile(r"\bnot\b|n['’]t\b|incorrect|wrong|不")
    around = [(found[1] or found[2], whole[found.end() :][:30] + whole[: found.start()][-12:]) for found in _OPTION.finditer(whole)]
    options = [letter for letter, beside in around if not denied.search(beside)]
    if len({letter.upper() for letter in options}) == 1 and (chosen := _named(options[0], choices, "letter")):
        return chosen
    if (
        (found := _ENDS_IN_LETTER.search(kept[-1]))
        and not REFUSAL.search(kept[-1])
        and not NEGATED.search(kept[-1][max(0, found.start() - 12) : found.start(1)].replace("，", ",").rpartition(",")[2])
        and not re.search(_DOUBT, kept[-1][: found.start(1)].rstrip(" *(\"'"), re.IGNORECASE)
        and (chosen := _named(found[1], choices, "conclusion"))
    ):
        return chosen
    if not choices:
        return _none("refusal" if REFUSAL.search(kept[0]) else "no letter")
    if are_numbers(choices):
        number = _unstated_number(kept, asked)
        return _named(number.answer, choices, number.method) or _none(number.reason or _NO_CHOICE)
    cues = [sentence for sentence in reversed(kept) if CUE.search(sentence)]
    several = ""
    places = (*((sentence, "conclusion") for sentence in cues), (kept[-1], "conclusion"), (kept[0], "opening"))
    for methods in ({"letter", "text"}, {"words"}):  # what it says before what it paraphrases
        for sentence, method in places:
            named = read_choice(_tidy(_without_cue(sentence)), choices)
            if REFUSAL.search(sentence):
                continue
            if len(named.indices) == 1 and named.method in methods:
                return Extraction(_letters(named.indices), method)
            several = several or (named.method if named.both else "")
    if REFUSAL.search(kept[0]) or REFUSAL.search(kept[-1]):
        return _none("refusal")
    if several:
        return _none(several)
    plain = (_tidy(sentence) for sentence in kept[:200] if not REFUSAL.search(sentence))
    indices = frozenset().union(*(read_choice(sentence, choices).indices for sentence in plain))
    if len(indices) == 1:
        return Extraction(_letters(indices), "only")
    return _none("it names several choices" if indices else "it names no choice")
