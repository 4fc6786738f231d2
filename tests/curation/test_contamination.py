"""Training data that contain a benchmark's questions or images, equal and nearly so."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from mpo.curation.dedupe import find_contamination


def noise(seed, quality=None):
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    data = BytesIO()
    image = Image.fromarray(pixels).resize((160, 120), Image.Resampling.BICUBIC)
    image.save(data, **({"format": "PNG"} if quality is None else {"format": "JPEG", "quality": quality}))
    return data.getvalue()


def question(name, text, *images):
    return {"id": name, "messages": [{"role": "user", "content": [{"type": "text", "text": text}]}], "images": list(images)}


def pair(name, text, *images):
    return {"id": name, "prompt": [{"role": "user", "content": text}], "images": [{"bytes": one, "path": None} for one in images]}


LONG = "How many of the red balloons in the left half of the picture are larger than the house that stands behind them?"
QUESTIONS = [
    question("same", "What is it?", noise(1)),
    question("near", LONG, noise(2)),
    question("number", "A train runs 120 km in 2 hours. How fast does it run on average over the whole way?", noise(3)),
    question("new", "Which of these is a bird?", noise(4)),
]


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        (pair("p", "what is it", noise(1)), {"same": {"question", "image", "both"}}),
        (pair("p", "What is it?", noise(9)), {"same": {"question"}}),
        (pair("p", LONG.replace("balloons", "ballons"), noise(2, 90)), {"near": {"question", "image", "both"}}),
        (pair("p", "Anything else?", noise(4, 90), noise(3)), {"new": {"image"}, "number": {"image"}}),
        (pair("p", "A train runs 130 km in 2 hours. How fast does it run on average over the whole way?", noise(9)), {}),
        (pair("p", "", noise(9)), {}),
    ],
)
def test_what_training_has_seen(train, expected):
    found = find_contamination([train], QUESTIONS)
    assert {one["id"]: {*one} - {"id"} for one in found["found"]} == expected
    counts = {"questions": "question", "images": "image", "both": "both"}
    assert {name: found[name] for name in counts} == {
        name: sum(kind in kinds for kinds in expected.values()) for name, kind in counts.items()
    }
    assert found["total"] == 4 and all(value == "p" for one in found["found"] for key, value in one.items() if key != "id")


@pytest.mark.parametrize("size", [(400, 300), (80, 60)])
def test_a_copy_of_another_size_is_found(size):
    data = BytesIO()
    Image.open(BytesIO(noise(2))).resize(size, Image.Resampling.LANCZOS).save(data, "JPEG", quality=60)
    found = find_contamination([pair("p", "Anything else?", data.getvalue())], QUESTIONS)
    assert found["found"] == [{"id": "near", "image": "p"}]
