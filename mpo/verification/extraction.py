r"""Find the final answer of a response.

A response states its answer in a form (`Final answer: 7`, `\boxed{7}`, `<answer>7</answer>`, `the answer is 7`, `答案：7`), or is
nothing but the answer, or says it in its conclusion or its first sentence. The last statement counts, as models correct themselves.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace

from mpo.verification.choices import read_choice
from mpo.verification.conclusions import unstated_answer
from mpo.verification.matching import check_rules
from mpo.verification.number import SHARE, read_number
from mpo.verification.prose import ASKS_LETTER, ASKS_SHARE, COURTESY, LETTER_ALONE, REFUSAL, SENTENCE, sentences_of
from mpo.verification.sequences import count_blanks, filled
from mpo.verification.statements import (
    CORRECTED,
    LABEL,
    OPTION,
    STATEMENT,
    Extraction,
    last_matches,
    named_choice,
    no_answer,
    read_statement,
    statements,
    tidy,
)

HEAD, TAIL = 20_000, 40_000
"""Of a longer response, only so many characters of its beginning and its end are read."""
_THINKING = re.compile(r"</?(?:think|thinking|thought|reasoning)>|[◁⟨]/?think[▷⟩]", re.IGNORECASE)
_TOKEN = re.compile(r"</?s>|<eo[a-z]>|<\|[\w ]{1,30}\|>|<(?:bos|eos|pad|(?:start|end)_of_turn)>")
"""A special token of a model that stands in its text: `</s>`, `<|im_end|>`."""
_NEXT = re.compile(r"\n[ \t*#]*(?:(?:New |Next )?(?:Question|Problem|Exercise)|Q)[ \t]?\d{0,3}[*]{0,2}[:：]")
"""Where a response asks the next question by itself."""
_TWICE = re.compile(r"(?<![^\n])([^\n]+)\n+\1$")  # a last line that only repeats the one before it
_ITEM = re.compile(r"[,;，；、和与]|\band\b|^[(（]?\w{1,2}[.)）]|^- |[①-⑳]")
"""In a list, a line that is more than one value, which may well be there twice."""
_ONLY_VALUE = re.compile(r'(?:```(?:json)?\s*)?\{\s*+"\w{1,40}"\s*+:\s*+"?+([^"{}\[\],:]{1,400}+)"?+\s*+\}(?:\s*+```)?')
"""A JSON object of one plain value, whatever its name."""
_AGAIN = re.compile(  # a response that ends by correcting itself with a number
    r"(?i)(?:[.!?…,;:。，；\n—–-]|\bbut)\s*(?:不对|等等|更正|其实|不(?=[,，])|no,? wait|wait|oops|actually|correction"
    r"|scratch that|no(?=[,:])|I now (?:think|believe))\W{1,4}"
    r"(?:[^.\n:;,，]{1,40}[:;,，—–-]\s?)?"
    r"(?:(?:it|that|this|the (?:correct )?answer)(?:['’]s| is| should be| must be)|there are|make (?:it|that)"
    r"|应?该?[是为有])?\s?(\S.{0,40}?)[\s.!*。]*$"
)
_LETTERLIKE = re.compile("[\u24b6-\u24cf\U0001d400-\U0001d7ff\uff0b\uff0d\uff0f-\uff19\uff1c-\uff1e\uff21-\uff3a\uff41-\uff5a]+")
"""Circled letters, bold or script letters and digits of mathematics, and full-width ones; full-width signs such as ＝."""
_INVISIBLE = re.compile("[\x00\xad\u200b-\u200f\u202a-\u202e\u2060\ufeff]|\r")
_CHINESE_MARKS = str.maketrans(",:;?!", "，：；？！")
_OPENS = re.compile(  # a courtesy before the answer
    r"(?i)\s*(?:(?:sure|okay|ok|certainly|of course|absolutely)[!,.]\s*)?"
    r"here(?:['’]s| is| are) (?:the|my|your|an?) (?:\w+ ){0,2}"
    r"(?:answer|solution|explanation|response|analysis)[^.!:\d\n]{0,60}[.!:]\s*\n"
)
_SHARE = re.compile(r"(?:the (?:probability|chance|ratio) is )?([\w-]{1,20}) (?:in|to) ([\w-]{1,20})", re.IGNORECASE)
_STATED_LETTER = re.compile(r"(?m)((?:^|[:：]|\b(?:is|option|choice)\b)[\s*]{0,4})([A-J])(?=[\s*.。]{0,4}$)")
_HEAD = re.compile(r"[*_\s(]{0,6}([A-J])[*_)]{0,4}(?:[.:、)][*_]{0,3}[ \t][^\n]{1,80}|[.。]?[*_]{0,3})\n\s*\n")
"""A response that begins with a letter, alone in its paragraph."""
_JUDGED = re.compile(
    r"(?im)(?:^\W{0,4}|[;；,，。.]\s?)(?:option |选项)?([A-H]|[IJ](?! [a-z]))(?![A-Za-z'])[^\n;；，]{0,160}?(?<![A-Za-z])"
    r"(incorrect|not correct|wrong|false|no|correct|right|true|yes|错误|不正确|正确|[✓✔✅✗✘❌])(?![A-Za-z])"
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
        raise ValueError(f"A response must be text; got {type(response).__name__}.")
    return find_answer(response, kind, choices, "")


def find_answer(response: str, kind: str | None, choices: Sequence[str] | None, asked: str) -> Extraction:
    """Do what `extract` does, knowing the question: a number that it gives is the answer only where no other one is."""
    found = _find_answer(bare(response, kind), kind, choices, asked)
    if kind in {"number", "math", "chart"} and found.answer and (share := read_number(found.answer)) and share.whole:
        if ASKS_SHARE.search(asked):
            return replace(found, answer=f"{share.value}/{share.whole}")
        if re.search(r"(?i)\bhow many\b|多少[个只人]|几", asked):
            return replace(found, answer=SHARE.split(found.answer)[0])
    return found


def bare(response: str, kind: str | None = None) -> str:
    """Return a response without finished reasoning, special tokens, invisible characters, courtesies and repetition."""
    if len(response) > HEAD + TAIL:
        response = f"{response[:HEAD]}\n{response[-TAIL:]}"
    text = _LETTERLIKE.sub(lambda found: unicodedata.normalize("NFKC", found[0]), _INVISIBLE.sub("", response))
    text = re.sub(r"[^\S\n]+", " ", _TOKEN.sub(" ", text))
    text = re.sub(r"\n\s*\n", "\n\n", text)
    if (marks := list(_THINKING.finditer(text))) and "/" in marks[-1][0]:
        text = text[marks[-1].end() :]
    stops = re.compile(r"(?<=[\u4e00-\u9fff])[,:;?!] ?(?=[\u4e00-\u9fff])")
    text = stops.sub(lambda found: found[0].strip().translate(_CHINESE_MARKS), text.strip())
    if (opens := _OPENS.match(text)) and opens.end() < len(text):
        text = text[opens.end() :]
    for _ in range(4):
        ends = [found.end() for found in SENTENCE.finditer(text, max(0, len(text) - 300)) if found.end() < len(text)]
        last = text[ends[-1] :] if ends else ""
        if not COURTESY.search(last) or re.search(r"\d|[:：]|\*\*|\banswer (?:is|was)\b", last):
            break
        text = text[: ends[-1]].rstrip()
    text = re.sub(r"(?m)^\*\*((?:\d{1,2}|[a-z])[.)] [^*\n]+)\*\*$", r"\1", text)
    if (twice := _TWICE.search(text)) and (kind != "list" or _ITEM.search(twice[1])):
        text = text[: twice.end(1)]
    if kind in {"text", "yes_no"} and text.isupper() and len(text.split()) > 3:
        text = text.lower()
    return re.sub(r"\A\*\*([^*\n]+)\*\*\Z|(?<=\n)\*\*([^*\n]{12,}[.!。])\*\*\Z", lambda found: found[1] or found[2], text)


def after_label(text: str) -> str | None:
    """Return what a label at the beginning is followed by, where that is one line: `**Answer:** 7`."""
    label = LABEL.match(text.lstrip("*_#> "))
    said = label.string[label.end() :].lstrip("*_: \n：").rstrip() if label else "\n"
    return None if "\n" in said else said


def _find_answer(text: str, kind: str | None, choices: Sequence[str] | None, asked: str) -> Extraction:
    if _THINKING.search(text):
        return no_answer("unfinished reasoning")
    if only := _ONLY_VALUE.fullmatch(text):
        text = only[1]
    kind = kind or ("choice" if choices is not None else None)
    text = without_struck(text)
    if kind in {"number", "math", "chart", "list"}:
        text = without_rejected(text)
    if kind in {"text", "math", "expression", "document", "list", None}:
        text = without_denied(text)
    elif kind == "choices":
        text = without_contrast(text)
    if kind in {"number", "math", "chart"} and ASKS_SHARE.search(asked) and (share := _SHARE.fullmatch(text.strip(" \n*.。"))):
        above, below = read_number(share[1]), read_number(share[2])
        text = f"{above.value}/{below.value}" if above and below and below.value else text
    if kind != "choices" and (said := after_label(text)) is not None:
        stated = read_statement(said, "label", kind, choices) if kind == "choice" and said else None
        if stated and stated.answer is None:  # (A), (B)
            return stated
        found = _find_answer(said, kind, choices, asked) if said else no_answer("empty")
        return replace(found, method="label") if found.answer else found
    if kind != "choice" and (values := _filled(text, kind, asked)):
        return Extraction("; ".join(values), "label")
    if kind in {"number", "chart", "math"} and (again := _AGAIN.search(text[-200:])) and read_number(again[1]) is not None:
        return Extraction(again[1], "conclusion")
    if (following := _NEXT.search(text)) and re.search(r"\w", text[: following.start()]):  # the model goes on with another one
        first = _find_answer(text[: following.start()].strip(), kind, choices, asked)
        if first.answer is not None or first.reason == "refusal":
            return first
    if kind != "choice" or not text.strip():
        return _find(text, kind, choices, asked) if text.strip() else no_answer("empty")
    text = without_contrast(_labelled(text, choices or ()))
    if choices and ASKS_LETTER.search(asked) and any(map(LETTER_ALONE.fullmatch, choices)):
        text = _STATED_LETTER.sub(r"\1(\2)", text)
    found = _judged(text, choices) or _reconsidered(text, choices) or _find(text, kind, choices, asked)
    refusals = [place for place, choice in enumerate(choices or ()) if REFUSAL.search(choice)]
    if len(refusals) == 1 and found.method in {"none", "conclusion", "opening", "only"} and REFUSAL.search(sentences_of(text)[-1]):
        return Extraction(chr(65 + refusals[0]), "conclusion")
    if choices and found.answer is not None and any(map(LETTER_ALONE.fullmatch, choices)):
        return replace(found, answer=choices[ord(found.answer[0]) - 65])  # a letter would be taken for the text of another
    return found


def _filled(text: str, kind: str | None, asked: str) -> list[str] | None:
    """What a response writes into several blanks, or one sentence into one; None where it states, corrects or doubts its answer."""
    values = filled(text, asked)
    if not values or next(statements(text, kind), None) or REFUSAL.search(text) or re.search(r"(?i)\b(?:wait|actually)\b", text):
        return None
    several = len(values) > 1
    if any(re.match(r"(?i)(?:not|either|n't)\b|.* or ", value) for value in values) or not several and len(sentences_of(text)) > 1:
        return None
    return values if several == (kind == "list" or count_blanks(asked) > 1) else None


def _labelled(text: str, choices: Sequence[str]) -> str:
    """A response with labels in place of the choices whose own text would be read as a statement: `Option B in the image`."""
    for place, choice in enumerate(choices):
        if OPTION.search(choice) or STATEMENT.search(choice):
            label, words = chr(65 + place), re.escape(choice.strip(" ."))
            text = re.sub(rf"(?i)(?:[(（]?\b{label}[).:：）]\s?)?(?<!\w){words}(?!\w)", f"({label})", text)
    return text


def _judged(text: str, choices: Sequence[str] | None) -> Extraction | None:
    """The choice of a response that begins with its letter, or judges all choices and finds one right."""
    later = CORRECTED.search(text) or any(
        method in {"tag", "boxed"} or (method != "letter" and re.search("nswer|答案", text[start : start + 40]))
        for start, _, method in statements(text, "choice")
    )
    if (head := _HEAD.match(text)) and not later and not re.match(r"\W*([A-J])[.:、)]", text[head.end() :]):
        return Extraction(head[1], "letter") if read_choice(tidy(head[0].strip()), choices).method == "letter" else None
    said = {found[1].upper(): found[2].lower() for found in _JUDGED.finditer(text)}
    right = [letter for letter, word in said.items() if word in {"correct", "right", "true", "yes", "正确", *"✓✔✅"}]
    return named_choice(f"({right[0]})", choices, "letter") if len(said) > 2 and len(right) == 1 and not later else None


def _reconsidered(text: str, choices: Sequence[str] | None) -> Extraction | None:
    weak = re.compile(r"(?:but|no|rather)\b(?!,? wait)", re.IGNORECASE)
    found = next((found for found in reversed(last_matches(CORRECTED, text)) if not weak.match(found[0])), None)
    if found is None or any(later.start() > found.end() for pattern in (LABEL, STATEMENT) for later in last_matches(pattern, text)):
        return None
    return named_choice(found[1], choices, "conclusion")


def _find(text: str, kind: str | None, choices: Sequence[str] | None, asked: str) -> Extraction:
    failed = ""
    for _, stated, method in sorted(statements(text, kind), key=lambda statement: statement[0], reverse=True):
        if found := read_statement(stated.strip(), method, kind, choices):
            if found.answer is not None or found.reason in {"hedge", "refusal"}:
                return found
            failed = failed or found.reason
    return no_answer(failed) if failed else unstated_answer(text.strip(), kind, choices, asked[-TAIL:])


# What a response names only to reject it: struck out, put in contrast, or found to be no solution


_STRUCK = re.compile(r"~~[^~\n]{1,200}~~")
_LETTER = r"(?:options? |choices? |选项)?[(（]?[A-J](?![A-Za-z'’])[)）]?"
_CONTRAST = re.compile(
    r"(?:\s?[(（]|[,，;；]\s?|\s|(?<=[\u4e00-\u9fffA-J)）]))(?:(?i:not|rather than|instead of|unlike|as opposed to)\s"
    r"|而不是|而非|(?<!而)不是|不选)\s?"
    rf"{_LETTER}(?:(?:\s?[,，、/]\s?|\s)(?:(?:or|nor|and)\s)?{_LETTER})*[)）]?(?=$|[\s,.;:!，。；])"
)
_BEFORE = re.compile(rf"(?:(?i:not)\s|不是|不选)\s?{_LETTER}[,，]?\s?(?:but\s|而是|而选|是)")
_ALSO = re.compile(
    rf"(?:\b(?i:not (?:only|just|merely))\s(?P<one>{_LETTER}),?\s(?i:but)\s(?:(?i:also)\s)?"
    rf"|不[仅但只]是?\s?(?P<other>{_LETTER})[^\s，,。A-J]{{0,4}}[，,]?\s?(?:而且|并且|还有?|也))(?P<second>\s?{_LETTER})"
)
_OVER = re.compile(rf"(?i:\b(?:pick|choose|prefer|select|take)\s)(?P<kept>{_LETTER})\sover\s{_LETTER}")
_NO_SOLUTION = (
    r"(?:reject\w*|discard\w*|extraneous|inadmissible|invalid|impossible|excluded"
    r"|not (?:valid|possible|allowed|admissible|a solution)"
    r"|舍去?|不合题?意?)"
)
_VALUE = r"\$?(?P<{}>[A-Za-z](?:_?\{{?\w{{1,2}}\}}?)?\s?=\s?[-+\u2212]?\s?[\w.\\/{{}}]{{1,30}}?)\$?"
_REJECTED = re.compile(
    rf"{_VALUE.format('a')}\s?[(（](?:[^()（）=]{{0,20}}\W)?{_NO_SOLUTION}[^()（）]{{0,80}}[)）]"
    rf"|[(（]?{_VALUE.format('b')}\s(?:is|was|must be)\s(?:\w+ly\s)?{_NO_SOLUTION}[^()（）.;,\n]{{0,80}}[)）]?"
    rf"|(?:\b(?:we\s)?(?:reject|discard|exclude)|舍去?)\s?(?:the root\s|the solution\s)?{_VALUE.format('c')}(?=$|[\s,.;，。；）)])"
    r"(?:\s(?:because|since|as)\b[^.;\n]{0,100})?",
    re.IGNORECASE,
)
_JOINED = r"(?:\s?(?:[,;，；、]|\bor\b|\band\b|或|和)\s?)*"
_NOT_BUT = re.compile(
    r"(?i)(?P<before>^|[.!?\n]\s*|\b(?:is|was|says|reads)\s|['’]s\s)not (?!only\b|just\b|merely\b|all\b|every)"
    r"[^,.;!?\n]{1,60}?,? but (?:rather )?(?=[^,.;\n]{1,60}[\s.*]*$)"
)
_NOT_THAT = re.compile(
    r"(?i)(?:[,，]\s?(?:(?:and|but) )?not(?! only)|\s(?:rather than|instead of)) [^,;.!?\n]{1,60}(?=[\s.*]*$)"
    r"|\s\(not [^()\n]{1,100}\)(?=[\s.*]*$)"
)


def without_struck(text: str) -> str:
    """Return a text without what is struck out in it, if anything remains."""
    kept = _STRUCK.sub("", text) if "~~" in text else text
    return kept if re.search(r"\w", kept) else text


def without_contrast(text: str) -> str:
    """Return a text without the letters of choices that it names in contrast to its own."""
    text = _ALSO.sub(lambda found: f"{found['one'] or found['other']} and {found['second'].strip()}", text)
    text = _OVER.sub(lambda found: f"choose {found['kept']}", _BEFORE.sub("", text))
    return _CONTRAST.sub(
        lambda found: "" if re.search(r"[A-J](?![A-Za-z])\W*$", text[max(0, found.start() - 12) : found.start()]) else found[0],
        text,
    )


def without_denied(text: str) -> str:
    """Return a text without what it names at its end in contrast to its answer."""
    return _NOT_THAT.sub("", _NOT_BUT.sub(lambda found: found["before"], text))


def without_rejected(text: str) -> str:
    """Return a text without the values that it finds to be no solution."""
    rejected = {next(filter(None, found.groups())) for found in _REJECTED.finditer(text)}
    if not rejected:
        return text
    kept = re.sub(rf"{_JOINED}(?:{_REJECTED.pattern})", "", text, flags=re.IGNORECASE)
    for value in rejected:
        kept = re.sub(rf"{_JOINED}\$?(?<![\w\\]){re.escape(value)}\$?(?![\w.]*\w)", "", kept)
    return re.sub(r"^\W*(?:or|and|或|和)\s?|[,;]?\s(?:so|thus|hence|therefore|and|but|or)\W*$", "", kept.strip())
