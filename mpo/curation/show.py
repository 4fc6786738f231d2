"""Show records to people, as stored in the data and as tokenised for a model: as text, or as a self-contained HTML page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from io import BytesIO
from typing import Any

from datasets import Dataset
from PIL import Image

from mpo.curation.dedupe import images_of, texts
from mpo.data.eval_part import content_text, encoded
from mpo.figure import data_url
from mpo.pipelines.report import html_page
from mpo.schema import names
from mpo.visible import visible

STYLE = """
body { max-width: 1120px; overflow-wrap: anywhere; }
body > pre { white-space: pre; overflow-x: auto; }
article { margin-bottom: 20px; padding: 16px; border: 1px solid #ccc; }
.chosen { color: #1f7a4d; }
.rejected { color: #b3261e; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(420px, 1fr)); }
figure { margin: 8px; }
figure img { width: 100%; }
article img { max-width: 320px; max-height: 320px; margin: 0 8px 8px 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 12px; }
dd { margin: 0; }
"""
THUMBNAIL_SIDE = 512
"""Maximum pixels of an image's longer side on the page."""
ABOUT = [name for name in names() if name not in ("id", "images", "prompt", "chosen", "rejected")] + ["tools"]


def show_text(pairs: Dataset, processor: Any = None) -> str:
    """Show records as text: images by name and size and, with a processor, the model's tokens."""
    return "\n\n".join(_record_text(record, processor) for record in encoded(pairs, pairs.column_names))


def show_page(pairs: Dataset, title: str, processor: Any = None) -> str:
    """Show records as one self-contained HTML page with their images."""
    return html_page(title, "\n".join(_article(record, processor) for record in encoded(pairs, pairs.column_names)), STYLE)


def show_data(pairs: Dataset, processor: Any = None) -> list[dict[str, Any]]:
    """Show records as `show_text` does, for JSON: ``id``, the other columns, ``images`` and, by its heading, each text."""
    return [_record_data(record, processor) for record in encoded(pairs, pairs.column_names)]


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
    seen = ""
    for name, text in _as_seen(record, processor):
        seen += f'<h3 class="{name.split(",")[0]}">{escape(name)}</h3><pre>{escape(text)}</pre>'
    return f"<article><h2>{escape(str(record.get('id')))}</h2>{images}<dl>{about}</dl>{seen}</article>"


def _about(record: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(name, record[name]) for name in ABOUT if record.get(name) is not None]


def _as_seen(record: Mapping[str, Any], processor: Any) -> list[tuple[str, str]]:
    """Return the prompt and the completions as texts with headings or, with a processor, as tokens."""
    is_pair = "messages" not in record
    if processor is None and not is_pair:
        return [(f"{one['role']}, turn {number}", _said(one)) for number, one in enumerate(record["messages"], start=1)]
    if processor is None:
        return list(zip(("prompt", "chosen", "rejected"), texts(dict(record)), strict=True))
    from mpo.encoding.show import decode_record
    from mpo.encoding.turns import CONVERSATION, SIDES

    opened = list(images_of(record))
    # The encoder expects columns without a value to be missing.
    bare = {name: value for name, value in record.items() if value is not None and name != "images"}
    return decode_record({**bare, "images": opened} if opened else bare, processor, sides=SIDES if is_pair else CONVERSATION)


def _said(message: Mapping[str, Any]) -> str:
    more = [f"{name}: {message[name]}" for name in ("tool_calls", "train") if message.get(name) is not None]
    return "\n".join([content_text(message["content"]), *more])


def _img(opened: Image.Image) -> str:
    size = f"{opened.width} x {opened.height}"
    opened.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    return f'<img title="{size}" alt="{size}" src="{png_url(opened.save)}">'


def png_url(save: Callable[..., Any], **settings: Any) -> str:
    """Encode a PNG as a data URL, to embed it in a page; ``save`` writes it to a file, as `Figure.savefig` does."""
    save(png := BytesIO(), format="png", **settings)
    return data_url(png.getvalue(), "image/png")
