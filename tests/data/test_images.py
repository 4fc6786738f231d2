"""Images are decoded to known pixels, or refused by name. Every image is made here."""

import json
import os
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from datasets import Dataset, Image, List
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from PIL import ImageFile, features
from support import make_image

from mpo.data import images, load_preferences
from mpo.data.encoded import with_encoded_images
from mpo.data.images import image_size, open_image
from mpo.data.paths import inside
from mpo.encoding.turns import record_images

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encoded(image: PILImage.Image, format: str, **options) -> bytes:
    file = BytesIO()
    image.save(file, format=format, **options)
    return file.getvalue()


def halves(mode: str = "RGB", left=RED, right=BLUE, size=(16, 8)) -> PILImage.Image:
    """Two colours, side by side."""
    image = PILImage.new(mode, size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


def colours(content, *places) -> list[tuple[int, int, int]]:
    opened = open_image(content)
    assert opened.mode == "RGB" and type(opened) is PILImage.Image
    return [opened.getpixel(place) for place in places]


def near(found, expected, by: int) -> bool:
    return all(abs(a - b) <= by for one, other in zip(found, expected, strict=True) for a, b in zip(one, other, strict=True))


# --- Decoded to known pixels

LEFT, RIGHT = (2, 4), (13, 4)
LOSSLESS = {
    "PNG": {},
    "GIF": {},
    "BMP": {},
    "DIB": {},
    "TIFF": {},
    "PPM": {},
    "ICO": {"sizes": [(16, 8)]},
    "WEBP": {"lossless": True},
    "JPEG2000": {"irreversible": False},
}


@pytest.mark.parametrize("format", LOSSLESS)
def test_formats(format):
    content = encoded(halves(), format, **LOSSLESS[format])
    assert colours(content, LEFT, RIGHT) == [RED, BLUE]
    assert image_size(content) == (8, 16)


@pytest.mark.parametrize(("format", "options"), [("JPEG", {"quality": 100, "subsampling": 0}), ("AVIF", {"quality": 100})])
def test_lossy_formats(format, options):
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    assert near(colours(encoded(halves(), format, **options), LEFT, RIGHT), [RED, BLUE], by=6)


def test_the_four_kinds_of_source(tmp_path):
    path = tmp_path / "a.png"
    halves().save(path)
    content = path.read_bytes()
    for source in (path, str(path), content, {"bytes": content, "path": None}, {"bytes": None, "path": str(path)}, halves()):
        assert colours(source, LEFT, RIGHT) == [RED, BLUE]
    assert open_image(str(path)).filename == str(path)
    image = halves()
    assert open_image(image) is image


def test_a_wrong_extension(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(halves(), "PNG"))
    assert colours(tmp_path / "a.jpg", LEFT, RIGHT) == [RED, BLUE]


def test_grey_of_8_and_16_bits():
    """A 16-bit value v is shown as v * 255 / 65535, rounded: 65535 is white, 257 k is k, and 32768 is 127.5."""
    values = np.array([[0, 257, 257 * 100, 32768, 65535]], dtype=np.uint16)
    expected = [(value,) * 3 for value in (0, 1, 100, 128, 255)]
    places = [(x, 0) for x in range(5)]
    sixteen = PILImage.fromarray(values)
    for format in ("PNG", "TIFF"):
        assert colours(encoded(sixteen, format), *places) == expected
    assert colours(b"P5 5 1 65535 " + values.astype(">u2").tobytes(), *places) == expected
    assert colours(encoded(PILImage.new("L", (2, 2), 77), "PNG"), (0, 0)) == [(77,) * 3]
    assert colours(encoded(PILImage.new("1", (2, 2), 1), "PNG"), (0, 0)) == [WHITE]


def test_colours_of_16_bits():
    """A PNG made by hand: 2 x 1, of 16 bits a channel."""
    row = b"\0" + struct.pack(">6H", 65535, 0, 257 * 10, 0, 65535, 0)
    content = png(struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0), zlib.compress(row))
    assert colours(content, (0, 0), (1, 0)) == [(255, 0, 10), (0, 255, 0)]


@pytest.mark.parametrize(("kind", "channels"), [(0, 1), (2, 3)], ids=["grey", "colour"])
def test_16_bits_with_a_transparent_colour(kind, channels):
    """Pillow compares the colour with pixels truncated to 8 bits, and shows what should be white."""
    row = b"\0" + struct.pack(f">{channels}H", *[4660] * channels)
    header = struct.pack(">IIBBBBB", 1, 1, 16, kind, 0, 0, 0)
    see_through = chunk(b"tRNS", struct.pack(f">{channels}H", *[4660] * channels))
    content = png(header, zlib.compress(row), before=see_through)
    with pytest.raises(ValueError, match="16 bits .*transparent"):
        open_image(content, where="the image")


def test_transparent_parts_are_white():
    half = (255, 0, 0, 128)  # over white: 255, 127, 127
    image = halves("RGBA", left=half, right=(0, 0, 255, 0))
    for format, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        assert near(colours(encoded(image, format, **options), LEFT, RIGHT), [(255, 127, 127), WHITE], by=1)
    assert near(colours(encoded(halves("LA", left=(0, 128), right=(0, 0)), "PNG"), LEFT, RIGHT), [(127,) * 3, WHITE], by=1)
    assert near(colours(image, LEFT, RIGHT), [(255, 127, 127), WHITE], by=1)


def test_palettes():
    palette = PILImage.new("P", (16, 8), 0)
    palette.putpalette([*RED, *BLUE, *GREEN])
    palette.paste(1, (8, 0, 16, 8))
    for format in ("PNG", "GIF", "BMP", "TIFF"):
        assert colours(encoded(palette, format), LEFT, RIGHT) == [RED, BLUE]
    for format in ("PNG", "GIF"):
        assert colours(encoded(palette, format, transparency=1), LEFT, RIGHT) == [RED, WHITE]
    assert near(colours(encoded(palette, "PNG", transparency=b"\x80\xff"), LEFT, RIGHT), [(255, 127, 127), BLUE], by=1)


def test_a_transparent_colour():
    assert colours(encoded(halves(), "PNG", transparency=BLUE), LEFT, RIGHT) == [RED, WHITE]


def test_cmyk_with_adobes_inversion_and_without():
    """Ink of (0, 255, 255, 0) is red. Adobe's files have a marker, and hold 255 minus the ink."""
    ink = halves("CMYK", left=(0, 255, 255, 0), right=(255, 255, 0, 0))
    adobe = encoded(ink, "JPEG", quality=100)
    assert b"Adobe" in adobe
    assert near(colours(adobe, LEFT, RIGHT), [RED, BLUE], by=4)
    inverted = PILImage.merge("CMYK", [channel.point(lambda value: 255 - value) for channel in ink.split()])
    plain = without_app14(encoded(inverted, "JPEG", quality=100))
    assert b"Adobe" not in plain
    assert near(colours(plain, LEFT, RIGHT), [RED, BLUE], by=4)
    assert near(colours(encoded(ink, "TIFF"), LEFT, RIGHT), [RED, BLUE], by=1)


def without_app14(jpeg: bytes) -> bytes:
    place = jpeg.index(b"\xff\xee")
    return jpeg[:place] + jpeg[place + 2 + int.from_bytes(jpeg[place + 2 : place + 4], "big") :]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_upright(format, orientation):
    """A corner that is red when upright: where it is stored, and by which of EXIF's eight turns, does not matter."""
    upright = PILImage.new("RGB", (24, 16), "blue")
    upright.paste(RED, (0, 0, 8, 8))
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL's Transpose that undoes it
    stored = upright if orientation == 1 else upright.transpose(PILImage.Transpose(back[orientation]))
    exif = PILImage.Exif()
    exif[images.ORIENTATION] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    content = encoded(stored, format, exif=exif, **options)
    assert near(colours(content, (3, 3), (20, 3), (3, 13)), [RED, BLUE, BLUE], by=6)
    opened = open_image(content)
    assert (opened.height, opened.width) == image_size(content) == (16, 24)
    assert open_image(opened).tobytes() == opened.tobytes()  # turned once
    with PILImage.open(BytesIO(content)) as lazy:
        assert open_image(lazy).size == (24, 16)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_many(format):
    frames = [PILImage.new("RGB", (16, 8), colour) for colour in (RED, GREEN, BLUE)]
    content = encoded(frames[0], format, save_all=True, append_images=frames[1:], **LOSSLESS[format])
    assert colours(content, LEFT) == [RED]


def test_broken_exif_says_nothing():
    content = encoded(halves(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + bytes(range(40)), quality=100, subsampling=0)
    assert near(colours(content, LEFT, RIGHT), [RED, BLUE], by=6)


# --- Refused by name: the malformed corpus


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(header: bytes, data: bytes, before: bytes = b"") -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def bomb(width: int, height: int) -> bytes:
    return png(struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), zlib.compress(b"\0" * 1000))


def flipped(content: bytes, place: int) -> bytes:
    place %= len(content)
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


def malformed() -> dict[str, tuple[bytes, str]]:
    """Map a name to a file and a part of its error message."""
    big = make_image(0, 64, 48)
    whole = {
        "JPEG": encoded(big, "JPEG"),
        "progressive JPEG": encoded(big, "JPEG", progressive=True),
        "PNG": encoded(big, "PNG"),
        "GIF": encoded(big, "GIF"),
        "WebP": encoded(big, "WEBP"),
        "BMP": encoded(big, "BMP"),
        "TIFF": encoded(big, "TIFF"),
        "deflated TIFF": encoded(big, "TIFF", compression="tiff_deflate"),
        "PPM": encoded(big, "PPM"),
        "JPEG 2000": encoded(big, "JPEG2000"),
    }
    cut = "cut short or damaged|not an image|PDF"
    corpus = {"nothing": (b"", "is empty"), "zeros": (bytes(1000), "not an image"), "one byte": (b"\xff", "not an image")}
    for name, content in whole.items():
        for share in (0.02, 0.3, 0.9):
            corpus[f"{name}, {share:.0%} of it"] = (content[: int(len(content) * share)], cut)
        corpus[f"{name} with another magic number"] = (b"XX" + content[2:], cut)
    header = struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0)
    corpus |= {
        "PNG of 30000 x 30000": (bomb(30_000, 30_000), "beyond|bomb"),
        "PNG of 2000000 x 100": (bomb(2_000_000, 100), "2,000,000 x 100 pixels is beyond|decompression bomb"),
        "PNG of 0 x 5": (bomb(0, 5), "has none|cut short|not an image"),
        "PNG of 5 x 0": (bomb(5, 0), "has none|cut short|not an image"),
        "PNG with too little data": (png(header, zlib.compress(bytes(10))), "cut short or damaged"),
        "PNG whose data are not compressed": (png(header, b"no zlib stream"), "cut short or damaged"),
        "PNG of 7 bits": (png(struct.pack(">IIBBBBB", 4, 4, 7, 2, 0, 0, 0), b""), "cut short|not an image"),
        "PNG that is a header": (whole["PNG"][:33], "not an image"),
        "PNG with a huge text": (
            b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**7))),
            "cut short or damaged|not an image",
        ),
        "BMP of 0 x 0": (whole["BMP"][:18] + bytes(8) + whole["BMP"][26:], "has none|cut short|not an image"),
        "BMP of 60000 x 60000": (whole["BMP"][:18] + struct.pack("<ii", 60_000, 60_000) + whole["BMP"][26:], "beyond|bomb"),
        "GIF of 65535 x 65535": (whole["GIF"][:6] + b"\xff" * 4 + whole["GIF"][10:], "beyond|bomb"),
        "PPM of 0 x 0": (b"P6 0 0 255 ", "has none|cut short|not an image"),
        "PPM of 99999 x 99999": (b"P6 99999 99999 255 ", "beyond|bomb"),
        "TIFF of 32-bit integers": (encoded(PILImage.new("I", (4, 4), 7), "TIFF"), "32-bit integers"),
        "TIFF of floats": (encoded(PILImage.new("F", (4, 4), 0.5), "TIFF"), "floating-point"),
        "SVG": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG drawing"),
        "SVG without a head": (b'<svg width="3"/>', "SVG drawing"),
        "HTML": (b"<!DOCTYPE html><html>404</html>", "HTML page"),
        "HTML in small letters": (b"\n <html><body>no</body></html>", "HTML page"),
        "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n", "Git LFS pointer"),
        "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        "PDF": (b"%PDF-1.7\n", "PDF file"),
        "EPS, which would start a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        "JSON": (b'{"image": "a.png"}', "not an image"),
        "a JPEG of two markers": (b"\xff\xd8\xff\xd9", "cut short|not an image"),
        "a RIFF that is no WebP": (b"RIFF\x24\0\0\0WAVEfmt ", "not an image|cut short"),
        "WebP of a header": (whole["WebP"][:30], "cut short|not an image"),
        "text": ("Bild".encode("utf-16"), "not an image"),
    }
    return corpus


CORPUS = malformed()


def test_the_corpus_is_large():
    assert len(CORPUS) >= 60


@pytest.mark.parametrize("case", CORPUS, ids=lambda case: f"{case}: {CORPUS[case][1]}")
def test_malformed(case):
    content, message = CORPUS[case]
    with pytest.raises(ValueError, match=f"(?i)^record 'a': image 1 of 1: .*({message})"):
        record_images({"id": "a", "images": [{"bytes": content, "path": None}]})


def test_lenient_settings_of_others_change_nothing(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    content = CORPUS["JPEG, 30% of it"][0]
    with pytest.raises(ValueError, match="cut short"):
        open_image(content)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_the_limit_is_ours_to_move(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    with pytest.raises(ValueError, match=r"the image: .*16 x 8 pixels .*100.*MAX_PIXELS"):
        open_image(encoded(halves(), "PNG"))
    with pytest.raises(ValueError, match="limit of 100"):
        open_image(halves())


@pytest.mark.parametrize("source", [None, 3, {}, {"bytes": None, "path": None}, [1], PILImage], ids=str)
def test_what_is_no_image(source):
    with pytest.raises(ValueError, match="image is a path"):
        open_image(source)


def test_sizes_without_pixels():
    with pytest.raises(ValueError, match="0 x 5 pixels is empty"):
        open_image(PILImage.new("RGB", (0, 5)))


def special_files(folder) -> dict[str, tuple[str, str]]:
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    return {
        "pipe": (str(folder / "pipe"), "a pipe"),
        "folder": (str(folder / "folder"), "a folder"),
        "device": ("/dev/zero", "a device"),
        "missing": (str(folder / "no.png"), "no such image"),
        "URL": ("https://example.org/a.png", "is a URL"),
        "zero byte": ("a\0b", "no such image"),
        "long": ("a" * 5000, "no such image"),
    }


def test_files_that_are_none(tmp_path):
    for path, message in special_files(tmp_path).values():
        with pytest.raises(ValueError, match=message):
            open_image(path)
        with pytest.raises(ValueError, match=message):
            image_size({"path": path, "bytes": None})


# --- Fuzzed

WHOLE = [
    encoded(make_image(1, 40, 30), format, **options)
    for format, options in (("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("GIF", {}), ("TIFF", {}))
]
FUZZ = settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])


def opened_or_refused(content: bytes) -> None:
    """And a size that is read without Pillow is the one that Pillow reads."""
    if (plain := images._plain_size(content)) is not None:
        with images._header(content, "") as (opened, _):
            assert plain == images._upright_size(opened)
    try:
        opened = open_image(content)
    except ValueError as error:
        assert str(error).startswith("the image: ")
    else:
        assert opened.mode == "RGB" and opened.width * opened.height <= images.MAX_PIXELS


@pytest.mark.parametrize("format", ["JPEG", "progressive", "PNG", "WebP", "GIF"])
def test_sizes_of_plain_files(format):
    """Pillow opens the others; and with EXIF, XMP, a second image, a second header, or a cut before the pixels, these as well."""
    content = WHOLE[("JPEG", "progressive", "PNG", "WebP", "GIF").index(format)]
    assert images._plain_size(content) == (None if format in ("WebP", "GIF") else (30, 40))
    begin, before = (33, chunk(b"IHDR", content[16:29])) if format == "PNG" else (2, b"\xff\xe1\0\x08Exif\0\0")
    assert images._plain_size(content[:begin] + before + content[begin:]) is images._plain_size(content[:40]) is None


@FUZZ
@given(
    st.binary(max_size=400),
    st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF", b"BM", b"II*\0", b"P6 "]),
)
def test_random_bytes(content, magic):
    opened_or_refused(magic + content)


@FUZZ
@given(st.sampled_from(WHOLE), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=8), st.integers(0, 10**6))
def test_real_files_with_flipped_bits(content, flips, cut):
    changed = bytearray(content)
    for place, value in flips:
        changed[place % len(changed)] = value
    opened_or_refused(bytes(changed[: cut % (len(changed) + 1)] if cut % 3 == 0 else changed))


# --- Inside their folder


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    (folder / "deep").mkdir(parents=True)
    for path in (folder / "a.png", folder / "deep" / "b.png", tmp_path / "outside.png"):
        halves().save(path)
    (folder / "out.png").symlink_to(tmp_path / "outside.png")
    (folder / "out").symlink_to(tmp_path)
    (folder / "within.png").symlink_to("deep/b.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "nowhere.png").symlink_to("no.png")
    (folder / "null").symlink_to("/dev/null")
    os.mkfifo(folder / "pipe")
    (tmp_path / "root-too").mkdir()
    halves().save(tmp_path / "root-too" / "a.png")
    return folder


@pytest.mark.parametrize(
    ("path", "real"),
    [
        ("a.png", "a.png"),
        ("deep/b.png", "deep/b.png"),
        ("deep/../a.png", "a.png"),
        ("./deep//b.png", "deep/b.png"),
        ("within.png", "deep/b.png"),
        ("{root}/a.png", "a.png"),
        ("out/root/a.png", "a.png"),
    ],
)
def test_paths_inside(root, path, real):
    assert inside(root, path.format(root=root)) == str(root / real)


OUTSIDE = {
    "../outside.png": "lies outside",
    "../root-too/a.png": "lies outside",
    "deep/../../outside.png": "lies outside",
    "{root}/../outside.png": "lies outside",
    "/etc/passwd": "lies outside",
    "out.png": "lies outside",
    "out/outside.png": "lies outside",
    "null": "lies outside",
    "/dev/zero": "lies outside",
    "loop.png": "cannot be reached",
    "nowhere.png": "there is no image",
    "no.png": "there is no image",
    "a.png/b.png": "cannot be reached",
    "deep": "a folder",
    ".": "a folder",
    "": "is not a path",
    "a\0.png": "is not a path",
    "pipe": "a pipe",
    "https://example.org/a.png": "is a URL",
    "file:///etc/passwd": "is a URL",
    "s3://bucket/a.png": "is a URL",
    "data:image/png;base64,AAAA": "is a URL",
}


@pytest.mark.parametrize("path", OUTSIDE)
def test_paths_outside(root, path):
    with pytest.raises(ValueError, match=OUTSIDE[path]):
        inside(root, path.format(root=root))
    with pytest.raises(ValueError, match=f"^pairs.jsonl:3: the image .*{OUTSIDE[path]}"):
        inside(root, path.format(root=root), where="pairs.jsonl:3")


@pytest.mark.parametrize("path", [None, 3, ["a.png"], b"a.png", {"path": "a.png"}], ids=str)
def test_paths_that_are_not_text(root, path):
    with pytest.raises(ValueError, match="is not a path"):
        inside(root, path)


@given(st.text(max_size=30))
def test_any_path(path):
    """Only files of the folder are returned."""
    folder = os.path.dirname(__file__)
    try:
        found = inside(folder, path)
    except ValueError:
        return
    assert os.path.isfile(found) and found.startswith(os.path.realpath(folder) + os.sep)


# --- Columns that stay encoded


def test_columns_stay_encoded(tmp_path):
    halves().save(tmp_path / "a.png")
    rows = [{"id": "a", "images": [str(tmp_path / "a.png")], "image": None}, {"id": "b", "images": [], "image": None}]
    decoded = Dataset.from_list(rows).cast_column("images", List(Image()))
    dataset = with_encoded_images(decoded)
    expected = [{"bytes": None, "path": str(tmp_path / "a.png")}]
    assert dataset[0]["images"] == expected and dataset.select([1, 0])[1]["images"] == expected
    assert isinstance(decoded[0]["images"][0], PILImage.Image)  # the other is as it was
    assert dataset._fingerprint != decoded._fingerprint
    assert dataset._fingerprint == with_encoded_images(decoded)._fingerprint
    assert dataset.data.table.column("images").chunk(0).equals(decoded.data.table.column("images").chunk(0))
    stream = with_encoded_images(decoded.to_iterable_dataset())
    assert next(iter(stream))["images"] == expected
    single = Dataset.from_dict({"image": [halves()]}, features=None).cast_column("image", Image())
    assert set(with_encoded_images(single)[0]["image"]) == {"bytes", "path"}


def test_what_a_transform_of_the_users_reads_is_decoded(tmp_path):
    halves().save(tmp_path / "a.png")
    dataset = Dataset.from_list([{"images": [str(tmp_path / "a.png")]}]).cast_column("images", List(Image()))
    dataset = dataset.with_transform(lambda rows: {"images": [[image.size for image in row] for row in rows["images"]]})
    assert with_encoded_images(dataset)[0]["images"] == [(16, 8)]


def test_an_image_that_became_a_link_is_not_followed(tmp_path):
    """The file or its folder becomes a link after the data was read; a user's own record may have links."""
    for folder in ("data/sub", "private"):
        (tmp_path / folder).mkdir(parents=True)
        make_image(1).save(tmp_path / folder / "a.png")
    line = {"image": "sub/a.png", "question": "What is it?", "chosen": "A cat.", "rejected": "A dog."}
    (tmp_path / "data" / "pairs.jsonl").write_text(json.dumps(line))
    record = with_encoded_images(load_preferences(tmp_path / "data" / "pairs.jsonl"))[0]
    assert len(record_images(record)) == 1
    inner = tmp_path / "data" / "sub"
    (inner / "a.png").unlink()
    (inner / "a.png").symlink_to(tmp_path / "private" / "a.png")
    with pytest.raises(ValueError, match="a.png .*link.*private"):
        record_images(record)
    assert len(record_images({"prompt": "?", "images": record["images"]})) == 1
    (inner / "a.png").unlink()
    inner.rmdir()
    inner.symlink_to(tmp_path / "private")
    with pytest.raises(ValueError, match="a.png .*link.*private"):
        record_images(record)
