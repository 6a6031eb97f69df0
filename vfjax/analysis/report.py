"""An HTML page that needs nothing beside it: pictures inside, no script, no address."""

import base64
import dataclasses
import html
from collections.abc import Sequence
from pathlib import Path

from vfjax.atomic import replacing

STYLE = """body{font-family:sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}
img{max-width:100%}table{border-collapse:collapse;margin:1em 0}
td,th{border:1px solid #ccc;padding:.2em .6em;text-align:right}th:first-child,td:first-child
{text-align:left}"""


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: its heading.
        text: what is seen, a paragraph.
        picture: a PNG file.
        table: rows of cells, the first the heading.
    """

    title: str
    text: str
    picture: Path | None = None
    table: Sequence[Sequence[object]] = ()


def write(file: Path, title: str, sections: Sequence[Section]) -> None:
    """Writes the page, whole or not at all."""
    body = "\n".join(_part(section) for section in sections)
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    page = f"<!doctype html>\n<html><head>{head}</head>\n<body><h1>{html.escape(title)}</h1>\n"
    with replacing(file) as part:
        part.write_text(f"{page}{body}\n</body></html>\n", encoding="utf-8")


def _part(section: Section) -> str:
    out = [f"<h2>{html.escape(section.title)}</h2>", f"<p>{html.escape(section.text)}</p>"]
    if section.picture is not None:
        data = base64.b64encode(section.picture.read_bytes()).decode()
        name = html.escape(section.title, quote=True)
        out.append(f'<img alt="{name}" src="data:image/png;base64,{data}">')
    if section.table:
        head, *rows = section.table
        out.append("<table>" + _row(head, "th") + "".join(_row(r, "td") for r in rows) + "</table>")
    return "\n".join(out)


def _row(cells: Sequence[object], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(_said(c))}</{tag}>" for c in cells) + "</tr>"


def _said(cell: object) -> str:
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)
