"""Each heuristic of `mpo data filter` on a text that it must find and on one that it must not."""

import pytest

from mpo.curation.judge import Form
from mpo.data.degenerate import LIMITS, find_degenerate

SENTENCE = "The small cat sits on the old wooden chair."
TABLE = "| name | height | width |\n|---|---|---|\n" + "\n".join(f"| box {row} | {row * 3} | {row * 7} |" for row in range(80))
CODE = "\n".join(f"    assert add({row}, {row}) == {2 * row}" for row in range(12)) + "\n    return total"
POEM = "\n\n".join(f"{verse}\nAnd the green grass grew all around, all around,\nAnd the green grass grew all around." for verse in (
    "There was a tree in the middle of the ground", "And on that tree there was a limb", "And on that limb there was a nest",
))  # fmt: skip
GOOD = [TABLE, CODE, POEM, "\n".join(f"Day {day}: {day * day} km" for day in range(100)), "3.14 " + "-" * 200, "", " \n", "0" * 40]
NAMES = "Anna Ben Carl Dora Emil Fritz Gina Hans Ida Jon Karl Lena".split()
GOOD += ["\n".join(f"In {1990 + x}, the value was {x * 37 % 101} million dollars." for x in range(30))]
GOOD += ["\n".join(f"Step {x}: We add {x * x} to the sum, which is now {x * x * x}." for x in range(1, 16))]
GOOD += ["\n".join(f"- The value of {name} in the chart is {len(name) * 7}%." for name in NAMES)]
GOOD += ["".join(f"<tr><td>{name}</td><td>{x * 17 % 97}</td></tr>\n" for x, name in enumerate(NAMES))]
GOOD += ['{"label": "car", "box": [1, 2]}, '.join(map(str, range(3))), ", ".join(map(str, range(300))), "[0, 0, 0]\n" * 30]
GOOD += ["\n".join(f"{a} x {b} = {a * b}" for a in range(12) for b in range(12)), "1 0 0 0 0\n" * 10]


def rules(text, **limits):
    return [one.rule for one in find_degenerate(text, {**LIMITS, **limits})]


@pytest.mark.parametrize(
    ("rule", "broken", "good"),
    [
        ("line", SENTENCE + "abc, " * 2500, SENTENCE + "abc, " * 10),
        ("zeros", "It is 3." + "0" * 101, "It is 3." + "0" * 100),
        ("zeros", "It is" + " 0," * 101, "It is" + " 0," * 100),
        ("run", "No" + "o" * 64, "No" + "o" * 63),
        ("run", "Wait" + "!" * 257, "Wait" + "!" * 256),
        ("run", "No: " + "ab=1, " * 70, "No: " + "ab=1, " * 30),
        ("run", "好" * 65, "好" * 25),
        ("lines", "\n".join(f"{place}. {SENTENCE}" for place in range(6)), "\n".join(f"{place}. {SENTENCE}" for place in range(3))),
        ("loop", "First I look. " + "Then I look again. " * 10, "First I look. " + "Then I look again. " * 4),
        ("loop", "图中有一只猫。" + "猫在桌子上。" * 9, "图中有一只猫。" + "猫在桌子上。" * 4),
        ("loop", "the " * 40, "the " * 30),
        ("loop", "It was a very " * 40 + " ".join(f"word{x}" for x in "abcdefghijklmnopqrs"), "It was very late. " * 3),
        (
            "ngrams",
            " ".join(f"{'AB'[x % 3 % 2]} is near the wall there. {SENTENCE * (x % 4 == 1)}" for x in range(20)),
            SENTENCE * 3,
        ),
    ],
    ids=range(13),
)
def test_a_broken_text_and_a_near_miss(rule, broken, good):
    assert rule in rules(broken) and not rules(good)
    assert rule not in rules(broken, **{rule: None})


@pytest.mark.parametrize("text", GOOD, ids=range(len(GOOD)))
def test_structure_is_no_loop(text):
    assert rules(text) == []


def test_a_finding_says_where():
    """Characters 6 to 125 are zeros; then a loop of five words."""
    (found,) = find_degenerate("It is " + "0" * 120 + ".")
    assert (found.value, found.threshold, found.start, found.end) == (120, 100, 6, 126)
    text = f"{SENTENCE} Nothing else is new. " + "We go on and on. " * 12
    (found,) = find_degenerate(text)
    assert text[found.start : found.end].startswith("We go on") and text[found.end :] == ". "
    assert found.value == 5 * 11  # words of all but the first round


@pytest.mark.parametrize("limits", [{"zeroes": 3}, {"zeros": 0}, {"lines": 1.5}, {"loop": True}, {"run": "a"}])
def test_limits_are_checked(limits):
    with pytest.raises(ValueError, match=next(iter(limits))):
        Form(limits)
