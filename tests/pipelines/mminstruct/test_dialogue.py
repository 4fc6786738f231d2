"""Dialogues that a model writes in one response: their rounds, what is wrong with one, and what goes with it."""

from collections import Counter

import pytest
from told import Says

from mpo.pipelines.mminstruct import check
from mpo.pipelines.mminstruct.check import Agree, Blind, Check, find_fault
from mpo.pipelines.mminstruct.generate import Generate, Seed, read_items
from mpo.pipelines.mminstruct.output import even, whole

EN = {
    "id": "a",
    "language": "en",
    "domain": "ocr",
    "caption": "A red car and two blue bikes stand before a bakery with a round sign.",
}
ZH = {"id": "a", "language": "zh", "domain": "ocr", "caption": "一辆红色的汽车和两辆蓝色的自行车停在一家有圆形招牌的面包店前。"}
FIRST = ("Which vehicle stands beside the bikes?", "a car")
ERSTE = ("自行车旁边停着什么？", "一辆汽车")


def made(*rounds, of=EN):
    """The rounds of a dialogue, with what is wrong with each."""
    text = "\n".join(f"<Q{at}>{asked}</Q{at}><A{at}>{said}</A{at}>" for at, (asked, said) in enumerate(rounds, 1))
    items = Generate(Says(lambda asked: text))(Seed(types=["dialogue"])([of]))
    return [(item, (find_fault(item) or "").partition(":")[0]) for item in items]


def test_rounds():
    long = "A red car stands there, and beside it are two blue bikes, all of them before a bakery."
    items = [one for one, _ in made(FIRST, ("Is it red?", "Yes"), ("Why?", "It was painted"), ("What is before the shop?", long))]
    assert [one["type"] for one in items] == ["short", "judgement", "short", "long"]
    assert [one["turn"] for one in items] == [0, 1, 2, 3] and {one["dialogue"] for one in items} == {"a/0.0"}
    said = [("Is it red?", "Yes, it is."), ("Which way does it go?", "No way"), ("Is it wide or tall?", "wide")]
    assert [one["type"] for one, _ in made(FIRST, *said)] == ["short", "judgement", "short", "short"]
    assert [one["type"] for one, _ in made(ERSTE, ("它是红色的吗？", "是的，是红色。"), of=ZH)] == ["short", "judgement"]
    assert [[old["answer"] for old in one["earlier"]] for one in items[:3]] == [[], ["a car"], ["a car", "Yes"]]


def test_what_is_asked_for():
    for of, words in ((EN, ("4 rounds of one dialogue", "stands by itself")), (ZH, ("4个前后相承", "第一个问题独立成句"))):
        (seeded,) = Seed(types=["dialogue"])([of])
        (request,) = Generate(Says(str)).requests(seeded)
        text = request.messages[0]["content"][0]["text"]
        assert all(word in text for word in words) and "<C1>" not in text and len(seeded["seeds"][0]["questions"]) == 3


@pytest.mark.parametrize("of", [EN, ZH])
def test_good_ones_are_kept(of):
    good = {
        "en": [FIRST, ("What colour is it?", "red"), ("And the things beside it?", "blue"), ("Why?", "They were painted")],
        "zh": [ERSTE, ("它是什么颜色？", "红色"), ("那自行车呢？", "蓝色"), ("红色的汽车停在什么店前？", "面包店")],
    }
    other = {
        "en": [("How many bikes are there?", "two"), ("What colour are the two bikes?", "blue"), ("Is the red car new?", "No")],
        "zh": [("有几辆自行车？", "两辆"), ("这两辆自行车是什么颜色？", "蓝色"), ("它们在红色的汽车旁边吗？", "是")],
    }
    for rounds in (good[of["language"]], other[of["language"]]):
        assert [fault for _, fault in made(*rounds, of=of)] == [""] * len(rounds)


@pytest.mark.parametrize(
    ("of", "rounds", "fault"),
    [
        (EN, [("And what colour is the car?", "red")], "dialogue"),
        (EN, [("What colour is it?", "red")], "dialogue"),
        (EN, [("What else is red?", "a car")], "dialogue"),
        (EN, [FIRST, ("Which vehicle stands beside the bikes in the image?", "a car")], "repeat"),
        (EN, [FIRST, ("What colour is it?", "red"), ("What colour is it?", "Red.")], "repeat"),
        (EN, [FIRST, ("What colour is it?", "red"), ("What colour is it?", "blue")], "contradiction"),
        (EN, [("What colour is the car?", "red"), ("Is the car red?", "Yes")], "leak"),
        (EN, [("What does the red car stand beside?", "two bikes"), ("What colour is the car?", "red")], "leak"),
        (EN, [("What is shown?", "a red car"), ("What colour is the car?", "red")], "leak"),
        (EN, [("What is shown?", "Two bikes and a car that is red."), ("How many bikes are there?", "two")], "leak"),
        (EN, [FIRST, ("What colour is the red one?", "red")], "leak"),
        (EN, [("Is the car red?", "Yes"), ("What colour is the car?", "red")], "leak"),
        (EN, [FIRST, ("What colour is it, as the description says?", "red")], "caption"),
        (EN, [FIRST, ("What colour is it?", "I cannot tell.")], "refusal"),
        (ZH, [("那是什么颜色？", "红色")], "dialogue"),
        (ZH, [("它是什么颜色？", "红色")], "dialogue"),
        (ZH, [ERSTE, ("它是什么颜色？", "红色"), ("它是什么颜色？", "红色")], "repeat"),
        (ZH, [("汽车是什么颜色？", "红色"), ("汽车是红色的吗？", "是")], "leak"),
        (ZH, [("红色的汽车停在什么店前？", "面包店"), ("汽车是什么颜色？", "红色")], "leak"),
    ],
)
def test_faults_of_rounds(of, rounds, fault):
    """The last round has the fault; one more after it goes with it."""
    more = ("Who stands there?", "nobody") if of is EN else ("那里站着谁？", "没有人")
    found = [one for _, one in made(*rounds, more, of=of)]
    assert found == [*[""] * (len(rounds) - 1), fault, "dialogue"]


def test_what_cannot_be_read():
    faults = [one.get("fault") for one in read_items("<Q1>Is it?</Q1><A1>Yes</A1><Q3>Is it not?</Q3><A3>No</A3>", "dialogue")]
    assert faults[0] is None and "round 2 has the number 3" in faults[1]
    json = '{"items": [{"question": "Is it?", "choices": [], "answer": "Yes"}, {"question": "", "choices": [], "answer": "No"}]}'
    assert [bool(one.get("fault")) for one in read_items(json, "dialogue")] == [False, True]
    json = '{"items": [{"question": "Which is it?", "choices": ["A. red", "B. blue"], "answer": "%s"}]}'
    assert [bool(read_items(json % said, "dialogue")[0].get("fault")) for said in ("A. red", "B", "red", "a bus")] == [1, 1, 0, 0]
    assert [fault for _, fault in made(FIRST, ("What colour is it? A. red B. blue", "A"))] == ["", "malformed"]
    text = "<Q1>{}</Q1><A1>{}</A1><Q2>What colour is it?<A2>red</A2><Q3>Is it new?</Q3><A3>Yes</A3>".format(*FIRST)
    items = Generate(Says(lambda asked: text))(Seed(types=["dialogue"])([EN]))
    assert [one.get("fault", "").partition(":")[0] for one in items] == ["", "malformed", "dialogue"]
    assert len(Check()(items)) == 1


def test_a_dialogue_goes_before_a_single_question():
    """What it asks is not asked alone again; "What colour is it?" is of another thing in each."""
    (seeded,) = Seed(types=["short", "dialogue"], rounds=2)([EN])
    said = iter(
        [
            "<Q1>{}</Q1><A1>{}</A1>".format(*FIRST),
            "<Q1>What colour is the car?</Q1><A1>red</A1>",
            "<Q1>{}</Q1><A1>{}</A1><Q2>What colour is it?</Q2><A2>red</A2>".format(*FIRST),
            "<Q1>What hangs there?</Q1><A1>a sign</A1><Q2>What colour is it?</Q2><A2>blue</A2>",
        ]
    )
    faults = [find_fault(one) for one in Generate(Says(lambda asked: next(said)))([seeded])]
    assert [(one or "").partition(":")[0] for one in faults] == ["repeat", "", "", "", "", ""]


def test_models_are_told_of_earlier_rounds():
    """A later round that the earlier ones answer needs no image; the judge knows what "it" is."""
    items = [one for one, _ in made(("Which animal is shown?", "a cat"), ("Which sound does it make?", "meow"))]
    knows = Blind(Says(lambda asked: "meow" if "Said before: Which animal is shown? a cat\nWhich sound" in asked else "UNKNOWN"))
    assert [one["turn"] for one in knows(items)] == [0]
    before = "a cat\nQuestion: Which sound"
    judge = Agree(Says(lambda asked: "Verdict: CONTRADICTED" if before in asked else "Verdict: SUPPORTED"))
    assert [one["turn"] for one in judge(items)] == [0]


def test_yes_and_no_are_even_with_what_goes_with_a_round():
    """A yes too many is a first round here, and goes with the no after it, for which another yes goes."""
    given = [("d", 0, "Yes"), ("d", 1, "No"), ("e", 0, "Yes"), ("e", 1, "No"), ("f", 0, "Yes"), ("f", 1, "No"), ("g", 0, "Yes")]
    items = [
        {"id": f"{of}{turn}", "type": "judgement", "source": "s", "dialogue": of, "turn": turn, "answer": answer}
        for of, turn, answer in given
    ]
    for seed in range(9):
        lost = []
        kept = even(items, lost, seed)
        counts = Counter(one["answer"] for one in kept)
        assert counts["Yes"] == counts["No"] and len(kept) + len(lost) == 7
        assert whole(kept, []) == kept and {one["step"] for one in lost} <= {"balance", "dialogue"}


def test_every_round_is_checked_once(monkeypatch):
    """Of a model that goes on and on, each round asks whether all before it can be used."""
    calls = Counter()
    found = check.find_round_fault
    monkeypatch.setattr(check, "find_round_fault", lambda item: calls.update([item["question"]]) or found(item))
    rounds = made(*((f"What stands {place} the {thing}?", "a bike") for place in ("behind", "under") for thing in "abcdefgh"))
    assert [fault for _, fault in rounds] == [""] * 16 and max(calls.values()) <= 2
