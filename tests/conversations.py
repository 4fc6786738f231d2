"""Conversations for the tests: of several turns, with images anywhere, several, or none."""

from datasets import Dataset
from support import make_image


def turn(role, *parts, **more):
    """A message; None among its parts is an image."""
    return {
        "role": role,
        "content": [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts],
        **more,
    }


def conversation(number: int, images: int = 0, later: int = 0, turns: int = 1) -> dict:
    """`images` images in the first turn, `later` in each of the others."""
    said = "It is" + " very" * (number % 4)
    messages = [turn("user", *[None] * images, f"What is {number}?"), turn("assistant", f"{said} {number}.")]
    for index in range(1, turns):
        messages += [turn("user", "And", *[None] * later, f" {number + index}?"), turn("assistant", f"{said} {index}, I think.")]
    count = images + later * (turns - 1)
    pixels = [make_image(10 * number + place, width=32 + 32 * (place % 2)) for place in range(count)]
    return {"id": f"conversation-{number}", "messages": messages, "images": pixels}


KINDS = {
    "text": {},
    "one image": {"images": 1},
    "several turns": {"turns": 3},
    "images in later turns": {"images": 1, "later": 1, "turns": 3},
    "several images a turn": {"images": 2, "later": 2, "turns": 2},
    "an image in the last turn": {"later": 1, "turns": 2},
}


def conversations(count: int, kinds=tuple(KINDS)) -> list[dict]:
    return [conversation(number, **KINDS[kinds[number % len(kinds)]]) for number in range(count)]


def conversation_set(count: int, kinds=tuple(KINDS)) -> Dataset:
    return Dataset.from_list(conversations(count, kinds))


def write_video(path, frames: int) -> str:
    """A video of different images, 64 x 32, two a second. Needs PyAV."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for number in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_image(make_image(number))))
        container.mux(stream.encode())
    return str(path)
