"""Show records to people, as stored in the data and as tokenised for a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from types import SimpleNamespace
from typing import Any

from datasets import Dataset
from PIL import Image

from mpo.curation.dedupe import images_of, texts
from mpo.curation.page import html_page, png_url
from mpo.data.eval_part import encoded
from mpo.schema import names
from mpo.visible import visible

THUMBNAIL_SIDE = 512
"""Maximum pixels of an image's longer side on the page."""
ABOUT = [name for name in names() if name not in ("id", "images", "prompt", "chosen", "rejected")]


def show_text(pairs: Dataset, processor: Any = None) -> str:
    """Show records as text: images by name and size and, with a processor, the model's tokens."""
    return "\n\n".join(_record_text(record, processor) for record in encoded(pairs, pairs.column_names))


def show_page(pairs: Dataset, title: str, processor: Any = None) -> str:
    """Show records as one self-contained HTML page with their images."""
    return html_page(title, "\n".join(_article(record, processor) for record in encoded(pairs, pairs.column_names)))


def _record_text(record: Mapping[str, Any], processor: Any) -> str:
    lines = [f"record {record.get('id')!r}"]
    lines += [f"  {name}: {value}" for name, value in _about(record)]
    for place, (opened, image) in enumerate(zip(images_of(record), record.get("images") or (), strict=True), start=1):
        lines.append(f"  image {place}: {opened.width} x {opened.height}, {image.get('path') or 'in the data'}")
    for name, text in _as_seen(record, processor):
        lines += [f"  {name}", *(f"    {line}" for line in text.split("\n"))]
    return "\n".join(visible(line).rstrip() for line in lines)


def _article(record: Mapping[str, Any], processor: Any) -> str:
    about = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in _about(record))
    images = "".join(map(_img, images_of(record)))
    seen = ""
    for name, text in _as_seen(record, processor):
        seen += f'<h3 class="{name.split(",")[0]}">{escape(name)}</h3><pre>{escape(text)}</pre>'
    return f"<article><h2>{escape(str(record.get('id')))}</h2>{images}<dl>{about}</dl>{seen}</article>"


def _about(record: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(name, record[name]) for name in ABOUT if record.get(name) is not None]


def _as_seen(record: Mapping[str, Any], processor: Any) -> list[tuple[str, str]]:
    """Return the prompt and the completions as texts with headings or, with a processor, as tokens."""
    if processor is None:
        return list(zip(("prompt", "chosen", "rejected"), texts(dict(record)), strict=True))
    from mpo.encoding.show import show_record

    as_trained = SimpleNamespace(max_length=None, truncation_mode="keep_start", completion_end="end_of_turn", tile_budget="prompt")
    opened = list(images_of(record))
    # The encoder expects columns without a value to be missing.
    bare = {name: value for name, value in record.items() if value is not None and name != "images"}
    shown = show_record({**bare, "images": opened} if opened else bare, processor, as_trained)
    # A heading, and its lines, which are indented.
    parts = [part.split("\n") for part in re.split(r"\n(?!    )", shown)]
    return [(name, "\n".join(line[4:] for line in lines)) for name, *lines in parts]


def _img(opened: Image.Image) -> str:
    size = f"{opened.width} x {opened.height}"
    opened.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    return f'<img title="{size}" alt="{size}" src="{png_url(opened.save)}">'
