"""Frames of tiny, real videos: which are chosen, their places in a prompt, and errors."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from support import make_image, messages

from mpo.batching.collator import PairCollator
from mpo.data import load_preferences
from mpo.data.video import Frame, frame_size, frames_of, index_of, open_frames, with_frames
from mpo.encoding.costs import measure
from mpo.encoding.turns import record_images, render

av = pytest.importorskip("av")
RATE = 10


def write(path, frames: int, *, width=64, height=32, codec="mpeg4", group=12, rate=RATE, pts=None):
    """A video whose frame i is grey of brightness 2 i."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.gop_size = group
        stream.bit_rate = 2_000_000
        for i in range(frames):
            image = np.full((height, width, 3), min(2 * i, 255), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = i if pts is None else pts[i]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """Twelve seconds, 120 frames."""
    return write(tmp_path_factory.mktemp("films") / "film.mp4", 120)


def numbers(frames) -> list[int]:
    return [round(float(np.asarray(frame).mean()) / 2) for frame in frames]


def official_indices(frames: int, count: int) -> list[int]:
    """The middles of `count` intervals, as divided by numpy's linspace."""
    bounds = np.linspace(0, frames, count + 1).astype(int)
    return [int(begin + end - 1) // 2 for begin, end in zip(bounds[:-1], bounds[1:], strict=True)]


@pytest.mark.parametrize(("frames", "count"), [(120, 12), (120, 8), (40, 32), (7, 7), (100, 1), (9, 2)])
def test_which_frames(frames, count):
    assert [index_of(Frame("", place, count), frames) for place in range(count)] == official_indices(frames, count)


def test_how_many(film, tmp_path):
    """One per second, here 12, but from 8 to 32, and never more than the video has."""
    assert len(frames_of(film)) == 12
    assert len(frames_of(film, min_frames=16)) == 16
    assert len(frames_of(film, max_frames=9)) == 9
    assert len(frames_of(write(tmp_path / "short.mp4", 20))) == 8
    assert len(frames_of(write(tmp_path / "tiny.mp4", 3))) == 3
    assert len(frames_of(write(tmp_path / "one.mp4", 1))) == 1
    with pytest.raises(ValueError, match="1 <= min_frames <= max_frames"):
        frames_of(film, min_frames=9, max_frames=8)


@pytest.mark.parametrize("count", [8, 12, 32])
@pytest.mark.parametrize(("name", "codec"), [("mp4", "mpeg4"), ("avi", "mpeg4"), ("mkv", "mpeg4"), ("webm", "libvpx-vp9")])
def test_the_frames_themselves(tmp_path, name, codec, count):
    path = write(tmp_path / f"film.{name}", 120, codec=codec)
    found = open_frames(path, frames_of(path, min_frames=count, max_frames=count))
    assert all(frame.mode == "RGB" and frame.size == (64, 32) for frame in found)
    assert np.abs(np.subtract(numbers(found), official_indices(120, count))).max() <= 1  # brightness is coded lossily


def test_frames_that_lie_far_apart(tmp_path):
    """Two minutes at two frames per second: the decoder seeks from key frame to key frame."""
    path = write(tmp_path / "long.mp4", 120, rate=1, group=20)
    assert np.abs(np.subtract(numbers(open_frames(path, frames_of(path, max_frames=8))), official_indices(120, 8))).max() <= 1


def test_some_frames_alone(film):
    frames = frames_of(film)
    assert numbers(open_frames(film, [frames[2], frames[9]])) == [numbers(open_frames(film, frames))[i] for i in (2, 9)]
    assert frame_size(frames[0]) == (32, 64)


# --- In a record


def record(film, *, videos=1, images=(), content=None) -> dict:
    content = content or [{"type": "video", "text": None}] * videos + [{"type": "text", "text": "What happens?"}]
    return {
        "id": "v",
        "prompt": [{"role": "user", "content": content}],
        "chosen": messages("The sum is 5.", "assistant"),
        "rejected": messages("It is a dog.", "assistant"),
        "videos": [film] * videos,
        "images": list(images),
    }


def test_the_prompt(film, processor):
    """As in the official MPO code: ``Frame1: <image>``, one per line, then the question."""
    lines = "".join(f"Frame{i}: <IMG_CONTEXT>\n" for i in range(1, 13))
    rendered = render(record(film), processor)
    assert f"user\n{lines}What happens?" in rendered.prompt
    assert len(rendered.images) == 12


def test_images_and_videos_keep_their_order(film):
    one, two = make_image(0), make_image(1)
    parts = [{"type": kind, "text": None} for kind in ("image", "video", "image", "video")]
    expanded = with_frames(record(film, videos=2, images=[one, two], content=parts), where="x")
    assert expanded["images"][0] is one and expanded["images"][13] is two and len(expanded["images"]) == 26
    assert expanded["tiles"] == {"min": 1, "max": 1}
    assert with_frames(expanded, where="x") == expanded
    opened = record_images(record(film, videos=2, images=[one, two], content=parts))
    assert all(isinstance(image, Image.Image) for image in opened)
    assert numbers(opened[1:13]) == numbers(opened[14:]) == numbers(open_frames(film, frames_of(film)))


def test_one_tile_a_frame_known_before_anything_is_decoded(film, processor, monkeypatch):
    why = [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}]
    dataset = Dataset.from_list([record(film), {**record(film), "videos": None, "prompt": why}])
    batch = PairCollator(processor, layout="packed")([dataset[0]])
    monkeypatch.setattr("mpo.encoding.turns.open_frames", lambda *args, **kwargs: pytest.fail("decoded"))
    costs = measure(dataset, processor)
    assert costs.tiles.tolist() == [12, 0]
    assert len(batch["pixel_values"]) == 12
    assert batch.tokens <= costs.tokens()[0] <= batch.tokens + 2  # completions with a common prefix share a node


def test_one_video_is_read_once_for_all_its_frames(film, monkeypatch):
    opened = []
    original = av.open
    monkeypatch.setattr(av, "open", lambda *args, **kwargs: opened.append(1) or original(*args, **kwargs))
    record_images(record(film))
    assert len(opened) <= 2  # its header, its frames


# --- Errors


def broken(folder, film) -> dict[str, tuple[str, str]]:
    content = open(film, "rb").read()

    def file(name: str, data: bytes) -> str:
        (folder / name).write_bytes(data)
        return str(folder / name)

    return {
        "missing": (str(folder / "no.mp4"), "no such video file"),
        "folder": (str(folder), "a folder"),
        "URL": ("https://example.org/a.mp4", "is a URL"),
        "empty": (file("empty.mp4", b""), "FFmpeg cannot read this"),
        "half": (file("half.mp4", content[: len(content) // 2]), "FFmpeg cannot read this"),
        "text": (file("text.mp4", b"no video at all" * 50), "FFmpeg cannot read this"),
        "a playlist": (
            file("list.m3u8", b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:9,\n" + film.encode()),
            "FFmpeg cannot read this",
        ),
        "a list of files": (file("a.ffconcat", f"ffconcat version 1.0\nfile {film}\n".encode()), "FFmpeg cannot read this"),
    }


def test_broken_videos(tmp_path, film, processor):
    for name, (path, message) in broken(tmp_path, film).items():
        with pytest.raises(ValueError, match=f"^record 'v': video 1 of 1: .*{message}"):
            render(record(path), processor)
        assert name


def test_a_video_that_ends_too_early(tmp_path):
    """The header at the beginning declares 120 frames, of which the last are missing."""
    path = tmp_path / "whole.mkv"
    write(path, 120)
    content = path.read_bytes()
    (tmp_path / "cut.mkv").write_bytes(content[: int(len(content) * 0.6)])
    cut = str(tmp_path / "cut.mkv")
    with pytest.raises(ValueError, match="cut.mkv: .*(cut short|damaged)"):
        open_frames(cut, frames_of(cut))


@pytest.fixture(scope="module")
def small_films(tmp_path_factory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("fuzz")
    return [Path(write(folder / f"a.{name}", 12, width=32, group=4)).read_bytes() for name in ("mp4", "mkv", "avi")]


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6), st.integers(0, 10**6))
def test_real_files_with_flipped_bits(small_films, which, flips, cut):
    changed = bytearray(small_films[which])
    for place, value in flips:
        changed[place % len(changed)] = value
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        file.write(changed[: cut % (len(changed) + 1)] if cut % 4 == 0 else changed)
        file.flush()
        try:
            assert all(frame.mode == "RGB" for frame in open_frames(file.name, frames_of(file.name)))
        except ValueError as error:
            assert str(error).startswith(file.name)


def test_too_many_pixels(film, monkeypatch):
    monkeypatch.setattr("mpo.data.images.MAX_PIXELS", 100)
    with pytest.raises(ValueError, match="64 x 32 pixels is beyond"):
        open_frames(film, [Frame(film, 0, 1)])


def test_places_and_videos_must_agree(film, processor):
    with pytest.raises(ValueError, match="record 'v': .*1 video parts for 2"):
        render({**record(film), "videos": [film, film]}, processor)
    with pytest.raises(ValueError, match="0 video parts for 1 videos"):
        render({**record(film), "prompt": "What happens?", "chosen": "a", "rejected": "b"}, processor)


def test_without_pyav(film, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ValueError, match=r"pip install mpo-trainer\[video\]"):
        open_frames(film, [Frame(film, 0, 1)])


@pytest.mark.parametrize(
    ("limits", "count"),
    [
        ({"max": 9}, 9),
        ({"min": 40}, 40),  # more than the usual 32
        ({"min": None, "max": 2}, 2),
        ({"min": None, "max": None}, 12),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_source_says_how_many(film, processor, tmp_path, limits, count, streaming):
    """Both loaded and streamed; a second source of images in the same mixture has no frames."""
    path = tmp_path / "films.jsonl"
    path.write_text(json.dumps({"video": Path(film).name, "question": "<video>\nWhat?", "chosen": "Grey.", "rejected": "A cat."}))
    pairs = load_preferences(path, image_root=Path(film).parent, frames=limits, streaming=streaming)
    (row,) = list(pairs)
    assert len(with_frames(row, where="x")["images"]) == count
    if not streaming:
        assert measure(pairs, processor).tiles.tolist() == [count]


def test_limits_that_make_no_sense(tmp_path):
    for limits, message in (({"min": 9, "max": 8}, "got min 9, max 8"), ({"most": 3}, "got 'most'")):
        with pytest.raises(ValueError, match=message):
            load_preferences(tmp_path / "films.jsonl", frames=limits)


@pytest.mark.parametrize(("size", "made"), [((2200, 550), (1920, 480)), ((400, 2000), (384, 1920)), ((1920, 1080), (1920, 1080))])
def test_large_frames_are_made_smaller(tmp_path, size, made):
    """All frames are in memory together, and each is one tile; Full HD is not resized."""
    path = write(tmp_path / "large.mp4", 2, width=size[0], height=size[1])
    opened = open_frames(path, frames_of(path))
    assert [frame.size for frame in opened] == [made] * 2
    with av.open(path) as container:
        whole = [frame.to_image() for frame in container.decode(video=0)]
    assert all((one.tobytes() == other.tobytes()) == (size == made) for one, other in zip(opened, whole, strict=True))
