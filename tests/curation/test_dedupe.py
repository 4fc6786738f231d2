"""Exact and near duplicates."""

import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mpo.curation.dedupe import find_duplicates, without
from mpo.data import load_preferences

QUESTION = "Look at the chart and say how many apples the shop sold in the second week of May, please."
CHOSEN = "In the second week of May the bar reaches the line of forty, so the shop sold forty apples in that week."
REJECTED = "In the second week of May the bar is the lowest of all of them, so the shop sold nothing in that week."


def photo(seed):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((200, 200), Image.Resampling.BICUBIC)


@pytest.fixture
def load(tmp_path):
    for name in "ab":
        photo(ord(name)).save(tmp_path / f"{name}.png")
    photo(ord("a")).resize((160, 160)).save(tmp_path / "a.jpg", quality=75)

    def load(*changes):
        lines = [
            json.dumps({"id": str(place), "question": QUESTION, "chosen": CHOSEN, "rejected": REJECTED, "image": "a.png"} | change)
            for place, change in enumerate(changes)
        ]
        (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
        return load_preferences(tmp_path / "pairs.jsonl")

    return load


def found(pairs, **settings):
    return [(one.index, one.same_as) for one in find_duplicates(pairs, **settings)]


def test_exact_duplicates(load):
    pairs = load({}, {"question": "Why?"}, {}, {"image": "b.png"}, {}, {"chosen": "So."})
    assert found(pairs, near=False) == [(2, 0), (4, 0)]
    assert without(pairs, find_duplicates(pairs, near=False))["id"][:] == ["0", "1", "3", "5"]


def test_near_duplicates(load):
    """1: other case and punctuation, image compressed again. 2: another image. 3, 4: one number, one sign differs."""
    pairs = load(
        {},
        {"question": QUESTION.upper() + "!!", "image": "a.jpg"},
        {"image": "b.png"},
        {"chosen": CHOSEN + " 41"},
        {"chosen": CHOSEN + " ="},
    )
    assert found(pairs) == [(1, 0)]
    (one,) = find_duplicates(pairs)
    assert one.reason.startswith("texts that overlap by 100%") and "look the same" in one.reason
    assert found(pairs, near=False) == []


def test_each_text_has_to_be_near(load):
    """The same question and chosen completion with another rejected one is another pair; MMPR has fifteen per question."""
    pairs = load({}, {"rejected": "It sold two hundred apples, as the label above the tall bar says."})
    assert found(pairs) == []


def test_the_threshold(load):
    """Seven of about 90 5-letter sequences change with the last word."""
    pairs = load({}, {"question": QUESTION.replace("please", "thanks")})
    assert found(pairs, threshold=0.95) == []
    assert found(pairs, threshold=0.8) == [(1, 0)]


def test_texts_without_images_and_chains(load):
    """2 is near 1 and equal to 3; all are duplicates of record 0, which is kept."""
    none = {"image": None}
    pairs = load(
        none, none | {"question": QUESTION.lower()}, none | {"question": QUESTION.upper()}, none | {"question": QUESTION.upper()}
    )
    assert found(pairs) == [(1, 0), (2, 0), (3, 0)]
    assert len(without(pairs, find_duplicates(pairs))) == 1


def test_many_pairs_of_one_prompt_stay(load):
    """Forty completions of one prompt with different numbers."""
    pairs = load(*({"chosen": f"{CHOSEN} Final answer: {number}"} for number in range(40)))
    assert found(pairs) == []


def test_drawings_that_differ_in_colour_label_or_bars_are_not_the_same(load, tmp_path):
    """Nine drawings with one general question and equal completions; most of them have the same difference hash."""

    def drawn(name, draw):
        page = Image.new("RGB", (448, 448), "white")
        draw(ImageDraw.Draw(page))
        page.save(tmp_path / name)
        return {"image": name}

    def bars(colour, heights):
        def draw(page):
            for place, height in enumerate(heights):
                page.rectangle((60 + place * 90, 400 - height, 120 + place * 90, 400), fill=colour)

        return draw

    def triangle(label):
        def draw(page):
            page.polygon(((224, 60), (60, 380), (390, 380)), outline="black", width=3)
            page.text((230, 200), label, fill="black", font_size=30)
            page.text((200, 390), "12", fill="black", font_size=30)

        return draw

    square = (150, 150, 300, 300)
    drawings = [
        drawn("red_square.png", lambda page: page.rectangle(square, fill="red")),
        drawn("green_square.png", lambda page: page.rectangle(square, fill="green")),
        drawn("circle.png", lambda page: page.ellipse(square, fill="red")),
        drawn("red_triangle.png", lambda page: page.polygon(((225, 150), (150, 300), (300, 300)), fill="red")),
        drawn("bars.png", bars("blue", (100, 200, 300, 150))),
        drawn("other_bars.png", bars("blue", (110, 190, 310, 160))),
        *(drawn(f"triangle_{label}.png", triangle(label)) for label in ("5", "13", "97")),
    ]
    assert found(load(*drawings)) == []
    (tmp_path / "copy.png").write_bytes((tmp_path / "triangle_13.png").read_bytes())
    assert found(load(*drawings, {"image": "copy.png", "question": f"{QUESTION}!"})) == [(9, 7)]


def test_each_of_several_images_has_to_be_the_same(load):
    pairs = load(
        {"image": ["a.png", "b.png"]},
        {"image": ["a.jpg", "b.png"]},
        {"image": ["b.png", "a.png"]},
        {"image": ["a.png", "a.png"]},
        {"image": ["a.png"]},
    )
    assert found(pairs) == [(1, 0)]


def test_an_image_that_cannot_be_read_is_named_with_its_record(load, tmp_path):
    pairs = load({}, {"id": "second\x1b", "image": "b.png"})
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"record 'second\\x1b', image 1: \S*b\.png: this image"):
        find_duplicates(pairs)
    (tmp_path / "b.png").unlink()
    with pytest.raises(ValueError, match=r"record 'second\\x1b': '\S*b\.png' .*No such file"):
        find_duplicates(pairs, near=False)


def test_refusals(load):
    pairs = load({})
    for settings, message in (({"threshold": 0.3}, "threshold .*got 0.3"), ({"image_bits": 4}, "image_bits .*got 4")):
        with pytest.raises(ValueError, match=message):
            find_duplicates(pairs, **settings)
