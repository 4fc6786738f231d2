"""Parse, check, balance and arrange instructions; captions that can be used."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from told import Says

from mpo.generation.generator import Response
from mpo.pipelines.mminstruct.caption import Caption, InLanguages
from mpo.pipelines.mminstruct.check import Agree, Blind, Check, check_all, find_fault
from mpo.pipelines.mminstruct.collect import Classify
from mpo.pipelines.mminstruct.generate import Generate, Seed, read_items
from mpo.pipelines.mminstruct.output import arrange, balance, conversations, distinct
from mpo.pipelines.mminstruct.repeats import mark_repeats
from mpo.pipelines.step import Dropped

CHOICE = "<Q1>Which colour?</Q1><C1>A. red\nB. blue\nC. green</C1><A1>{}</A1>"
CONTRADICTED = "Verdict: CONTRADICTED"


@pytest.mark.parametrize(
    ("text", "type", "found"),
    [
        ("<Q1>Is it?</Q1><A1>Yes</A1>\nNote: <Q2>Is it not?</Q2> <A2>No</A2>", "judgement", ["Yes", "No"]),
        ("<Q7>Is it?</Q7><A7>Yes</A7>", "judgement", ["Yes"]),
        ("<Q1>Is it?</Q1><C1></C1><A1>Yes</A1>", "judgement", ["Yes"]),
        (CHOICE.format("B. blue"), "choice", ["blue"]),
        (CHOICE.format("(B)"), "choice", ["blue"]),
        (CHOICE.format("Blue"), "choice", ["blue"]),
        ("<Q1>Which?</Q1><C1>A. red B. blue C. green</C1><A1>C</A1>", "choice", ["green"]),
        ('{"items": [{"question": "Which?", "choices": ["A. red", "B. blue"], "answer": "A. red"}]}', "choice", ["red"]),
        ('```json\n{"items": [{"question": "Is it?", "choices": [], "answer": "No"}]}\n```', "judgement", ["No"]),
        (CHOICE.format("It has that of option B, blue."), "choice", ["blue"]),
        ("<Q1>Which bus is it?</Q1><C1>A. 4\nB. 8</C1><A1>Bus 8</A1>", "choice", ["8"]),
        ("<Q1>Which of the 5 is it?</Q1><C1>A. 2\nB. 8</C1><A1>2.5</A1>", "choice", ["wrong letter"]),
        (CHOICE.format("It has that of option B, green."), "choice", ["wrong letter"]),
        (CHOICE.format("It is not option B."), "choice", ["wrong letter"]),
        (CHOICE.format("Option B rather than option C"), "choice", ["wrong letter"]),
        (CHOICE.format("B. red"), "choice", ["wrong letter"]),
        (CHOICE.format("D"), "choice", ["wrong letter"]),
        (CHOICE.format("purple"), "choice", ["wrong letter"]),
        ("<Q1>Which?</Q1><C1>A. red\nC. blue</C1><A1>A</A1>", "choice", ["malformed"]),
        ("<Q1>Which?</Q1><A1>A</A1>", "choice", ["malformed"]),
        ("<Q1>Is it?<A1>Yes</A1>", "judgement", ["malformed"]),
        ("<Q1>Is it?</Q1><A1>Yes</A2>", "judgement", ["malformed", "malformed"]),
        ("<A1>Yes</A1><Q1>Is it?</Q1>", "judgement", ["malformed"]),
        ("<Q1>Is it?</Q1><A1>Yes</A1><Q1>Again?</Q1><A1>No</A1>", "judgement", ["malformed"]),
        ("<Q1>Is <Q2>it?</Q1><A1>Yes</A1></Q2><A2>No</A2>", "judgement", ["malformed", "malformed"]),
        ("<Q1> </Q1><A1>Yes</A1>", "judgement", ["malformed"]),
        ("Yes.", "judgement", ["malformed"]),
        ('{"items": []}', "judgement", ["malformed"]),
        ('{"items": [{"question": "Is it?", "answer": 3}]}', "judgement", ["malformed"]),
        ('{"items": [{"question"', "judgement", ["malformed"]),
        ('{"items": {"question": "Is it?", "answer": "No"}}', "judgement", ["malformed"]),
        ("<Q1>Which?</Q1><C1>A. red / B. blue / C. green</C1><A1>B. blue</A1>", "choice", ["blue"]),
        ('{"items": [{"question": "Which?", "choices": ["red", "blue"], "answer": "B"}]}', "choice", ["blue"]),
        ('{"items": [{"question": "Which?", "choices": ["red", "blue"], "answer": "blue"}]}', "choice", ["blue"]),
        ('{"items": [{"question": "Which?", "choices": ["B. red", "blue"], "answer": "B"}]}', "choice", ["malformed"]),
        (
            '{"items": [{"question": "Is it?", "answer": "No"}, {"question": "Is it so?", "answer": 3}, "Is it?", null, '
            '{"question": "Is it not?", "choices": [4], "answer": "No"}, {"question": "Was it?", "answer": "Yes"}]}',
            "judgement",
            ["No", "malformed", "malformed", "malformed", "malformed", "Yes"],
        ),
    ],
)
def test_responses_are_parsed_strictly(text, type, found):
    assert [one.get("fault", "").partition(":")[0] or one["answer"] for one in read_items(text, type)] == found


def test_a_truncated_response_keeps_what_is_whole():
    items = read_items("<Q1>Is it?</Q1><A1>Yes</A1><Q2>Is it n", "judgement", cut=True)
    assert items[0]["answer"] == "Yes" and "cut off" in items[1]["fault"]
    assert "cut off" in read_items('{"items": [{"question": "Is it', "judgement", cut=True)[0]["fault"]


def test_what_a_model_thinks_is_no_part_of_what_it_says():
    """It may name other domains, and have tags of its own; one that is cut off while it thinks has said nothing."""
    thought = "<think>\nLandmark, or ocr? <Q1>Is it?</Q1><A1>No</A1>\n</think>\n\n"
    caption, good = Caption(Says(str), shortest={"en": 5}), "A red sign with the word STOP stands at the corner."
    for said in (thought + good, thought.removeprefix("<think>") + good):
        assert caption.finish({"id": "a"}, [[Response(said, "stop", 1, 1)]])["caption"] == good
    with pytest.raises(Dropped, match="empty"):
        caption.finish({"id": "a"}, [[Response("<think>A red sign with a word on it. So", "length", 1, 1)]])
    record = {"id": "a", "seeds": [{"type": "judgement", "round": 0}]}
    for said in ("<Q1>Is it red?</Q1><A1>Yes</A1>", '{"items": [{"question": "Is it red?", "choices": [], "answer": "Yes"}]}'):
        (made,) = Generate(Says(str)).finish(record, [[Response(thought + said, "stop", 1, 1)]])
        assert made["question"] == "Is it red?" and "fault" not in made
    assert Classify(Says(str)).finish({"id": "a"}, [[Response(thought + "artwork", "stop", 1, 1)]])["domain"] == "artwork"


QUIET = " Nothing else can be made out, as the place is empty at this hour and the weather keeps people at home, where it is warm."
QUIET_ZH = "除此以外没有别的东西可以辨认，因为这个时候四周空空荡荡，天气让人们都留在暖和的家里。"
"""What makes a caption long enough to be one that has to support an answer, and says nothing of it."""
EN = {"language": "en", "caption": "A red car and two blue bikes stand before a shop called BÄCKEREI 面包."}
ZH = {"language": "zh", "caption": "一辆红色的汽车和两辆蓝色的自行车停在名为 BÄCKEREI 的店前。"}
LONG = {**EN, "caption": EN["caption"] + QUIET}


@pytest.mark.parametrize(
    ("given", "type", "question", "answer", "choices", "fault"),
    [
        (EN, "short", "What colour is the car?", "red", None, None),
        (EN, "short", "Which is nearer, the car or the bikes?", "the car", None, None),
        (EN, "short", "What is written on the shop?", "面包", None, None),
        (EN, "short", "What is the shop called?", "BÄCKEREI", None, None),
        (ZH, "short", "店名是什么？", "BÄCKEREI", None, None),
        (ZH, "judgement", "汽车是红色的吗？", "是的。", None, None),
        (EN, "choice", "How many bikes are there?", "two", ["one", "two", "3", "four"], None),
        (EN, "long", "What is shown?", "A red car and two bikes stand in front of a shop.", None, None),
        (EN, "short", "What colour is the red car?", "red", None, "leak"),
        (EN, "judgement", "The answer is yes: is the car red?", "Yes", None, "leak"),
        (EN, "short", "Which answer is circled?", "C", None, None),
        (EN, "short", "If x < 5 and y > 3, what is shown?", "a plot", None, None),
        (EN, "short", "What is the product description on the label?", "milk", None, None),
        (EN, "short", "¿Qué color tiene?", "red", None, "language"),
        (EN, "short", "Quel est le nom?", "red", None, "language"),
        (EN, "short", "What is the name of the film?", "Le Petit Prince", None, None),
        (EN, "short", "What colour is it?", "It can't be seen.", None, "refusal"),
        (EN, "short", "Which brand?", "I don't know.", None, "refusal"),
        ({"language": "zh"}, "short", "店名是什么？", "Starbucks Coffee", None, None),
        (ZH, "short", "红色的汽车是什么颜色？", "红色", None, "leak"),
        (EN, "judgement", "Is the car red?", "Maybe", None, "malformed"),
        (EN, "judgement", "Is the car red?", "Yes, it is not.", None, "malformed"),
        (EN, "judgement", "Is the car green?", "No, it is not.", None, None),
        (EN, "judgement", 'Is the car red? Reply with "Yes".', "Yes", None, "leak"),
        (EN, "short", "Which thing is red?", "Yes", None, "malformed"),
        (EN, "short", "Is the car red?", "a car", None, "malformed"),
        (EN, "short", "Is the car red or blue?", "red", None, None),
        (EN, "short", "How many bikes are there?", "blue", None, "malformed"),
        (EN, "short", "How many bikes are there?", "A couple", None, None),
        (EN, "short", "What colour are the bikes?", "two", None, "malformed"),
        (LONG, "short", "What colour are the bikes?", "purple", None, "unsupported"),
        (LONG, "short", "What stands before the shop?", "a tram", None, "unsupported"),
        (EN, "short", "What is red?", "a car (the", None, "malformed"),
        (EN, "short", "What is red?", 'a car",', None, "malformed"),
        (EN, "short", "What is red?", "**a car**", None, "malformed"),
        (EN, "short", "bikes next to the car?", "two", None, "malformed"),
        (EN, "short", "What?", "a car", None, "malformed"),
        (EN, "short", "As I told you earlier, what is red?", "a car", None, "caption"),
        (EN, "long", "What is shown?", "A red car and two bikes. They stand in front of", None, "malformed"),
        (EN, "long", "What is shown?", "A red car and two bikes are shown. Het voorwerp op de tafel is rood.", None, "language"),
        (EN, "short", "Subtract all bikes. How many are left?", "0", None, None),
        ({"caption": "A is 5.01 and B is 6.59 high." + QUIET}, "short", "Which value has A?", "50.1", None, "unsupported"),
        ({"caption": "The mass M_{200m} on an axis."}, "short", "What is on the axis of M_{200m}?", "mass", None, None),
        (EN, "short", "What is <object>?", "a car", None, "malformed"),
        (EN, "short", "What is shown?", "a very long answer that goes on and on and does not come to any end", None, "malformed"),
        (EN, "long", "What is shown?", "A car.", None, "malformed"),
        (EN, "short", "What colour is the car in the description given above?", "red", None, "caption"),
        (EN, "short", "According to the description, what colour is the car?", "red", None, "caption"),
        (ZH, "short", "根据描述，汽车是什么颜色？", "红色", None, "caption"),
        (EN, "short", "How old is the car?", "It cannot be determined.", None, "refusal"),
        (EN, "short", "汽车是什么颜色？", "red", None, "language"),
        (EN, "short", "What colour is the car?", "红色", None, "language"),
        (EN, "long", "Was sieht man?", "Man sieht vor einem Laden mehrere abgestellte Fahrzeuge stehen.", None, "language"),
        (ZH, "short", "What colour is the car?", "红色", None, "language"),
        (EN, "choice", "Which colour?", "red", ["red", "Red.", "blue", "green"], "options"),
        (EN, "choice", "How many?", "two", ["two", "2", "three", "four"], "options"),
        (EN, "choice", "Which colour?", "red", ["red", "blue", "All of the above"], "options"),
        (LONG, "choice", "Which colour has the car?", "green", ["green", "red"], "unsupported"),
        (EN, "choice", "Which colour has the car?", "pink", ["green", "red"], "wrong letter"),
        (EN, "choice", "What is left?", "a car", ["a car", "a bike", "both a bike and a car", "a tram"], "options"),
        (EN, "choice", "What is left?", "a car", ["a car", "a cart", "a red cart", "a tram"], None),
        (EN, "choice", "What is left?", "a car", ["a car", "...", "a cart"], "malformed"),
        (EN, "short", "User: What colour is the car?", "red", None, "malformed"),
        (EN, "short", "What stands beside the [insert object]?", "a shop", None, "malformed"),
        (EN, "long", "What is shown?", "A red car and two bikes stand in front of a...", None, "malformed"),
        (EN, "judgement", "Is the car red? (The answer should be yes.)", "Yes", None, "leak"),
        (EN, "judgement", "Is the car (the one that has no roof) red?", "Yes", None, None),
        (EN, "short", "As described above, what colour is the car?", "red", None, "caption"),
        (EN, "long", "What is shown?", "The text says that a red car and two bikes stand there.", None, None),
        ({"caption": "A red car."}, "long", "What is shown?", "The text says that a red car stands there.", None, "caption"),
        (EN, "short", "Which car is it?", "Unfortunately, the image was not provided.", None, "refusal"),
        (EN, "short", "Which characters are on the flag?", "福 (good fortune)", None, None),
        (ZH, "short", "店前的旗子上印着哪个品牌？", "Adidas", None, None),
        (ZH, "short", "店前的汽车有多大？", "very big indeed", None, "language"),
        (ZH, "short", "Please look and answer: 店前的两辆自行车是什么颜色的？", "蓝色", None, "language"),
        (ZH, "short", "店前的汽车", "红色", None, "malformed"),
        (ZH, "short", "图中显示的是5.01。柱子的数值是多少？", "5.01", None, "leak"),
        (EN, "short", "What stands before the sh", "a car", None, "malformed"),
        (EN, "short", "What stands before the?", "a car", None, "malformed"),
        (EN, "short", "What is the colour of ?", "red", None, "malformed"),
        (EN, "short", "hich colour has the car?", "red", None, "malformed"),
        (EN, "short", "A red car stands before a shop.", "a car", None, "malformed"),
        (EN, "short", "Name the colour of the car", "red", None, None),
        (EN, "short", "What stands before the shop?", "a car or bi", None, "malformed"),
        (EN, "short", "Which [CLASS] stands before the shop?", "a car", None, "malformed"),
        (EN, "short", "What stands before the shop?", "a car. a car", None, "malformed"),
        (EN, "judgement", "Does a car stand there?", "Yes. Is it blue? No", None, "malformed"),
        (EN, "judgement", "Does a car stand there?", "Não", None, "malformed"),
        (EN, "long", "What is shown?", "```\nA red car and two blue bikes stand before a shop.\n```", None, "malformed"),
        (EN, "long", "What is shown?", "A shop is shown. A red car stands before it. A shop is shown.", None, "malformed"),
        (EN, "choice", "What stands there?", "a car", ["A. a tram", "a car", "a cart"], "malformed"),
        (EN, "choice", "What stands there?", "a car", ["-", "a car", "a cart"], "malformed"),
        (EN, "choice", "What stands there?", "un coche", ["un gato", "un coche", "una casa"], "language"),
        ({"language": "en", "caption": "A red car."}, "short", "Which word is written above it?", "面包店", None, "language"),
        (ZH, "short", "店前的汽车是什么 colour 的？", "蓝色", None, "language"),
        (ZH, "short", "店前的 guanggao pai 上画着什么？", "汽车", None, "language"),
        (ZH, "short", "店前的汽車是什麼顏色？", "红色", None, "language"),
        (ZH, "short", "店前的汽车是什么颜色", "红色", None, "malformed"),
        (ZH, "short", "店前的汽车比？", "红色", None, "malformed"),
        (ZH, "short", "Antworte kurz: 店前的汽车是什么颜色的？", "红色", None, "language"),
        (EN, "short", "Bitte antworte kurz: What colour is the car?", "red", None, "language"),
        (EN, "short", "What stands before the shop?", "B. a car", None, "malformed"),
        (EN, "judgement", "Is the car red?", "No, the car is red.", None, "contradiction"),
        (EN, "judgement", "Is the car red?", "Yes, the car is not red.", None, "contradiction"),
        (EN, "judgement", "Is the car blue?", "No, the car is not blue.", None, None),
        (
            EN,
            "long",
            "What is shown?",
            "Rome has the highest bar with 3, Oslo the lowest with 7.",
            None,
            "contradiction",
        ),
        (EN, "long", "What is shown?", "Rome has the highest bar with 7, Oslo the lowest with 3.", None, None),
        (
            EN,
            "long",
            "What stands before the shop?\nWhat is red?",
            "A red car and two blue bikes stand before the shop.",
            None,
            "malformed",
        ),
    ],
)
def test_faults(given, type, question, answer, choices, fault):
    item = {**given, "id": "a", "type": type, "question": question, "answer": answer, "choices": choices}
    found = find_fault(item)
    assert (found or "").partition(":")[0] == (fault or ""), found
    assert len(Check()([item])) == (fault is None)


@pytest.mark.parametrize(
    ("one", "other", "fault"),
    [
        (
            ("short", "What colour is the car?", "red"),
            ("short", "Please tell me, what color is the car in this image?", "Red"),
            "repeat",
        ),
        (("short", "What colour is the car?", "red"), ("short", "What colour is the car?", "blue"), "contradiction"),
        (("choice", "What colour is the car?", "red"), ("short", "What colour is the car?", "blue"), "contradiction"),
        (("choice", "What colour is the car?", "red"), ("short", "What colour is the car?", "red"), "repeat"),
        (("short", "On which side is the tag?", "left"), ("short", "The tag is on which side?", "left"), "repeat"),
        (("short", "What does the note say?", "closed"), ("short", "What does the note read?", "closed"), "repeat"),
        (("short", "How many red cars are there?", "2"), ("short", "How many blue cars are there?", "2"), ""),
        (("short", "What is to the left of the car?", "a dog"), ("short", "What is to the right of the car?", "a dog"), ""),
        (("judgement", "Is the car left of the bike?", "Yes"), ("judgement", "Is the bike left of the car?", "No"), ""),
        (("judgement", "Is the car red?", "Yes"), ("judgement", "Is the car red?", "No"), "contradiction"),
        (("short", "汽车是什么颜色？", "红色"), ("short", "请问图中汽车是什么颜色？", "红色"), "repeat"),
    ],
)
def test_repeats(one, other, fault):
    items = [{"type": type, "question": question, "answer": answer} for type, question, answer in (one, other)]
    for item in items:
        item |= {"choices": ["red", "blue"]} if item["type"] == "choice" else {}
        item |= {"language": "zh"} if "汽车" in item["question"] else {}
    found = check_all(items)
    assert found[0] is None and (found[1] or "").partition(":")[0] == fault


def test_what_a_model_knows_without_the_image():
    item = {
        "id": "a",
        "type": "choice",
        "question": "Which is the capital of France?",
        "choices": ["Paris", "Rome", "Oslo"],
        "answer": "Paris",
    }
    right = lambda asked: next(line[0] for line in asked.splitlines() if line.endswith(". Paris"))  # noqa: E731
    assert not Blind(Says(right))([item])
    assert Blind(Says(lambda asked: "A"))([item])  # in another order each time
    assert Blind(Says(lambda asked: "UNKNOWN"))([item])
    assert not Blind(Says(lambda asked: f"<think>Rome? No.</think>\n\n{right(asked)}"))([item])
    assert Blind(Says(lambda asked: f"<think>It may be {right(asked)}"))([item])  # cut off while it thinks
    judgement = {"id": "b", "type": "judgement", "question": "Is Paris in France?", "answer": "Yes"}
    assert not Blind(Says(lambda asked: "Yes."))([judgement]) and Blind(Says(lambda asked: "No"))([judgement])


@pytest.mark.parametrize(
    ("said", "kept"),
    [("Verdict: CONTRADICTED", 0), ("**Verdict:** supported", 1), ("I cannot say", 1), (f"<think>{CONTRADICTED}", 1)]
    + [(f"<think>{CONTRADICTED}? It is red.</think>I cannot say", 1), (f"<think>Verdict: SUPPORTED?</think>{CONTRADICTED}", 0)],
)
def test_a_judge(said, kept):
    item = {"id": "a", "type": "short", "question": "Which colour?", "answer": "red", "caption": "A red car."}
    assert len(Agree(Says(lambda asked: said))([item])) == kept
    assert Agree(Says(lambda asked: "Verdict: CONTRADICTED"))([{**item, "caption": ""}])  # there is nothing to compare with


def test_seeds_are_random_and_the_same_again():
    records = [{"id": f"{number}", "domain": "ocr", "caption": "x"} for number in range(40)]
    made = Seed(types=["short"], rounds=2, per=3)(records)
    assert made == Seed(types=["short"], rounds=2, per=3)(records)
    questions = [[*one["questions"]] for record in made for one in record["seeds"]]
    assert len(questions) == 80 and all(len({*own}) == len(own) >= 2 for own in questions)
    assert len({question for own in questions for question in own}) >= 5
    assert not Seed()([{"id": "a", "domain": "oc", "caption": "x"}])


def test_what_cannot_be_asked_about():
    model = Generate(Says(str))
    for record, name in (
        ({}, "no caption"),
        ({"caption": "x"}, "no seeds"),
        ({"caption": "x", "seeds": [{}], "domain": "d"}, "domain"),
    ):
        with pytest.raises(ValueError, match=name):
            model.requests({"id": "a", **record})
    with pytest.raises(ValueError, match="no image"):
        Caption(Says(str)).requests({"id": "a"})
    for settings, name in (({"form": "xml"}, "'xml'"), ({"counts": {"essay": 1}}, "'essay'"), ({"n": 0}, "n=0")):
        with pytest.raises(ValueError, match=name):
            Generate(Says(str), **settings)
    for settings in ({"types": ["essay"]}, {"types": []}, {"rounds": 0}):
        with pytest.raises(ValueError, match="Expected"):
            Seed(**settings)


def test_yes_and_no_are_balanced_and_letters_even():
    def judgement(number, answer, domain="ocr", language="en"):
        return {"id": f"{number}", "type": "judgement", "answer": answer, "domain": domain, "language": language, "question": "?"}

    items = [judgement(n, "Yes") for n in range(6)] + [judgement(10 + n, "No", "landmark") for n in range(3)]
    items += [judgement(20, "Yes", "landmark"), judgement(30, "是", language="zh")]
    kept, dropped = balance(items)
    assert Counter(one["answer"] for one in kept) == {"Yes": 3, "No": 3} and len(kept) + len(dropped) == len(items)
    assert {one["domain"] for one in dropped} == {"ocr"}  # the one-sided one
    assert balance(items)[0] == kept
    choices = [{"id": f"{n}", "type": "choice", "question": "?", "choices": [*"wxyz"], "answer": "w"} for n in range(42)]
    arranged = arrange(choices)
    letters = Counter(one["response"] for one in arranged)
    assert sorted(letters.values()) == [10, 10, 11, 11]
    assert all(one["choices"]["ABCD".index(one["response"])] == "w" and sorted(one["choices"]) == [*"wxyz"] for one in arranged)
    assert len({tuple(one["choices"]) for one in arranged}) > 8 and len({one["suffix"] for one in arranged}) > 5


def test_what_is_said_of_two_images_is_said_of_neither():
    given = [
        ("a", "long", "A man reads."),
        ("a", "long", "A man reads!"),
        ("b", "long", "a man  reads"),
        ("b", "long", "In a large hall with two windows, the man sits at a table and reads a long book about the sea."),
        ("c", "long", "In a large hall with two windows, the man sits at a table and reads a long book about the sea. Good."),
        ("c", "long", "In a large hall with six windows, the woman sits at a desk and writes a short text about her house."),
        ("b", "short", "A man reads."),
    ]
    items = [{"id": f"{n}", "images": [image], "type": type, "answer": answer} for n, (image, type, answer) in enumerate(given)]
    lost = []
    assert [one["id"] for one in distinct(items, lost)] == ["0", "3", "5", "6"] and [one["id"] for one in lost] == ["1", "2", "4"]


def test_turns():
    items = [{"id": f"{n}", "images": ["a" if n < 5 else "b"], "language": "en"} for n in range(7)]
    assert [len(one) for one in conversations(items, 3)] == [3, 2, 2]


def test_captions(tmp_path):
    from support import make_image

    make_image(0, 800, 600).save(tmp_path / "a.png")
    record = {"id": "a:en", "images": [str(tmp_path / "a.png")], "domain": "ocr", "ocr": "STOP <image>", "tags": ["sign", "street"]}
    step = Caption(Says(str), shortest={"en": 5, "ocr": 9})
    (asked,) = step.requests(record)
    text = asked.messages[0]["content"][1]["text"]
    assert max(asked.images[0].size) == 512 and "STOP [image]" in text and "sign, street" in text and "at least 9 words" in text
    (plain,) = Caption(Says(str), max_side=None).requests({**record, "ocr": ""})
    assert plain.images == [str(tmp_path / "a.png")] and "at least 120 words" in plain.messages[0]["content"][1]["text"]
    good = "A red sign with the word STOP stands at the corner."
    for said, finish, reason in (
        (good, "stop", None),
        ("A red sign.", "stop", "too short"),
        ("I'm sorry, but I can't help with this picture of a red sign today.", "stop", "refuses"),
        ("A red sign. " + "It is red and it is big. " * 60, "stop", "repeats"),
        ("一块红色的标志牌立在路口，上面写着停字。", "stop", "not in English"),
        (good + " Behind it one", "length", None),
        (good + " Its lower edge cannot be determined.", "stop", None),
        ("A red sign with the word STOP stands at", "length", "whole sentence"),
    ):
        fault = step.finish({**record}, [[Response(said, finish, 1, 1)]]) if reason is None else None
        if reason is None:
            assert fault["caption"].startswith(good) and not fault["caption"].endswith("one")
        else:
            with pytest.raises(Dropped, match=reason):
                step.finish({**record}, [[Response(said, finish, 1, 1)]])
    first = Caption(Says(str), shortest={"en": 5, "ocr": 9}, last=False)
    left = first.finish({**record}, [[Response("No.", "stop", 1, 1)]])
    (again,) = step.requests(left)
    assert "too short (1 words" in again.messages[0]["content"][1]["text"]
    done = step.finish(left, [[Response(good, "stop", 1, 1)]])
    assert done["caption"] == good and "fault" not in done and step.requests(done) == []


@pytest.mark.parametrize(
    ("language", "said", "fault"),
    [
        ("en", "There is no image in your message. It may show a street.", "refuses"),
        ("en", "It appears the image did not load, so a street is assumed.", "refuses"),
        ("en", "Two children share one umbrella; the sign does not display a price.", None),
        ("zh", "您没有上传图片，请重新上传，谢谢您的配合与理解。", "refuses"),
        ("zh", "未检测到图片。这可能是一条普通的街道。", "refuses"),
        ("zh", "墙上没有挂任何照片，桌上放着一本打开的画册。", None),
        ("en", "A cat sits on a red cushion. 这只猫坐在红色的垫子上，看起来非常放松。", "not in English"),
        (
            "en",
            "A wide wooden sign above the open door reads “欢迎光临本店请勿吸烟谢谢合作” in red and golden paint.",
            None,
        ),
        ("en", "A sign reads 欢迎光临 in red above the door.", None),
        ("zh", "一只猫坐在红色的垫子上。 The cat looks very relaxed here.", "not in Chinese"),
    ],
)
def test_captions_without_an_image_and_in_two_languages(language, said, fault):
    found = Caption(Says(str), shortest={"en": 5, "zh": 5}).fault(said, {"language": language})
    assert (found is None) if fault is None else fault in str(found)


def test_languages():
    assert [one["id"] for one in InLanguages([{"id": "a"}], ["en", "zh"])] == ["a:en", "a:zh"]
    for languages in (["de"], []):
        with pytest.raises(ValueError, match="Expected languages"):
            InLanguages([], languages)


def test_records_and_faults_of_another_author():
    """benchmarks/mminstruct_faults.yaml: at most 5 % of the good are dropped, and 95 % of the faults are found, by kind 90 %
    where words can tell."""
    given = yaml.safe_load((Path(__file__).parents[3] / "benchmarks" / "mminstruct_faults.yaml").read_text())

    def faults(name, type, text, count, *said):
        items = [{"type": type, **given["images"][name], **one} for one in read_items(text, type)]
        return [*check_all(items), *["missing"] * (count - len(items))]

    good = [fault for one in given["good"] for fault in faults(*one)]
    assert len(good) == 201 and sum(map(bool, good)) <= 0.05 * len(good), [*filter(None, good)]
    found = {kind: [bool(faults(*one)[-1]) for one in own] for kind, own in given["faults"].items() if kind != "no image needed"}
    assert sum(map(sum, found.values())) >= 0.95 * sum(map(len, found.values()))
    low = {kind for kind, own in found.items() if sum(own) < 0.9 * len(own)}
    assert low <= {"speaks of the description", "another option"}, low


@pytest.mark.parametrize(
    ("type", "earlier", "later", "kind"),
    [
        ("judgement", ("Is the lamp green?", "Yes"), ("Is the lamp not green?", "Yes"), "contradiction"),
        ("judgement", ("Is the lamp green?", "Yes"), ("Is the lamp not green?", "No"), "repeat"),
        ("judgement", ("Is A higher than B?", "Yes"), ("Is B higher than A?", "No"), None),
        ("judgement", ("Is A higher than B?", "Yes"), ("Is B higher than A?", "Yes"), "contradiction"),
        ("judgement", ("Is A higher than B?", "Yes"), ("Is A lower than B?", "Yes"), "contradiction"),
        ("judgement", ("Is A higher than B?", "No"), ("Is A lower than B?", "No"), None),
        ("judgement", ("Is A higher than B?", "Yes"), ("Is B lower than A?", "Yes"), "repeat"),
        ("judgement", ("Is there a smaller box?", "Yes"), ("Is there a larger box?", "Yes"), None),
        ("short", ("Where is the dog?", "under the desk"), ("What is the dog?", "a terrier"), None),
        ("short", ("What is left of the cup?", "a spoon"), ("What is the cup left of?", "a book"), None),
        ("short", ("What is the colour of the cup?", "red"), ("What colour does the cup have?", "blue"), "contradiction"),
        ("long", ("What does the man do?", "He reads a long paper."), ("What is the man?", "He is a priest in black."), None),
        ("judgement", ("有猫吗？", "有"), ("有没有猫？", "没有"), "contradiction"),
        ("short", ("帽子是哪种颜色？", "红色"), ("帽子是什么颜色的？", "红色"), "repeat"),
        ("short", ("桥上有多少个人在钓鱼？", "三个"), ("有多少个人在桥上钓鱼？", "三个"), "repeat"),
        ("short", ("How high is the tower?", "90 m"), ("What is the height of the tower?", "90 m"), "repeat"),
        ("short", ("How high is the tower?", "90 m"), ("How far away is the tower?", "90 m"), None),
        ("judgement", ("Is the lid of the jar red?", "Yes"), ("Is the jar's lid red?", "Yes"), "repeat"),
        ("judgement", ("Is the lid of the jar red?", "Yes"), ("Is the jar's label red?", "Yes"), None),
        ("judgement", ("Is the lamp green?", "Yes"), ("The lamp is green, isn't it?", "Yes"), "repeat"),
        ("judgement", ("Is Al's bag left of the bin?", "Yes"), ("Is the bin left of the bag of Al?", "Yes"), None),
        ("short", ("How old is the tree?", "20"), ("How high is the tree?", "20"), None),
        ("judgement", ("Is the lamp green?", "Yes"), ("Looking at the image, is the lamp green?", "No"), "contradiction"),
        ("judgement", ("左边的灯亮着吗？", "是"), ("请看图，左边的灯亮着吗？", "否"), "contradiction"),
        ("judgement", ("On the left, is the lamp green?", "Yes"), ("On the right, is the lamp green?", "Yes"), None),
        ("short", ("What hangs behind the man?", "a flag"), ("What hangs behnd the man?", "a flag"), "repeat"),
        ("short", ("What is the value of class_1?", "7"), ("What is the value of class_12?", "7"), None),
        ("judgement", ("Is the lamp green at the bottom?", "No"), ("At the bottom, is the lamp green?", "No"), "repeat"),
        ("judgement", ("Is the lamp by the door green?", "Yes"), ("Is the lamp by the door green or not?", "Yes"), "repeat"),
        ("judgement", ("Is the lamp by the door green?", "Yes"), ("Isn't the lamp by the door green?", "Yes"), "repeat"),
        ("judgement", ("Is A taller than B?", "Yes"), ("Is A higher than B?", "Yes"), "repeat"),
        ("short", ("灯是什么颜色的？", "绿色"), ("什么颜色的是灯？", "绿色"), "repeat"),
        ("short", ("What is the height of the lamp?", "3 m"), ("Give the height of the lamp.", "3 m"), "repeat"),
        ("judgement", ("Is the lamp green?", "Yes"), ("Say whether the lamp is green.", "Yes"), "repeat"),
        ("judgement", ("左边的灯比右边的高吗？", "是"), ("左边的灯是否高于右边的灯？", "是"), "repeat"),
        ("short", ("What is the height of the lamp?", "3 m"), ("What is the height of the lamp? Be brief.", "3 m"), "repeat"),
    ],
)
def test_what_asks_the_same(type, earlier, later, kind):
    items = [{"type": type, "question": question, "answer": answer} for question, answer in (earlier, later)]
    mark_repeats(items)
    assert "fault" not in items[0] and (items[1].get("fault") or "").partition(":")[0] == (kind or "")


@pytest.mark.parametrize(
    ("type", "earlier", "later", "kind"),
    [
        ("short", ("What stands at the door?", "a lamp"), ("What stands at the door, by the way?", "a lamp"), "repeat"),
        ("short", ("What stands at the door?", "a lamp"), ("One more question: what stands at the door?", "a lamp"), "repeat"),
        ("short", ("What stands at the door?", "a lamp"), ("What stands at the red door?", "a lamp"), None),
        ("short", ("What stands at the door?", "a lamp"), ("What stands at the dcor?", "a lamp"), "repeat"),
        ("short", ("What stands at the door?", "a lamp"), ("What stands at the wall?", "a lamp"), None),
        ("short", ("What stands at the door?", "a lamp"), ("What stands at the gate?", "a lamp"), "repeat"),
        ("judgement", ("Is the boy at the door?", "Yes"), ("Is the boy at the wall?", "Yes"), None),
        ("short", ("Who is at the door?", "a boy"), ("Who is at the door: a boy or a girl?", "a boy"), "repeat"),
        ("judgement", ("Is the lamp green?", "No"), ("As a child would ask, is the lamp green?", "No"), "repeat"),
        ("judgement", ("Is there a cat?", "No"), ("Is there a cat on the roof?", "No"), None),
        ("judgement", ("Is the bin black?", "Yes"), ("The bin is black, right?", "Yes"), "repeat"),
        ("short", ("门口有什么？", "一盏灯"), ("再问一下，门口有什么？", "一盏灯"), "repeat"),
        ("short", ("门口的等是谁的？", "孩子"), ("门口的灯是谁的？", "孩子"), "repeat"),
        ("short", ("门口的桶是谁的？", "孩子"), ("门口的灯是谁的？", "孩子"), None),
        ("judgement", ("AB是直径吗？", "是"), ("BC比AC长吗？", "是"), None),
    ],
)
def test_what_asks_the_same_of_a_description(type, earlier, later, kind):
    """Words that the description has not do not make another question."""
    caption = (
        "A red door in a wall, a green lamp and a black bin at the door, and a boy. 门口有一盏绿色的灯、一个黑色的桶和一个孩子。"
    )
    items = [{"type": type, "question": question, "answer": answer, "caption": caption} for question, answer in (earlier, later)]
    mark_repeats(items)
    assert "fault" not in items[0] and (items[1].get("fault") or "").partition(":")[0] == (kind or "")


@pytest.mark.parametrize(
    ("type", "question", "answer", "choices", "caption"),
    [
        ("choice", "Which organ is labelled (B)?", "Heart", ["Heart", "Lung"], "A drawing of organs."),
        ("choice", "Which two points lie on the base?", "A and B", ["A and B", "A and C", "B and C"], "A triangle ABC."),
        ("choice", "Which vitamin is named?", "C", ["A", "B", "C", "D"], "A bottle of vitamin C."),
        ("choice", "Which language is it?", "C++", ["C", "C++", "C#"], "Code in C++."),
        ("choice", "Which sign is shown?", "≤", ["<", "≤"], "A sign with ≤."),
        ("choice", "Who holds it?", "The woman (right)", ["The man (left)", "The woman (right)"], "A man and a woman."),
        ("choice", "How many women are there?", "One", ["One", "Two"], "A woman walks with two dogs."),
        ("choice", "How many cats are there?", "None", ["None", "Two"], "A woman walks with two dogs."),
        ("choice", "How many people sit there?", "5", ["3", "5", "6"], "Three men and two women."),
        ("choice", "By how much is A longer?", "1.58 cm", ["1.58 cm", "5.01 cm"], "A has 6.59 cm, B has 5.01 cm."),
        ("choice", "Which animal is not there?", "Horse", ["Dog", "Horse"], "A dog and a cat."),
        ("choice", "图中有几个人？", "五个", ["三个", "五个", "六个"], "三个男人和两个女人。"),
        ("choice", "每行有几枚钱币？", "6枚", ["4枚", "6枚"], "24枚钱币，每行六枚。"),
        ("choice", "柱子有多高？", "约6厘米", ["94厘米", "约6厘米"], "柱子为5.94厘米。"),
        ("judgement", "When seen from above, is the roof round?", "Yes", None, "A round roof."),
        ("judgement", "What we see is a lighthouse. True or false?", "True", None, "A lighthouse."),
        ("short", "What does the man say?", "I'm sorry", None, 'A comic: the man says "I\'m sorry".'),
        ("short", "门上的牌子写着什么？", "抱歉，今日休息", None, '牌子写着"抱歉，今日休息"。'),
        ("short", "What does the caption say?", "Monday", None, 'A tired dog. The caption says "Monday".'),
        ("short", "Which tag is around the title?", "<title>", None, "A screenshot of code: <title>Home</title>"),
        ("short", "Between the cat and the dog, which is larger?", "The dog", None, "A large dog and a small cat."),
        ("short", "小猫与大狗相比，谁更大？", "大狗", None, "一只大狗和一只小猫。"),
        ("short", "What colour is the car?", "scarlet", None, "A red car and two blue bikes."),
        ("choice", "What colour is the car?", "scarlet", ["scarlet", "blue"], "A red car and two blue bikes."),
        ("short", "What is written in subplot a?", "[mV]", None, "A subplot a with the label [mV]."),
        ("short", "哪家公司的标志是苹果？", "苹果公司", None, "苹果公司的标志是一个苹果。"),
        ("long", "图例说明了什么？", "图例使用 matplotlib 绘制，说明了三条线。", None, "图例说明了三条线。"),
        ("short", "鳥在哪裡？", "樹上", None, "樹上有一隻鳥，旁邊的門前停著紅色的車，遠處還有一條路。"),
        ("short", "三个类别中柱子最高的是？", "甲类", None, "甲类的柱子最高，乙类和丙类的柱子较低。"),
    ],
)
def test_keeps_right_ones_that_look_like_faults(type, question, answer, choices, caption):
    language = "en" if question.isascii() else "zh"
    item = {"type": type, "question": question, "answer": answer, "choices": choices, "language": language}
    item["caption"] = caption + (QUIET if language == "en" else QUIET_ZH)
    assert find_fault(item) is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Is he wearing glasses?", "Is she wearing glasses?"),
        ("Is the segment A longer than 5 cm?", "Is the segment AB longer than 5 cm?"),
        ("图中左边的男人是否戴着墨镜？", "图中左边的男人是否戴着黑墨镜？"),
    ],
)
def test_a_letter_may_be_another_word(one, other):
    items = [{"type": "judgement", "question": question, "answer": "No"} for question in (one, other)]
    mark_repeats(items)
    assert "fault" not in items[1]


@pytest.mark.parametrize(
    ("question", "answer", "fault"),
    [
        ("What is the difference in the value in Kenya and India", "3", None),
        ("What is the difference in the value in Kenya and", "3", "malformed"),
        ("What is shown beside the ele", "a tree", "malformed"),
        ("How many bars have values smaller than 0?", "0", None),
        ("Explain that 24: How many bars are there?", "24", "leak"),
        ("At what value of y is x = -2.5?", "2", None),
        ("Which method has the highest ΔSSIM in the region’s line?", "ours", None),
        ("Какая машина here is it?", "red", "language"),
        ("The slope of f(x) at x=0 is ____", "positive", None),
        ("What is the ____?", "positive", "malformed"),
    ],
)
def test_questions_of_public_sets(question, answer, fault):
    found = find_fault({"type": "short", "question": question, "answer": answer, "caption": "A chart beside an elephant."})
    assert (found and found.partition(":")[0]) == fault


BARS = "A chart. The bar of Rome is 21.5 high, the bar of Oslo is 13.4 high, the bar of Bern is 17 high. A red cup stands on it."
BARS_ZH = "柱状图中，罗马的柱高为21.5，奥斯陆的柱高为13.4，一只红色的杯子。"


@pytest.mark.parametrize(
    ("type", "question", "answer", "fault"),
    [
        ("judgement", "Is the bar of Rome higher than that of Bern?", "No", "contradiction"),
        ("judgement", "Is the bar of Rome higher than that of Bern?", "Yes", None),
        ("judgement", "Is Bern lower than Oslo?", "Yes", "contradiction"),
        ("judgement", "Is Bern twice as high or higher than Oslo?", "Yes", None),
        ("judgement", "罗马的柱子比奥斯陆的高吗？", "否", "contradiction"),
        ("judgement", "Is Rome high?", "Yes, so the answer is no.", "malformed"),
        ("judgement", "Is 21.5 larger than 13.4?", "Yes", "no image needed"),
        ("judgement", "Is the red cup red?", "Yes", "no image needed"),
        ("judgement", "Is the left cup left of the bar?", "Yes", None),
        ("judgement", "Does the green cup stand?", "Yes", "unsupported"),
        ("judgement", "Does a green cup stand there?", "No", None),
        ("short", "Which bar is the highest?", "Oslo", "contradiction"),
        ("short", "Which bar is the second highest?", "Bern", None),
        ("short", "What is the value of Oslo?", "21.5", "contradiction"),
        ("short", "What is the value of Oslo?", "13", None),
        ("short", "哪个城市的柱子最高？", "奥斯陆", "contradiction"),
        ("short", "2) What stands there?", "a cup", "malformed"),
        ("short", "What What stands stands on on it it?", "a cup", "malformed"),
        ("short", "W h a t i s r e d ?", "a cup", "malformed"),
        ("short", "```What stands there?```", "a cup", "malformed"),
        ("short", "图中 of 杯子是什么颜色？", "红色", "language"),
        ("short", 'How many letters does the word "Rome" have?', "4", "no image needed"),
        ("long", "What is shown?", "Rome has the highest bar with 21.5, and Oslo the lowest with 13.4, as a chart.", None),
        ("long", "What is shown?", "Oslo has the highest bar of all, and the others are lower.", "contradiction"),
        ("long", "What is shown?", "Rome has a bar of 21.5, and the one of Oslo is 8.1 lower, as a chart.", None),
        ("long", "What is shown?", "Rome has a bar of 21.5, and the one of Oslo reaches 14.3 in it.", "unsupported"),
        ("long", "What is shown?", "The bar of Bern is higher, as 17 is greater than 21.5 in the chart.", "contradiction"),
        ("long", "What is shown?", "A cup stands on the bars. However, there is no cup in the image.", "contradiction"),
        ("long", "What is shown?", "The bars have no cup on them. There is no cup in the image.", None),
        (
            "long",
            "What is shown?",
            "1. A cup stands on all of the many bars there.\n2. A cup stands on all of the many bars there.",
            "malformed",
        ),
    ],
)
def test_what_contradicts_a_description(type, question, answer, fault):
    zh = any("\u4e00" <= letter for letter in question)
    found = find_fault(
        {
            "type": type,
            "question": question,
            "answer": answer,
            "language": "zh" if zh else "en",
            "caption": BARS_ZH + QUIET_ZH if zh else BARS + QUIET,
        }
    )
    assert (found and found.partition(":")[0]) == fault, found


LINES = "The line of Oslo has 30.2 degrees, that of Rome 41.7, 1,249.7 in all. A grey cat is there. The longest name is Rome."


@pytest.mark.parametrize(
    ("type", "question", "answer", "kept"),
    [
        ("short", "Which value does Oslo reach?", "30", True),
        ("short", "Which value does Oslo reach?", "31", False),
        ("short", "Which value does Oslo reach?", "30.4", False),
        ("short", "Which value does Rome reach?", "42 degrees", True),
        ("short", "Which value do all reach?", "1,250", True),
        ("short", "Which value do all reach?", "1.25 thousand", True),
        ("short", "By which factor is Rome higher?", "1.4", True),
        ("short", "Which value does Oslo reach in hundreds?", "0.302", True),
        ("short", "Which value does Oslo reach?", "3.02", False),
        ("short", "上海的数值是多少？", "34度", True),
        ("short", "上海的数值是多少？", "37度", False),
        ("short", "Which colour has the cat?", "gray", True),
        ("choice", "Which value has Rome?", "42", True),
        ("choice", "At about how many degrees does Rome end?", "40", True),
        ("choice", "Which value has Rome?", "55", False),
        ("long", "What is there to see?", "The place is for people who like lines. There are no people in the image.", True),
        ("short", "Which city has the longest name?", "Oslo", True),  # nothing that the values tell
        ("short", "Which city has the longest coast?", "Oslo", True),
    ],
)
def test_rounded_values_and_other_superlatives_are_kept(type, question, answer, kept):
    zh = not question.isascii()
    caption = "北京的折线终点为30.2度，上海的折线终点为33.8度。" + QUIET_ZH if zh else LINES + QUIET
    item = {"type": type, "question": question, "answer": answer, "caption": caption, "language": "zh" if zh else "en"}
    found = find_fault({**item, "choices": [answer, "30.2", "90"] if type == "choice" else []})
    assert (found is None) == kept, found


@pytest.mark.parametrize(
    ("type", "question", "answer", "caption", "kept"),
    [
        ("judgement", "Is Oslo the largest of the three?", "No", "Rome 3.5, Oslo 5.5 and Bern 4.5.", False),
        ("judgement", "Is Oslo the largest of the three?", "Yes", "Rome 3.5, Oslo 5.5 and Bern 4.5.", True),
        ("judgement", "图中人口最多的城市是天津吗？", "是", "四个直辖市的人口：北京2189，天津1387，上海2487，重庆3205。", False),
        ("judgement", "Are there five dogs?", "No", "Two dogs.", True),
        ("judgement", "The answer to the following question is yes. Is it red?", "Yes", "A red car.", False),
        ("judgement", "Is the answer on the card yes or no?", "Yes", "A card.", True),
        ("short", "How many rolls are on the plate?", "Eleven", "A plate with two rolls and a jar.", False),
        ("short", "How many rolls are left?", "Seven", "Eight rolls, and one roll is gone.", True),
        ("short", "How many people wear hats?", "four", "Five people wait. One of the people has no hat.", False),
        ("short", "How tall is the vase approximately?", "32 metres", "A vase, 32 centimetres tall.", False),
        ("short", "How tall is the vase?", "32 cm", "A vase, 32 centimetres tall.", True),
        ("short", "How heavy is it?", "15 kg", "A bag of 15kg.", True),
        ("short", "优惠了多少？", "3.80美元", "优惠3.80元，实付52.00元。", False),
        ("short", "上海的销量是多少？", "45万台", "销量（万台）：北京的销量是32，上海的销量是45，广州的销量是28.5。", True),
        ("short", "Which month is it?", "February", "A calendar shows March.", False),
        ("short", "What may happen?", "They march on.", "A poster of May, where people march.", True),
    ],
)
def test_counts_units_months_and_lists_of_values(type, question, answer, caption, kept):
    language = "en" if question.isascii() else "zh"
    caption += QUIET if language == "en" else QUIET_ZH
    item = {"type": type, "question": question, "answer": answer, "caption": caption, "language": language}
    assert (find_fault(item) is None) == kept, find_fault(item)


def test_hostile_texts():
    """Digits without end cost nothing; separators, ranges, two series and names in Latin letters are read as they are meant."""
    caption = "A is 3.5 high, B is 5.25 high; 1,200.5 in all, 5.2-6.1, 1.5e999999999, " + "9" * 6000 + QUIET
    for answer in (
        "It reaches 1e999999999 and no more in all of this chart.",
        f"It is {'9' * 6000} is greater than {'8' * 6000} there, all in all.",
    ):
        find_fault({"type": "long", "question": "What is shown?", "answer": answer, "caption": caption})
    assert find_fault({"type": "short", "question": "What is the value of A?", "answer": "1" * 5000, "caption": caption})
    good = "The values go from 5.2 to 6.1 and up to 1200.5, which is 1.2005 thousand, or 350.0 percent."
    assert find_fault({"type": "long", "question": "What is shown?", "answer": good, "caption": caption}) is None
    two = "A is 3 high, B is 5 high, A is 9 wide, B is 2 wide."
    assert find_fault({"type": "judgement", "question": "Is A larger than B?", "answer": "Yes", "caption": two}) is None
    for question in ("图中 Bank of China 的标志是什么颜色？", "TensorFlow的标志是什么颜色？"):
        assert find_fault({"type": "short", "question": question, "answer": "红色", "language": "zh"}) is None


HARBOUR = (
    "Three boats lie along the quay on the left: a red one in front, a white one with a blue stripe behind it, and a green one "
    "farthest away. A man in a yellow coat sits on a crate and mends a net. Two gulls stand on a post at the right edge. "
    "A board lists prices: cod costs 4.20, plaice 6.10 and sole 9.50. The red boat is 8 metres long, the green boat 12 metres."
)


@pytest.mark.parametrize(
    ("type", "question", "answer", "choices", "kept"),
    [
        ("short", "What does the man mend?", "a net", None, True),
        ("short", "What does the man mend?", "a bicycle", None, False),
        ("short", "What does the man mend?", "nets", None, True),
        ("short", "Which fish has a stripe of blue?", "seven", None, False),
        ("short", "What does the plaice cost?", "6.10", None, True),
        ("short", "What does the plaice cost?", "9.50", None, False),
        ("short", "What do cod and sole cost altogether?", "13.70", None, True),
        ("short", "How many gulls stand on the post?", "five", None, False),
        ("short", "What colour is the man's coat?", "green", None, False),
        ("choice", "What is the man in the coat doing?", "feeding gulls", ["mending a net", "feeding gulls", "painting"], False),
        ("choice", "What is the man in the coat doing?", "mending a net", ["mending a net", "feeding gulls", "painting"], True),
        ("choice", "Which fish has the highest price?", "cod", ["cod", "plaice", "sole"], False),
        ("choice", "Which fish has the highest price?", "sole", ["cod", "plaice", "sole"], True),
        ("judgement", "Is the red boat longer than the green boat?", "Yes", None, False),
        ("judgement", "Do you like to read?", "Yes", None, False),
        ("judgement", "Do two gulls stand on a post? Two gulls stand there.", "Yes, two gulls stand there.", None, False),
        ("short", "What do you get when you multiply 7 by 8?", "56", None, False),
        ("short", "What shape has the frame of the image?", "rectangular", None, True),
        ("short", "What does the text on the sign say?", "Keep off", None, True),
        ("judgement", "Is the red boat shorter than the green boat?", "Yes", None, True),
        ("judgement", "Do two gulls stand on a post?", "No", None, False),
        ("judgement", "Do two gulls stand on a crate?", "No", None, True),
        ("judgement", "Do two gulls stand on a post?", "No, the man has a coat.", None, False),
        ("long", "What is shown?", "Two gulls stand on a post at the left edge, and a man on a crate mends a net.", None, False),
        ("long", "What is shown?", "Two gulls stand on a post at the right edge, and a man on a crate mends a net.", None, True),
        ("long", "What is shown?", "A man in a purple coat sits on a crate and mends a net beside the quay.", None, False),
        (
            "long",
            "What is shown?",
            "The zebras graze under tall acacia trees while a lion sleeps nearby in dry grass.",
            None,
            False,
        ),
    ],
)
def test_what_a_description_supports(type, question, answer, choices, kept):
    item = {"type": type, "question": question, "answer": answer, "choices": choices, "caption": HARBOUR}
    assert (find_fault(item) is None) == kept, find_fault(item)


PRICES = "A menu on a wall has five prices: soup costs 4.50, fish costs 9.20, rice costs 3.10, cake costs 2.80 and tea costs 2.00. "
PRICES += "Three rows of eight chairs stand there. The bus line calls at Airport, Museum, Central, Park and Harbour, in that order."
PRICES += " A clock over the door shows 0:25."


@pytest.mark.parametrize(
    ("question", "answer", "kept"),
    [
        ("How much cheaper is the tea than the fish?", "7.20", True),
        ("By how much is fish dearer than soup?", "By 4.7", True),
        ("How many stops does the bus line have?", "Five", True),
        ("How many chairs would be left if one row were taken away?", "16", True),
        ("What does the fish cost?", "9.20", True),
        ("What does the fish cost?", "3.10", False),
        ("What does the fish cost?", "8.70", False),
        ("What do 4 cakes cost?", "11.20", True),
        ("How much does a guest save who pays 7.00 for soup and cake?", "0.30", True),
        ("How many minutes does it take?", "25 minutes", True),
        ("How many seconds does it take?", "26 seconds", False),
    ],
)
def test_values_that_are_made_of_others(question, answer, kept):
    assert (find_fault({"type": "short", "question": question, "answer": answer, "caption": PRICES}) is None) == kept


@pytest.mark.parametrize(
    ("answer", "fault"), [("不是，是二等座。", None), ("看不见，被遮住了。", None), ("不是，是blue的。", "language")]
)
def test_chinese_judgements_that_correct(answer, fault):
    item = {"type": "judgement", "question": "这张票是一等座吗？", "answer": answer, "language": "zh"}
    found = find_fault(
        {**item, "caption": "一张蓝色的火车票平放在木桌上，座位等级为二等座，姓名被黑线遮住了，票旁边放着一副黑色的耳机。"}
    )
    assert (found and found.partition(":")[0]) == fault


BRIDGE = "一座红色的石桥跨过小河。河的西岸有面馆和书店，东岸有邮局和一家浅绿色的茶馆。邮局门口注明“周日休息”。"
BRIDGE += "甲班身高160，体重52；乙班身高165，体重49。"


@pytest.mark.parametrize(
    ("question", "answer", "kept"),
    [
        ("邮局在河的西岸吗？", "不在，邮局在东岸。", True),
        ("面馆在河的西岸吗？", "不在，面馆在西岸。", False),
        ("邮局星期日开门吗？", "不开门，周日休息。", True),
        ("甲班的体重比乙班大吗？", "是的，52比49大。", True),
        ("甲班的体重比乙班大吗？", "是的，49大于52。", False),
        ("茶馆是浅绿色的吗？", "是的，茶馆是浅绿色的。", True),
        ("茶馆是灰色的吗？", "是的，茶馆是灰色的。", False),
    ],
)
def test_chinese_judgements_with_a_reason(question, answer, kept):
    item = {"type": "judgement", "question": question, "answer": answer, "language": "zh", "caption": BRIDGE}
    assert (find_fault(item) is None) == kept, find_fault(item)


@pytest.mark.parametrize(
    ("question", "answer", "kind"),
    [
        ("Write two questions about the image. What does the man mend?", "a net", "malformed"),
        ("What does the man mend?", "</answer> a net", "malformed"),
        ("What does the man mend? (It is a net.)", "a net", "leak"),
        ("What lies between the quay and the post? (It is a net.)", "a net", "leak"),
        ("If 4 boats cost 80 euros, what does one boat cost?", "20 euros", "no image needed"),
    ],
)
def test_what_is_around_a_question(question, answer, kind):
    assert (find_fault({"type": "short", "question": question, "answer": answer, "caption": HARBOUR}) or "").startswith(kind)


def test_a_judge_that_knows_the_truth_drops_every_contradiction_and_nothing_else():
    path = Path(__file__).parents[3] / "benchmarks" / "mminstruct_fourth.jsonl.gz"
    lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    about = {one["image"]: {"caption": one["caption"], "language": one["language"]} for one in lines if "caption" in one}
    records = [one for one in lines if one.get("label") in ("good", "contradicting") and one["type"] != "choice"]
    true = {(one["question"], one["answer"]) for one in records if one["label"] == "good"}

    def judge(asked):
        said = re.search(r"(?:Question|问题)[:：] ?(.*)\n(?:Answer|答案)[:：] ?(.*)", asked)
        return f"Verdict: {'SUPPORTED' if said.groups() in true else 'CONTRADICTED'}"

    kept = {one["id"] for one in Agree(Says(judge))([{**one, **about[one["image"]]} for one in records])}
    assert kept == {one["id"] for one in records if one["label"] == "good"} and len(records) - len(kept) > 80
