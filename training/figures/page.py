"""A page of results: one HTML file with its pictures inside it, and nothing fetched from elsewhere."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

STYLE = (resources.files("timm_dvt") / "assets" / "page.css").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Text:
    """A paragraph; `code` is set as it is, line by line."""

    text: str
    code: bool = False

    def html(self) -> str:
        words = html.escape(self.text)
        return f"<pre>{words}</pre>" if self.code else f"<p>{words}</p>"


@dataclass(frozen=True)
class Table:
    """Rows of cells below a row of headings; the first `words` columns are words, the others are numbers.

    Rows whose numbers are in `green` are.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    green: Sequence[int] = ()

    def html(self) -> str:
        lines = [_row("th", self.headings, self.words)]
        lines += [_row("td", row, self.words, number in self.green) for number, row in enumerate(self.rows)]
        return '<div class="wide"><table>' + "".join(lines) + "</table></div>"


@dataclass(frozen=True)
class Picture:
    """A PNG with the words that stand below it, which are also for those who do not see it."""

    png: bytes
    caption: str

    def html(self) -> str:
        data, caption = base64.b64encode(self.png).decode(), html.escape(self.caption, quote=True)
        image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
        return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


@dataclass(frozen=True)
class Section:
    """A part of a page under a title of its own."""

    title: str
    parts: Sequence[Text | Table | Picture]


def page(title: str, lead: str, sections: Sequence[Section]) -> bytes:
    """The page, as UTF-8: legible on paper white and at night, on a wide screen and on a phone."""
    body = [f"<h1>{html.escape(title)}</h1>", f'<p class="faint">{html.escape(lead)}</p>']
    for section in sections:
        body += [f"<h2>{html.escape(section.title)}</h2>", *(part.html() for part in section.parts)]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{"".join(body)}</body></html>\n'.encode(
        errors="replace"
    )


def _row(tag: str, cells: Sequence[str], words: int, green: bool = False) -> str:
    number = ' class="number"'
    marked = ((cell, "" if place < words else number) for place, cell in enumerate(cells))
    return (
        ('<tr class="green">' if green else "<tr>")
        + "".join(f"<{tag}{mark}>{html.escape(cell)}</{tag}>" for cell, mark in marked)
        + "</tr>"
    )
