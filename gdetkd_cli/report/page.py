"""HTML of a report: its page, sections, figures and tables. All text is escaped here."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

from gdetkd_cli.text import show_hidden

DASH = "-"  # stands for a missing number
_TEMPLATE = Path(__file__).with_name("template.html")


@dataclass(frozen=True)
class Section:
    """A part of the page; ``html`` is made by the functions of this module."""

    title: str
    html: str


def text(value: object) -> str:
    """Text of any source, safe inside an element or an attribute."""
    return escape(show_hidden(str(value), keep="\n"))


def paragraph(words: str) -> str:
    return f"<p>{prose(words)}</p>\n"


def prose(words: str) -> str:
    """Escaped text in which `this` is code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text(words))


def number(value: object, digits: int = 1) -> str:
    """A number with ``digits`` decimals, and anything else as a dash."""
    return f"{value:.{digits}f}" if isinstance(value, (int, float)) else DASH


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> str:
    """A table; the first ``words`` columns are text, the others numbers."""
    head = "".join(f'<th scope="col">{text(one)}</th>' for one in columns[words:])
    head = "".join(f'<th scope="col" class="word">{text(one)}</th>' for one in columns[:words]) + head
    lines = []
    for row in rows:
        cells = [f'<td class="word">{text(one)}</td>' for one in row[1:words]]
        cells += [f"<td>{text(one)}</td>" for one in row[words:]]
        lines.append(f'<tr><th scope="row">{text(row[0])}</th>{"".join(cells)}</tr>')
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>\n'


def figure(image: str, caption: str) -> str:
    """A chart or an image element, with its caption."""
    return f"<figure>{image}<figcaption>{prose(caption)}</figcaption></figure>\n"


def details(title: str, content: str) -> str:
    """Content that opens on a click; ``content`` is HTML."""
    return f"<details><summary>{text(title)}</summary>{content}</details>\n"


def code(content: str) -> str:
    return f"<pre>{text(content)}</pre>\n"


def image(content: bytes, alternative: str) -> str:
    """An embedded JPEG."""
    data = base64.b64encode(content).decode()
    return f'<img alt="{text(alternative)}" src="data:image/jpeg;base64,{data}">'


def build_page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """Builds the page from its sections."""
    names = [f"part-{place}" for place in range(1, len(sections) + 1)]
    links = "".join(
        f'<li><a href="#{name}">{text(one.title)}</a></li>' for name, one in zip(names, sections, strict=True)
    )
    parts = "".join(
        f'<section id="{name}"><h2>{text(one.title)}</h2>\n{one.html}</section>\n'
        for name, one in zip(names, sections, strict=True)
    )
    page = Template(_TEMPLATE.read_text(encoding="utf-8"))
    return page.substitute(title=text(title), subtitle=text(subtitle), links=links, sections=parts)
