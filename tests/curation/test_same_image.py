"""Copies of a photograph are found; drawings with another label, colour or bar are not taken for copies.

How the limits were chosen. Copies: 20 images (of scikit-image, scikit-learn and matplotlib: photographs, scans, pages of text)
as JPEG of quality 75, 85 and 95, as WebP of quality 80, and at 0.8, 0.9 and 0.97 of their size by Lanczos, bicubic and bilinear
filters, with and without JPEG after it: 380. Changed: 420 drawings of 224 to 2,400 pixels with one different digit or letter of
8 to 16 pixels, bar height (by 1 to 5 pixels) or colour; and 120 photographs with a different label.

                                                                       copies: median, max    changed drawings: min
    largest block difference over the usual difference (`ISOLATED`)                1.1   2.2    3.7, or SHIFT is exceeded
    difference in brightness or colour of most blocks (`SHIFT`)                    0.5   1.9    2.5, or ISOLATED is exceeded

All copies are found. No changed drawing or photograph is taken for a copy; if both are JPEG of quality 75, one is (bars of red 255
and 235). Copies of drawings are often missed, and so are sharp photographs made smaller by a box filter (14 of 60): a remaining
duplicate does less harm than a lost pair.
"""

from io import BytesIO

import numpy as np
import pytest
from matplotlib.cbook import get_sample_data
from PIL import Image, ImageDraw

from mpo.data.similar import _block_means, _same_shape, glimpse, may_be_same, same_image

FILTERS = {"lanczos": Image.Resampling.LANCZOS, "bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@pytest.fixture(scope="module")
def photo():
    """A portrait, 512 x 600 pixels."""
    with Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)) as opened:
        return opened.convert("RGB")


def compressed(image, quality, form="JPEG"):
    file = BytesIO()
    image.save(file, form, quality=quality)
    return Image.open(BytesIO(file.getvalue())).convert("RGB")


def smaller(image, scale, filter="bicubic"):
    return image.resize((round(image.width * scale), round(image.height * scale)), FILTERS[filter])


def drawing(label="13", bar=120, colour="blue", pixels=10):
    page = Image.new("RGB", (448, 336), "white")
    pen = ImageDraw.Draw(page)
    for place, height in enumerate((100, bar, 150)):
        pen.rectangle((60 + place * 90, 300 - height, 120 + place * 90, 300), fill=colour if place == 1 else "blue")
    pen.text((200, 40), label, fill="black", font_size=pixels)
    pen.line((30, 300, 400, 300), fill="black", width=2)
    return page


def seen_the_same(one, other):
    """Compare the pixels; the glimpses of copies must not differ."""
    same = same_image(one, other)
    assert same == same_image(other, one)
    assert may_be_same(glimpse(one), glimpse(other)) or not same
    return same


@pytest.mark.parametrize("quality", [75, 85, 95])
def test_compressed_again(photo, quality):
    assert seen_the_same(photo, compressed(photo, quality))
    assert seen_the_same(photo, compressed(photo, quality, "WEBP"))


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("scale", [0.8, 0.9, 0.97, 1.0])
def test_made_smaller(photo, scale, filter):
    assert seen_the_same(photo, smaller(photo, scale, filter))
    assert seen_the_same(photo, compressed(smaller(photo, scale, filter), 80))


@pytest.mark.parametrize(
    "other", [{"label": "18"}, {"label": "12"}, {"bar": 122}, {"bar": 119}, {"colour": "navy"}, {"colour": "mediumblue"}], ids=str
)
def test_changed_drawings(other):
    """A digit of 10 pixels, a bar by 1 or 2 pixels, a shade: unchanged, both as JPEG, and one of them as a copy."""
    one, changed = drawing(), drawing(**other)
    assert seen_the_same(one, drawing())
    assert not seen_the_same(one, changed)
    assert not seen_the_same(compressed(one, 75), compressed(changed, 75))
    assert not seen_the_same(one, compressed(changed, 90))
    assert not seen_the_same(one, smaller(changed, 0.9))


def test_everything_changed():
    """A slightly brighter image, another colour, and another noise: no block stands out, but each is another image."""
    noise = np.random.default_rng(0).integers(0, 200, (2, 96, 96, 3), dtype=np.uint8)
    one, other = map(Image.fromarray, noise)
    brighter, redder = Image.fromarray(noise[0] + np.uint8(4)), Image.fromarray(noise[0] + np.array([6, 0, 0], dtype=np.uint8))
    assert not any(seen_the_same(one, changed) for changed in (other, brighter, redder))


def test_another_label_on_a_photograph(photo):
    labelled = []
    for label in "38":
        copy = photo.copy()
        ImageDraw.Draw(copy).text((200, 240), label, fill="yellow", font_size=12)
        labelled.append(copy)
    assert not seen_the_same(*labelled)
    assert not seen_the_same(labelled[0], compressed(labelled[1], 85))


def test_shapes():
    """333 x 250 is 0.75 of 444 x 333.3; a third of the size is too small, and a cropped image is another one."""
    assert _same_shape((444, 333), (333, 250)) and _same_shape((333, 250), (444, 333))
    assert not _same_shape((444, 333), (148, 111))
    assert not _same_shape((444, 333), (444, 330)) and not _same_shape((400, 300), (300, 400))
    assert _same_shape((1, 1), (1, 1))


def test_block_means_by_hand():
    """9 x 8 pixels: a block of ones, and a block that is padded with the last row, of threes."""
    values = np.ones((9, 8), dtype=np.float32)
    values[8] = 3
    assert _block_means(values).tolist() == [[1.0], [3.0]]
