"""The parts of verification one by one, each with a few inputs and what it says of them."""

import pytest

from mpo.schema import Question
from mpo.verification import final_answer
from mpo.verification.choices import named_inside, same_selection
from mpo.verification.dress import boxed, plain_math, plain_sentence, plain_vectors, undress
from mpo.verification.expressions import equation, latex, refused, same_expression, same_rational
from mpo.verification.extraction import bare, without_contrast, without_denied, without_rejected, without_struck
from mpo.verification.matching import detect_kind, is_expression
from mpo.verification.phrases import opposites, phrase_of, said_phrase, without_asked
from mpo.verification.prose import asked_clause, content_words, of_name, sentences_of, stated_number
from mpo.verification.sequences import (
    count_parts,
    filled,
    in_parts,
    labelled,
    named_values,
    overlap,
    read_boxes,
    read_intervals,
    read_list,
    read_ratio,
)
from mpo.verification.texts import normalize, read_time, read_yes_no, same_date, same_text, same_transcription
from mpo.verification.units import canonical_unit
from mpo.verification.verdicts import restated


def test_without_struck():
    assert without_struck("~~12~~ 13") == " 13"


def test_without_contrast():
    assert (without_contrast("B (not A)"), without_contrast("Not A but B."), without_contrast("It is not B.")) == (
        "B",
        "B.",
        "It is not B.",
    )
    assert without_contrast("Not only A but also B") == "A and B"


def test_without_denied():
    assert (
        without_denied("Not Paris, but Lyon."),
        without_denied("The ratio is 3 to 4, not 4 to 3."),
        without_denied("It is not red."),
    ) == ("Lyon.", "The ratio is 3 to 4.", "It is not red.")


def test_without_rejected():
    assert (
        without_rejected("x = 15 or x = -3 (rejected)"),
        without_rejected("x = 4 or x = -6; reject x = -6 as it is negative."),
    ) == ("x = 15", "x = 4.")


def test_count_parts():
    assert (count_parts("(1) How many apples? (2) How many pears?"), count_parts("Which is right, (1) red or (2) blue?")) == (2, 0)


def test_in_parts():
    assert (in_parts("red; blue, green", 2), in_parts("(1) red, green (2) blue", 2), in_parts("red, blue", 2)) == (
        ["red", "blue, green"],
        ["red, green", "blue"],
        ["red", "blue"],
    )


def test_filled():
    asked = "The area is ____ and the perimeter is ____."
    assert (filled("So the area is 12 and the perimeter is 14.", asked), filled("First blank: 12; second blank: 14.", asked)) == (
        ["12", "14"],
        ["12", "14"],
    )


def test_named_inside():
    assert named_inside("The car is light blue.", ["blue", "light blue"]).indices == frozenset({1})


def test_same_selection():
    assert [same_selection(said, "A, C", ["red", "blue", "green"])[0] for said in ("AC", "green and red", "A", "A or C")] == [
        True,
        True,
        False,
        False,
    ]


def test_same_date():
    assert (
        same_date("on Friday, March 5, 2021", "2021-03-05"),
        same_date("Monday, 2021-03-05", "2021-03-05"),
        same_date("5", "7"),
    ) == (True, False, None)


def test_read_time():
    assert (read_time("3:45 pm"), read_time("15:45"), read_time("quarter to four"), read_time("noon"), read_time("3")) == (
        (15, 45, 0, 3),
        (15, 45, 0, None),
        (3, 45, 0, None),
        (12, 0, 0, 12),
        None,
    )


def test_boxed():
    assert boxed(r"so \boxed{\frac{1}{2}}.") == [(3, 22, "\\frac{1}{2}")]


def test_undress():
    assert (undress("**B.**"), undress(r"$\boxed{\text{12 cm}}$"), undress('"stop"')) == ("B.", "12 cm", "stop")


def test_plain_sentence():
    assert plain_sentence("so $x=5$ for $5 or $6") == "so x=5 for $5 or $6"


def test_plain_math():
    assert (plain_math("2½"), plain_math(r"2\frac{1}{2}"), plain_math("\u22125"), plain_math(r"12\text{ cm}")) == (
        "2 1/2",
        "2 1/2",
        "-5",
        "12 cm",
    )


def test_plain_vectors():
    assert (plain_vectors(r"\vec{a} = \begin{pmatrix} 1 \\ 2 \end{pmatrix}"), plain_vectors(r"\langle 1, 2 \rangle")) == (
        "a = (1, 2)",
        "(1, 2)",
    )


def test_same_expression():
    assert same_expression("x^2-1", "(x-1)(x+1)") == (True, None, None, "mathematically equal")


def test_equation():
    assert (equation("f(x) = 2x + 1"), equation("x^2 + y^2 = 9"), equation("2x")) == (["y", "2x+1"], ["x^2+y^2", "9"], ["2x"])


def test_latex():
    assert (latex("2√3"), latex("sqrt(x) * π"), latex("x²")) == ("2\\sqrt{3}", "\\sqrt{x} \\cdot \\pi", "x^{2}")


def test_refused():
    assert (refused("9^9^9^9"), refused("x^2 + 1"), refused("(x+1)^5000")) == (
        "has a power or factorial too large to compute",
        "",
        "has a power or factorial too large to compute",
    )


def test_bare():
    assert bare("<think>7 or 8?</think> **It is 7.**\n\nI hope this helps!") == "It is 7."


def test_detect_kind():
    assert [detect_kind(truth) for truth in ("12 cm", "yes", "[0, 1)", "red, blue", r"\frac{x}{2}", "C", "a cat")] == [
        "number",
        "yes_no",
        "interval",
        "list",
        "expression",
        "choice",
        "text",
    ]


def test_is_expression():
    assert (is_expression("2x + 1"), is_expression(r"\sqrt{2}"), is_expression("t-shirt"), is_expression("2019-05-01")) == (
        True,
        True,
        False,
        False,
    )


def test_said_phrase():
    assert said_phrase(["It has a logo.", "The brand of the laptop is Lenovo (a ThinkPad)."], "What brand is the laptop?") == (
        "Lenovo",
        "conclusion",
    )
    assert said_phrase(["The plate reads 12.", "Hence the title is *Methods*."], "What is the title?") == ("Methods", "conclusion")


def test_phrase_of():
    assert phrase_of("The man is riding a motorbike on a road.", "What is the man riding?") == "a motorbike"


def test_opposites():
    assert (opposites("closed"), opposites("older")) == ({"open"}, {"younger"})


def test_without_asked():
    assert without_asked("on the left side of the road", "On which side of the road is the bus?") == "left"


def test_sentences_of():
    assert sentences_of("It is 7. I hope this helps!") == ["It is 7."]


def test_stated_number():
    assert (
        stated_number("There are 3 bars with values below 40."),
        stated_number("It is 5 or 6."),
        stated_number("It is red."),
    ) == ("3 bars", "", None)


def test_of_name():
    assert of_name("Ana 5, Mia 3, Zoe 2.", "How many goals did Mia score?") == "3"


def test_asked_clause():
    assert asked_clause("Tom has 12 and Ann has 9.", "How many does Ann have?") == "Ann has 9."
    assert asked_clause("The bus number is 12, and the next one is 15.", "What is the number of the bus?") == "The bus number is 12"


def test_content_words():
    assert content_words("Are these cats black?") == ["cat", "black"]


def test_same_rational():
    assert (same_rational("x^2-1", "(x-1)(x+1)"), same_rational("1/2", "1/3"), same_rational("x", r"\sqrt{x}")) == (
        (True, True),
        (False, False),
        None,
    )


def test_read_list():
    assert (read_list("[2, 9]"), read_list("red, blue and green"), read_list("x = 1 or x = 2")) == (
        (["2", "9"], True),
        (["red", "blue", "green"], False),
        (["1", "2"], False),
    )


def test_read_ratio():
    assert (read_ratio("3 : 4"), read_ratio("The ratio is 2 to 3 to 5."), read_ratio("3/4")) == (["3", "4"], ["2", "3", "5"], None)


def test_labelled():
    assert (labelled("(1) 3, (2) 5"), labelled("b) 5 a) 3"), labelled("1.5, 2.5"), labelled("(3, 4)")) == (
        ["3", "5"],
        ["3", "5"],
        None,
        None,
    )


def test_named_values():
    assert (named_values("x = 2 and y = 3"), named_values("(x, y) = (2, 3)"), named_values("x = 2"), named_values("2, 3")) == (
        [("x", "2"), ("y", "3")],
        [("x", "2"), ("y", "3")],
        None,
        None,
    )


def test_read_intervals():
    assert (read_intervals("[0, 1)"), read_intervals("0 <= x < 1"), read_intervals("x > 3")) == (
        [("[", "0", "1", ")")],
        [("[", "0", "1", ")")],
        [("(", "3", "∞", ")")],
    )


def test_read_boxes():
    assert (read_boxes("<box>[[0, 0, 10, 9]]</box>"), read_boxes("(0,0),(10,10)"), read_boxes("[10, 10, 0]")) == (
        [(0.0, 0.0, 10.0, 9.0)],
        [(0.0, 0.0, 10.0, 10.0)],
        None,
    )


def test_overlap():
    assert overlap((0, 0, 10, 10), (0, 0, 10, 5)) == 0.5


def test_normalize():
    assert (normalize("A black cat."), normalize("Don't!"), normalize("T-shirt"), normalize("-5"), normalize("C++")) == (
        "black cat",
        "dont",
        "t shirt",
        "-5",
        "c++",
    )


def test_same_text():
    assert (same_text("two", "2"), same_text("3,14", "314")[0]) == ((True, "equal"), False)


def test_read_yes_no():
    assert (read_yes_no("Yes, it is."), read_yes_no("否"), read_yes_no("Yes or no"), read_yes_no("nobody")) == (
        True,
        False,
        None,
        None,
    )


def test_same_transcription():
    assert (same_transcription("ITC Limitd", "ITC Limited"), same_transcription("illegal use", "legal use")) == (True, False)


def test_canonical_unit():
    assert (
        canonical_unit("Centimeters"),
        canonical_unit("sq. cm"),
        canonical_unit("km per hour"),
        canonical_unit("red apples"),
    ) == ("cm", "cm^2", "km/h", "red apple")


def test_restated():
    assert (
        restated("Based on the image, the car is not red.", "Is the car red?"),
        restated("The car is blue.", "Is the car red?"),
    ) == (False, None)


@pytest.mark.parametrize("said", ["It is at the bottom.\n\nAnswer: {}", "It says so at the end. The answer is {}. It is in print."])
@pytest.mark.parametrize("name", ["T.F. Riehl", "Mr. W. E. Jones", "J. K. Rowling", "St. Louis", "U.S. Steel", "vitamin C"])
def test_a_name_with_initials_is_a_whole_answer(name, said):
    question = Question([{"role": "user", "content": "Which name does the letter give?"}], ground_truths=[name], kind="text")
    assert final_answer(said.format(name), question).answer == name


def test_sentences_do_not_end_in_abbreviations():
    assert sentences_of("It was on Jan. 5, 1998. See Fig. 3 on p. 7. I like it in the U.S. The end.") == [
        "It was on Jan. 5, 1998.",
        "See Fig. 3 on p. 7.",
        "I like it in the U.S.",
        "The end.",
    ]
