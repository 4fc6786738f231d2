"""Show records to people, as stored in the data and as tokenised for a model."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from io import BytesIO
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
    return "\n\n".join(_record_text(record, processor) for record in _records(pairs))


def show_page(pairs: Dataset, title: str, processor: Any = None) -> str:
    """Show records as one self-contained HTML page with their images."""
    articles = "\n".join(_article(record, processor) for record in _records(pairs))
    return html_page(title, articles)


def _records(pairs: Dataset) -> Any:
    return encoded(pairs, pairs.column_names)


def show_data(pairs: Dataset, processor: Any = None) -> list[dict[str, Any]]:
    """Show records as `show_text` does, for JSON: ``id``, the other columns, ``images`` and, by its heading, each text."""
    return [_record_data(record, processor) for record in _records(pairs)]


def _record_data(record: Mapping[str, Any], processor: Any) -> dict[str, Any]:
    images = [
        {"width": opened.width, "height": opened.height, "path": image.get("path")}
        for opened, image in zip(images_of(record), record.get("images") or (), strict=True)
    ]
    return {"id": record.get("id"), **dict(_about(record)), "images": images, "texts": dict(_as_seen(record, processor))}


def _record_text(record: Mapping[str, Any], processor: Any) -> str:
    found = _record_data(record, processor)
    lines = [f"record {found['id']!r}", *(f"  {name}: {value}" for name, value in _about(record))]
    for place, image in enumerate(found["images"], start=1):
        lines.append(f"  image {place}: {image['width']} x {image['height']}, {image['path'] or 'in the data'}")
    for name, text in found["texts"].items():
        lines += [f"  {name}", *(f"    {line}" for line in text.split("\n"))]
    return "\n".join(visible(line).rstrip() for line in lines)


def _article(record: Mapping[str, Any], processor: Any) -> str:
    about = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in _about(record))
    images = "".join(map(_img, images_of(record)))
    seen = "".join(
        f'<h3 class="{name.split(",")[0]}">{escape(name)}</h3><pre>{escape(text)}</pre>'
        for name, text in _as_seen(record, processor)
    )
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
    found: list[tuple[str, list[str]]] = []
    for line in shown.split("\n"):
        if line.startswith("    "):
            found[-1][1].append(line[4:])
        else:
            found.append((line, []))
    return [(name, "\n".join(lines)) for name, lines in found]


def _img(opened: Image.Image) -> str:
    size = f"{opened.width} x {opened.height}"
    opened.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    png = BytesIO()
    opened.save(png, format="PNG")
    return f'<img title="{size}" alt="{size}" src="{png_url(png.getvalue())}">'
