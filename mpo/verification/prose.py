"""Prose: its sentences, which of them conclude or refuse, and the number that a sentence is about."""

from __future__ import annotations

import re
from collections.abc import Collection
from fractions import Fraction

from mpo.verification.dress import plain_sentence
from mpo.verification.number import find_numbers, read_number
from mpo.verification.units import singular

REFUSAL = re.compile(
    r"(?i)\b(?:sorry|apologi[sz]e|unable to|not able to|(?:ca|do|wo)n['’]t (?:help|see|process|know|determine|tell|answer|calculate"
    r"|compute|count|view|identify|provide|have enough|say|access|be determined)|cannot (?:\w+ly )?(?:help|see|process|determine"
    r"|tell|answer|calculate|compute|count|view|identify|provide|say|access|be (?:determined|answered|inferred|known))"
    r"|do not (?:know|have enough)|(?:is|it['’]s|am) (?:not (?:possible|clear|sure|certain)|impossible|unclear|unsure|uncertain)"
    r"|(?:do|does|did)(?: not|n['’]t) (?:provide|give|contain|include|have|specify|mention|state|indicate|show)\b"
    r"[^.\n]{0,60}?\b(?:information|context|details?|data|whether|if)|cannot (?:provide|give|be (?:provided|made|given|found))"
    r"|(?:is|are|was|were) not (?:provided|given|specified|available|visible)|as an? (?:text-based )?ai|not enough information"
    r"|insufficient (?:information|data|context|details?)|no way to (?:know|tell)|need more information|(?:hard"
    r"|difficult) to (?:say|tell)(?=\W{0,3}$|[.;]))\b|无法|不能确定|不知道|抱歉|不确定"
)
CUE = re.compile(
    r"(?:^\W{0,4}|[,;:]\s)(?:therefore|thus|hence|so|consequently|accordingly|in conclusion|in summary|to conclude"
    r"|in total|total(?=\s?[:：])|overall(?=,)|taken together|all in all|finally"
    r"|(?:the )?(?:final|total) (?:count|number|sum|total|value|result)\b"
    r"|(?:this|that) (?:means|makes|gives|leaves)|we (?:get|have|find|conclude))\b|∴|因此|所以|故|综上|总共|一共|最终",
    re.IGNORECASE,
)
COURTESY = re.compile(
    r"(?i)\b(?:hope (?:this|that|it)|let me know|(?:do|would) you (?:have|want|like|need)|anything else|feel free"
    r"|(?:please )?(?:provide|share) (?:me|more)|if you have any|happy to help)\b"
    r"|希望.{0,12}帮|如果?[你您]?还?有.{0,6}(?:问题|疑问)"
)
_POLITE = re.compile(
    rf"{COURTESY.pattern}"
    r"|^(?:had|were) (?:the|it|they)\b[^.]*\bwould\b|^\((?=\S+\s\S+\s)[^()]+\)$"
    r"|^\W{0,4}(?:(?:let['’]?s |let us |to )?(?:verify|(?:double-)?check)\b|verification[:：])|^[*\s]{0,4}(?:验证|检验)"
    r"|^(?:sure|okay|ok|certainly|of course|i see the image|i understand)\b[^.!]{0,60}[.!,]?$"
)
SENTENCE = re.compile(
    r"(?m)(?<=[.!?])(?<!^[A-J]\.)(?<!\bDr\.)(?<!\b(?:Mr|Ms|St|Mt|Ft|vs)\.)(?<!\bMrs\.)(?<!\b(?:i\.e|e\.g)\.)(?<!\b[ap]\.m\.(?=\s[a-z]))"
    r"(?<!\b(?:Jan|Feb|Apr|Aug|Oct|Nov|Dec|Fig|Vol)\.(?=\s\d))(?<!\bSept\.(?=\s\d))(?<!\bp\.(?=\s\d))"
    r"(?<!\b[A-Z]\. [A-Z]\.)(?<!\bDr\. [A-Z]\.)(?<!\b[A-Z]\.[A-Z]\.(?=\s[A-Z][\w'’-]{1,30}\W{0,3}$))"
    r"[*_\"')\]]{0,3}\s+|(?<=[。！？])|\n+"
)
HEDGE = re.compile(
    r"(?i)^(?:(?:it|this|that|they)(?:['’]s| is| are| looks like| seems to be| appears to be)\s|(?:(?:most )?(?:probably|likely)"
    r"|perhaps|maybe|apparently)\s|(?:I|we) (?:think|believe|guess|would say)(?: that)?(?: it['’]s| it is)?\s)+"
)
"""Words before an answer that say only how sure it is."""
BOLD = re.compile(r"\*\*([^*\n]{1,80})\*\*|\\boxed\{([^{}]{1,80})\}")
_ABOUT = (
    r"(?:(?:approximately|about|around|roughly|exactly|only|just|equal to|a total of|total of|a|also|now|still"
    r"|the number|the year|year|with|大约|约)\W{1,3}){0,3}$"
)
_COPULA = re.compile(
    r"(?i)(?:\b(?:is|are|was|were|equals?|be|shows?|reads?|contain(?:s|ing)?|find|get|got|gives?(?: us)?|left|leaves|means"
    r"|in total)|=|≈|:|：|是|为|有|等于|得|需要?|共)\W{0,4}" + _ABOUT
)
_PREPOSITION = re.compile(r"\b(?:has|have|had|of|to|at|in|as)\W{0,4}" + _ABOUT, re.IGNORECASE)
_NO_ANSWER = re.compile(
    r"(?i)(?:\b(?:step|figure|fig|option|choice|question|image|table|page|line|row|column|point|angle|triangle|grade|day|stage"
    r"|level|than|not(?: be)?|cannot be|half of|twice|double|triple|[%％] of|(?:divided|multiplied) by|per|from|within|above|below"
    r"|over|under|(?<!is )at least|at most|up to|out of|minimum of|maximum of)|[<>!]=|\\(?:[lg]eq?|neq?|pm)|(?<!=)>|[∠△<≤≥≠±]"
    r"|n['’]t(?: be)?|instead of|rather than|舍去?(?:[a-z]\s?=)?|至少|至多|最多|不?大于|不?小于|不?少于|不?超过|不是|不为|不等于"
    r"|(?<!\S)(?-i:(?!(?:About|Around|Only|Just|Total|Answer|Thus|Hence|Therefore|The|These|All|With|Since|Result|Value|Sum|Out"
    r"|After|From)\b|\w+(?:ly|ing)\b)[A-Z][a-z]{2,12}))\s?[#(]?$"
)
_REJECTED = re.compile(
    r"(?i)\W{0,3}(?:\s?\w{1,12}){0,2}(?:\s(?:is|was|would be)|(?<=that)['’]s)(?:n['’]t| not| wrong| incorrect| too)\b"
    r"|\s(?:decimal|significant)\b|\s?[(（](?:wrong|incorrect|rejected|extraneous|invalid|舍)|\+(?=[\s.,;]|$)"
)
_REASON = re.compile(
    r"(?is)[\s,(;](?:when|where|which|if|because|since|whereas|while|assuming|given that|as shown|that is,|i\.e\.)\s.*"
    r"|:\s(?=.*\d[^\d.,]+\d).*"
)
_SETTING = re.compile(
    r"(?i)^\W{0,3}(?:(?:so|thus|therefore|hence)\W{1,2})?(?:if|when|as|since|because|given|although|while|after|before|on|in|at|for|from|among"
    r"|with|using|out of|initially|originally|among|of|by|[a-z]{3,12}ing)\b[^,，]{1,200}[,，]\s"
)
_HYPOTHETICAL = re.compile(r"^\W{0,3}(?:if|unless|suppose)\b|\bwould (?:be|have)\b.*\bif\b", re.IGNORECASE)
ASKS_LETTER = re.compile(
    r"(?i)\b(?:answer|respond|reply|choose|give|select|write|output)\b[^.\n]{0,60}\bletters?\b|(?:字母|选项(?:代号|序号))"
)
ASKS_SHARE = re.compile(r"(?i)\b(?:probability|chance|odds|ratio|fraction|proportion|share)\b|概率|比例|比值|几分之几")
LETTER_ALONE = re.compile(r"\s*\W?[A-J]\W?\s*")
ASKS_YEAR = re.compile(r"\byear\b|\bwhen\b|哪一?年", re.IGNORECASE)
_MONTH_AND_DAY = re.compile(
    r"(?i)\b(?:\d{1,2}(?:st|nd|rd|th)? (?:of )?)?(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]{0,6}\.?"
    r"(?: \d{1,2}(?:st|nd|rd|th)?)?,? (?=[12]\d{3}\b)"
)
_BRACKET = re.compile(r"(?<=\s)\((?!or\b)[^()]*\)(?!\s*[=*/+^-])")
_SO = re.compile(
    r"(?is).*[,;，；]\s?(?:and )?(?:so|thus|therefore|hence|which (?:is|gives|makes|means|equals)(?=\s[\d$-])|leaving|giving|making"
    r"|(?:for )?a (?:total|change|difference) of|(?:but )?(?:it(?:['’]s| is)|there (?:is|are)) (?:actually|really|in fact)"
    r"|but (?:actually|in fact|really)|所以|因此|故|剩下?|还剩|共)(?![A-Za-z])"
)
MOST_SENTENCES, MOST_CHARACTERS = 400, 2000
"""Sentences that are read, of the beginning and the end, and characters of each."""
Found = tuple[int, int, str]
"""Start and end of a number in a sentence, and the number with its unit."""
_CLAUSE = re.compile(r"[,;，；]\s?(?:(?:and|but|while|whereas|而且?|但是?)(?![a-z])\s?)?|\s(?:and|but|while|whereas)\s")
_STATES = re.compile(
    r"(?i)\b(?:is|are|was|were|has|have|had|costs?|weighs?|measures?|shows?|reads?|contains?|gets?|got|won|sold|made|took|takes"
    r"|\w{2,}ed|(?:but )?(?:only|just))\b[^\d]{0,30}$|\w\s?[:=]\s?$|(?:是|有|为|到|只|共)[^\d]{0,8}$"
)
_ANOTHER = re.compile(
    r"(?i)\b(?:first|second|third|fourth|fifth|last|latter|next|other|others|previous|following|another|behind|beside|left|right|upper|lower"
    r"|top|bottom)\b|前[面一]|后[面一]|下一|另|其他|旁边|第[一二三四五]"
)
_BEGINS = re.compile(r"\S+ (?:of (?:them|these|those|which)|(?:\w+ )?(?:are|were|is|was|have|has|\w+ed))\b")
_TOTALS = re.compile(
    r"(?i)\b(?:totals?|sum|differences?|altogether|together|remain\w*|left|average|product)\b|(?<!\b[a-z]\s)(?<!\b[a-z])[=≈]|一共|共|剩|差"
)
_HYPOTHETICALLY = re.compile(r"(?i)\b(?:if (?:you|we|one|i) (?:also |do )?(?:count|include|add)\w*)\b|^(?:如果)?(?:算上|包括|加上)")
_INCLUDING = re.compile(r"(?i)\b(?:counting|including|with)\b")
_HOW_MANY = re.compile(
    r"(?i)how many (?:\w+ ){0,3}?(\w+) (?:is|are|was|were|do|does|did|can|could|have|has|had|will|would|in|on|of)\b"
)
_SEEN = re.compile(r"(?i)\b(?:see|seen|shown|visible)\b")
_RIGHT = re.compile(r"(?i)(?<!\S)(\S{1,20}) (?:is|as) the (?:(?:right|correct|final) )?(?:answer|one)\W*$")
_PAIR = re.compile(r"\s?\(?(?:or|and|to|-|~|或|和|至|到|,|[%°]? or)\s?(?:[a-z](?:_?\{?\d\}?)?\s?=\s?)?", re.IGNORECASE)
_FUNCTION_WORDS = frozenset(
    "is are was were be been do does did has have had can could will would should a an "
    "the this these those that there it in on of at to and or as image picture figure graph chart".split()
)


def sentences_of(text: str) -> list[str]:
    """Return the sentences of a text, without courtesies where there is anything else."""
    found = [sentence.strip()[:MOST_CHARACTERS] for sentence in SENTENCE.split(text) if sentence and sentence.strip()]
    if len(found) > MOST_SENTENCES:
        found = found[: MOST_SENTENCES // 2] + found[-MOST_SENTENCES // 2 :]
    return [sentence for sentence in found if not _POLITE.search(sentence)] or found


def numbers_in(sentence: str) -> list[Found]:
    """Return the numbers of a sentence that may be an answer: not `Step 2`, `option 1`, `at least 3` or `not 4`."""
    bulleted = re.sub(r"^\s*(?:\d{1,2}[.)]\s|#+ )", lambda found: " " * len(found[0]), sentence)
    found = [
        number
        for number in find_numbers(bulleted)
        if not _NO_ANSWER.search(bulleted[max(0, number[0] - 18) : number[0]])
        and not _REJECTED.match(bulleted, number[1])
        and number[2][0] not in "±"
        and not (number[2] == "one" and re.search(r"\b(?:the|this|that|correct|right|other|last|\w+est)\s$", bulleted[: number[0]]))
    ]
    digits = [number for number in found if re.search(r"\d", number[2])]
    if digits and len(digits) < len(found):  # "In two hours he walks 7 km", not "There are two bars above 40"
        after = [n for n in found if _COPULA.search(bulleted[max(0, n[0] - 40) : n[0]]) or n[1] > digits[-1][0]]
        return [n for n in found if n in digits or (n in after and n[2] != "one")]
    return found


def stated_number(sentence: str, givens: Collection[Fraction] = (), *, year: bool = False) -> str | None:
    """Return the number or expression that a sentence of prose is about; empty where it hedges; None where there is none.

    It is the bold one, or that of the conclusion (`..., so 5`) or main clause, the last one after a verb such as `is`, or the first
    one. Those that the question gives (`givens`) come last; unless a year is asked for, `in 2015` is only a date.
    """
    for a, b in reversed(BOLD.findall(sentence)):
        inner = plain_sentence(a or b)
        if read_number(inner) is not None:
            return str(a or b)
        if numbers_in(inner):
            return stated_number(inner)
    plain = plain_sentence(sentence)
    if (right := _RIGHT.search(plain)) and read_number(right[1]) is not None:
        return right[1]
    if not numbers_in(plain) or (_HYPOTHETICAL.search(plain) and not numbers_in(_SETTING.sub("", plain))):
        return None
    if year:
        plain = _MONTH_AND_DAY.sub("", plain)
    if re.search(r"\d(?::| : )\d", plain):  # a ratio or a time
        return ""
    for aside in (_SO, _SETTING, _BRACKET, _REASON):
        clause = aside.sub(" ", plain)
        plain = clause if numbers_in(clause) else plain
    found = numbers_in(plain)
    different = len({shown for _, _, shown in found}) > 1
    if different and (len(found) == 2 and re.search(r"\bbetween \S+ (?:and|to) \S+", plain) or re.search(r"\beither\b", plain)):
        return ""
    if spans := [found.span() for found in re.finditer(r"\b(?:between|from) \S{1,20} (?:and|to) \S{1,20}", plain)]:
        found = [number for number in found if not any(start <= number[0] < end for start, end in spans)] or found
    found = [number for number in found if not re.match(r"[^=]{0,12}=", plain[number[1] :])] or found
    dated = [number for number in found if re.fullmatch(r"(?:1[5-9]|20)\d\d", plain[number[0] : number[1]])]
    dated = [number for number in dated if re.search(r"\b(?:in|for|since|by|during)\s$", plain[: number[0]])]
    found = [number for number in found if year or number not in dated] or found
    fresh = [number for number in found if (read := read_number(number[2])) is None or read.value not in givens] or found
    pairs = [pair for pair in zip(found, found[1:], strict=False) if _PAIR.fullmatch(plain[pair[0][1] : pair[1][0]])]
    paired = {number for pair in pairs for number in pair}
    chosen = None
    for verb in (_COPULA, _PREPOSITION):
        pool = [number for number in fresh if verb is _COPULA or number not in paired]
        after = [number for number in pool if verb.search(plain[max(0, number[0] - 40) : number[0]])]
        chosen = chosen or (after[-1] if after else None)
    total = re.compile(r"\W{0,12}(?:\w{1,12} )?(?:in total|in all|altogether)\b(?!\W{1,3}\d)")
    chosen = next((number for number in fresh if total.match(plain, number[1])), chosen)
    chosen = chosen or next((number for number in fresh if number not in paired), fresh[0])
    if chosen in paired:
        return ""
    return "" if re.fullmatch(r"\d+\s?[-~]\s?\d+", chosen[2]) or "±" in chosen[2] else chosen[2]


def of_name(sentence: str, asked: str) -> str | None:
    """Return the number beside the one name of a list that the question has."""
    said = dict(re.findall(r"(?<!\w)([A-Z][a-z]+)(?::|\s[-–—])? (\d[\d.]*)(?=\W*(?:[,;\n]|$))", sentence))
    own = [said[name] for name in re.findall(r"(?<=[a-z] )[A-Z]\w+", asked) if name in said]
    return own[0].rstrip(".") if len(said) > 1 and len(own) == 1 else None


def asked_clause(sentence: str, asked: str) -> str:
    """Return the clause of a sentence that states the number which is asked for; the sentence where no clause is clearly it."""
    if _RIGHT.search(sentence):
        return sentence
    places = [(0, 0), *(found.span() for found in _CLAUSE.finditer(sentence)), (len(sentence), len(sentence))]
    clauses = [sentence[start:end].strip() for (_, start), (end, _) in zip(places, places[1:], strict=False)]
    contrast = re.search(r"\bbut\b", sentence)
    stated = []
    for clause in clauses if len(clauses) < 7 else ():
        found = [n for n in numbers_in(clause) if not re.search(rf"(?<![\d.]){re.escape(clause[n[0] : n[1]])}(?![\d.]*\d)", asked)]
        if found and (
            any(_STATES.search(clause[: n[0]]) for n in found) or (found[0][0] == 0 and (contrast or _BEGINS.match(clause)))
        ):
            stated.append(clause)
    if len(stated) < 2 or _TOTALS.search(stated[-1]) or (_TOTALS.search(clauses[-1]) and numbers_in(clauses[-1])):
        return sentence
    noun = {singular(said.lower()) for said in _HOW_MANY.findall(asked)}
    names = {name.lower() for name in re.findall(r"(?<=[a-z] )[A-Z]\w+", asked)}
    wanted, *words = (word_set(_SEEN.sub("visible", text)) for text in (asked, *stated))
    common = set.intersection(*words)
    scores = []
    for clause, had in zip(stated, words, strict=True):
        others = sum(said.lower() not in asked.lower() for said in _ANOTHER.findall(clause)) + bool(_HYPOTHETICALLY.search(clause))
        shared = had & wanted - common
        scores.append((-others, len(shared & names), len(shared - noun), len(shared & noun), -bool(_INCLUDING.search(clause))))
    best = max(scores)
    return stated[scores.index(best)] if scores.count(best) == 1 else sentence


def content_words(text: str) -> list[str]:
    """Return the words of a text that carry its content, in the singular and in order."""
    text = re.sub(r"\b(on|in)(?=\s*(?:[.,;?!]|$))", r"\1ward", text.lower().replace("n't", " not"))  # Is the light on?
    return [singular(word) for word in re.findall(r"[^\W_]+", text) if word not in _FUNCTION_WORDS]


def word_set(text: str) -> set[str]:
    """Return the content words of a text, and the pairs of Chinese characters."""
    return set(content_words(text)) | {a + b for a, b in zip(text, text[1:], strict=False) if "\u4e00" <= min(a, b)}
