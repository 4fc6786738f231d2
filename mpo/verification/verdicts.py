"""Is a response right? Its final answer, compared with what is known about the question."""

from __future__ import annotations

import re
from dataclasses import replace

from mpo.schema import Question
from mpo.verification.extraction import after_label, bare, find_answer
from mpo.verification.matching import Verdict, check_rules, detect_kind, match
from mpo.verification.number import read_number
from mpo.verification.phrases import opposites, without_asked
from mpo.verification.prose import ASKS_LETTER, ASKS_YEAR, CUE, REFUSAL, content_words, sentences_of
from mpo.verification.sequences import count_parts, in_parts, read_list
from mpo.verification.statements import Extraction, no_answer
from mpo.verification.texts import normalize, read_yes_no, same_text
from mpo.verification.units import is_unit, singular

_UNKNOWN = re.compile(r"(?i)\W*(?:un(?:answerable|known)|not (?:given|answerable)|无法回答|未知)\W*")
_RANKS = re.compile(
    r"(?i)\b(?:order|rank|sort|arrange)\b[^.?]*\b(?:from|by)\b|\b(?:ascending|descending|increasing|decreasing|in) order(?! to)\b"
    r"|\bfrom \w+ (?:the )?\w+est to\b|从.{1,4}到.{1,4}(?:排|列)"
)
_SCALES = re.compile(r"(?i)\b(?:thousand|million|billion|trillion)s?\b|[万亿](?=元|人|吨)")
_PERCENT = re.compile(r"(?i)percent|%|百分")
_POLAR = re.compile(
    r"(?i)(?:^|[.!?,:]\s+|\n)\W{0,3}((?:is|are|was|were|do|does|did|has|have|had|can|could|will|would|should)\s(?:[^.?!\n]|\.\d){3,400})\?"
)
_WHERE = re.compile(
    r"(?i)\b(?:according to|based on|in|from|on) (?:the|this|that|these) (?:\w+ )?"
    r"(?:image|picture|figure|graph|photo|chart|plot)s?\b"
)
_UNIT = re.compile(r"(?i)(?:\bin\s|\bhow many\s|多少)([a-z]+|[\u4e00-\u9fff]{1,3}?)(?=[?？.,) ]|$)")
_BESIDE = re.compile(r"(?:,\s(?:with|and|as|since|because|showing)|\swith(?:out)?)\s.*")  # the sky is clear, with no clouds
_IT_DID = re.compile(
    r"(?i)(?:^|\b(?:so|thus|hence),?\s)(?:it|they)\s(?:did|does|do|is|are|was|were|has|have)(\s?n[o'’]t)?\s([a-z]+)[.\s*]*$"
)
_CLAUSES = re.compile(r"[,;]\s(?:but|while|whereas|although|though)\s|;\s")
_UNDECIDED = re.compile(
    r"(?i)\?|\b(?:whether|if|unsure|uncertain|perhaps|maybe|possibly|(?:may|might|could) (?:be|have)|wrong to)\b"
    r"|\bnot (?:sure|certain|clear)\b"
)
_NEGATION = re.compile(
    r"\b(?:not|no|never|neither|nor|cannot|without|hardly|barely|far from|anything but)\b|n['’]t\b", re.IGNORECASE
)


def final_answer(response: str, question: Question, *, kind: str | None = None) -> Extraction:
    """Find the final answer of a response to a question: what `verify` compares with the ground truths.

    Unlike `extract` it knows what is asked: a number of the question is no answer, and the question repeated as a statement is one.

    Args:
        response, question: as in `verify`.
        kind: the kind of answer to look for; None for the question's, or that of its first ground truth.

    Raises:
        ValueError: for an unknown kind, impossible choices or tolerance, and a response that is no text.

    >>> question = Question([{"role": "user", "content": "Is the car red?"}], ground_truths=["yes"])
    >>> final_answer("The car is not red.", question)
    Extraction(answer='no', method='restated', reason='')
    """
    check_rules(question.kind, question.choices, question.tolerance)
    if not isinstance(response, str):
        raise ValueError(f"A response must be text; got {type(response).__name__}.")
    kind = kind or question.kind or (detect_kind(question.ground_truths[0], question.choices) if question.ground_truths else None)
    found = find_answer(response, kind, question.choices, _text(question))
    if found.reason == "refusal" or (said := restated(bare(response), _text(question))) is None:
        return found
    if found.answer is None:
        return _said(said, kind, question) or found
    if kind == "yes_no" and read_yes_no(found.answer) is not said:  # Yes, the light is off.
        return no_answer("it says yes and no")
    return found


def verify(response: str, question: Question) -> Verdict:
    """Whether the final answer of a response is one of the question's ground truths.

    Args:
        response: the full text of the response.
        question: the question, with its ground truths and what else is known of its answer.

    Raises:
        ValueError: for a question without a ground truth, of an unknown kind, or with impossible choices or tolerance.

    >>> question = Question([{"role": "user", "content": "How many?"}], ground_truths=["7"])
    >>> verify("3 + 4 = 7. Final answer: 7", question).correct, verify("I cannot see it.", question)
    (True, Verdict(correct=False, method='none', reason='no answer: refusal'))
    """
    if isinstance(question.ground_truths, str) or not question.ground_truths:
        raise ValueError(f"Question {question.id!r} needs ground_truths, a list of texts; it has {question.ground_truths!r}.")
    verdicts: list[Verdict] = []
    for truth in question.ground_truths:
        kind = question.kind or detect_kind(truth, question.choices)
        extraction = final_answer(response, question, kind=kind)
        if _is_truth(response, truth, kind) and not (kind == "choice" and question.choices and ASKS_LETTER.search(_text(question))):
            return Verdict(True, "equal", "the response is the ground truth")
        unknown = _UNKNOWN.fullmatch(truth) or REFUSAL.search(truth)
        if extraction.reason == "refusal" and unknown and kind in {"text", "document"}:
            return Verdict(True, kind, "neither says an answer")
        said_nothing = Verdict(False, "none", f"no answer: {extraction.reason}")
        verdicts.append(said_nothing if extraction.answer is None else _compare(extraction.answer, truth, kind, question))
        if not verdicts[-1].correct and kind in {"text", "document"} and re.fullmatch(r"\s*\d{1,9}\s*", truth):
            number = final_answer(response, question, kind="number").answer  # the number that a sentence is about
            verdicts.append(_compare(number, truth, "number", replace(question, kind="number")) if number else verdicts[-1])
        if verdicts[-1].correct:
            return verdicts[-1]
    return verdicts[0]


def _is_truth(response: str, truth: str, kind: str) -> bool:
    """Whether a response is nothing but the ground truth, though its words might be read as a sentence: `Don't know`."""
    words = kind in {"text", "document", "chart"} and read_number(truth) is None
    texts = [response.strip(), said := bare(response, kind), after_label(said) or said]
    return bool(truth.strip()) and any(
        text == truth.strip() or (words and len(text) < len(truth) + 20 and normalize(text) == normalize(truth)) for text in texts
    )


def _compare(answer: str, truth: str, kind: str, question: Question) -> Verdict:
    tolerance, asked = question.tolerance, _text(question)
    # Five percent of a year are a century.
    if kind == "chart" and tolerance is None and re.fullmatch(r"\s*[12]\d{3}\s*", truth) and ASKS_YEAR.search(asked):
        tolerance = 0.0
    many = 0
    if kind == "list":
        many = len(read_list(truth)[0]) if (ranked := _RANKS.search(asked)) else count_parts(asked)
        answer = answer.replace("<", ",") if ranked else answer
    if many > 1:  # in the order of the blanks or questions
        given, wanted = (in_parts(text, many) for text in (answer, truth))
        if len(given) == len(wanted) == many:
            same = all(
                _compare(*pair, detect_kind(pair[1]), replace(question, kind=None, choices=None, messages=[])).correct
                for pair in zip(given, wanted, strict=True)
            )
            return Verdict(same, "list", "the same in each part" if same else "a part differs")
    if kind in {"text", "document"} and same_text(*(without_asked(text, asked) for text in (answer, truth)))[0]:
        return Verdict(True, kind, "the same but for words of the question")
    verdict = match(answer, truth, question.kind and kind, choices=question.choices, unit=question.unit, tolerance=tolerance)
    if verdict.correct or kind not in {"number", "chart", "math"} or (known := read_number(truth)) is None:
        return verdict
    if scale := _SCALES.search(f"{asked} {question.unit or ''}"):  # 3.2 million of what is asked for in millions
        plain = re.sub(rf"(?i)(?<=\d)\s?{scale[0].rstrip('s')}s?(?![a-z])", "", answer)
        if plain != answer:
            return match(plain, truth, kind, tolerance=tolerance)
    if question.unit is None and not known.unit and (said := read_number(answer)) and is_unit(said.unit):
        if units := [unit for unit in _UNIT.findall(asked) if is_unit(unit)]:  # 0.18 kg of what is asked for in grams
            return match(answer, truth, kind, unit=units[-1], tolerance=tolerance)
    # "What percentage ...?" with the ground truth 50: the answer 50% is 50 of what the question asks for.
    if question.unit is None and not known.unit and _PERCENT.search(answer + asked):
        if abs(known.value) >= 1 or _PERCENT.search(asked):
            return match(answer, truth, kind, unit="%", tolerance=tolerance)
    return verdict


def restated(response: str, asked: str) -> bool | None:
    """Whether a response affirms or denies a yes-no question by repeating it in its first sentence or a conclusion.

    None where no such sentence has all content words of the question in their order, or the question asks nothing of the kind.
    """
    if asks := re.search(r"[有是在]([\u4e00-\u9fff]{1,8})吗[？?]?\s*$", asked[-2000:]):
        end = re.findall(rf"(没有?|不是|不在|没在|有|是|在)[^，。没不]{{0,6}}{asks[1]}", response[-2000:])
        return end[-1][0] not in "没不" if end and not _UNDECIDED.search(response) else None
    if asks := re.search(r"([\u4e00-\u9fff]{2})([\u4e00-\u9fff]{2})吗[？?]?\s*$", asked[-2000:]):
        last = re.search(rf"([^，。；\n]*){asks[1]}([^，。；\n]{{0,5}}?)([不没未]有?)?{asks[2]}[。.\s]*$", response[-2000:])
        return not last[3] if last and not re.search("[如若不没未非否]|可能|一定", last[1] + last[2]) else None
    questions = _POLAR.findall(asked[-2000:])
    if not questions or _NEGATION.search(questions[-1]):
        return None
    wanted = content_words(_WHERE.sub("", questions[-1]))
    sentences = sentences_of(response[:20_000])
    told = (*filter(CUE.search, reversed(sentences)), *sentences[:1])
    for sentence in (clause for whole in told for clause in (*_CLAUSES.split(whole), whole)):
        following = iter(content_words(sentence))
        repeated = bool(wanted) and all(word in following for word in wanted)
        shorter = iter(content_words(main := _BESIDE.sub("", sentence)))
        sentence = main if repeated and all(word in shorter for word in wanted) else sentence
        if not repeated and sentence == sentences[-1] and (did := _IT_DID.search(sentence)):
            predicate = re.search(rf"\b{did[2]}(?=$|\s(?:from|in|on|between|during|after|to|by|over|at|than)\s)", questions[-1])
            if predicate and singular(did[2].lower()) in wanted and not _UNDECIDED.search(sentence):
                return not did[1]
        if repeated and not _UNDECIDED.search(sentence) and not REFUSAL.search(sentence):
            return not _NEGATION.search(sentence)
        for at, word in enumerate(wanted):  # The door is closed.
            contrary = opposites(word) & set(content_words(sentence))
            following = iter(content_words(sentence))
            if contrary and all(part in following for part in [*wanted[:at], *contrary, *wanted[at + 1 :]]):
                return bool(_NEGATION.search(main if contrary & set(content_words(main)) else sentence))
    return None


def _said(said: bool, kind: str | None, question: Question) -> Extraction | None:
    if kind == "yes_no":
        return Extraction("yes" if said else "no", "restated")
    for place, choice in enumerate(question.choices or ()):
        if kind == "choice" and len(question.choices or ()) == 2 and len(choice) < 8 and read_yes_no(choice) is said:
            return Extraction(chr(65 + place), "restated")
    return None


def _text(question: Question) -> str:
    content = next((turn.get("content") for turn in reversed(question.messages) if turn.get("role") == "user"), "")
    parts = [{"text": content}] if isinstance(content, str) else content or ()
    return " ".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))
