"""Text questions with checkable answers, drawn by a program: arithmetic word problems, dates, units."""

from __future__ import annotations

import random
import re
from typing import NamedTuple

NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kenji", "Lena")
THINGS = ("apples", "books", "pencils", "stamps", "marbles", "cookies", "shells", "coins", "cards", "stickers")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
TEST_TEMPLATES = 3
"""The last templates of each kind are in the test alone."""

RANGES = {"few": (2, 12), "some": (3, 30), "many": (10, 90), "days": (1, 9)}
"""Smallest and largest a and b, where a > b; c is 2 to 9, and d is a day of the week."""

KINDS = {
    "arithmetic": (
        ("{n} has {a} {t} and buys {b} more. How many {t} does {n} have now?", "many", "{a} + {b}"),
        ("{n} has {a} {t} and gives {b} of them away. How many {t} are left?", "many", "{a} - {b}"),
        ("There are {a} {t} in each box, and {n} has {c} boxes. How many {t} are there?", "some", "{a} * {c}"),
        ("{n} had {a} {t}, lost {b} and then found {c}. How many {t} does {n} have?", "many", "{a} - {b} + {c}"),
        ("{n} buys {c} packs of {b} {t} and has {a} {t} already. How many is that in all?", "some", "{b} * {c} + {a}"),
        ("A shelf holds {a} {t}. {n} adds {b} and later {c} more. How many {t} are on it?", "many", "{a} + {b} + {c}"),
        ("{n} reads {b} pages a day. How many pages does {n} read in {c} days?", "some", "{b} * {c}"),
        ("A ticket costs {b} dollars. {n} pays for {c} tickets. How many dollars is that?", "some", "{b} * {c}"),
        ("{n} is {a} years old, and {n}'s sister is {c} years younger. How old is she?", "many", "{a} - {c}"),
        ("On one day {n} counts {a} {t}, on the next {b}. How many is that together?", "many", "{a} + {b}"),
        ("{n} collects {a} {t} and sells {b}. How many {t} remain?", "many", "{a} - {b}"),
        ("Each of {c} children gets {b} {t} from {n}. How many {t} does {n} hand out?", "some", "{b} * {c}"),
        ("{n} starts with {a} {t}, gets {b} from a friend and loses {c}. How many has {n}?", "many", "{a} + {b} - {c}"),
    ),
    "date": (
        ("Today is {d}. What day of the week is it in {a} days?", "days", "{d} + {a} days"),
        ("Today is {d}. What day of the week was it {a} days ago?", "days", "{d} - {a} days"),
        ("{n} leaves on a {d} and comes back {a} days later. On which day of the week?", "days", "{d} + {a} days"),
        ("{n} must send invitations {a} days before a party on {d}. On which day of the week?", "days", "{d} - {a} days"),
        ("How many days are there in {a} weeks?", "some", "{a} * 7"),
        ("How many months are there in {a} years?", "some", "{a} * 12"),
        ("A course lasts {a} weeks and {b} days. How many days is that?", "few", "{a} * 7 + {b}"),
        ("{n} was born in 19{a} and a sister {c} years before. In which year was she born?", "many", "19{a} - {c}"),
        ("A parcel is sent on a {d} and takes {a} days. On which day of the week does it arrive?", "days", "{d} + {a} days"),
        ("{n} wakes up on a {d}. Which day of the week was it {a} days earlier?", "days", "{d} - {a} days"),
        ("{n} is away for {a} weeks and {b} days. How many days is {n} away?", "few", "{a} * 7 + {b}"),
    ),
    "unit": (
        ("How many centimetres are {a} metres?", "many", "{a} * 100"),
        ("How many minutes are {a} hours?", "few", "{a} * 60"),
        ("How many grams are {a} kilograms?", "many", "{a} * 1000"),
        ("How many seconds are {a} minutes?", "few", "{a} * 60"),
        ("A rope is {a} metres long. How many centimetres is that?", "some", "{a} * 100"),
        ("{n} runs {a} kilometres. How many metres is that?", "some", "{a} * 1000"),
        ("A film lasts {c} hours and {a} minutes. How many minutes is that?", "some", "{c} * 60 + {a}"),
        ("{n} buys {a} metres and {b} centimetres of rope. How many centimetres is that?", "some", "{a} * 100 + {b}"),
        ("How many grams are {a} kilograms and {b} grams?", "some", "{a} * 1000 + {b}"),
        ("{n} lifts {a} kilograms. How many grams is that?", "many", "{a} * 1000"),
        ("A ribbon is {a} metres and {b} centimetres long. How many centimetres is that?", "some", "{a} * 100 + {b}"),
        ("A flight takes {c} hours and {a} minutes. How many minutes does it take?", "some", "{c} * 60 + {a}"),
    ),
}
"""By kind: templates of a question, the range of its numbers, and what is to be computed."""


class Problem(NamedTuple):
    """A question, its answer, a worked example, its kind and the number of its template."""

    question: str
    answer: str
    worked: str
    kind: str
    template: int


def answer_of(work: str) -> str:
    """Compute: sums and products, or a day of the week some days before or after another one.

    >>> answer_of("3 * 7 + 2"), answer_of("Monday - 2 days")
    ('23', 'Saturday')
    """
    if work.endswith("days"):
        day, sign, count, _ = work.split()
        return DAYS[(DAYS.index(day) + (1 if sign == "+" else -1) * int(count)) % 7]
    total = 0
    for sign, product in re.findall(r"([+-]?) ?(\d+(?: \* \d+)?)", work):
        factors = [int(factor) for factor in product.split(" * ")]
        total += (-1 if sign == "-" else 1) * factors[0] * (factors[1] if factors[1:] else 1)
    return str(total)


def draw_problems(count: int, seed: int, *, test: bool) -> list[Problem]:
    """Draw distinct problems, in turn of each kind.

    Args:
        count: number of problems.
        seed: random seed.
        test: whether of the templates of the test, which no other problem has.
    """
    rng, found = random.Random(f"{seed}/{test}"), dict[str, Problem]()
    for number in range(50 * count):
        kind = list(KINDS)[number % len(KINDS)]
        known = len(KINDS[kind]) - TEST_TEMPLATES
        place = rng.randrange(known, len(KINDS[kind])) if test else rng.randrange(known)
        text, size, work = KINDS[kind][place]
        b, a = sorted(rng.sample(range(RANGES[size][0], RANGES[size][1] + 1), 2))
        values = {"a": a, "b": b, "c": rng.randint(2, 9), "d": rng.choice(DAYS), "n": rng.choice(NAMES), "t": rng.choice(THINGS)}
        question, work = text.format(**values), work.format(**values)
        answer = answer_of(work)
        found[question] = Problem(question, answer, f"{work} = {answer}. The answer is {answer}.", kind, place)
        if len(found) == count:
            return list(found.values())
    raise ValueError(f"There are not {count} different problems; found {len(found)}. Draw fewer.")


def is_right(response: str, answer: str) -> bool:
    """Whether the last number or day of the week of a response is the answer.

    >>> is_right("5 + 7 = 12. The answer is 12.", "12"), is_right("It is Monday, not Sunday.", "Monday")
    (True, False)
    """
    found = re.findall("|".join(DAYS) + r"|\d+(?:,\d{3})*", response)
    return bool(found) and found[-1].replace(",", "") == answer
