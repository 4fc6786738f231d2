"""What a response names only to reject it: struck out, put in contrast, or found to be no solution."""

from __future__ import annotations

import re

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
