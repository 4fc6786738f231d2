"""Answers in words inside prose, found by what the question asks: `The label reads "Lenovo", so the brand is Lenovo.`"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mpo.verification.dress import undress
from mpo.verification.prose import CUE, HEDGE, MOST_CHARACTERS, REFUSAL, content_words, word_set
from mpo.verification.units import singular

_MARKED = re.compile(r"\*\*([^*\n]{1,120})\*\*|(?<![\w*])\*([^*\n]{1,120})\*(?![\w*])|[\"“「『]([^\"”」』\n]{1,120})[\"”」』]")
_LABEL = re.compile(r"^[\s*_#>-]{0,6}(?:[^:：\n.]{2,60}[:：][*_]{0,2}\s+|答[:：]\s?)(?=\S)|.*(?:->|→|⇒)\s?(?=[^→>]{1,60}$)")
_CONCLUDES = re.compile(r"(?i)\b(?:therefore|thus|hence)\b|^(?:but |wait,? )?(?:actually|wait|correction|no|in fact|it['’]s)\b")
_COPULA = re.compile(
    r"(?i).*(?:\b(?:is|are|was|were|says?|reads?|shows?|spells?|called|named|labelled|states?|stands? for|represents?)\s(?:that\s)?"
    r"|(?<!不)是|为|叫做?|写着)"
)
_ASIDE = re.compile(
    r",?\s(?:which|who|because|since|while|whereas|where|judging|meaning|followed|as (?:shown|indicated|can|seen))\b.*$"
    r"|,\s(?:in|on|at|not|from|with|a|an|as|unlike)\s.*$|\s?[(（](?![A-Za-z\d]{1,3}[)）]).*$|\s[–—]\s.*$|[;，；].*$"
)
_PLACE = re.compile(
    r"(?<=\w)\s(?:on|in|at|with|near|behind|beside|under|next to|along|from)\s(?:an?|the|his|her|its|their)\s[^,]*$"
)
_PRO_VERB = re.compile(r"(?i)^(.{1,40}?)\s(?:does|did|is|has|can|will)(?=$|[.,;])")
_DENIES = re.compile(r"(?i)\b(?:not|never|no)\b|n['’]t\b|不是|没有")
MOST_WORDS = 15
_ASKS_CODE = re.compile(r"(?i)\b(?:date|when|expir\w+|website|url|e-?mail|phone number)\b|网址|邮箱|电话")
_CODE = re.compile(
    r"(?<![\d/.])(?:\d{1,4}/\d{1,2}/\d{1,4}|\d{1,2}/\d{4}|\d{1,2}\.\d{1,2}\.\d{2,4})(?![\d/])"
    r"|(?:https?://|www\.)[^\s,，。)]{0,200}[\w/]|[\w.+-]{1,64}@[\w.-]{1,64}\w|[+(]\d[\d() -]{6,18}\d"
)
_ASKS_HAN = re.compile(
    r"([^\s，。？?!！]{2,}?)的?([是为]?)(?:什么|谁|哪(?:一|两|三|四|几|些|里|儿)?[个种]?|多少)([\u4e00-\u9fff]{0,6})[？?]?\s*$"
)
_NO_VERB = r"(?!(?:is|are|was|were|do|does|did|of|in|on|the|can|will|would|should)\b)"
ASKS_WHO = re.compile(  # the verb and the word after it
    rf"(?i)\W*(?!.*\b(?:years?|numbers?|values?|percent\w*)\b)(?:who|(?:which|what)(?:\s{_NO_VERB}\w+){{1,3}}?)\s{_NO_VERB}"
    r"(\w+)\s(?:(?:the|an?|in|for|to|at|on)\s)?(\w+)"
)
_OPPOSITES = "onward off|inward out|open closed|open shut|full empty|wet dry|awake asleep|even odd|long short|tall short|old young"
_OPPOSITES += "|big small|large small|high low|fast slow|near far|hot cold|warm cold|more fewer|more less|expensive cheap"
_OPPOSITES += "|strong weak|wide narrow|early late"
_ASKS_WHICH = re.compile(r"(?i)\b(?:which|who|what)\b.*?\b(\w+er|more \w+|more|less)\b[^,?]*[,:]\s(.+?)\sor\s(.+?)\?")
_IS_THAN = re.compile(
    r"(?i)^(?:so |thus |therefore,? )?(.+?)\s(?:is|are|was|were|has|looks?|seems?)\b"
    r".*?\b(\w+er|more \w+|more|less)\b.*?\sthan\s([^,.]+)"
)
_EACH = re.compile(r"(?i)(.+?) and (.+?) (?:are|is|have|were) (.+?) and (.+?),? respectively")


def said_phrase(sentences: Sequence[str], asked: str, *, several: bool = False) -> tuple[str, str] | None:
    """Return the phrase with which a response answers a question in words, and how it was found; None where it says none.

    It stands in a conclusion, after a label, or in the sentence that shares most words with the question, there marked
    or after its verb. `several` is for lists, of which a marked word is only a part.
    """
    wanted = word_set(asked)
    shares = [len(wanted & word_set(sentence)) for sentence in sentences]
    order = sorted(range(len(sentences)), key=lambda at: (-shares[at], -at))
    cues = [at for at in reversed(range(len(sentences))) if CUE.search(sentences[at]) or _CONCLUDES.search(sentences[at])]
    labels = {at: label[0] for at, sentence in enumerate(sentences) if (label := _LABEL.match(sentence))}
    end = len(sentences) - 1
    last = [end] if labels.get(end, "").rstrip().endswith((">", "→", "⇒")) else []
    last = last or [at for at, label in labels.items() if wanted & word_set(label)][-1:]
    last = last or ([end] if end in labels or sentences[-1].startswith("**") else [])
    first = [0] if len(sentences[0].split()) < 4 and sentences[0].isascii() and sentences[0][-1] not in ":?" else []
    for at in (*cues, *last, *first, *(at for at in order if shares[at])):
        if REFUSAL.search(sentences[at]):
            return None
        if phrase := phrase_of(sentences[at], asked, several=several):
            return phrase, "opening" if at == 0 and len(sentences) > 1 else "conclusion"
    return None


def phrase_of(sentence: str, asked: str, *, several: bool = False) -> str | None:
    """Return the phrase of one sentence that answers a question in words."""
    if re.match(r"(?i)\W*why\b", asked) and (reason := re.search(r"(?i)\b(?:because|since)\s(?!of)([^.]+)", sentence)):
        return reason[1].strip()
    sentence = re.sub(r"^(?:So|Thus|Hence|Therefore),?\s", "", sentence[:MOST_CHARACTERS].strip().rstrip(".。 "))
    if said := code_of(sentence, asked) or (None if several or _DENIES.search(sentence) else _subject(sentence, asked)):
        return said
    if said := _compared(sentence, asked) or _respectively(sentence, asked) or ((found := _PRO_VERB.match(sentence)) and found[1]):
        return said
    if sentence.count("**") == 2 and sentence.startswith("**") and sentence.endswith("**"):
        sentence = sentence.strip("*")
    while label := _LABEL.match(sentence):
        sentence = sentence[label.end() :]
    clause = re.split(r"(?i)[,;，；]\s?(?:and )?(?:so|thus|therefore|hence|所以|因此)[,，]?\s", sentence)[-1]
    clauses = re.split(r"[,;，；]?\s(?:and|but|while|whereas)\s(?=the\s|it\s)|[；;]", clause)
    common = [len(word_set(one) & word_set(asked)) for one in clauses]
    if len(clauses) > 1 and common.count(max(common)) == 1 and not several:
        clause = clauses[common.index(max(common))]
    if _DENIES.search(_MARKED.sub("", clause)):
        return None
    marked = list(_MARKED.finditer(clause))
    bold = [found for found in marked if found[1]] or marked
    if not several and len({found[0] for found in bold}) == 1:
        return undress(next(filter(None, bold[0].groups()))).strip(" .,") or None
    plain = clause.replace("**", "")
    short = _ASIDE.sub("", plain) or plain
    wanted = set(content_words(asked))
    ends = [word.end() for word in re.finditer(r"[^\W_]+", short) if singular(word[0].lower()) in wanted]
    tail = re.sub(r"(?i)^\s*(?:of\s.*?)?\b(?:is|are|was|were|says|reads)\s", "", short[ends[-1] :]) if ends else ""
    copula = _COPULA.match(short)
    if not re.search(r"\w", tail) or (copula and copula.end() > ends[-1]):
        tail = short[copula.end() :] if copula else "" if ends else short
        if copula and set() < set(content_words(tail)) <= wanted:  # A cup is on the table.
            return _kept(re.sub(r"(?i)\s*\b(?:is|are|was|were)\s$", "", copula[0]), asked, several=several)
    if several and (copula := _COPULA.match(plain)):
        tail = plain[copula.end() :]
    return _kept(tail, asked, several=several)


def code_of(sentence: str, asked: str) -> str | None:
    """Return the one date, address or number of a telephone in a sentence, where the question asks for such."""
    found = _CODE.findall(sentence) if _ASKS_CODE.search(asked) and not _DENIES.search(sentence) else []
    return str(found[0]) if len(found) == 1 else None


def said_in_chinese(sentences: Sequence[str], asked: str) -> str | None:
    """Return what follows the words before the question word: `图中的建筑位于上海` where it asks `这座建筑位于哪个城市`."""
    if (asks := _ASKS_HAN.search(asked[-200:])) is None or re.search("不对|其实|实际|更正|而是|但", "".join(sentences)):
        return None
    before, after = re.escape(asks[1].rstrip("了的着")[-8:]), asks[3]
    verb = "+" if asks[2] and f"的{asks[2]}" not in asks[0] else "?"
    stems = "|".join(before[at:] for at in range(len(before) - 1) if before[at - 1 : at] != "\\")  # the longest that is there
    after_stem = rf"(?<![没不未])({stems})[了的着]{{0,2}}(?:{after or '(?!)'})?(?:[是为叫有指]|包括|:|：){verb}([^，。；？\n]+)"
    found = [(len(stem), at, said) for at, sentence in enumerate(sentences) for stem, said in re.findall(after_stem, sentence)]
    said = max(found, default=(0, 0, "?"))[2].strip(' *"”’')
    if len(said) > 60 or re.search("[?什哪谁吗或]|多少", said):
        return None
    phrase = re.sub(r"^一[只个条张辆件位座台棵朵头匹把](?=.)", "", said)
    return re.sub(f"[两三四五六七八九十几]?[个种]?{after}$", "", phrase) if after else phrase


def _subject(sentence: str, asked: str) -> str | None:
    """What does what a question asks who does: `Ann Lee signed the letter` where it asks who signed the letter."""
    if (asks := ASKS_WHO.match(asked)) is None:
        return None
    said = re.match(rf"([A-Z\d][^,;:]{{0,60}}?)\s{asks[1]}\s(?:(?:the|an?|in|for|to|at|on)\s)?{asks[2]}\b", sentence)
    vague = said and re.match(r"(?i)(?:it|this|that|s?he|they|there|i|we|you|if|either|one)\b", said[1])
    return said[1].replace("**", "") if said and not vague and set(content_words(said[1])) - set(content_words(asked)) else None


def opposites(word: str) -> set[str]:
    """The words that say the contrary of an adjective or comparative."""
    pairs = [pair.split() for pair in _OPPOSITES.split("|")]
    pairs += [[re.sub(r"(?<=[^aeiou])y$|e$", lambda end: "i" * (end[0] == "y"), one) + "er" for one in pair] for pair in pairs]
    pairs.append(["bigger", "smaller"])
    return {pair[1 - at] for pair in pairs for at in (0, 1) if pair[at] == word}


def _compared(sentence: str, asked: str) -> str | None:
    if " than " not in sentence or len(sentence) > 200:  # both patterns take cubic time
        return None
    question, said = _ASKS_WHICH.search(asked[-200:]), _IS_THAN.match(sentence)
    if not question or not said or re.search(r"(?i)\bnot\b|n['’]t\b", sentence):
        return None
    one, other = question[1].lower(), said[2].lower()
    return said[1] if one == other else said[3] if other in opposites(one) else None


def _respectively(sentence: str, asked: str) -> str | None:
    if "respectively" in sentence and (found := _EACH.match(sentence[-200:])):
        mine = [bool(set(content_words(found[at])) & set(content_words(asked))) for at in (1, 2)]
        return found[3 + mine.index(True)] if sum(mine) == 1 else None
    return None


def _kept(phrase: str, asked: str, *, several: bool) -> str | None:
    phrase = re.sub(r"^by\s", "", phrase.strip()) if re.match(r"(?i)\W*who\b|.*\bby whom\b", asked) else phrase
    phrase = re.sub(r"^\s*(?:of|that of|those of)\s", "", phrase)
    if several:
        first, _, rest = re.sub(r"^\s*(?:only|just|both|the)\s", "", phrase).strip().partition(" ")
        phrase = rest if rest and set() < set(content_words(first)) <= set(content_words(asked)) else f"{first} {rest}"
    phrase = undress(HEDGE.sub("", phrase.strip(" \n\t,.。*:："))).strip(" .,。*")
    if not several:
        phrase = _ASIDE.sub("", phrase) or phrase
        if not re.match(r"(?i)\W*where\b", asked) and not re.match(r"(?i)(?:on|in|at|from|to)\b", phrase):
            phrase = _PLACE.sub("", phrase) or phrase
    return phrase if phrase and re.search(r"\w", phrase) and len(phrase.split()) <= MOST_WORDS + 25 * several else None


def without_asked(phrase: str, asked: str) -> str:
    """Return a phrase without the words of the question at its end and the preposition at its beginning, if anything remains."""
    wanted = set(content_words(asked))
    words = re.sub(r"(?i)^(?:on|in|at)\s(?=the\s|an?\s)", "", phrase.strip(" .。")).split()
    small = {"of", "the", "a", "an"}
    while any(word.lower() not in small for word in words[:-1]) and (
        singular(re.sub(r"\W", "", words[-1]).lower()) in wanted or words[-1].lower() in small
    ):
        words.pop()
    return re.sub(r"(?i)^(?:the|an?)\s", "", " ".join(words))
