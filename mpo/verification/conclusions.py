"""Answers of a response that states none in a form: the whole of it, its conclusion or its first sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction

from mpo.verification import prose, statements
from mpo.verification.choices import NEGATED, are_numbers, read_choice, same_choice
from mpo.verification.dress import plain_sentence
from mpo.verification.matching import is_expression
from mpo.verification.number import find_numbers, read_number
from mpo.verification.phrases import ASKS_WHO, code_of, phrase_of, said_in_chinese, said_phrase
from mpo.verification.prose import BOLD, CUE, REFUSAL, numbers_in, sentences_of, stated_number
from mpo.verification.sequences import NAMED_RUN, named_values, read_boxes, read_intervals, read_ratio
from mpo.verification.statements import OPTION, Extraction, letters_of, named_choice, no_answer, tidy, trimmed
from mpo.verification.texts import read_yes_no

_DESPITE = re.compile(
    r"(?im)^[^.!?\n]{0,200}?(?:n['’]t|not|unable|sorry|unclear|uncertain)\b[^.!?\n]{0,200}?[,;]? (?:but|however)\b,? (?=\S)"
)
_UNSURE = re.compile(r"(?i)can['’]t|cannot|not sure|not certain|unable|sorry")
_ENDS_IN_LETTER = re.compile(
    r"(?:\b(?:is|be|say|guess|choose|pick|think|so|thus|hence|therefore|supports|suggests|indicates|(?:go(?:ing)?|continues?|left"
    r"|agree) with|leaves|leaving)|['’]s|[:：，,]|是|选)[ \t]{0,2}[*\"']{0,3}([(（]?[A-J][)）]?)[*\"']{0,3}[.!。．]?$"
)
_ONLY_LETTER = re.compile(  # Only B satisfies both.
    r"(?i:(?:^|[,;:.]\s?|\b(?:so|thus|hence|therefore|that)\s)only\s(?:option\s|choice\s)?)[(]?([A-J])[)]?\s(?!(?:is|was|looks|seems)\s(?:not|wrong|false|incorrect)"
    r"|does\s?n[o'’]|fails|cannot|can['’]t|has no\b)[a-z]{2,}"
    r"|(?:只有|仅有?)(?:选项)?\s?([A-J])(?![A-Za-z、，,和与])(?!.{0,6}(?:不|错))"
)
_NOTATION = re.compile(
    r"[-+\d\s]{0,6}\\(?:vec|hat|overrightarrow|mathbf|boldsymbol|sum|prod|int|begin|langle)(?![A-Za-z])"
    r"(?!.*[A-Za-z]{2} [A-Za-z]{2})"
)
_MATH = re.compile(r"\$\$?([^$]{1,400})\$\$?|\\\[([^\]]{1,400})\\\]|\\\(((?:[^\\]|\\[^)]){1,400})\\\)")
_NOT_AMONG = re.compile(
    r"(?i)\bnot (?:an? |one of |among |in |listed |any of )(?:\w+ ){0,3}(?:options?|choices?)\b"
    r"|\bnone of the (?:\w+ )?(?:options|choices) (?:match|is|are)\b"
)
_LEADING_CUE = re.compile(rf"^\W{{0,5}}(?:{CUE.pattern})\W{{0,5}}", re.IGNORECASE)
_CUT = re.compile(r"(?:\b(?:is|are|was|were|equals?|the|of|to|and|or|by|so|with|for|from|that|which|because)|[=+×])$")
"""The end of a sentence that goes no further: `so the area equals`."""
_DENIED = re.compile(r"\bnot\b|n['’]t\b|incorrect|wrong|\bfails\b|\bwould\b(?! be (?:my|the|correct|right|best)\b(?! if))|不")
_NONE = re.compile(r"(?i)\bthere (?:are|is|were|was) (?:no|not any)\b|没有(?!足够|提供|给出|办法|显示|明确|答案|正确|信息)")
_EMPTY = re.compile(r"∅|\\(?:varnothing|emptyset)\b|(?i:\bempty set\b)|空集")
_WORDED = frozenset({"text", "document", "chart", "list", "expression"})
_OF_VARIABLES = re.compile(r"[-+*/^)\d]\s?=|\d\s?[A-Za-z]\s?=")
_PROSE = re.compile(r"(?<!\\)\b[A-Za-z]{2,}[,:]?\s+[A-Za-z]{2,}|[\u4e00-\u9fff]")
_SEQUENCE = re.compile(
    r"\\?\{\s?[a-z]\s?(?:[|∣:]|\\mid\b)[^{}]{3,60}\\?\}"
    r"|(?:\\left)?[\[(][^\[\]()\n,，;]{1,40}(?:[,，;][^\[\]()\n,，;]{1,40}){1,50}[\])](?:\s?(?:∪|\\cup|U)\s?(?:\\left)?[\[(][^\[\]()\n]{1,80}[\])]){0,5}"
    r"|[^\s\u4e00-\u9fff$]{1,12}\s?(?:[<>≤≥]|\\[lg]eq?\b)=?\s?[a-z]\s?(?:[<>≤≥]|\\[lg]eq?\b)=?\s?[^\s$.，。]{1,12}"
)
_BOUNDS = re.compile(
    r"(?:from|between) [-+]?\d[\d.,]*(?:\s?°?\s?[A-Za-z%]{0,3}) (?:to|and) [-+]?\d[\d.]*(?:\s?°?\s?[A-Za-z%]{1,3}(?![a-z]))?"
    r"|(?<![\w<>])[a-z]\s?(?:[<>≤≥]|\\[lg]eq?\b)=?\s?[^\s,$]{1,12}\s(?:or|∪)\s[a-z]\s?(?:[<>≤≥]|\\[lg]eq?\b)=?\s?[^\s,$]{1,12}"
)
_ONE_BOUND = re.compile(  # so x ≥ -4
    r"^[^<>=≤≥+*/^\d]*?(?<![\w+*/^-])(?<![+*/^-]\s)([a-z]\s?(?:[<>≤≥]|\\[lg](?:eq?|t)\b)=?\s?[^\s<>=≤≥]{1,30})(?<!\.)[.。]?$"
)
_INITIAL = re.compile(r"(?<!\w)([A-Z][a-z]+ [A-Z]\.) (?=(?!(?:The|It|This|That|In|On|He|She|They|So|But)\b)[A-Z][a-z]+ )")
_SAYS = re.compile(
    r"(?:\b(?:is|are|was|were|reads|says|shows|(?:I|I['’]d) (?:would )?(?:say|think|guess|believe)(?! that| .*\b(?:is|are)\b)"
    r"(?: it['’]s)?)\s+|(?:[:：](?!\d)|(?<!\d)[:：])\s?|(?:(?<!不)是|为)(?:一[只个条张辆件位座台棵朵头匹])?)"
    r"((?:[^\s是为]++\s?){1,8}+)$"
)
_WORD = re.compile(r"[A-Za-z]{3}|[\u4e00-\u9fff]")
_NOT_YET = re.compile(  # a first sentence whose number later ones replace
    r"(?i)^\W*(?:if|unless|suppose|initially|originally|at first|at the start)\b|\bfirst\b.*\bbut\b|\bforgot\b"
    r"|\b(?:you|one|people|some)(?:['’]d| (?:would|might|may|could)) (?:expect|think|assume|guess|say)\b"
)
_LETTER = re.compile(
    r"(?<![\w'’])(?:([B-HJ])|(A)(?=\s(?:is|was|has)\b|[)\"'.,;:]|\W*$))(?![\w'’+#])|(?<=[a-z]\s)(?<!\b[Ii]s\s)(A)(?=\s[a-z])"
)
_LABELLED = re.compile(r"\W{0,4}([A-J])[).:、]\W{0,3}(.+)")
_UNREAL = re.compile(r"(?i)\W*if (?:it|this|that|the answer|(?:option )?[a-j])\b.*\bwould\b")  # if it were night, A would fit


def unstated_answer(whole: str, kind: str | None, choices: Sequence[str] | None, asked: str) -> Extraction:
    """The answer of a response that states none in a known form."""
    whole = _DESPITE.sub(lambda found: "" if REFUSAL.search(found[0]) or _UNSURE.search(found[0]) else found[0], whole) or whole
    if _CUT.search(whole) and len(whole.split()) > 5:
        return no_answer("unfinished reasoning")
    kept = sentences_of(whole)
    if kind in _WORDED and (names := _INITIAL.sub("\\1\u2060", whole)) != whole:  # Ann L. Lee is no end of a sentence
        kept = [sentence.replace("\u2060", " ") for sentence in sentences_of(names)]
    if kind == "choice":
        return _unstated_choice(whole, kept, choices, asked)
    if kind == "yes_no":
        return _unstated_yes_no(whole, kept)
    if kind == "box":
        return Extraction(whole, "whole") if read_boxes(whole) else no_answer("there is no box")
    if _is_form(whole, kind):
        return Extraction(whole, "whole")
    if (formal := next(_formal(whole, kept, kind), None)) is not None:
        return Extraction(formal, "conclusion")
    if kind in {"number", "chart", "math"} and not (kind == "chart" and ASKS_WHO.match(asked)):
        found = _value(whole, kept, kind, asked)
        if found.answer is not None or kind == "number":
            return found
    if REFUSAL.search(kept[0]) or REFUSAL.search(kept[-1]):
        return no_answer("refusal")
    return _in_words(whole, kept, kind, asked)


def _unstated_yes_no(whole: str, kept: Sequence[str]) -> Extraction:
    reconsidered = re.search(r"(?i)\b(?:wait|actually|correction)\W{1,4}((?:yes|no)\b.{0,200})", whole)
    cues = [sentence for sentence in reversed(kept) if CUE.search(sentence)]
    decided = re.split(r"(?i)[,;]\s(?:and )?(?:so|thus|therefore|hence),?\s", kept[-1])[-1]
    opening = decided if re.search(r"(?i)\b(?:wait|actually)\b[^\n]{0,300},\s(?:and )?so (?:yes|no)\b", whole) else kept[0]
    for sentence in (reconsidered[1] if reconsidered else opening, *cues, kept[-1], decided):
        said = _LEADING_CUE.sub("", sentence)
        if (len(kept) == 1 or sentence[-1] not in "?？") and read_yes_no(said) is not None:
            return Extraction(said, "opening" if sentence is kept[0] else "conclusion")
    return no_answer("it says neither yes nor no")


def _is_form(whole: str, kind: str | None) -> bool:
    """Whether a response is nothing but a list of lines, an interval, values of names, a ratio or notation."""
    if kind == "list":
        return bool(re.fullmatch(r"(?:[^\n.:：]{1,40}\n+)+[^\n.:：]{1,40}", whole))
    if kind == "interval":
        return bool(read_intervals(whole)) and not _PROSE.search(whole) and not re.match(r"(?!from|between)[A-Za-z]{2,}\s", whole)
    if kind == "math" and (_EMPTY.search(whole) or NAMED_RUN.fullmatch(plain_sentence(whole).strip(" *."))):
        return not _EMPTY.search(whole)
    return kind in {"math", "expression"} and "\n" not in whole and bool(read_ratio(whole) or _NOTATION.match(whole))


def _formal(whole: str, kept: Sequence[str], kind: str | None) -> Iterator[str]:
    last, plain = kept[-1], plain_sentence(kept[-1])
    if kind == "list" and len(blocks := [*statements.BLOCK.finditer(whole)]) == 1 and not whole[blocks[0].end() :].strip():
        yield blocks[0][0].strip()
    if kind in {"list", "interval"} and len(parts := [found[0] for found in _SEQUENCE.finditer(last)]) == 1:
        yield parts[0].strip(" $")
    if kind == "list":
        yield from [said for said in kept if NAMED_RUN.fullmatch(plain_sentence(said).strip(" *."))][-1:]
    if kind == "interval" and len(bounds := _BOUNDS.findall(plain)) == 1 and len(re.findall(r"\d+", last)) == 2:
        if not re.search("(?i)exclu|without", last):
            yield re.sub(r"(?<=\d)\s?(?:°\s?)?[A-Za-z%]{1,3}(?= (?:to|and)|$)|\s?°", "", bounds[0])
    if kind == "interval" and not _DENIED.search(plain) and (bound := _ONE_BOUND.search(re.split("[,;，；]", plain)[-1])):
        yield from [bound[1]] * (len(re.findall(rf"(?<!\w){bound[1][0]}\s?(?:[<>≤≥]|\\[lg]e)", plain)) == 1)
    if kind == "math" and _EMPTY.search(last):
        yield trimmed(last)
    named = re.fullmatch(r"[A-Z][A-Za-z ]{2,30}:\s*\**([^:*]+?)\**", last.rstrip("."))
    if kind in {"math", "expression"} and named and is_expression(named[1]) and not _PROSE.search(named[1]):
        yield named[1]
    if kind in {"math", "expression"} and len(kept) > 1 and (end := re.fullmatch(r"=\s?([^=<>]{1,80})", plain)):
        yield end[1]
    if kind == "math":
        valued = [said for said in kept if "=" in said] if not re.search(r"\d", last) else []
        run = NAMED_RUN.search(plain_sentence((valued or kept)[-1]).strip(" *"))
        if run and len({re.sub(r"[_{}\d₀-₉]", "", name) for name, _ in named_values(run[0]) or ()}) == 1:  # x = 2 or x = -3
            yield run[0]


def _value(whole: str, kept: Sequence[str], kind: str, asked: str) -> Extraction:
    if read_number(whole) is not None or re.fullmatch(r"\$\d+!\$\.?", whole):
        return Extraction(whole, "whole")
    first, _, later = whole.partition("\n")
    if later and read_number(first) is not None and len(first.split()) < 4 and "=" not in first:
        return Extraction(first, "opening")
    spans = [next(filter(None, span.groups())) for span in _MATH.finditer(kept[-1])]
    if kind == "math" and spans and is_expression(spans[-1]) and read_number(spans[-1]) is None:
        return Extraction(_value_side(spans[-1]), "conclusion")
    return _unstated_number(kept, asked)


def _in_words(whole: str, kept: Sequence[str], kind: str | None, asked: str) -> Extraction:
    worded = kind in {"text", "document"}
    if kind in _WORDED - {"expression"} and (in_chinese := said_in_chinese(kept, asked)):
        return Extraction(in_chinese, "conclusion")
    if not worded and kind != "chart" and (run := NAMED_RUN.search(plain_sentence(kept[-1]).strip(" *"))):
        return Extraction(run[0], "conclusion")
    if kind in {"expression", "math", None}:
        if spans := list(_MATH.finditer(whole)):
            return Extraction(_value_side(next(filter(None, spans[-1].groups())).strip()), "conclusion")
        shown = stated_number(kept[-1]) if _PROSE.search(kept[-1]) and not _OF_VARIABLES.search(kept[-1]) else None
        if shown and is_expression(shown):
            return Extraction(shown, "conclusion")
    if worded and (form := re.fullmatch(r"[^\n:：]{1,90}[:：][ *]*\n+((?:[^\n:：]{1,100}(?:\n|$)){1,4})", whole)):
        return Extraction(trimmed(" ".join(form[1].split())), "conclusion")
    if (worded or kind == "expression") and len(fenced := re.findall(r"```\w*\n([^`]{1,400}?)\n```", whole)) == 1:
        return Extraction(fenced[0], "conclusion")
    if len(kept) == 1 and "\n" not in whole and whole[-1] not in ":：":
        if statements.EITHER.match(whole):
            return no_answer("hedge")
        copula = _SAYS.search(whole[-400:]) if len(whole.split()) >= 4 or not whole.isascii() else None
        said = copula[1] if copula and kind in {"text", "document", "chart", "list", "interval"} else None
        if kind in _WORDED and asked and (len(whole.split()) > 4 or code_of(whole, asked)):
            said = phrase_of(whole, asked, several=kind == "list") or said
        return Extraction(trimmed((said or whole).replace("**", "")), "opening" if said else "whole")
    if kind in _WORDED and asked and (said_there := said_phrase(kept, asked, several=kind == "list")):
        return no_answer("hedge") if statements.EITHER.match(said_there[0]) else Extraction(*said_there)
    return no_answer("no statement of an answer")


def _value_side(equation: str) -> str:
    sides = [side.strip() for side in re.split(r"(?<![<>!\\=])=(?!=)", equation)]
    chain = len(sides) > 2 and all(sides) and len(sides[0]) < 12 and not re.search(r",|;|\bor\b|\band\b", equation)
    return f"{sides[0]} = {sides[-1]}" if chain else equation


def _unstated_number(sentences: Sequence[str], asked: str) -> Extraction:
    sentences = [plain_sentence(sentence) if not BOLD.search(sentence) else sentence for sentence in sentences]
    if own := prose.of_name(sentences[-1], asked):
        return Extraction(own, "conclusion")
    numbered = [sentence for sentence in sentences if numbers_in(sentence)]
    if len(sentences) > 1:  # "5? 6? It is hard to say."
        numbered = [sentence for sentence in numbered if sentence[-1] not in "?？"]
    if not numbered:
        ends = f"{sentences[0]}\n{sentences[-1]}"
        if REFUSAL.search(ends):
            return no_answer("refusal")
        return Extraction("0", "opening") if _NONE.search(ends) else no_answer("no number")
    givens = frozenset(given for _, _, shown in find_numbers(asked) if (given := _amount(shown)) is not None)
    fresh = [sentence for sentence in numbered if any(_amount(shown) not in givens for _, _, shown in numbers_in(sentence))]
    cues = [sentence for sentence in numbered if CUE.search(sentence)]
    bold = [sentence for sentence in numbered if any(read_number(a or b) or numbers_in(a or b) for a, b in BOLD.findall(sentence))]
    last = (fresh or numbered)[-1]
    year = bool(prose.ASKS_YEAR.search(asked))
    told = {numbered[0], numbered[-1], last, *cues[-1:], *bold[:1], *bold[-1:]}
    said = {sentence: stated_number(prose.asked_clause(sentence, asked), givens, year=year) for sentence in told}
    data = [sentence for sentence in sentences if re.match(r"[^:：.]{1,30}[:：]\s", sentence)]
    steps = len(data) > 2 or re.match(r"\W{0,4}(?:step\s?)?\d{1,2}[.):]", sentences[0], re.IGNORECASE)
    before = _NOT_YET.search(sentences[0]) or not numbers_in(re.sub(r",\s(?:who|which|whose)\b[^,.]*", "", sentences[0]))
    opens = not steps and not before and numbered[0] is sentences[0] and bool(said[numbered[0]])
    opens = opens and (fresh[:1] == numbered[:1] or len(numbered) == 1)
    shared = [len(set(prose.content_words(asked)) & set(prose.content_words(sentence))) for sentence in (numbered[0], last)]
    if bold and bold[0] is sentences[0] and not any(sentence in bold for sentence in cues if sentence is not sentences[0]):
        chosen, method = bold[0], "opening"
    elif opens and _amount(said[numbered[0]]) == _amount(said[numbered[-1]]) is not None:
        chosen, method = numbered[0], "opening"
    elif len(numbered) > 1 and not bold and numbered[-1] not in cues and _amount(said[last]) == _result(numbered[-2]) is not None:
        chosen, method = last, "conclusion"
    elif cues or bold:
        chosen, method = (cues or bold)[-1], "conclusion"
    elif opens and shared[1] <= shared[0] and ("=" not in last or ("=" in numbered[0] and _WORD.search(numbered[0]))):
        chosen, method = numbered[0], "opening"
    else:
        chosen, method = last, "conclusion"
    example = re.match(r"(?:for (?:instance|example)|suppose)\b", chosen, re.IGNORECASE)
    if re.match(r"(?i)(?:but|however)\b", sentences[-1]) and (REFUSAL.search(sentences[-1]) or "unknown" in sentences[-1]):
        return no_answer("refusal")
    refused = [sentence for sentence in sentences if CUE.search(sentence) and REFUSAL.search(sentence)]
    if REFUSAL.search(chosen) or (refused and not cues) or example or (REFUSAL.search(sentences[0]) and not cues):
        return no_answer("refusal")
    shown = said[chosen]
    return Extraction(shown, method) if shown else no_answer("hedge" if shown == "" else "no number")


def _amount(shown: str | None) -> Fraction | None:
    number = read_number(shown or "")
    return number.value if number else None


def _result(sentence: str) -> Fraction | None:
    return _amount(sentence.rpartition("=")[2].strip(" .。$")) if "=" in sentence else None


def _only_letter(sentences: Sequence[str]) -> Extraction | None:
    """The letter of a conclusion or the first sentence that has one alone: `Box B fits more closely.`"""
    cues = [sentence for sentence in reversed(sentences) if CUE.search(sentence)]
    for sentence, method in (*((sentence, "conclusion") for sentence in cues), (sentences[0], "opening")):
        letters = {next(filter(None, found.groups())) for found in _LETTER.finditer(sentence)}
        if len(letters) == 1 and not NEGATED.search(sentence) and not REFUSAL.search(sentence):
            return Extraction(letters.pop(), method)
    return None


def _lists_choices(text: str) -> bool:
    return len(set(re.findall(r"(?m)(?:^\W{0,4}|\s\()([A-J])[).:、]", text))) > 1


def _unstated_choice(whole: str, kept: Sequence[str], choices: Sequence[str] | None, asked: str) -> Extraction:
    said, own = [(sentence, label) for sentence in kept if (label := _LABELLED.match(sentence))], choices or ()
    copied = [sentence for sentence, label in said if any(same_choice(label[2], text) for text in own[ord(label[1]) - 65 :][:1])]
    remaining = [sentence for sentence in kept if sentence not in copied] if len(copied) > 1 else kept
    if found := _unstated_letter(whole, kept[-1], remaining, choices):
        return found
    kept = remaining
    if not choices:
        return _only_letter(kept) or no_answer("refusal" if REFUSAL.search(kept[0]) else "no letter")
    if are_numbers(choices):
        number = _unstated_number(kept, asked)
        return named_choice(number.answer, choices, number.method) or no_answer(number.reason or statements.NO_CHOICE)
    if _NOT_AMONG.search(" ".join(kept[-2:])):
        none = [place for place, choice in enumerate(choices) if re.match(r"(?i)\W*none of|not (?:given|listed)", choice)]
        return Extraction(chr(65 + none[0]), "conclusion") if none else no_answer("its answer is none of the choices")
    cues = [sentence for sentence in reversed(kept) if CUE.search(sentence)]
    places = [*((sentence, "conclusion") for sentence in (*cues, kept[-1])), (kept[0], "opening")]
    telling = [place for place in places if _tells(place[0])]
    several = ""
    for methods in ({"letter", "text"}, {"words"}):  # what it says before what it paraphrases
        for sentence, method in telling:
            named = read_choice(tidy(_LEADING_CUE.sub("", sentence)), choices)
            if len(named.indices) == 1 and named.method in methods:
                return Extraction(letters_of(named.indices), method)
            several = several or (named.method if named.both else "")
    if REFUSAL.search(kept[0]) or REFUSAL.search(kept[-1]):
        return no_answer("refusal")
    if several:
        return no_answer(several)
    indices = frozenset().union(*(read_choice(tidy(said), choices).indices for said in kept[:200] if _tells(said)))
    if len(indices) == 1:
        return Extraction(letters_of(indices), "only")
    return no_answer("it names several choices" if indices else "it names no choice")


def _tells(sentence: str) -> bool:
    """Whether a sentence may say the answer: it refuses none, and does not only repeat the choices or suppose one."""
    return not (REFUSAL.search(sentence) or _lists_choices(sentence) or _UNREAL.match(sentence))


def _unstated_letter(whole: str, last: str, kept: Sequence[str], choices: Sequence[str] | None) -> Extraction | None:
    first, listed = whole.split("\n", 1)[0], _lists_choices(whole)
    ending = re.split(r",\s(?:(?:even )?though|although|while)\b", last, maxsplit=1)[0]
    ending = re.sub(r"\s(?:by|through|after) elimination(?=\W*$)", "", ending)
    decided = ending.rpartition(", ")[2]
    part = decided if _ENDS_IN_LETTER.search(decided) else ending  # "It could be A or B, but I say B."
    if not kept or re.search(r"(?<!\w)\(?[A-J]\)?\s(?:or|and)\s(?:option\s)?\(?[A-J]\)?(?!\w)", part):
        return no_answer("it names several choices")
    named = read_choice(tidy(whole if len(kept) == 1 else first), choices)
    if (named.both or (choices and len(named.indices) > 1)) and len(kept) == 1:
        return no_answer(named.method)
    for letter in (named, read_choice(tidy(kept[-1]), choices)) if not listed else ():
        if letter.method == "letter" and len(letter.indices) == 1:
            return Extraction(letters_of(letter.indices), "letter")
    around = [(found[1] or found[2], whole[found.end() :][:30] + whole[: found.start()][-12:]) for found in OPTION.finditer(whole)]
    options = [letter for letter, beside in around if not _DENIED.search(beside)]
    if len({letter.upper() for letter in options}) == 1 and (chosen := named_choice(f"({options[0]})", choices, "letter")):
        return chosen
    polar = [read_yes_no(choice) for choice in choices] if choices and len(choices) == 2 else []
    if (said := read_yes_no(first)) is not None and polar in ([said, not said], [not said, said]):
        return Extraction("AB"[polar.index(said)], "opening")
    if (
        (found := _ENDS_IN_LETTER.search(ending))
        and not REFUSAL.search(ending)
        and not NEGATED.search(ending[max(0, found.start() - 12) : found.start(1)].replace("，", ",").rpartition(",")[2])
        and not re.search(statements.DOUBT, ending[: found.start(1)].rstrip(" *(\"'"), re.IGNORECASE)
        and (chosen := named_choice(found[1], choices, "conclusion"))
    ):
        return chosen
    only = _ONLY_LETTER.search(kept[-1]) if not REFUSAL.search(kept[-1]) else None
    return named_choice(f"({only[1] or only[2]})", choices, "conclusion") if only else None
