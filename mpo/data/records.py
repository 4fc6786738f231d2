"""One line of a pair file -> one preference record, checked.

Two kinds of lines are understood. MMPR's: ``image`` (a path, several, or none), ``question``, ``chosen``, ``rejected``. And TRL's:
``images`` (paths), ``prompt``, ``chosen``, ``rejected`` as strings or messages. Both may carry an ``id``.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

IMAGE_PLACEHOLDER = "<image>"


def to_record(line: Mapping[str, Any], *, where: str, image_root: Path) -> dict[str, Any]:
    """Turn a line into a record with ``id``, ``images`` (absolute paths), ``prompt``, ``chosen`` and ``rejected``.

    Args:
        line: the parsed line.
        where: how errors call it, such as ``pairs.jsonl:17``.
        image_root: the folder that picture paths are relative to, and must stay inside.

    Raises:
        ValueError: for missing or empty fields, pictures that are not there or not under `image_root`, and numbers of
            placeholders and pictures that differ.
    """
    question_key = "question" if "question" in line else "prompt"
    for key in (question_key, "chosen", "rejected"):
        if not line.get(key):
            found = "is empty" if key in line else f"is missing (the line has {sorted(line)})"
            raise ValueError(f"{where}: '{key}' {found}. A pair needs a question, a chosen and a rejected answer.")
    if line["chosen"] == line["rejected"]:
        raise ValueError(f"{where}: 'chosen' and 'rejected' are the same answer, so there is nothing to prefer.")
    paths = line.get("image", line.get("images")) or []
    images = [_inside(image_root, path, where) for path in ([paths] if isinstance(paths, str) else paths)]
    return {
        "id": str(line.get("id", where)),
        "images": images,
        "prompt": _messages(line[question_key], "user", len(images), where),
        "chosen": _messages(line["chosen"], "assistant"),
        "rejected": _messages(line["rejected"], "assistant"),
    }


def _messages(content: Any, role: str, images: int = 0, where: str = "") -> list[dict[str, Any]]:
    """Text or messages -> messages whose contents are lists of parts, the pictures in the first user message."""
    messages = content if isinstance(content, list) else [{"role": role, "content": content}]
    result = []
    for message in messages:
        parts = message["content"]
        if isinstance(parts, str):
            parts = _parts(parts, images if message["role"] == "user" else 0, where)
            images = 0 if message["role"] == "user" else images
        result.append({"role": message["role"], "content": parts})
    return result


def _parts(text: str, images: int, where: str) -> list[dict[str, Any]]:
    """Text and picture parts; ``<image>`` marks, if there are any, say where the pictures stand, else they come first."""
    marks = text.count(IMAGE_PLACEHOLDER) if images else 0
    if marks and marks != images:
        raise ValueError(
            f"{where}: the question has {marks} {IMAGE_PLACEHOLDER} marks for {images} pictures. Give one mark per picture, "
            "or none to put all pictures in front."
        )
    parts: list[dict[str, Any]] = []
    for index, stretch in enumerate(text.split(IMAGE_PLACEHOLDER) if marks else [""] * images + [text]):
        if index > 0:
            parts.append({"type": "image", "text": None})
            stretch = stretch.removeprefix("\n")  # the chat template puts that line break itself
        if stretch:
            parts.append({"type": "text", "text": stretch})
    return parts


def _inside(root: Path, path: str, where: str) -> str:
    root = root.resolve()
    full = (root / path).resolve()
    if not full.is_relative_to(root):
        raise ValueError(
            f"{where}: the picture {path!r} lies outside {root}. Set data.image_root to a folder that holds all pictures."
        )
    if not full.is_file():
        raise ValueError(f"{where}: there is no picture {path!r} in {root}. Set data.image_root to where the pictures are.")
    return str(full)
