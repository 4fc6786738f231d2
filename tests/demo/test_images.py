"""Images of the demo: no handwritten digit is in two splits."""

import json

import numpy as np
import pytest
from PIL import Image

from mpo.data import load_questions
from mpo.demo.data import KINDS, Handwriting, assert_disjoint, draw, load_handwriting, make_dataset, split_sources
from mpo.demo.folder import DemoFolder, DemoSettings
from mpo.io import read_json_lines
from mpo.verification import verify

SMALL = DemoSettings(worked_sources=20, question_sources=200, worked_examples=12, questions=30, eval_questions=9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = DemoFolder(tmp_path_factory.mktemp("demo"))
    make_dataset(folder, SMALL)
    return folder


@pytest.mark.parametrize("seed", range(5))
def test_every_source_is_in_exactly_one_split(seed):
    labels = load_handwriting().labels
    splits = split_sources(labels, worked=100, questions=1000, rng=np.random.default_rng(seed))
    assert sorted(np.concatenate(list(splits.values())).tolist()) == list(range(1797))
    assert np.bincount(labels[splits["worked"]]).tolist() == [10] * 10
    assert np.bincount(labels[splits["questions"]]).tolist() == [100] * 10
    assert_disjoint(splits)


def test_a_shared_source_is_found():
    with pytest.raises(AssertionError, match=r"digits \[3\] of split b"):
        assert_disjoint({"a": [1, 3], "b": [2, 3]})


@pytest.mark.parametrize(("worked", "questions"), [(15, 100), (100, 1690)])
def test_sources_must_divide_and_leave_some(worked, questions):
    with pytest.raises(ValueError, match=f"worked={worked}, questions={questions}"):
        split_sources(load_handwriting().labels, worked=worked, questions=questions, rng=np.random.default_rng(0))


def test_written_images_share_no_source_either(folder):
    sources = json.loads(folder.sources.read_text())
    assert set(sources) == {"worked", "questions", "eval"}
    assert_disjoint(sources)


def test_lines_hold_what_the_setting_allows(folder):
    """Worked examples have reasoning, questions only the ground truth, evaluation lines also the digits, to measure reading."""
    worked, questions, eval_questions = (read_json_lines(folder.lines(split)) for split in ("worked", "questions", "eval"))
    assert (len(worked), len(questions), len(eval_questions)) == (12, 30, 9)
    assert set(questions[0]) == {"id", "image", "question", "ground_truth"}
    for line in worked:
        assert line["worked_example"].endswith(f"\nFinal answer: {line['ground_truth']}")
    for line in eval_questions:
        (kind,) = (kind for kind in KINDS.values() if kind.text == line["question"])
        assert line["ground_truth"] == kind.ground_truth(line["digits"])


def test_the_questions_are_ones_for_mpo_evaluate(folder):
    """As a file of questions with answers: of each, the example that leads to the ground truth is right, another one is not."""
    for number, question in enumerate(load_questions(folder.lines("eval"))):
        kind, digits = list(KINDS.values())[number % 3], read_json_lines(folder.lines("eval"))[number]["digits"]
        assert verify(kind.worked_example(digits), question).correct
        assert not verify(kind.worked_example([digit + 1 for digit in digits]), question).correct


def test_images_are_three_tiles_wide(folder):
    line = read_json_lines(folder.lines("questions"))[0]
    with Image.open(folder.data / line["image"]) as image:
        assert (image.size, image.mode) == ((96, 32), "RGB")


def test_the_seed_decides_every_file(folder, tmp_path):
    again = DemoFolder(tmp_path)
    make_dataset(again, SMALL)
    files = sorted(path.relative_to(folder.data) for path in folder.data.rglob("*.*"))
    assert len(files) == 12 + 30 + 9 + 4
    assert all((folder.data / file).read_bytes() == (again.data / file).read_bytes() for file in files)


def test_ink_is_black_on_white_and_digits_stand_in_order():
    blank, full = np.zeros((8, 8)), np.full((8, 8), 16.0)
    handwriting = Handwriting(np.stack([blank, full]), np.array([0, 1]))
    pixels = np.asarray(draw(handwriting, [1, 0], digit_size=8))
    assert pixels.shape == (8, 16, 3)
    assert (pixels[:, :8] == 0).all() and (pixels[:, 8:] == 255).all()
