"""What our HTML pages share: the frame and its style, tables of plain text, and pictures that the page itself holds."""

import base64
import io
import warnings
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

STYLE = """body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;padding:0 1rem;color:#222;overflow-wrap:break-word}
img,video{max-width:100%;height:auto}img{display:block;margin:.5rem 0}figure{margin:.5rem 0}figcaption{font-size:.9rem}
.plot{overflow-x:auto}
table{border-collapse:collapse;display:block;overflow-x:auto}
td,th{padding:.2rem .6rem;border-bottom:1px solid #ccc;text-align:left;vertical-align:top}"""
NUMBERS = """table{font-size:.85rem;font-variant-numeric:tabular-nums}td,th{text-align:right}
td:first-child,th:first-child{text-align:left}"""  # of a page whose tables hold numbers after the first column


def page(title: str, body: Iterable[str], width: int, style: str = "") -> str:
    """A whole page, at most `width` rem wide; `body` is HTML, and `style` adds to the common one."""
    head = "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
    head += f"<title>{escape(title)}</title><style>{STYLE}body{{max-width:{width}rem}}{style}</style>"
    return head + "\n".join(part for part in body if part) + "</html>\n"


def picture(data: bytes, kind: str, description: str, style: str = "") -> str:
    """An img element that holds its data; kind: as in image/png; style: CSS of the element."""
    return f'<img alt="{escape(description)}" style="{style}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def plot(figure: Any, description: str, kind: str = "png") -> str:
    """The picture of a Matplotlib figure, "png" or "svg"; on a narrow screen it is scrolled, and not smaller than can be read."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph ")  # of a name that the font lacks: the page's text has it, too
        figure.savefig(buffer, format=kind, dpi=110)
    style = f"min-width:{60 * figure.get_figwidth():.0f}px"
    return f"<div class=plot>{picture(buffer.getvalue(), {'svg': 'svg+xml'}.get(kind, kind), description, style)}</div>"


def short(name: str) -> str:
    """A name that leaves room for the rest of a plot."""
    return name if len(name) < 40 else f"{name[:38]}…"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Every cell is escaped. Raises ValueError when a row does not fit the head."""
    if bad := [row for row in rows if len(row) != len(head)]:
        raise ValueError(f"{len(head)} columns, but {bad[0]}")
    lines = ["".join(f"<th scope=col>{escape(h)}" for h in head), *("".join(f"<td>{escape(str(c))}" for c in row) for row in rows)]
    return f"<table>{''.join(f'<tr>{line}' for line in lines)}</table>"


def facts(rows: Iterable[tuple[str, Any]]) -> str:
    """A table of names and what is to be said of each, escaped."""
    return f"<table>{''.join(f'<tr><th scope=row>{escape(name)}<td>{escape(str(value))}' for name, value in rows)}</table>"
