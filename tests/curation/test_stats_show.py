"""Statistics, and records shown to people."""

import json
import re

import numpy as np
import pytest
from support import TEXTS, make_image

from mpo.curation.show import show_page, show_text
from mpo.curation.stats import compute_stats, stats_figures, stats_page, stats_text
from mpo.data import load_preferences
from mpo.models.small import small_processor


@pytest.fixture(scope="module")
def processor():
    return small_processor(TEXTS, image_size=32, patch_size=8, max_patches=4)


@pytest.fixture
def pairs(tmp_path):
    """Two pairs of one prompt with an image of two tiles and a thumbnail, and a text pair of another source."""
    make_image(0).save(tmp_path / "a.png")
    lines = [
        {"id": "1", "image": "a.png", "question": "What is it?", "chosen": "It is a cat.", "rejected": "A cat it is"},
        {"id": "2", "image": "a.png", "question": "What is it?", "chosen": "It is a cat.", "rejected": "No."},
        {
            "id": "<b>3</b>",
            "source": "s",
            "prompt": "Why <i>not</i>?",
            "chosen": "So be it, then.",
            "rejected": "<script>x</script> y",
        },
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return load_preferences(tmp_path / "pairs.jsonl")


def test_words(pairs):
    """Overlap: "it is a cat" and "a cat it is" have the same four words; "so be it then" and "no": none of five."""
    stats = compute_stats(pairs)
    assert stats.measures["chosen, words"].tolist() == [4, 4, 4] and stats.measures["rejected, words"].tolist() == [4, 1, 2]
    assert stats.gap.tolist() == [0, 3, 2] and stats.unit == "words"
    assert stats.measures["overlap of words"].tolist() == [1, 0, 0]
    assert stats.prompts == 2 and stats.measures["images"].tolist() == [1, 1, 0]
    assert [(name, places.tolist()) for name, places in stats.by_source()] == [("pairs", [0, 1]), ("s", [2])]
    text = stats_text(stats)
    assert text.startswith("3 pairs of 2 prompts (1.5 pairs per prompt), 2 with images (2 images)")
    assert re.search(r"chosen - rejected, words +1\.67 +0 ", text)
    assert re.search(r"\npairs +2 +66\.7% +4 +2\.50 +50% +0\.50", text)


def test_tokens_and_tiles(pairs, processor):
    stats = compute_stats(pairs, processor)
    assert stats.measures["tiles"].tolist() == [3, 3, 0] and stats.unit == "tokens"
    # <|im_end|> counts as a token of the completion.
    assert stats.measures["chosen, tokens"][0] == len(processor.tokenizer("It is a cat.")["input_ids"]) + 1
    assert stats.gap.tolist() == (stats.measures["chosen, tokens"].astype(int) - stats.measures["rejected, tokens"]).tolist()
    assert "tiles" in stats_text(stats)


def test_figures(pairs):
    """Bars of the overlap: two pairs with no shared word, one with all."""
    figures = stats_figures(compute_stats(pairs))
    (axes,) = figures["Words that both completions share"].axes
    assert [bar.get_height() for bar in axes.patches][:: len(axes.patches) - 1] == [2, 1]
    assert all(figure._repr_png_()[:4] == b"\x89PNG" for figure in figures.values()) and len(figures) == 5


def test_the_page_stands_alone(pairs, processor):
    for stats in (compute_stats(pairs), compute_stats(pairs, processor)):
        page = stats_page(stats, "<pairs> & more")
        assert page.count('src="data:image/png;base64,') == 5
        assert "<h1>&lt;pairs&gt; &amp; more</h1>" in page
        assert "http" not in page and "<script" not in page


def test_show_as_the_data_has_it(pairs):
    text = show_text(pairs)
    assert "record '1'" in text and "image 1: 64 x 32, " in text and "a.png" in text
    assert "  prompt\n    <image>What is it?\n  chosen\n    It is a cat.\n  rejected\n    A cat it is" in text


def test_control_characters_are_escaped(tmp_path):
    line = {"id": "1", "source": "a\x1b[2J", "question": "Tab\tand\r\nline", "chosen": "\x9b31mred", "rejected": "\u202edesrever"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(line))
    text = show_text(load_preferences(tmp_path / "pairs.jsonl"))
    assert all(written in text for written in ("a\\u001b[2J", "Tab\tand\\r\n    line", "\\x9b31mred", "\\u202edesrever"))
    assert all(letter.isprintable() or letter in "\t\n" for letter in text)


def test_an_image_that_cannot_be_decoded_is_named_with_its_record(pairs, processor, tmp_path):
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    for shown in (lambda: show_text(pairs), lambda: show_page(pairs, "pairs"), lambda: show_page(pairs, "pairs", processor)):
        with pytest.raises(ValueError, match=r"record '1', image 1: \S*a\.png: this image"):
            shown()


def test_show_as_the_model_sees_it(pairs, processor):
    """Three tiles of 4 tokens; labelled tokens are between angle quotation marks."""
    text = show_text(pairs.select([0]), processor)
    assert "<IMG_CONTEXT> x 12" in text and "\N{LEFT-POINTING DOUBLE ANGLE QUOTATION MARK}It is a cat.<|im_end|>" in text
    assert re.search(r"chosen, \d+ tokens, \d+ labelled", text)


def test_the_page_of_records_is_safe_to_open(pairs, processor):
    for page in (show_page(pairs, "pairs"), show_page(pairs, "pairs", processor)):
        assert page.count('<img title="64 x 32"') == 2
        assert "<script" not in page and "<i>" not in page and "<b>" not in page
        assert "&lt;script&gt;x&lt;/script&gt; y" in page


def test_one_pair_is_enough(pairs):
    stats = compute_stats(pairs.select([2]))
    assert np.isfinite(stats.measures["overlap of words"]).all() and stats_page(stats, "one")
