"""A page of results: one HTML file with its pictures inside it, and nothing fetched from elsewhere."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass

STYLE = """
:root { color-scheme: light dark; --ink: #16181c; --faint: #646970; --paper: #fff; --line: #dcdfe4 }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --faint: #9aa0a6; --paper: #16181c; --line: #3a3f47 } }
body { margin: 2rem auto; max-width: 76rem; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif;
       color: var(--ink); background: var(--paper) }
h1 { font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere } h2 { font-size: 1.15rem; margin-top: 2.2rem }
p { max-width: 46rem } p.faint, figcaption { color: var(--faint) }
div.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left }
td.number, th.number { text-align: right } td:not(:last-child), .number { white-space: nowrap }
tr.green td { background: color-mix(in srgb, #2da44e 18%, transparent) }
figure { margin: 1rem 0 } img { max-width: 100%; background: #fff }
@media (max-width: 40rem) { td:first-child { white-space: normal !important } figure { overflow-x: auto }
  img { max-width: none; width: max(100%, 44rem) } }
pre { overflow-x: auto; padding: .8rem; border: 1px solid var(--line) }
"""


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
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{"".join(body)}</body></html>\n'.encode()


def _row(tag: str, cells: Sequence[str], words: int, green: bool = False) -> str:
    number = ' class="number"'
    marked = ((cell, "" if place < words else number) for place, cell in enumerate(cells))
    return (
        ('<tr class="green">' if green else "<tr>")
        + "".join(f"<{tag}{mark}>{html.escape(cell)}</{tag}>" for cell, mark in marked)
        + "</tr>"
    )
