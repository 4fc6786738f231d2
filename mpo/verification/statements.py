r"""Answers that a response states in a form: `Final answer: 7`, `\boxed{7}`, `<answer>7</answer>`, `the answer is 7`, `答案：7`."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mpo.verification.choices import read_choice
from mpo.verification.dress import boxed, plain_sentence, undress
from mpo.verification.matching import is_expression
from mpo.verification.number import read_number
from mpo.verification.prose import HEDGE, REFUSAL, numbers_in, stated_number
from mpo.verification.sequences import LETTERED, MARKER, read_boxes
from mpo.verification.texts import read_yes_no

NO_CHOICE = "its number is that of no choice"
Statement = tuple[int, str, str]
"""Where a response states its answer, the rest of that line, and the method."""
MOST_STATEMENTS = 40
"""Of more statements of one form, the last ones are read."""
_TAG = re.compile(
    r"(?i)<(?:answer|final_answer|conclusion)>((?:(?!</?(?:answer|final_answer|conclusion)>)[\s\S]){0,4000})(?:</(?:answer|final_answer|conclusion)>|$)"
)
_FINAL = r"(?:(?:final|correct|right|best|most\s+appropriate|most\s+likely|most\s+accurate)[ \t]{1,3})"
LABEL = re.compile(
    rf"(?im)(?<![A-Za-z]){_FINAL}{{0,3}}(?:answer|option|choice)(?:[ \t](?:letter|choice|option))?(?:[ \t]{{1,3}}(?:to"
    rf"|for)[ \t][^\n:.*]{{1,80}})?[*_\"'`）) \t]{{0,6}}(?:[:：]|[ \t][-–—](?=[ \t]))"
    r"|^[ \t]{0,3}(?:#{1,6}[ \t]*)?\*{0,2}conclusion\*{0,2}[:：]"
    r"|^[ \t]{0,3}(?:#{1,6}[ \t]*|\*\*)\s?(?:final[ \t]|correct[ \t])?answer[* \t]{0,4}$|^[ \t]{0,3}####[ \t](?=\S{1,60}$)"
    r"|[【\[](?:答案|正确答案|(?:final )?answer)[】\]]"
    r"|(?:最终|正确|最后)?(?:的)?(?:答案|结果)(?:是|为)?[*\s]{0,4}[:：]|故?选(?:择|项)?[:：]"
)
STATEMENT = re.compile(
    rf"(?i)(?<![A-Za-z]){_FINAL}{{0,3}}(?:answer|option|choice)s?(?:[ \t](?:letter|choice|option))?"
    rf"(?:[ \t]{{1,3}}(?:to|for|of|in|from|that|here|which)\b[^\n.:]{{0,160}}?)?[*\"'”) \t]{{0,6}}[ \t]"
    r"(?:is|are|would[ \t]be|should[ \t]be|must[ \t]be|will[ \t]be|could[ \t]be|may[ \t]be|might[ \t]be|=)(?=[\s:*\"“'(（$\\\[])"
    rf"|(?<![A-Za-z])(?:I|we)(?:[ \t](?:would|will|should|can))?[ \t](?:choose|select|pick|conclude)\b(?:[ \t]that)?"
    r"|(?<![A-Za-z])(?:chang|switch|revis|correct)(?:e|ing)?[ \t](?:my|the)[ \t](?:final[ \t])?answer[ \t]to\b"
    r"|(?<![A-Za-z])(?:choose|select|pick)[ \t](?=(?:option|choice|answer|\(?[A-J]\b))"
    r"|(?:正确|最终|最后)?(?:的)?(?:答案|选项|结果)[ \t]?(?:应该|应当|应|就)?(?:是|为|选)|(?:应该?|故|因此|所以|我|就|则|应当)选择?"
    r"|(?<![\u4e00-\u9fff])选择?(?=[\s（(]?[A-J])|(?:错误|不?正确|不?符合)[^，。\n]{0,8}的是(?=\s?[A-J](?:[。\n]|$))"
)
_A = re.compile(r"(?m)^[ \t*]{0,4}A(?:ns|nswer)?\.?[*]{0,2}[:：][*]{0,2}[ \t]*(?=\S)([^\n]{1,80})$")
"""The line of an answer in a text of questions (`Q:`) and answers; of a choice it would be the first one."""
_IS_CORRECT = re.compile(
    r"(?im)(?:^|[.!?,;:。，；]\s?|\b(?:so|thus|hence|therefore|is|that|think|believe|but|所以|因此)[,，]?[ \t])"
    r"[*_\"]{0,3}(?:the[ \t])?(?:(?:options?|choices?|answers?|选项)[ \t]?)?"
    r"[*(\[（\"]{0,4}(?-i:([A-H]|[IJ](?! (?!is\b)[a-z])))(?![A-Za-z'’])(?:选?项)?"
    r"[*)\]）\".:]{0,4}(?:[ \t][^\n.()]{0,60}?[*)\"]{0,3})?[ \t]?"
    r"(?:(?:is|seems|appears|would be|must be)(?:[ \t](?:to be|therefore|thus|also|indeed))?[ \t](?:(?:the|my)[ \t])?(?:only[ \t])?"
    r"(?:(?:correct|answer)\b|one(?=[.!]|$)|(?:right|best)(?=[.,;!。]|$|[ \t](?:answer|option|choice|one|here|because|since)\b)"
    r"|most[ \t](?:appropriate|likely|accurate|suitable))"
    r"|(?:fits|matches)[ \t](?:better|best)\b|(?:是|为)?正确)"
    r"(?![ \t](?:(?:is|are|seems)[ \t](?:false|wrong|incorrect|not)|(?:only[ \t])?if)\b)"
)
_IS_LETTER = re.compile(r"(?im)\b(?:is|are)[ \t][*_\"]{0,3}[(（](?-i:([A-J]))[)）][*_\"]{0,3}(?:[.。][*_\"]{0,3}(?=\s|$)|[ \t]*$)")
OPTION = re.compile(
    r"(?i)(?<![\w])(?:option|choice|answer(?:\schoice)?|letter|选项|选择?)[ \t]{0,2}(?:[*(\[（\"]{1,4}([A-Ja-j])\b"
    r"|(?-i:([A-H]|[IJ](?! (?!is\b)[a-z])))(?![A-Za-z'’]))"
)
_ENDS = re.compile(r"(?<![\d\s.][.])(?<=[.!?])[*_\"')]{0,3}\s+(?=[A-Z*\"'(#])|(?<=[。！？；])")
_TITLE = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|Mt|Ft|Gen|Col|Lt|Sgt|Capt|Rev|Gov|Sen|vs|Fig|Vol|Dept)\.$")
_INITIAL = re.compile(r"\b(?:[A-Z]|Inc|Ltd|Co|Corp|Jr|Sr)\.$")
_NAME = re.compile(r"(?:[A-Z][\w'’-]*\.?\s){0,3}[A-Z][\w'’-]+(?:[.,;!?)\"*]|$)")
_OTHERS = re.compile(
    r"(?i)^[\s*]{0,6}(?:not\b|n't\b|wrong|incorrect|different|(?:based|found|given|determined|obtained|clear|as follows"
    r"|because|that (?:it|we))\b|不是|不)"
)
DOUBT = r"(?:\bnot|n['’]t)[ \t](?:think|believe|say|agree)\b[^\n.,]{0,40}$|\b(?:doubt|tempt\w+)\b[^\n.,]{0,20}$"
DOUBT += r"|\bif\b[^\n.;]{0,160}[,，][^\n.;,]{0,40}\b(?:would|could|might)\b[^\n.;,]{0,20}$"
_OF_OTHERS = re.compile(
    r"(?i)\b(?:other|remaining|incorrect|wrong|available|possible|given|following|all|your"
    r"|possible)[ \t](?:\w{1,12}[ \t]){0,2}(?:answer|option|choice|solution|result)s?\b[^\n]{0,90}$"
    r"|\b(?:if|not|isn't|cannot)\b[^\n.,]{0,20}$"
    rf"|不(?:应该?|应当|能|会|可以)选择?$|{DOUBT}"
)
CORRECTED = re.compile(
    r"(?m)(?:\b(?i:but|wait|actually|rather|no|on reflection|correction|i mean(?:t)?|scratch that)\b[,:]?"
    r"(?:[^\n.]{0,60}?(?:\bis|\bbe|['’]s|\boption|,|:|\bchoose)|[^\n]{0,200}?\b(?:so|hence|thus|therefore))?[ \t]"
    r"|(?:不对|等等|更正|其实)[^\n]{0,30}?[是为选][ \t]?)"
    r"\(?([A-J])\)?(?=\W{0,3}$|[.,;:，。；]|[ \t](?:is|seems|fits)[ \t](?!not|wrong|incorrect|too))"
)
EITHER = re.compile(
    r"\W{0,5}either\b|\W{0,5}\w{1,30} or \w{1,30}\W{0,5}$|[^.\n]{1,200}\bif\b[^.\n]{1,200}\b(?:otherwise|else)\b", re.IGNORECASE
)
_OPENING_MATH = re.compile(r"\$([^$]{1,400})\$(?=[.,;]?(?:\s+[A-Z]|\s*$))")
_PROSE = re.compile(r"(?<![\\{A-Za-z])[A-Za-z]{3}|[<>≠≤≥±]|\\pm|\\(?:text|mathrm)\{[^{}]*[A-Za-z]{2} [A-Za-z]{2}")
BLOCK = re.compile(rf"(?:(?:(?m:^){MARKER}|{LETTERED})(?=\S)[^\n]{{1,200}}(?:\n\s*|$)){{2,}}")
_ITEMS = re.compile(rf"[ \t*_:：]*\n\s*({BLOCK.pattern})")
_LETTERS = re.compile(r"[*_\s]{0,4}[(（]?[A-J][)）]?(?:\s?[,，、/&]\s?(?:and |or )?| and | or )[(（]?[A-J](?:[)）,，、]|$| and )")
_RANGE = re.compile(
    r"(?i)^\W{0,4}(?:either|between|from)\b|^\W{0,4}[\w.]{1,20}\s?\(?(?:or|/|或者?|to|–|~|至|到)\s?[\w.]{1,20}\W{0,3}(?:$|[.;,])"
)


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


def no_answer(reason: str) -> Extraction:
    """That there is no answer, and why."""
    return Extraction(None, "none", reason)


def named_choice(letter: str | None, choices: Sequence[str] | None, method: str) -> Extraction | None:
    """The choice of a letter; None where there is none of that letter."""
    indices = read_choice(letter, choices).indices if letter else None
    return Extraction(letters_of(indices), method) if indices else None


def statements(text: str, kind: str | None) -> Iterator[Statement]:
    """The places where a response states an answer."""
    for found in last_matches(_TAG, text):
        yield found.start(), found[1], "tag"
    for start, _, content in boxed(text):
        if not re.search(r"\bnot[ $]{1,3}$", text[max(0, start - 6) : start]):
            yield start, content, "boxed"
    for found in last_matches(_A, text) if kind != "choice" else ():
        yield found.start(), found[1], "label"
    for pattern, method in ((LABEL, "label"), (STATEMENT, "statement")):
        for found in last_matches(pattern, text):
            only_if = "would" in found[0] and re.match(r"[^.\n]{0,60}\bif\b", text[found.end() : found.end() + 80])
            if not only_if and not _OF_OTHERS.search(text[max(0, found.start() - 200) : found.start()] + found[0]):
                block = _ITEMS.match(text, found.end()) if kind == "list" else None
                yield found.start(), block[1] if block else _line_after(text, found.end()), method
    for found in (*last_matches(_IS_CORRECT, text), *last_matches(_IS_LETTER, text)) if kind == "choice" else ():
        none = re.search(r"\bnone of\b[^.;]*$", text[max(0, found.start() - 40) : found.start(1)])
        if found.re is _IS_LETTER or not (none or re.search(r"\b(?:not|n't|neither|if)\b", found[0])):
            yield found.start(), f"({found[1]})", "letter"


def last_matches(pattern: re.Pattern[str], text: str) -> deque[re.Match[str]]:
    """The last matches of a pattern."""
    return deque(pattern.finditer(text), maxlen=MOST_STATEMENTS)


def _line_after(text: str, start: int) -> str:
    after = re.sub(r"^(?:[ \t*_:：]|>(?=[ \n]))+", "", text[start : start + 1000])
    after = re.sub(r"^(?:[ \t\n*_:：#]|>(?=[ \n]))+", "", after) if not after or after[0] == "\n" else after
    if after.startswith(("$$", "\\[", "```")):
        return after.split("\n\n", 1)[0]
    return re.sub(r"^([^{}]+)\}.*", r"\1", after.split("\n", 1)[0]).strip()  # \text{Answer: B}


def read_statement(text: str, method: str, kind: str | None, choices: Sequence[str] | None) -> Extraction | None:
    """The answer of a statement; None where it states nothing."""
    if method in {"label", "statement"}:
        if inner := boxed(text):
            text = inner[-1][2]
        elif nested := list(STATEMENT.finditer(text)) or list(LABEL.finditer(text)):  # "Final Answer: The final answer is 12"
            text = _line_after(text, nested[-1].end())
    if quoted := re.fullmatch(r"\"([^\"]{1,400})\"\s?[}\],].{0,200}", text):  # JSON
        text = quoted[1]
    if not text or (method == "statement" and _OTHERS.match(text)):
        return None
    if kind == "choice":
        return _choice(text, method, choices)
    sentence = _first_sentence(text).strip() if method in {"label", "statement"} else text
    if REFUSAL.search(sentence):
        return no_answer("refusal")
    opening = _OPENING_MATH.match(text)
    whole = opening[1] if opening else text
    if kind == "math" and (opening or method == "boxed") and not _PROSE.search(whole) and not EITHER.match(whole):
        return Extraction(undress(trimmed(whole)), method)
    if kind in {"number", "chart", "math"} and (number := _number(sentence)) is not None:
        return Extraction(number, method) if number else no_answer("hedge")
    if kind in {"number", "yes_no", "box"}:
        said = read_yes_no(sentence) is not None if kind == "yes_no" else kind == "box" and read_boxes(sentence)
        return Extraction(sentence, method) if said else None
    if kind not in {"list", "interval"} and EITHER.match(sentence) and method != "tag":
        return no_answer("hedge")
    return Extraction(undress(trimmed(sentence)), method) if trimmed(sentence) else None


def _first_sentence(text: str) -> str:
    """The first sentence of a text, which does not end after a title (`St. Louis`) or the initials of a name (`T.F. Riehl`)."""
    for end in _ENDS.finditer(text):
        before = text[: end.start()]
        if not (_TITLE.search(before) or (_INITIAL.search(before) and _NAME.match(text, end.end()))):
            return before
    return text


def trimmed(sentence: str) -> str:
    """An answer without a reason in brackets, decoration and the full stop."""
    kept = re.sub(r"\s*\((?:because|since|as|i\.e\.|approx\w*|about|rounded|see)(?![\w(])[^()]{0,400}\)\s*$", "", sentence.strip())
    kept = undress(kept).strip(" \t。.;,*_")
    return HEDGE.sub("", kept) or kept or sentence.strip()


def _choice(text: str, method: str, choices: Sequence[str] | None) -> Extraction | None:
    if method != "boxed" and (found := CORRECTED.search(text)) and (chosen := named_choice(found[1], choices, method)):
        return chosen
    if (doubt := re.search(r"\b(?:but|however|though|although)\b", text)) and REFUSAL.search(_ENDS.split(text[doubt.start() :])[0]):
        return no_answer("refusal")
    if re.search(r"\(\s?or\b", text[:20]):
        return no_answer("hedge")
    first = _ENDS.split(text, maxsplit=1)[0]
    if choices and (_LETTERS.match(text) or read_choice(tidy(first), choices).method == "letters"):
        return no_answer("it names several choices")
    reason = re.split(r"\b(?:because|since|as|rather than|instead of)\b|\s\(|而不是|[,，]\s?(?:not\b|不是)", text, maxsplit=1)[0]
    if (named := read_choice(tidy(reason), choices)).method == "letter" and len(named.indices) == 1:
        return Extraction(letters_of(named.indices), method)
    clause = re.split(r"[.,;，。；]\s|\bbecause\b|\bsince\b|[。，；]", text, maxsplit=1)[0]
    for part in filter(str.strip, (undress(text.rstrip(" .。")), first, clause)):
        named = read_choice(tidy(part), choices)
        if named.both and not re.search(r"\b(?:because|since|as|not)\b", part):
            return no_answer(named.method)
        if len(named.indices) == 1 or (named.indices and choices is None):
            return Extraction(letters_of(named.indices), method)
        if "different choices" in named.method:
            return no_answer(named.method)
    options = {option[1] or option[2] for option in OPTION.finditer(text)}
    if len(options) == 1 and (chosen := named_choice(f"({options.pop()})", choices, method)):
        return chosen
    if REFUSAL.search(text):
        return no_answer("refusal")
    return no_answer(NO_CHOICE) if method == "boxed" and choices and read_number(text) is not None else None


def tidy(text: str) -> str:
    """A text without what is set around a letter."""
    text = re.sub(r"\\(?:text(?:bf|it|rm)?|math(?:bf|it|rm))\s?\{([^{}]*)\}", r"\1", text)
    text = text.strip().lstrip("*_ ").replace("**", "").replace("\\text", "").replace("\\mathrm", "").replace("~", " ")
    return re.sub(r"^\{([^{}]*)\}$", r"\1", text).strip(" \t")


def letters_of(indices: frozenset[int]) -> str:
    """The letters of choices."""
    return ", ".join(chr(65 + index) for index in sorted(indices))


def _number(sentence: str) -> str | None:
    """The number that a statement states; empty where it hedges between two; None where there is none."""
    for text in (trimmed(sentence.replace("**", "").strip()), sentence.strip("*_ .。")):
        prose = re.search(r"(?<![\\A-Za-z])(?!sin|cos|tan|log|sqrt)[A-Za-z]{3}|[<>≠≤≥±]|\\pm|^\d+\s?[-–]\s?\d+$", text)
        if read_number(text) is not None or (is_expression(text) and not prose):
            return text
    sentence = plain_sentence(sentence)
    if cut := re.match(r"(\W{0,3}\d[\d.,]*)\.\s+[A-Z]", sentence):
        return cut[1]
    found = numbers_in(sentence)
    ranged = re.search(r"(?i)\b(?:either|between)\b", sentence[:40]) or _RANGE.match(sentence) or EITHER.match(sentence)
    several = len(found) > 1 and re.fullmatch(r"[\d\s.,;/()\[\]-]+", sentence)  # "1 3 8" is three numbers
    if several or (ranged and len({shown for _, _, shown in found}) > 1) or re.match(r"\W{0,4}at least\b", sentence):
        return ""
    last = re.split(r"=|≈|\\approx\b", sentence)[-1].strip(" $\\])")
    if read_number(last) is not None:
        return last
    stated = stated_number(sentence)
    if stated and found and found[0][0] <= 3 and not re.match(r"[^=]{0,12}=", sentence[found[0][1] :]):
        return found[0][2]
    return stated
