"""Refusals, unfinished completions, similar texts and images."""

import numpy as np
import pytest
from PIL import Image
from support import make_image

from mpo.curation.examine import refusal, unfinished
from mpo.data.similar import difference_hash, differing_bits, ngrams, normalised, overlap, signature


@pytest.mark.parametrize(
    "completion",
    [
        "I'm sorry, but I can't help with that.",
        "I am sorry, I cannot see the image.",
        "Unfortunately, I don\N{RIGHT SINGLE QUOTATION MARK}t have enough information about it.",
        "As an AI language model, I cannot view images.",
        "I cannot assist with this request.",
        "抱歉,我无法回答这个问题。",
    ],
)
def test_refusals(completion):
    assert refusal(completion)


@pytest.mark.parametrize(
    "completion",
    ["The man says he is sorry.", "A cat.", "It cannot be seen from here.", "Step 1. " * 40 + "As an AI would say, no."],
)
def test_completions_that_do_not_refuse(completion):
    assert refusal(completion) is None


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        (r"The answer is \boxed{\frac{1}{2}", "boxed"),
        ("```python\nprint(1)", "```"),
        ("<think>Let me see. It is 5.", "<think>"),
        ("It is red, green and", "'and'"),
        ("We add two,", "'two,'"),
        ("The chart shows that the sales of the second year grew much faster than", "'than'"),
        ("It is so. The chart shows that the sales of the second year grew much faster", "has no end"),
    ],
)
def test_unfinished_completions(completion, reason):
    assert reason in unfinished(completion)


@pytest.mark.parametrize(
    "completion",
    [
        "A cat.",
        "Cat",
        "5",
        r"So \boxed{\frac{1}{2}}",
        "Two and three make five.\n\nFinal answer: 5",
        "Adding all of these numbers up we finally get the answer: 17",
        "```\nx\n```",
        "<think>Hm.</think>Yes.",
        "- milk\n- bread and butter",
        "答案是五。",
        "Is it?",
        "",
    ],
)
def test_finished_completions(completion):
    assert unfinished(completion) is None


def test_signatures_of_near_texts_share_a_band():
    """A text of 60 different words, with case and punctuation changed and one word dropped, against another text."""
    words = [f"word{chr(97 + i % 26)}{i * 37}" for i in range(60)]
    one, near, other = " ".join(words), ", ".join(words[:-1]).upper() + "!", " ".join(f"other{i * 91}" for i in range(60))
    first, second, third = (signature(normalised(text)).reshape(8, 4) for text in (one, near, other))
    assert (first == second).all(axis=1).any()
    assert not (first == third).all(axis=1).any()
    assert overlap(ngrams(normalised(one)), ngrams(normalised(near))) > 0.95
    assert overlap(ngrams(normalised(one)), ngrams(normalised(other))) < 0.3


def test_ngrams_of_short_texts():
    for text in ("", "a", "abcd", "abcde"):
        assert len(ngrams(text)) == 1
    assert len(ngrams("abcdef")) == 2
    assert overlap(ngrams("a"), ngrams("b")) == 0


def test_difference_hash_finds_copies():
    """A resized and compressed copy differs in at most 3 bits, another image in about half of 64."""
    rng = np.random.default_rng(0)
    one, other = (
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((256, 256), Image.Resampling.BICUBIC)
        for _ in range(2)
    )
    again = one.resize((180, 200)).quantize(64).convert("RGB")
    assert differing_bits(difference_hash(one), difference_hash(again)) <= 3
    assert differing_bits(difference_hash(one), difference_hash(other)) > 12
    assert -(2**63) <= difference_hash(make_image(0)) < 2**63


def test_difference_hash_by_hand():
    """Grey falls from left to right in every row: each pixel is brighter than its right neighbour, 64 ones; mirrored, 64 zeros."""
    falling = Image.fromarray(np.tile(np.linspace(255, 0, 90).astype(np.uint8), (80, 1)))
    assert difference_hash(falling) == -1
    assert difference_hash(falling.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) == 0
