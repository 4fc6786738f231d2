"""Measure what the checks of `mpo mminstruct` find of faults whose author had not read them, and drop of good instructions.

    python benchmarks/mminstruct_unseen.py benchmarks/results/mminstruct_unseen.json

Images and good instructions are those of `mminstruct.py`. The edits here were written before their author read the rules, and
registered before the first measurement. They are halved by a hash of their names: rules may be repaired by what is missed of the
`open` half, whose misses are listed; of the `closed` half only counts are ever printed. An edit is one function of (random, item,
language) that gives the response of a model, or None where it does not apply. `GOOD` holds edits that keep an instruction right.
"""

import hashlib
import json
import random

import mminstruct as seen

from mpo.pipelines.mminstruct.check import check_all
from mpo.pipelines.mminstruct.generate import read_items

FAULTS, GOOD = {}, {}
LISTED = 3
"""Maximum number of misses of an edit that are listed."""
tagged, LETTERS = seen.tagged, "ABCDEFGH"


def fault(kind, *types):
    """Register an edit as a fault of a kind, of some types of instructions (all by default)."""

    def register(edit):
        def of_type(random, item, language):
            return edit(random, item, language) if not types or item[0] in types else None

        FAULTS.setdefault(kind, {})[edit.__name__] = of_type
        return edit

    return register


def good(edit):
    GOOD[edit.__name__] = edit
    return edit


def choice(question, options, said):
    """A response whose options and answer are as written."""
    return f"<Q1>{question}</Q1>\n<C1>{options}</C1>\n<A1>{said}</A1>"


def listed(options, letters=LETTERS, form="{}. {}"):
    return "\n".join(form.format(letter, option) for letter, option in zip(letters, options, strict=False))


def put(item, question=None, answer=None, options=None):
    """The response with another question, answer or options; a choice keeps its right letter."""
    type, own, choices, said = item
    return tagged([(type, own if question is None else question, choices if options is None else options, answer or said)])


def low(text):
    return text[0].lower() + text[1:]


# Letters and options


@fault("wrong letter", "choice")
def bracketed_other(random, item, language):
    _, question, options, answer = item
    other = random.choice([letter for letter, option in zip(LETTERS, options, strict=False) if option != answer])
    return choice(question, listed(options), f"({other}) {answer}")


@fault("wrong letter", "choice")
def letter_beyond(random, item, language):
    _, question, options, answer = item
    return choice(question, listed(options), f"{LETTERS[len(options)]}. {answer}")


@fault("wrong letter", "choice")
def beyond_alone(random, item, language):
    _, question, options, _ = item
    return choice(question, listed(options), LETTERS[len(options) + 1])


@fault("wrong letter", "choice")
def two_letters(random, item, language):
    _, question, options, _ = item
    return choice(question, listed(options), {"en": "A and C", "zh": "A和C"}[language])


@fault("wrong letter", "choice")
def none_of_them(random, item, language):
    _, question, options, _ = item
    return choice(question, listed(options), {"en": "None of these", "zh": "以上都不对"}[language])


@fault("wrong letter", "choice")
def text_of_no_option(random, item, language):
    _, question, options, _ = item
    return choice(question, listed(options), {"en": "B. a silver teapot", "zh": "B. 一把银茶壶"}[language])


@fault("options", "choice")
def same_but_case(random, item, language):
    _, question, options, answer = item
    return choice(question, listed([answer, f"{answer.upper()}.", *options[1:3]]), f"A. {answer}")


@fault("options", "choice")
def empty_option(random, item, language):
    _, question, options, answer = item
    return choice(question, listed([answer, options[1], " ", options[2]]), f"A. {answer}")


@fault("options", "choice")
def placeholder_option(random, item, language):
    _, question, options, answer = item
    filler = random.choice(
        {"en": ["Option C", "...", "[another option]", "TBD"], "zh": ["选项C", "……", "（其他选项）", "待定"]}[language]
    )
    return choice(question, listed([answer, options[1], filler, options[2]]), f"A. {answer}")


@fault("options", "choice")
def letter_left_out(random, item, language):
    _, question, options, answer = item
    return choice(question, listed(options, "ABDE"), f"A. {answer}")


@fault("options", "choice")
def same_letter_twice(random, item, language):
    _, question, options, answer = item
    return choice(question, listed(options, "ABBC"), f"A. {answer}")


@fault("options", "choice")
def one_holds_all(random, item, language):
    _, question, options, answer = item
    both = {"en": f"both {options[1]} and {answer}", "zh": f"{options[1]}和{answer}都是"}[language]
    return choice(question, listed([answer, options[1], both, options[2]]), f"A. {answer}")


@fault("options", "choice")
def on_one_line(random, item, language):
    _, question, options, answer = item
    return choice(question, " / ".join(options), answer)


@fault("options", "choice")
def right_one_told(random, item, language):
    _, question, options, answer = item
    mark = random.choice({"en": [" (correct)", " ✓", " (right answer)"], "zh": ["（正确）", " ✓", "（正确答案）"]}[language])
    return choice(question, listed([f"{answer}{mark}", *options[1:]]), f"A. {answer}")


# Form


@fault("malformed")
def crossed_tags(random, item, language):
    return tagged([item]).replace("</Q1>", "</A1>", 1)


@fault("malformed")
def as_json(random, item, language):
    _, question, _, answer = item
    return json.dumps([{"Q": question, "A": answer}], ensure_ascii=False)


@fault("malformed")
def as_markdown(random, item, language):
    _, question, _, answer = item
    return f"### Q1\n{question}\n\n### A1\n{answer}"


@fault("malformed")
def answer_of_dots(random, item, language):
    if item[0] == "choice":
        return choice(item[1], listed(item[2]), "...")
    return put(item, answer=random.choice(["...", "-", "?"]))


@fault("malformed")
def slots_left(random, item, language):
    slot = random.choice(["[OBJECT]", "{object}", "____", "[insert name]", "XXX"])
    question = item[1].rstrip("?？吗") + (f" {slot}?" if language == "en" else f"{slot}？")
    return put(item, question)


@fault("malformed")
def both_in_one(random, item, language):
    _, question, _, answer = item
    return f"<Q1>{question} {answer}</Q1>"


@fault("malformed", "choice")
def options_missing(random, item, language):
    return f"<Q1>{item[1]}</Q1>\n<A1>A. {item[3]}</A1>"


@fault("malformed")
def speaker_left(random, item, language):
    said = random.choice(["User: ", "Assistant: ", "Human: "]) if language == "en" else random.choice(["用户：", "助手："])
    return put(item, said + item[1])


@fault("malformed")
def tag_of_other_item(random, item, language):
    return tagged([item]).replace("<A1>", "<A2>").replace("</A1>", "</A2>")


@fault("malformed")
def other_tags_inside(random, item, language):
    return put(item, f"<b>{item[1]}</b> <Q2>")


@fault("truncated")
def question_cut(random, item, language):
    question = item[1].rstrip("?？吗")
    cut = question[: max(6 if language == "en" else 3, int(len(question) * 0.6))]
    return put(item, cut.rsplit(" ", 1)[0] + (" the" if language == "en" else ""))


@fault("truncated", "long")
def answer_cut(random, item, language):
    said = item[3].rstrip(".。")
    return put(item, answer=f"{said.rsplit(' ', 1)[0]} and the" if language == "en" else f"{said[: len(said) * 2 // 3]}，而")


@fault("truncated", "long")
def answer_in_a_bracket(random, item, language):
    return put(item, answer=item[3] + (" (for example, the" if language == "en" else "（例如"))


@fault("truncated", "long")
def answer_in_a_list(random, item, language):
    return put(item, answer=item[3] + (" It has three parts:\n1." if language == "en" else "它有三个部分：\n1."))


@fault("truncated", "long")
def answer_ends_in_dots(random, item, language):
    return put(item, answer=item[3].rstrip(".。")[: len(item[3]) * 3 // 4] + "...")


@fault("not yes or no", "judgement")
def neither(random, item, language):
    said = {
        "en": ["Both", "Partly", "Unclear", "Yes and no", "Possibly", "Neither"],
        "zh": ["可能是", "两者都是", "不一定", "部分是"],
    }
    return put(item, answer=random.choice(said[language]))


@fault("not yes or no", "judgement")
def a_thing(random, item, language):
    return put(
        item,
        answer={"en": random.choice(["Blue", "Three", "The left one"]), "zh": random.choice(["蓝色", "三个", "左边"])}[language],
    )


@fault("not yes or no", "judgement")
def open_question(random, item, language):
    question = {"en": "How many things are on the left?", "zh": "左边有几个东西？"}[language]
    return put(item, question, answer={"en": "Yes", "zh": "是"}[language])


# Repeats and contradictions: the last instruction is the fault


def again(item, question, answer=None):
    type, own, options, said = item
    return tagged([item, (type, question, options, answer or said)])


@fault("repeated")
def other_case(random, item, language):
    return again(item, item[1].upper() if language == "en" else item[1].replace("？", "?"))


@fault("repeated")
def politely(random, item, language):
    return again(item, f"Please tell me: {low(item[1])}" if language == "en" else f"请告诉我，{item[1]}")


@fault("repeated")
def in_the_image(random, item, language):
    question = item[1].rstrip("?？")
    return again(item, f"{question} in this image?" if language == "en" else f"在这张图片中，{question}？")


@fault("repeated")
def without_articles(random, item, language):
    words = [word for word in item[1].split() if word.lower() not in ("the", "a", "an")]
    return again(item, " ".join(words)) if language == "en" and len(words) < len(item[1].split()) else None


@fault("repeated")
def with_a_slip(random, item, language):
    at = len(item[1]) // 2
    return again(item, item[1][:at] + item[1][at + 1 :]) if language == "en" else None


@fault("repeated")
def with_an_adverb(random, item, language):
    return again(item, item[1].rstrip("?") + " exactly?" if language == "en" else f"请问{item[1]}")


@fault("contradicting itself", "judgement")
def denied_in_other_words(random, item, language):
    yes, no = seen.YES_NO[language]
    said = no if item[3] == yes else yes
    question = f"Looking at the image, {low(item[1])}" if language == "en" else f"请看图，{item[1]}"
    return again(item, question, said)


@fault("contradicting itself", "judgement")
def denied_politely(random, item, language):
    yes, no = seen.YES_NO[language]
    question = f"Could you tell whether this holds: {low(item[1])}" if language == "en" else f"请判断：{item[1]}"
    return again(item, question, no if item[3] == yes else yes)


@fault("contradicting itself", "short")
def another_number(random, item, language):
    question = f"In this image, {low(item[1])}" if language == "en" else f"这张图里，{item[1]}"
    return again(item, question, {"en": "ninety-nine", "zh": "九十九"}[language])


# Language

OTHERS = [
    ("Di che colore è la parte superiore dell'immagine?", "È di colore grigio chiaro."),
    ("Qual é o objeto que está mais perto da câmara?", "É uma caixa pequena de madeira."),
    ("이 이미지에서 가장 눈에 띄는 것은 무엇입니까?", "가운데에 있는 큰 상자입니다."),
    ("この画像の中央には何がありますか？", "中央には大きな箱があります。"),
    ("ما هو لون الجسم الموجود في الوسط؟", "لونه أزرق داكن."),
    ("Welk voorwerp staat er achter de grote tafel?", "Daar staat een kleine houten stoel."),
    ("Co znajduje się po lewej stronie obrazu?", "Po lewej stronie stoi wysokie drzewo."),
    ("Görüntünün sol tarafında ne var?", "Sol tarafta büyük bir ağaç var."),
]


@fault("wrong language")
def asked_in_another(random, item, language):
    return put(item, random.choice(OTHERS)[0])


@fault("wrong language", "long")
def answered_in_another(random, item, language):
    return put(item, answer=random.choice(OTHERS)[1] * 2)


@fault("wrong language")
def asked_in_the_other(random, item, language):
    return put(item, {"en": "画面左边的东西是什么样子的？", "zh": "What does the thing on the left look like?"}[language])


@fault("wrong language", "long")
def half_of_it(random, item, language):
    return put(
        item,
        answer=item[3]
        + {
            "en": "此外，图中还有一些其他的内容值得注意，例如背景和颜色。",
            "zh": " There is also more to be seen in the background of the picture.",
        }[language],
    )


@fault("wrong language")
def half_the_question(random, item, language):
    return put(item, {"en": f"请问，{item[1]}", "zh": f"Please look and answer this question: {item[1]}"}[language])


# The answer in the question


@fault("leaked", "short", "choice")
def hinted(random, item, language):
    return put(item, f"{item[1]} (Hint: {item[3]})" if language == "en" else f"{item[1]}（提示：{item[3]}）")


@fault("leaked", "judgement", "short", "choice")
def solved(random, item, language):
    return put(item, f"{item[1]} Correct answer: {item[3]}" if language == "en" else f"{item[1]} 正确答案：{item[3]}")


@fault("leaked", "short", "choice")
def told_before(random, item, language):
    return put(item, f"The image shows {item[3]}. {item[1]}" if language == "en" else f"图中显示的是{item[3]}。{item[1]}")


@fault("leaked", "short", "choice")
def tag_question(random, item, language):
    return put(item, f"{item[1]} Is it {item[3]}?" if language == "en" else f"{item[1]}是{item[3]}吗？")


@fault("leaked", "short", "choice")
def in_brackets(random, item, language):
    return put(item, f"{item[1].rstrip('?')} ({item[3]})?" if language == "en" else f"{item[1].rstrip('？')}（{item[3]}）？")


@fault("leaked", "judgement")
def known_as_true(random, item, language):
    return put(
        item, f"{item[1]} (The answer should be {item[3].lower()}.)" if language == "en" else f"{item[1]}（应回答“{item[3]}”）"
    )


# The description, refusals


@fault("of the description")
def asked_of_text(random, item, language):
    texts = {
        "en": [
            "According to the text provided, {}",
            "As described above, {}",
            "Per the given information, {}",
            "From the passage, {}",
            "In the caption it is said: {}",
            "Using the description provided, {}",
        ],
        "zh": ["根据上述文字，{}", "从描述可知，{}", "原文提到，{}", "依据所给信息，{}", "按照上文的描述，{}"],
    }
    return put(item, random.choice(texts[language]).format(low(item[1])))


@fault("of the description")
def asked_of_text_at_the_end(random, item, language):
    texts = {
        "en": [" according to the caption?", " as stated in the description?", " based on the text above?"],
        "zh": ["（根据描述回答）", "，依据上文？", "（见文字说明）"],
    }
    return put(item, item[1].rstrip("?？") + random.choice(texts[language]))


@fault("of the description", "long")
def answered_of_text(random, item, language):
    texts = {
        "en": [
            "The description states that {}",
            "As the caption mentions, {}",
            "The text says that {}",
            "Based on the description, {}",
        ],
        "zh": ["描述中指出，{}", "正如文字所说，{}", "根据描述，{}", "上文提到，{}"],
    }
    return put(item, answer=random.choice(texts[language]).format(low(item[3])))


@fault("refusal", "short", "long")
def not_known(random, item, language):
    texts = {
        "en": ["Not specified.", "Unknown", "N/A", "It is not mentioned.", "Not enough information.", "Cannot be determined."],
        "zh": ["未知", "不清楚", "没有提及", "信息不足", "无法确定"],
    }
    return put(item, answer=random.choice(texts[language]))


@fault("refusal", "short", "long")
def as_a_model(random, item, language):
    texts = {
        "en": [
            "As an AI language model, I can't view pictures.",
            "I'm unable to view the image, so I can't answer that.",
            "I don't have enough information to answer this question.",
            "Unfortunately, the image was not provided.",
        ],
        "zh": ["作为人工智能，我看不到图片。", "很抱歉，我不能回答这个问题。", "没有提供相关信息，因此不能回答。"],
    }
    return put(item, answer=random.choice(texts[language]))


@fault("refusal", "long")
def after_a_start(random, item, language):
    texts = {
        "en": "Thank you for the question. However, without seeing the image I cannot say what it shows.",
        "zh": "感谢您的提问。但是由于看不到图像，我无法说明其内容。",
    }
    return put(item, answer=texts[language])


# What stays right


@good
def as_it_is(random, item, language):
    return tagged([item])


@good
def asked_of_the_image(random, item, language):
    return put(item, f"Looking at the image, {low(item[1])}" if language == "en" else f"请看图，{item[1]}")


@good
def asked_for_detail(random, item, language):
    if item[0] != "long":
        return None
    return put(item, f"{item[1]} Please explain in a sentence or two." if language == "en" else f"{item[1]}请用一两句话说明。")


@good
def with_a_stop(random, item, language):
    if item[0] == "choice":
        return choice(item[1], listed(item[2]), f"A. {item[3]}.")
    return put(item, answer=item[3].rstrip(".。") + (". " if language == "en" else "。"))


@good
def options_in_brackets(random, item, language):
    return choice(item[1], listed(item[2], form="({}) {}"), f"(A) {item[3]}") if item[0] == "choice" else None


@good
def the_letter_alone(random, item, language):
    return choice(item[1], listed(item[2]), "A") if item[0] == "choice" else None


@good
def answered_at_length(random, item, language):
    if item[0] == "choice":
        return None
    if item[0] == "judgement":
        return put(item, answer=f"{item[3]}, as can be seen." if language == "en" else f"{item[3]}，从图中可以看出。")
    return put(
        item, answer=f"{item[3].rstrip('.。')}, as the image shows." if language == "en" else f"{item[3].rstrip('.。')}，如图所示。"
    )


@good
def with_room(random, item, language):
    return "Here they are.\n\n" + tagged([item]).replace("<A1>", "\n<A1> ").replace("</A1>", " </A1>\n")


@good
def with_another_beside_it(random, item, language):
    other = {
        "en": ("short", "What shape has the frame of the image?", [], "rectangular"),
        "zh": ("short", "图片的边框是什么形状？", [], "长方形"),
    }
    return tagged([other[language], item]) if item[0] == "short" else None


@good
def written_sign(random, item, language):
    """What is written in the image is asked for, as questions about text in images do."""
    texts = {
        "en": ("What does the text on the sign say?", "Please keep off the grass"),
        "zh": ("牌子上的文字写的是什么？", "请勿践踏草坪"),
    }
    return tagged([("short", texts[language][0], [], texts[language][1])]) if item[0] == "short" else None


@good
def nothing_there(random, item, language):
    """A right answer that denies is no refusal."""
    texts = {
        "en": ("Which animals can be seen?", "None; there are no animals in the image."),
        "zh": ("图中有哪些动物？", "没有动物。"),
    }
    return tagged([("short", texts[language][0], [], texts[language][1])]) if item[0] == "short" else None


@good
def name_in_another_script(random, item, language):
    texts = {"en": ("Which characters are on the banner?", "福 (good fortune)"), "zh": ("衬衫上印着哪个品牌？", "Adidas")}
    return tagged([("short", texts[language][0], [], texts[language][1])]) if item[0] == "short" else None


def is_open(name):
    return hashlib.sha256(f"half {name}".encode()).digest()[0] % 2 == 0


def said_of(text, item, image):
    """Why the last instruction of a response is dropped, "" for one that is kept."""
    about = {"caption": image["caption"], "language": image["language"], "type": item[0], "domain": image["domain"]}
    items = [{"id": f"{at}", **about, "images": [image["name"]], **one} for at, one in enumerate(read_items(text, item[0]))]
    return (check_all(items)[-1] if items else "malformed: nothing") or ""


def measure(listed):
    """Counts by half and kind, by half and edit; some misses of the halves that are `listed`; what is dropped of the good ones."""
    kinds, edits, misses, good_ones = {}, {}, [], {"good": 0, "dropped": []}
    for image in [*seen.photographs(), *seen.charts()]:
        for item in image["items"]:
            for kind, own in FAULTS.items():
                for name, edit in own.items():
                    text = edit(random.Random(f"20261130 {name} {image['name']} {item[1]}"), item, image["language"])
                    if text is None:
                        continue
                    half, found = "open" if is_open(name) else "closed", bool(said_of(text, item, image))
                    for counts, of in ((kinds, kind), (edits, name)):
                        one = counts.setdefault(half, {}).setdefault(of, {"faults": 0, "found": 0})
                        one["faults"] += 1
                        one["found"] += found
                    if not found and half in listed and one["faults"] - one["found"] <= LISTED:
                        misses.append({"kind": kind, "edit": name, "image": image["name"], "response": text})
            for name, edit in GOOD.items():
                text = edit(random.Random(f"20261130 {name} {item[1]}"), item, image["language"])
                if text is not None:
                    good_ones["good"] += 1
                    if said := said_of(text, item, image):
                        good_ones["dropped"].append({"edit": name, "image": image["name"], "response": text, "said": said})
    return kinds, edits, misses, good_ones


def result():
    kinds, edits, misses, good_ones = measure(("open",))
    told = {"good": good_ones["good"], "good dropped": len(good_ones["dropped"])}
    for half, own in kinds.items():
        faults, found = (sum(one[name] for one in own.values()) for name in ("faults", "found"))
        rates = [one["found"] / one["faults"] for one in edits[half].values()]  # as one edit makes many faults
        told[half] = {"edits": len(rates), "faults": faults, "found": found, "recall": round(found / faults, 4)}
        told[half] |= {"mean of edits": round(sum(rates) / len(rates), 4), "kinds": own}
    return told, {"misses": misses, "dropped good ones": good_ones["dropped"]}


if __name__ == "__main__":
    seen.add_to_file(result, __doc__)
