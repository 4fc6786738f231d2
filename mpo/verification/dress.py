r"""What stands around an answer: markdown, quotes, `\boxed{}`, `\text{}`, dollar signs; and LaTeX as plain characters."""

from __future__ import annotations

import re
import unicodedata

MOST_BOXED = 40
"""Of more, the last ones count."""
_SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_RAISED = re.compile(r"[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|mathsf|operatorname|mbox|rm|bf|displaystyle)\s?\{([^{}]*)\}")
_PAIRS = [(mark, mark) for mark in ("**", "__", "``", "*", "_", "`", '"', "'", "$$", "$")]
_PAIRS += [("“", "”"), ("‘", "’"), ("\\(", "\\)"), ("\\[", "\\]"), ("「", "」"), ("『", "』"), ("«", "»")]
_OPENING = frozenset("#-•" + "".join(opening[0] for opening, _ in _PAIRS))
_MINUS = str.maketrans(
    {"\u2212": "-", "\u2013": "-", "\uff0d": "-", "\ufe63": "-", "\u2011": "-", "\u00a0": " ", "\u202f": " ", "\u2009": " "}
)
_FRACTION = re.compile(r"\\[dtc]?frac\s?(?:\{\s?([^{}]{1,60})\s?\}|(\d))\s?(?:\{\s?([^{}]{1,60})\s?\}|(\d))")
_SPACES = re.compile(r"\\[,;:! ]|\\q?quad|(?<!\\)~(?!\s?\d)")
_MARKED = re.compile(r"(?<![\\$])\$(?=[^\s$])([^$\n]{1,200})(?<=\S)\$(?![\d$])")
_ONE_NAME = re.compile(
    r"\\(?:vec|overrightarrow|mathbf|boldsymbol|bm|hat)\s?(?:\{\s?(\\?[A-Za-z]{1,2}|0)\s?\}|([A-Za-z])(?![A-Za-z]))"
)
_COLUMN = re.compile(r"\\begin\{([pbv]?)matrix\}((?:(?!\\(?:begin|end))[^&]){1,400}?)\\end\{\1matrix\}")
_ANGLED = re.compile(r"(?:\\langle|⟨)([^<>⟨⟩]{1,200}?)(?:\\rangle|⟩)")


def boxed(text: str) -> list[tuple[int, int, str]]:
    r"""Find every `\boxed{...}` (or `\fbox`) with its braces matched: start, end and content."""
    found, end = [], 0
    for match in list(re.finditer(r"\\f?boxed?\s?\{", text))[-MOST_BOXED:]:
        if match.start() < end:  # inside the one before
            continue
        depth, place = 1, match.end()
        for brace in re.finditer(r"\\.|[{}]", text[match.end() : match.end() + 4000]):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                place = match.end() + brace.start()
                break
        else:
            continue
        end = place + 1
        found.append((match.start(), end, text[match.end() : place]))
    return found


def undress(text: str) -> str:
    """Take off what only decorates an answer."""
    text = text.strip()
    for _ in range(8):
        if text[:1] not in _OPENING or (text[:1] == "-" and text[1:2] != " "):
            break
        before = text
        for opening, closing in _PAIRS:
            inner = text[len(opening) : -len(closing)]
            if len(text) > len(opening + closing) and text.startswith(opening) and text.endswith(closing) and opening not in inner:
                text = inner.strip()
        boxes = boxed(text) if text.startswith("\\") else []
        if len(boxes) == 1 and boxes[0][0] == 0 and not text[boxes[0][1] :].strip(" .。"):
            text = boxes[0][2].strip()
        if (whole := _WRAPPED.fullmatch(text)) is not None:
            text = whole[1].strip()
        text = re.sub(r"^#{1,6} |^[-*•] (?=\D)", "", text)
        if text == before:
            break
    return text


def plain_sentence(sentence: str) -> str:
    """Return a sentence with numbers written plainly, and no dollar signs around mathematics; those of prices stay."""
    return plain_math(_MARKED.sub(r"\1", sentence) if "$" in sentence else sentence)


def plain_math(text: str) -> str:
    r"""Write LaTeX and special characters of numbers as plain ones: `\frac{1}{2}` as 1/2, `½` as 1/2, a long minus as a hyphen."""
    if text.isascii() and "\\" not in text and "$" not in text and "*" not in text and "{" not in text:
        return text
    text = text.translate(_MINUS)
    if not text.isascii():
        text = _RAISED.sub(lambda found: f"^{found[0].translate(_SUPERSCRIPT)}", text)
        text = "".join(_vulgar(character) for character in text)
    text = text.replace("\\%", "%").replace("\\$", "$").replace("{,}", ",").replace("\\left", "").replace("\\right", "")
    text = re.sub(r"\^\s?(?:\{\s?\\circ\s?\}|\\circ\b)|\\degree\b", "°", text)
    text = re.sub(r"\\(?:times|cdot)\b", "×", text)
    text = re.sub(r"\\(?:approx|sim|simeq)\b", "≈", text)
    text = _WRAPPED.sub(r" \1 " if text.startswith("\\") else r"\1", _SPACES.sub(" ", text))
    for _ in range(3):
        text, count = _FRACTION.subn(_divided, text)
        if not count:
            break
    text = re.sub(r"\$(?!\s?\d)|(?<=\d)\$|\\[()\[\]]|\*\*", "", text)
    return re.sub(r"[ \t]+", " ", text).strip()


def plain_vectors(text: str) -> str:
    """Write vectors without arrows and columns, and the empty set as one sign."""
    if "\\" not in text and "⟨" not in text:
        return text
    text = _ONE_NAME.sub(lambda found: found[1] or found[2], text)
    text = _COLUMN.sub(lambda found: f"({', '.join(filter(None, map(str.strip, found[2].split(chr(92) * 2))))})", text)
    text = _ANGLED.sub(lambda found: f"({found[1].strip()})", text)
    return re.sub(r"\\(?:varnothing|emptyset)(?![A-Za-z])", "∅", text)


def _vulgar(character: str) -> str:
    if character.isascii():
        return character
    plain = unicodedata.normalize("NFKC", character)
    if "\u2044" in plain and len(plain) > 1:
        return f" {plain.replace(chr(0x2044), '/')}"
    if unicodedata.category(character) == "Nd":
        return str(unicodedata.decimal(character))
    return {"\u066c": ",", "\u066b": "."}.get(character, plain if len(plain) == 1 else character)


def _divided(found: re.Match[str]) -> str:
    above, below = found[1] or found[2], found[3] or found[4]
    wrapped = [part.strip() if re.fullmatch(r"\d+(?:\.\d+)?", part.strip()) else f"({part.strip()})" for part in (above, below)]
    before = found.string[: found.start()].rstrip()
    return (" " if before[-1:].isdigit() else "") + "/".join(wrapped)
