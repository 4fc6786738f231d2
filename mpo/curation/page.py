"""Write self-contained HTML pages."""

from __future__ import annotations

import base64
from collections.abc import Callable
from html import escape
from io import BytesIO
from typing import Any

STYLE = """
body { margin: 0; background: #f6f8fa; color: #1f2933; font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 24px 64px; }
article, figure, main > pre { margin: 0 0 20px; padding: 16px; background: #fff; border: 1px solid #dde3ea; border-radius: 8px; }
h1 { font-size: 24px; margin: 0 0 12px; overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 0 0 8px; overflow-wrap: anywhere; }
h3 { font-size: 13px; margin: 12px 0 2px; }
pre { margin: 0; font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
main > pre { white-space: pre; overflow-x: auto; }
.chosen { color: #1f7a4d; }
.rejected { color: #b3261e; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(420px, 1fr)); gap: 16px; align-items: start; }
figure img { width: 100%; height: auto; }
article img { max-width: 320px; max-height: 320px; margin: 0 8px 8px 0; border: 1px solid #dde3ea; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 12px; margin: 8px 0; font-size: 13px; color: #52606d; }
dd { margin: 0; overflow-wrap: anywhere; }
"""


def html_page(title: str, body: str) -> str:
    """Build a page from a body of HTML and a title of plain text."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    heading = f"<h1>{escape(title)}</h1>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>\n{heading}\n{body}\n</main></body></html>\n'


def png_url(save: Callable[..., Any], **settings: Any) -> str:
    """Encode a PNG as a data URL, to embed it in a page; ``save`` writes it to a file, as `Figure.savefig` does."""
    png = BytesIO()
    save(png, format="png", **settings)
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode("ascii")
