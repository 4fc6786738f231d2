r"""Measure the checks of `mpo mminstruct` on a second set of faults, which no author of the checks had seen.

    python benchmarks/mminstruct_second.py benchmarks/results/mminstruct_second.json --stage untouched

The edits were written before their author read the checks or the older edits, and registered before the first measurement. Each is
labelled beforehand: `rule`, where the response, the description and the set hold all that is needed, by comparison, by form, or by
a closed list of words; `judge`, where meaning or the image is needed. Only `rule` counts as recall; of `judge`, what is found by
chance is told. In a dialogue one of three turns has the fault, and the others must stay. A case is the images with their responses,
and the place of the fault among all instructions. Misses of the closed half are never printed.
"""

# ruff: noqa: E501 (tables of wordings)
import hashlib
import random
import re
from collections import Counter

import mminstruct as seen

from mpo.pipelines.mminstruct.check import check_all
from mpo.pipelines.mminstruct.generate import read_items
from mpo.pipelines.mminstruct.output import distinct

LETTERS = "ABCDEFGH"
FAULTS, GOOD = {}, {}
LISTED = 3
"""Maximum number of misses of an edit that are listed."""
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
COLOURS = ("red", "green", "blue", "white", "black", "orange", "grey", "silver", "brown", "yellow")
ALL, OPEN, SHORT = ("judgement", "choice", "short", "long"), ("short", "long"), ("short",)


def said(item):
    """The answer as a response writes it: with its letter, if it has options."""
    return f"{LETTERS[item[2].index(item[3])]}. {item[3]}" if item[2] else item[3]


def reply(*items, marks=False):
    """A response of (question, options or their text, answer as written)."""
    lines = []
    for at, (question, options, answer) in enumerate(items, 1):
        if not isinstance(options, str):
            options = "\n".join(f"{LETTERS[place]}. {option}" for place, option in enumerate(options))
        lines.append(f"<Q{at}>{question}</Q{at}>" + f"<C{at}>{options}</C{at}>" * bool(options) + f"<A{at}>{answer}</A{at}>")
    return "\n".join(lines)


def own(item):
    return item[1], item[2], said(item)


def one(image, text, count=1, at=-1):
    return [(image, text, count)], at


def fault(kind, label, reason, *types, only=None):
    """Register an edit (random, item, image, images) that gives a case, several of one instruction each, or None."""

    def register(edit):
        FAULTS[edit.__name__] = (kind, label, reason, types or ALL, only, edit)
        return edit

    return register


def worded(kind, name, label, reason, types, **forms):
    """Register an edit by its forms in each language: (question, answer) with {q}, {a}, {w} (the answer with its letter)."""

    def edit(random, item, image, images):
        if image["language"] not in forms:
            return None
        question, answer = random.choice(forms[image["language"]])
        filled = {"q": item[1], "a": item[3], "w": said(item), "s": item[1].rstrip("?？"), "low": item[1][0].lower() + item[1][1:]}
        put = lambda form: re.sub(r"\{(q|a|w|s|low)\}", lambda found: filled[found[1]], form)  # noqa: E731
        return one(image, reply((put(question), item[2], put(answer))))

    edit.__name__ = name
    fault(kind, label, reason, *types)(edit)


# Letters and options

CHOICE = ("choice",)
worded("letter", "number_for_letter", "rule", "no option has this label", CHOICE, en=[("{q}", "Option II"), ("{q}", "(iii)")],
       zh=[("{q}", "选项丙"), ("{q}", "第二项")])  # fmt: skip
worded("letter", "all_of_the_above", "rule", "no option says so", CHOICE, en=[("{q}", "All of the above"), ("{q}", "Both of them")],
       zh=[("{q}", "以上都对"), ("{q}", "两者都是")])  # fmt: skip


@fault("letter", "rule", "the sentence has the letter of one option and the text of another", "choice")
def letter_and_text_apart(random, item, image, images):
    wrong = random.choice([letter for letter, option in zip(LETTERS, item[2], strict=False) if option != item[3]])
    forms = {"en": ["Option {0} is correct: {1}", "{0}, which is {1}", "({0}) {1}", "The answer is {0}, {1}."]}
    form = random.choice(forms.get(image["language"], ["正确选项是{0}：{1}", "选{0}，即{1}", "（{0}）{1}"]))
    return one(image, reply((item[1], item[2], form.format(wrong, item[3]))))


@fault("letter", "judge", "letter and text agree: which is right is in the image", "choice")
def another_letter_alone(random, item, image, images):
    wrong = random.choice([letter for letter, option in zip(LETTERS, item[2], strict=False) if option != item[3]])
    return one(image, reply((item[1], item[2], wrong)))


@fault("letter", "rule", "two options are one: but for article, case, or the way a number is written", "choice")
def options_that_are_one(random, item, image, images):
    right = item[3]
    if re.fullmatch(r"[\d.]+", right):
        same = right + "0" if "." in right else right + ".0"
    elif right in NUMBERS:
        same = str(NUMBERS.index(right))
    else:
        same = "the " + re.sub("^(a|an|the) ", "", right)
    options = [right, same, *[option for option in item[2] if option != right][:2]]
    random.shuffle(options)
    return one(image, reply((item[1], options, f"{LETTERS[options.index(right)]}. {right}")))


@fault("letter", "rule", "a sign stands at one option only", "choice")
def right_one_signed(random, item, image, images):
    sign = random.choice(["{} ✓", "{} *", "**{}**", "{} <-- right", "{} (T)"])
    return one(image, reply((item[1], [sign.format(text) if text == item[3] else text for text in item[2]], said(item))))


@fault("letter", "rule", "there is nothing to choose from", "choice")
def one_option(random, item, image, images):
    return one(image, reply((item[1], [item[3]], f"A. {item[3]}")))


# Without the image

for name, form in {"word_explained": "What does the word '{0}' mean?", "sum_asked": "What is {1} plus {2}?"}.items():

    @fault("no image", "judge", "a model without the image finds out (`blind`)", "short", only="en")
    def general(random, item, image, images, name=name, form=form):
        first, second = random.randint(3, 40), random.randint(3, 40)
        word = max(re.findall(r"[a-z]+", image["caption"]), key=len)
        answer = f"{first + second}" if name == "sum_asked" else f"a kind of {word[:3]}"
        return one(image, reply((form.format(word, first, second), [], answer)))

    FAULTS[name] = FAULTS.pop("general")


# Repeats


def after(image, item, question, answer=None):
    return one(image, reply(own(item), (question, item[2], answer or said(item))), 2)


@fault("repeated", "rule", "only function words and spelling differ", only="en")
def which_for_what(random, item, image, images):
    question = item[1]
    for first, second in (("Which colour", "What color"), ("What colour", "Which color"), ("Which ", "What "), ("Is the", "Is that"),
                          ("What ", "So what "), ("Does the", "Does this"), ("Are the", "Are these")):  # fmt: skip
        if first in question:
            return after(image, item, question.replace(first, second, 1))
    return None


@fault("repeated", "rule", "the same question with the same options in another order", "choice")
def options_in_another_order(random, item, image, images):
    options = item[2][1:] + item[2][:1]
    again = (item[1], options, f"{LETTERS[options.index(item[3])]}. {item[3]}")
    return one(image, reply(own(item), again), 2)


@fault("repeated", "rule", "a sentence or a phrase stands several times in a row", "long")
def loop_in_the_answer(random, item, image, images):
    first = re.split(r"(?<=[.。，,])", item[3])[0].strip()
    return one(image, reply((item[1], [], random.choice([" ", ""]).join([item[3], *[first] * random.randint(3, 6)]))))


@fault("repeated", "rule", "the question stands twice")
def question_twice(random, item, image, images):
    return one(image, reply((f"{item[1]} {item[1]}", item[2], said(item))))


@fault("repeated", "rule", "the answer is the question", "short", "long")
def question_as_answer(random, item, image, images):
    answer = random.choice([item[1], item[1].rstrip("?？") + (".", "。")[image["language"] == "zh"]])
    return one(image, reply((item[1], [], answer)))


@fault("repeated", "judge", "the words are others; only the meaning is the same", "short", "judgement", only="en")
def asked_by_other_words(random, item, image, images):
    words = {"colour": "hue", "bar": "column", "stand": "be located", "value": "number", "behind": "in the rear of"}
    question = item[1]
    for word, other in words.items():
        question = question.replace(word, other)
    return after(image, item, f"I wonder: {question}") if question != item[1] else None


# Contradictions


@fault("contradicting itself", "rule", "of two things compared both ways, one answer must be the other's opposite", "judgement")
def compared_both_ways(random, item, image, images):
    if item[3] in ("No", "否"):  # both may be false: in a tie
        return None
    found = re.fullmatch(r"Is the bar of (.+) higher than that of (.+)\?", item[1])
    if found:
        return after(image, item, f"Is the bar of {found[2]} higher than that of {found[1]}?")
    found = re.fullmatch("(.+)的柱子比(.+)的高吗？", item[1])
    return found and after(image, item, f"{found[2]}的柱子比{found[1]}的高吗？")


@fault("contradicting itself", "rule", "a closed list of opposites, else the same question", "judgement")
def opposite_asked(random, item, image, images):
    for first, second in (("higher", "lower"), ("upright", "upside down"), ("indoors", "outdoors"), ("高吗", "低吗")):  # fmt: skip
        if re.search(rf"\b{first}\b", item[1]) or first in item[1] and image["language"] == "zh":
            if item[3] in ("Yes", "是"):  # of a comparison, both may be false
                return after(image, item, item[1].replace(first, second))
    return None


@fault("contradicting itself", "rule", "the answer denies what its own first word affirms", "judgement")
def yes_it_is_not(random, item, image, images):
    forms = {"Yes": ["Yes, it is not.", "Yes, there is none.", "Yes, that is wrong."], "No": ["No, it is.", "No, that is right.", "No, yes."],
             "是": ["是，不是。", "是的，并没有。"], "否": ["否，是的。", "否，这是对的。"]}  # fmt: skip
    return one(image, reply((item[1], [], random.choice(forms[item[3]]))))


def chart(image):
    return "bar" in image["caption"] and "chart" in image["caption"] or "柱" in image["caption"]


@fault("contradicting", "rule", "the description has no such number, and a value is asked for", "short")
def digits_turned(random, item, image, images):
    if not chart(image) or not re.fullmatch(r"\d+\.\d+", item[3]):
        return None
    answer = random.choice(
        [f"{float(item[3]) * 10:.4g}", f"{float(item[3]) / 10:.3g}", f"{float(item[3]) + 1.3:.3g}", f"-{item[3]}"]
    )
    return None if answer in image["caption"] else one(image, reply((item[1], [], answer)))


@fault("contradicting", "rule", "the description does not have the unit", "short")
def unit_of_another_kind(random, item, image, images):
    if not chart(image) or not re.fullmatch(r"[\d.]+", item[3]):
        return None
    units = ["kg", "%", "years", "mm", "litres"] if image["language"] == "en" else ["千克", "%", "年", "毫米", "升"]
    return one(image, reply((item[1], [], f"{item[3]} {random.choice([unit for unit in units if unit not in image['caption']])}")))


@fault("contradicting", "rule", "the description does not have the colour", "short", only="en")
def colour_not_there(random, item, image, images):
    if "colour" not in item[1]:
        return None
    return one(image, reply((item[1], [], random.choice([c for c in (*COLOURS, "purple", "pink") if c not in image["caption"]]))))


@fault("contradicting", "rule", "the description counts the same thing otherwise", "long", "short")
def counted_otherwise(random, item, image, images):
    if not chart(image):
        return None
    count = int(re.search(r"has (\d+) blue|有(\d+)根", image["caption"])[0].strip("has blue有根"))
    other = NUMBERS[count + random.randint(2, 4)]
    question = {"en": f"Which of the {other} bars is meant here: {item[1]}", "zh": f"在{count + 3}根柱子中，{item[1]}"}[
        image["language"]
    ]
    return one(image, reply((question, [], item[3])))


@fault("contradicting", "judge", "both words are in the description", "judgement", "short")
def turned_round(random, item, image, images):
    flips = {"Yes": "No", "No": "Yes", "是": "否", "否": "是", "on the left": "on the right", "right": "left"}
    return one(image, reply((item[1], [], flips[item[3]]))) if item[3] in flips else None


@fault("contradicting", "judge", "a thing that is not described may have been called otherwise", "short", only="en")
def another_thing(random, item, image, images):
    return one(image, reply((item[1], [], random.choice(["a zebra", "an umbrella", "some bread", "a keyboard"]))))


@fault("contradicting", "judge", "what a question takes for granted is a matter of meaning", "long", only="en")
def false_premise(random, item, image, images):
    return one(image, reply((f"Next to the sleeping zebra, {item[1][0].lower()}{item[1][1:]}", [], item[3])))


# Form: template remains, leftovers of formats, cut texts

worded("template", "slot_left", "rule", "a slot of a template is still there", ALL,
       en=[("What does the {object} in the image do?", "{w}"), ("{q} [insert detail]", "{w}"), ("{q}", "%s"), ("{q}", "$ANSWER"),
           ("{q}", "{{answer}}"), ("What is the colour of <object>?", "{w}"), ("{q}", "TODO"), ("{q}", "your answer here")],
       zh=[("图中的【物体】是什么？", "{w}"), ("{q}（此处填写细节）", "{w}"), ("{q}", "待补充"), ("{q}", "在此填写答案"), ("{q}", "XXX")])  # fmt: skip
worded("template", "label_left", "rule", "a label of the format is still there", ALL,
       en=[("[Question] {q}", "{w}"), ("Q: {q}", "{w}"), ("1) {q}", "{w}"), ("{q}", "Answer: {w}"), ("{q} Type: short", "{w}"), ("Turn 2 - {q}", "{w}")],
       zh=[("【问题】{q}", "{w}"), ("问：{q}", "{w}"), ("1、{q}", "{w}"), ("{q}", "答案：{w}"), ("{q}（题型：简答）", "{w}"), ("第二轮：{q}", "{w}")])  # fmt: skip
worded("template", "word_to_the_user", "rule", "a closed list of phrases about the work itself", ALL,
       en=[("{q}", "{w} Let me know if you need more questions!"), ("{q}", "{w} I hope this helps."), ("Sure! Here is one: {q}", "{w}"),
           ("{q}", "{w} (Note: this tests counting.)"), ("{q} (Difficulty: easy)", "{w}")],
       zh=[("{q}", "{w} 希望对您有所帮助！"), ("好的，以下是问题：{q}", "{w}"), ("{q}", "{w}（注：本题考查计数）"), ("{q}（难度：简单）", "{w}")])  # fmt: skip
worded("format", "special_tokens", "rule", "a token of a chat format is no text", ALL,
       **{language: [("{q}", "{w}<|im_end|>"), ("{q}", "{w}</s>"), ("[INST] {q} [/INST]", "{w}"), ("{q}", "<think>Let us see.</think> {w}"),
                     ("<image> {q}", "{w}"), ("{q}", "{w}<|endoftext|>")] for language in ("en", "zh")})  # fmt: skip
worded("format", "markup", "rule", "markup or escapes are no text of a short answer or a question", ("judgement", "choice", "short"),
       **{language: [("{q}<br>", "{w}"), ("<b>{q}</b>", "{w}"), ("{q}", "**{w}**"), ("{q}\\n", "{w}"), ("{q}", "`{w}`"), ("## {q}", "{w}"),
                     ("&lt;p&gt;{q}", "{w}")] for language in ("en", "zh")})  # fmt: skip
worded("format", "broken_characters", "rule", "characters that only wrong decoding gives", ALL,
       en=[("It\u00e2\u20ac\u2122s shown: {low}", "{w}"), ("{q}", "{w} \ufffd"), ("{q}", "{w} caf\u00c3\u00a9"), ("{q} \\u00e9", "{w}")],
       zh=[("{q}", "{w}\ufffd\ufffd"), ("\u00e4\u00b8\u00ad\u00e6\u2013\u2021{q}", "{w}"), ("{q}", "{w}锟斤拷"), ("\\u4e2d{q}", "{w}")])  # fmt: skip
worded("format", "pieces_of_json", "rule", "signs of JSON at an end", ALL,
       **{language: [("{q}", '{"answer": "{w}"}'), ("{q}", '{w}",'), ('"question": "{q}', "{w}"), ("{q}", "{w}}]")] for language in ("en", "zh")})  # fmt: skip
worded("format", "no_answer", "rule", "a closed list of words for nothing", ("short", "long", "judgement"),
       en=[("{q}", "N/A"), ("{q}", "null"), ("{q}", "-"), ("{q}", "None given."), ("{q}", "?"), ("{q}", "See above.")],
       zh=[("{q}", "null"), ("{q}", "——"), ("{q}", "见上文"), ("{q}", "？"), ("{q}", "略")])  # fmt: skip
worded("format", "no_question", "rule", "too few words to ask for anything", ALL, en=[("What?", "{w}"), ("Question?", "{w}"), ("?", "{w}")],
       zh=[("什么？", "{w}"), ("问题？", "{w}"), ("？", "{w}")])  # fmt: skip
worded("format", "swapped", "rule", "the answer asks, and the question does not", OPEN, en=[("{a}", "{q}")], zh=[("{a}", "{q}")])
worded("type", "hedged", "rule", "neither yes nor no", ("judgement",), en=[("{q}", "Maybe"), ("{q}", "Yes and no"), ("{q}", "Partly, yes"), ("{q}", "It depends.")],
       zh=[("{q}", "也许"), ("{q}", "可能是"), ("{q}", "是也不是"), ("{q}", "看情况")])  # fmt: skip
worded("type", "yes_to_an_open_question", "rule", "an open question has no yes or no", SHORT, en=[("{q}", "Yes"), ("{q}", "No.")],
       zh=[("{q}", "是"), ("{q}", "否")])  # fmt: skip
worded("type", "open_question_judged", "rule", "a judgement does not ask with a question word", ("judgement",),
       en=[("What does the picture show on the left?", "{w}"), ("How many objects are there?", "{w}")],
       zh=[("图中左侧是什么？", "{w}"), ("图中有几根柱子？", "{w}")])  # fmt: skip
worded(
    "type",
    "one_word_for_a_long_answer",
    "rule",
    "the length",
    ("long",),
    en=[("{q}", "Yes."), ("{q}", "Colours."), ("{q}", "3")],
    zh=[("{q}", "对。"), ("{q}", "颜色"), ("{q}", "3")],
)
worded("type", "no_number_for_how_many", "rule", "how many asks for a number", SHORT, en=[("How many things of this kind are there? {q}", "green"), ("How many of them are seen?", "wooden")],
       zh=[("图中有多少根柱子？", "蓝色"), ("共有几个类别？", "白色背景")])  # fmt: skip
worded("type", "number_for_a_colour", "rule", "a colour is asked for", SHORT, en=[("What colour is the ground?", "24"), ("Which colour is it?", "seven")],
       zh=[("柱子是什么颜色？", "24"), ("背景是什么颜色的？", "3.5")])  # fmt: skip


@fault("type", "rule", "the length", "short")
def paragraph_for_a_short_answer(random, item, image, images):
    return one(image, reply((item[1], [], " ".join([item[3] + ".", image["caption"], image["caption"]]))))


@fault("cut", "rule", "a sentence that has no end", "long")
def cut_anywhere(random, item, image, images):
    place = random.randint(len(item[3]) // 3, len(item[3]) - 4)
    text = item[3][:place].rstrip()
    return one(image, reply((item[1], [], text))) if text[-1] not in ".。!?" else None


@fault("cut", "rule", "what is opened is not closed, or the last word cannot be one", "long", "short")
def cut_after_an_opening(random, item, image, images):
    ends = {
        "en": [" (which", " and the", ", because", ' with "', " of a", " such as"],
        "zh": ["（其中", "，因为", "和", "，例如", "“", "以及"],
    }
    return one(image, reply((item[1], [], item[3].rstrip(".。") + random.choice(ends[image["language"]]))))


@fault("cut", "rule", "begins in the middle: in lower case without a question word", only="en")
def question_without_its_start(random, item, image, images):
    return (
        one(image, reply((item[1].split(maxsplit=random.choice([1, 2]))[-1], item[2], said(item))))
        if item[1].count(" ") > 4
        else None
    )


@fault("cut", "rule", "a question with no end", only="en")
def question_stops(random, item, image, images):
    text = random.choice([" ".join(item[1].split()[:-2]), item[1].rstrip("?")[:-2], item[1].rstrip("?") + " and"])
    return one(image, reply((text, item[2], said(item))))


@fault("cut", "judge", "half a word can be a word", "short", only="en")
def word_cut(random, item, image, images):
    return one(image, reply((item[1], [], item[3][:-2]))) if re.fullmatch("[a-z ]{7,}", item[3]) else None


# Languages

OTHERS = [
    ("Qual é a cor do objeto que está em cima da mesa?", "O objeto que está em cima da mesa é vermelho e muito pequeno."),
    ("Di che colore è l'oggetto sul tavolo?", "L'oggetto sul tavolo è rosso ed è molto piccolo."),
    ("Welke kleur heeft het voorwerp op de tafel?", "Het voorwerp op de tafel is rood en het is erg klein."),
    ("Masanın üzerindeki nesne ne renk?", "Masanın üzerindeki nesne kırmızı ve çok küçüktür."),
    ("Vật trên bàn có màu gì?", "Vật trên bàn có màu đỏ và rất nhỏ."),
    ("テーブルの上の物は何色ですか？", "テーブルの上の物は赤くて、とても小さいです。"),
    ("탁자 위의 물건은 무슨 색입니까?", "탁자 위의 물건은 빨간색이고 매우 작습니다."),
    ("ما لون الشيء الموجود على الطاولة؟", "الشيء الموجود على الطاولة أحمر وصغير جدا."),
    ("मेज़ पर रखी वस्तु किस रंग की है?", "मेज़ पर रखी वस्तु लाल है और बहुत छोटी है।"),
    ("Jakiego koloru jest przedmiot na stole?", "Przedmiot na stole jest czerwony i bardzo mały."),
]


@fault("language", "rule", "letters or the commonest words tell the language", "short", "long", "judgement")
def asked_in_another(random, item, image, images):
    return one(image, reply((random.choice(OTHERS)[0], [], said(item))))


@fault("language", "rule", "letters or the commonest words tell the language", "long")
def answered_in_another(random, item, image, images):
    return one(image, reply((item[1], [], random.choice([random.choice(OTHERS)[1], f"{item[3]} {random.choice(OTHERS)[1]}"]))))


@fault("language", "rule", "yes and no are a closed list", "judgement")
def yes_in_another(random, item, image, images):
    forms = {"Yes": ["是", "Oui", "Ja", "Sí", "Да", "はい"], "No": ["否", "Non", "Nein", "Нет", "いいえ"],
             "是": ["Yes", "Oui", "はい"], "否": ["No", "Nein", "いいえ"]}  # fmt: skip
    return one(image, reply((item[1], [], random.choice(forms[item[3]]))))


@fault("language", "rule", "the options are in other letters than the question", "choice")
def options_in_another(random, item, image, images):
    words = (
        ["红色的杯子", "蓝色的盒子", "一只小猫", "大树"]
        if image["language"] == "en"
        else ["a red cup", "a blue box", "a small cat", "a tall tree"]
    )
    random.shuffle(words)
    return one(image, reply((item[1], words, f"B. {words[1]}")))


@fault("language", "judge", "a single foreign word in Latin letters can be a name", "short", "judgement", only="en")
def one_foreign_word(random, item, image, images):
    return one(image, reply((re.sub(r"\bthe\b", random.choice(["la", "der", "il"]), item[1]), [], said(item))))


# Leaks, the description, refusals

worded("leaked", "answer_after_question", "rule", "the answer stands after the question", ALL,
       en=[("{q} A: {a}", "{w}"), ("{q}\nAnswer: {a}.", "{w}"), ("{q} -> {a}", "{w}"), ("{q} I think {a}.", "{w}"), ("{q} ({a}!)", "{w}")],
       zh=[("{q} 答：{a}", "{w}"), ("{q}\n正确答案是{a}。", "{w}"), ("{q} -> {a}", "{w}"), ("{q}我认为是{a}。", "{w}"), ("{q}（{a}）", "{w}")])  # fmt: skip
worded("leaked", "told_to_say_it", "rule", "the answer is asked for by its text", ALL,
       en=[("{q} Reply with \"{a}\".", "{w}"), ("Say '{a}' in answer to this: {q}", "{w}"), ("Explain that {a}: {q}", "{w}")],
       zh=[("{q}请回答“{a}”。", "{w}"), ("请说“{a}”来回答：{q}", "{w}")])  # fmt: skip
worded("leaked", "said_before", "rule", "the answer stands before the question as a statement", OPEN,
       en=[("Everybody sees {a} here. {q}", "{w}"), ("{a}. {q}", "{w}"), ("Knowing it to be {a}, {low}", "{w}")],
       zh=[("大家都知道是{a}。{q}", "{w}"), ("{a}。{q}", "{w}"), ("既然是{a}，{q}", "{w}")])  # fmt: skip
worded("description", "of_a_text", "rule", "a closed list of words for the description, which the image has not", ALL,
       en=[("As stated above, {low}", "{w}"), ("Going by the information provided, {low}", "{w}"), ("In the given paragraph, {low}", "{w}"),
           ("{q}", "{w}, as the author writes"), ("{q}", "{w} (it is mentioned in the summary)"), ("From what you were told, {low}", "{w}")],
       zh=[("如上所述，{q}", "{w}"), ("根据所给信息，{q}", "{w}"), ("文中提到，{q}", "{w}"), ("{q}", "{w}（作者写道）"), ("据资料，{q}", "{w}")])  # fmt: skip
worded("refusing", "cannot_say", "rule", "a closed list of phrases", OPEN,
       en=[("{q}", "It is impossible to say."), ("{q}", "There is no way to tell from this."), ("{q}", "Not visible."), ("{q}", "Unclear."),
           ("{q}", "The image does not show that."), ("{q}", "That was left open, so nobody knows."), ("{q}", "Unfortunately, no details are given.")],
       zh=[("{q}", "看不出来。"), ("{q}", "无从得知。"), ("{q}", "图中没有显示。"), ("{q}", "不清楚"), ("{q}", "很抱歉，没有相关信息。")])  # fmt: skip


# Dialogues: one of three turns has the fault, and the other two must stay


def turns(image, types, skip):
    """The response of other good instructions of the image, of one type only as a response has."""
    return [other for other in image["items"] if other[0] in types and other[1] != skip[1]]


def dialogue(random, item, image, made):
    """`made`, an instruction as written, in a random place among two or fewer good ones of its type."""
    others = [own(other) for other in turns(image, (item[0],), item)[:2]]
    if not others:
        return None
    at = random.randint(0, len(others))
    return one(image, reply(*others[:at], made, *others[at:]), len(others) + 1, at)


@fault("dialogue", "rule", "a turn with a refusal", "short", "judgement")
def turn_refuses(random, item, image, images):
    forms = {"en": ["I am not able to see that.", "This cannot be answered."], "zh": ["我看不到。", "无法回答。"]}
    return dialogue(random, item, image, (item[1], [], random.choice(forms[image["language"]])))


@fault("dialogue", "rule", "a turn that speaks of turns that are not there", "short", "judgement")
def turn_of_another_dialogue(random, item, image, images):
    forms = {
        "en": ["As you said in your last message, {}", "As I told you earlier, {}"],
        "zh": ["正如你上一条消息所说，{}", "如我之前所说，{}"],
    }
    low = item[1][0].lower() + item[1][1:]
    return dialogue(random, item, image, (random.choice(forms[image["language"]]).format(low), [], item[3]))


@fault("dialogue", "rule", "a turn with the speakers' names", "short", "judgement")
def turn_with_speakers(random, item, image, images):
    forms = {
        "en": [("Human: {}", "{}"), ("{}", "Assistant: {}"), ("{}", "{}\nUser: And now?")],
        "zh": [("用户：{}", "{}"), ("{}", "助手：{}")],
    }
    question, answer = random.choice(forms[image["language"]])
    return dialogue(random, item, image, (question.format(item[1]), [], answer.format(item[3])))


@fault("dialogue", "rule", "a turn in another language", "short", "judgement")
def turn_in_another_language(random, item, image, images):
    return dialogue(random, item, image, (random.choice(OTHERS)[0], [], item[3]))


@fault("dialogue", "rule", "a turn without an answer", "short", "judgement")
def turn_without_answer(random, item, image, images):
    return dialogue(random, item, image, (item[1], [], random.choice(["", " ", "...", "…"])))


@fault("dialogue", "rule", "the first and the last of three turns ask the same, and answer otherwise", "short", "judgement")
def last_turn_takes_back(random, item, image, images):
    others = [own(other) for other in turns(image, (item[0],), item)[:1]]
    answer = {"Yes": "No", "No": "Yes", "是": "否", "否": "是"}.get(item[3]) or (others and others[0][2])
    if not others or answer == item[3]:
        return None
    again = {"en": "So, again: {}", "zh": "再问一次：{}"}[image["language"]].format(item[1])
    return one(image, reply(own(item), *others, (again, [], answer)), 3)


@fault("dialogue", "judge", "which answer belongs to which question is a matter of meaning", "short", only="en")
def answers_of_two_turns_exchanged(random, item, image, images):
    others = turns(image, (item[0],), item)[:1]
    return one(image, reply((others[0][1], [], item[3]), (item[1], [], others[0][3])), 2) if others else None


@fault("dialogue", "rule", "one long answer is given to two questions", "long")
def one_answer_twice(random, item, image, images):
    other = {"en": "Which details can be seen, and what do they tell?", "zh": "能看到哪些细节，它们说明了什么？"}[image["language"]]
    return one(image, reply(own(item), (other, [], item[3])), 2)


# Across images: the fault is in the second


def elsewhere(image, images, types):
    """Another photograph or chart in the same language, with its instruction of the type."""
    of = [other for other in images if other["language"] == image["language"] and other["name"] != image["name"]]
    other = of[int(hashlib.sha256(image["name"].encode()).hexdigest(), 16) % len(of)]
    return other, next(item for item in other["items"] if item[0] in types)


def across(image, images, item, question, answer):
    other, _ = elsewhere(image, images, ("long",))
    return [(other, reply(own(item)), 1), (image, reply((question, [], answer)), 1)], -1


@fault("across images", "rule", "nearly every word of a long answer is that about another image", "long")
def answer_of_another_changed_a_little(random, item, image, images):
    _, given = elsewhere(image, images, ("long",))
    en = image["language"] == "en"
    forms = ["Overall, {}", "{} This can be seen well.", "Looking closely, {}"] if en else ["总的来说，{}", "{}这一点很清楚。"]
    return across(image, images, given, item[1], random.choice(forms).format(given[3]))


@fault("across images", "rule", "the sentences are those about another image, in another order", "long")
def answer_of_another_in_another_order(random, item, image, images):
    _, given = elsewhere(image, images, ("long",))
    parts = re.findall("[^。，]+[。，]", given[3]) if image["language"] == "zh" else re.findall(r"[^.]+\.(?!\d)\s*", given[3])
    return across(image, images, given, item[1], " ".join(part.strip() for part in parts[::-1])) if len(parts) > 1 else None


@fault("across images", "rule", "question and long answer are those of another image, but for two words", "long", only="en")
def both_of_another(random, item, image, images):
    _, given = elsewhere(image, images, ("long",))
    answer = re.sub(r"\bthe\b", "this", given[3], count=2)
    return across(image, images, given, given[1], answer)


@fault("across images", "judge", "two images may be alike: the same short question and answer are no fault by themselves", "short")
def short_of_another(random, item, image, images):
    _, given = elsewhere(image, images, ("short",))
    other, _ = elsewhere(image, images, ("short",))
    return [(other, reply(own(given)), 1), (image, reply(own(given)), 1)], -1


# Edits that keep an instruction right


def good(edit):
    GOOD[edit.__name__] = edit


def right(name, types, **forms):
    def edit(random, item, image, images):
        if item[0] not in types or image["language"] not in forms:
            return None
        question, answer = random.choice(forms[image["language"]])
        low = item[1][0].lower() + item[1][1:]
        filled = {"q": item[1], "a": item[3], "w": said(item), "low": low, "c": item[3][0].upper() + item[3][1:]}
        put = lambda form: re.sub(r"\{(q|a|w|low|c)\}", lambda found: filled[found[1]], form)  # noqa: E731
        return one(image, reply((put(question), item[2], put(answer))))

    GOOD[name] = edit


right(
    "in_a_sentence",
    SHORT,
    en=[("{q}", "It is {a}."), ("{q}", "{c}."), ("{q}", "{c}, clearly visible in the image.")],
    zh=[("{q}", "是{a}。"), ("{q}", "{a}。")],
)
right("asked_at_length", ALL, en=[("Take a close look at the image. {q}", "{w}"), ("I am curious: {low}", "{w}"), ("Please look carefully and tell me, {low}", "{w}")],
      zh=[("请仔细观察图片，{q}", "{w}"), ("我很好奇，{q}", "{w}")])  # fmt: skip
right(
    "with_the_reason_wanted",
    ("long",),
    en=[("{q} Give reasons.", "{a}"), ("{q} Explain in two sentences.", "{a}")],
    zh=[("{q}请说明理由。", "{a}")],
)
right("as_a_list", ("long",), en=[("{q}", "There are several points:\n- {a}\n- Nothing else is remarkable."), ("{q}", "1. {a}\n2. The rest follows from this.")],
      zh=[("{q}", "有以下几点：\n1. {a}\n2. 其余部分没有特别之处。")])  # fmt: skip
right("with_foreign_words", ("long",), en=[("{q}", "{a} The whole has a certain je ne sais quoi, like a façade in Málaga."), ("{q}", "{a} One is reminded of the word \"Gemütlichkeit\".")],
      zh=[("{q}", "{a}图例使用 matplotlib 绘制。")])  # fmt: skip
right(
    "careful",
    ("long",),
    en=[("{q}", "It seems that the following holds. {a}"), ("{q}", "{a} What lies outside the frame cannot be seen.")],
    zh=[("{q}", "看起来，{a}")],
)
right(
    "quoted_and_bracketed",
    ("long",),
    en=[("{q}", '{a} (The "rest" is of less importance.)'), ("{q}", "In short: {a}")],
    zh=[("{q}", "简而言之：{a}"), ("{q}", "{a}（其余部分不重要。）")],
)
right(
    "who_is_meant",
    ("choice",),
    en=[("{q} Choose one of the following.", "{w}"), ("{q} Select the correct option.", "{w}")],
    zh=[("{q}请选择一项。", "{w}")],
)


@good
def answered_with_a_clause(random, item, image, images):
    forms = {"Yes": ["Yes, it does.", "Yes, that is the case.", "Yes."], "No": ["No, it does not.", "No, that is not the case.", "No, there is not."],
             "是": ["是的，确实如此。", "是的。"], "否": ["不，并非如此。", "不是。"]}  # fmt: skip
    return one(image, reply((item[1], [], random.choice(forms[item[3]])))) if item[3] in forms else None


@good
def opposite_answered_rightly(random, item, image, images):
    for first, second in (("higher", "lower"), ("高吗", "低吗")):
        if first in item[1]:
            return after(image, item, item[1].replace(first, second), {"Yes": "No", "No": "Yes", "是": "否", "否": "是"}[item[3]])
    return None


@good
def with_the_unit(random, item, image, images):
    if item[0] != "short" or "(cm)" not in image["caption"] or not re.fullmatch(r"[\d.]+", item[3]):
        return None
    return one(image, reply((item[1], [], f"{item[3]} cm")))


@good
def number_as_a_word(random, item, image, images):
    words = {"24": "Twenty-four", "24 ": "24 coins"}
    return one(image, reply((item[1], [], words[item[3]]))) if item[3] in words else None


@good
def one_of_two_named(random, item, image, images):
    if item[0] != "short" or "colour" not in item[1] or " " in item[3]:
        return None
    named = [item[3], random.choice([colour for colour in COLOURS if colour != item[3]])]
    random.shuffle(named)
    return one(image, reply((f"{item[1].rstrip('?')}, {named[0]} or {named[1]}?", [], item[3])))


@good
def three_turns(random, item, image, images):
    items = [own(item), *[own(other) for other in turns(image, (item[0],), item)[:2]]]
    return [(image, reply(*items), len(items))], None


@good
def asked_of_two_images(random, item, image, images):
    found = [(other, one) for other in images if other["name"] != image["name"] for one in other["items"] if one[:2] == item[:2]]
    if not found or item[0] == "choice":
        return None
    return [(found[0][0], reply(own(found[0][1])), 1), (image, reply(own(item)), 1)], -1


def is_open(name):
    return hashlib.sha256(f"second half {name}".encode()).digest()[0] % 2 == 0


def check(case, type):
    """Why each instruction of a case is dropped ("" if kept), missing ones last: within its image, then beside other images."""
    items, said, missing = [], [], 0
    for image, text, count in case[0]:
        about = {"caption": image["caption"], "language": image["language"], "type": type, "images": [image["name"]]}
        own = [{"id": f"{image['name']}/{place}", **about, **one} for place, one in enumerate(read_items(text, type))]
        items += own
        said += check_all(own)
        missing += count - len(own)
    distinct([one for one, why in zip(items, said, strict=True) if not why], lost := [])
    later = {one["id"]: one["reason"] for one in lost}
    return [why or later.get(one["id"], "") for one, why in zip(items, said, strict=True)] + ["malformed: missing"] * missing


def measure(listed):
    """Counts by half and label, by kind and edit; misses of the halves that are `listed`; what is dropped of the good ones."""
    edits, misses, beside, good_ones = {}, [], [], {"good": 0, "dropped": []}
    images = [*seen.photographs(), *seen.charts()]
    for image in images:
        for given in image["items"]:
            options = list(given[2])
            random.Random(f"order {image['name']} {given[1]}").shuffle(options)
            item = (given[0], given[1], options, given[3])
            for name, (kind, label, reason, types, only, edit) in FAULTS.items():
                if item[0] not in types or only not in (None, image["language"]):
                    continue
                case = edit(random.Random(f"second {name} {image['name']} {item[1]}"), item, image, images)
                if not case:
                    continue
                why, at = check(case, item[0]), case[1]
                found = bool(why[at])
                half = "open" if is_open(name) else "closed"
                counts = edits.setdefault(
                    name, {"kind": kind, "label": label, "reason": reason, "half": half, "faults": 0, "found": 0}
                )
                counts["faults"] += 1
                counts["found"] += found
                text = [text for _, text, _ in case[0]]
                if not found and half in listed and label == "rule" and counts["faults"] - counts["found"] <= LISTED:
                    misses.append({"kind": kind, "edit": name, "image": image["name"], "response": text})
                beside += [
                    {"edit": name, "response": text, "said": said}
                    for place, said in enumerate(why)
                    if said and place != at % len(why)
                ]
            for name, edit in GOOD.items():
                case = edit(random.Random(f"second {name} {image['name']} {item[1]}"), item, image, images)
                if case:
                    why = check(case, item[0])
                    good_ones["good"] += len(why)
                    text = [text for _, text, _ in case[0]]
                    good_ones["dropped"] += [
                        {"edit": name, "image": image["name"], "response": text, "said": said} for said in why if said
                    ]
    return edits, misses, beside, good_ones


def result():
    edits, misses, beside, good_ones = measure(("open",))
    told = {"good": good_ones["good"], "good dropped": len(good_ones["dropped"]), "dropped beside a fault": len(beside)}
    for half in ("open", "closed"):
        for label in ("rule", "judge"):
            chosen = [one for one in edits.values() if one["half"] == half and one["label"] == label]
            kinds = {}
            for one in chosen:
                kinds.setdefault(one["kind"], Counter()).update(faults=one["faults"], found=one["found"])
            faults, found = (sum(one[key] for one in chosen) for key in ("faults", "found"))
            counts = {"edits": len(chosen), "faults": faults, "found": found, "recall": round(found / max(faults, 1), 4)}
            told[f"{half} {label}"] = {**counts, "kinds": kinds}
    return told, {"edits": edits, "misses": misses, "dropped beside": beside, "dropped good ones": good_ones["dropped"]}


if __name__ == "__main__":
    seen.add_to_file(result, __doc__)
