"""Figures without pyplot: nothing is kept open or drawn twice, and a notebook shows one that is the value of a cell."""

from __future__ import annotations

import base64
from io import BytesIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure.

    Args:
        width: in inches.
        height: in inches.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("Drawing needs matplotlib. Install it: pip install matplotlib") from None

    class Shown(Figure):  # a notebook shows plain figures only after pyplot was imported
        def _repr_png_(self) -> bytes:
            return png_of(self)

    return Shown(figsize=(width, height), layout="constrained")


def png_of(figure: Any, dpi: int = 80) -> bytes:
    """A figure as the bytes of a PNG file."""
    png = BytesIO()
    figure.savefig(png, format="png", dpi=dpi)
    return png.getvalue()


def data_url(data: bytes, kind: str) -> str:
    """The bytes of an image of a media type as a data URL, to embed it in a page."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def small_url(image: Any, side: int) -> str:
    """A PIL image as a data URL of a JPEG file, at most `side` pixels wide and high."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    jpeg = BytesIO()
    small.save(jpeg, format="JPEG", quality=80)
    return data_url(jpeg.getvalue(), "image/jpeg")
