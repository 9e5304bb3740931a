"""Sections of results, and the one self-contained page, tables and figures that are made of them."""

from __future__ import annotations

import base64
import csv
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from shodh.core.files import atomic_path, write_atomically
from shodh.core.strict_json import write_json

SHOWN_ROWS = 24  # longer tables are files only
DPI = 110

Tone = Literal["good", "fair", "bad", "neutral"]

STYLE = """
:root { --ink: #1b2a41; --soft: #556070; --line: #dde1e7; --good: #0b6e4f; --fair: #b7791f; --bad: #b23a48;
  --neutral: #44536a }
body { font: 16px/1.55 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: var(--ink); background: #fff;
  max-width: 54rem; margin: 2rem auto 4rem; padding: 0 1.2rem }
h1 { font-size: 1.5rem; margin-bottom: .6rem; overflow-wrap: anywhere }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .4rem; padding-top: .8rem; border-top: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1.2rem 0 .2rem }
p { margin: .4rem 0 .8rem } a { color: inherit }
.verdict { border-left: 6px solid var(--tone); background: #f6f8fa; padding: .8rem 1.1rem; margin: 1rem 0 }
.verdict strong { color: var(--tone); font-size: 1.35rem; display: block }
.verdict p { margin: .2rem 0 }
.numbers { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: .7rem 0 .2rem }
.numbers div { font-size: .82rem; color: var(--soft) }
.numbers b { display: block; font-size: 1.15rem; color: var(--ink); font-weight: 600 }
nav { font-size: .9rem; color: var(--soft); columns: 2; margin: 1rem 0 } nav a { display: block }
.wide { overflow-x: auto }
table { border-collapse: collapse; margin: .4rem 0; font-size: .9rem; font-variant-numeric: tabular-nums }
td, th { padding: .22rem .7rem; text-align: right; white-space: nowrap }
th { border-bottom: 2px solid var(--ink); font-weight: 600 } td { border-bottom: 1px solid var(--line) }
td:first-child, th:first-child { text-align: left; padding-left: 0 } .text { text-align: left }
img { max-width: 100%; display: block; margin: .8rem 0 }
.note { color: var(--soft); font-size: .85rem }
"""


class Table(NamedTuple):
    """A table: names of the columns, and rows of text and numbers (None: not available)."""

    header: list[str]
    rows: list[list[Any]]


@dataclass
class Section:
    """One subject of a page.

    Attributes
    ----------
    key : str
        Name of `summary` in ``summary.json``, and the anchor on the page.
    text : str
        One to three plain sentences: what is shown, and how to read it.
    summary : dict
        JSON-able numbers (numpy scalars and arrays are converted; NaN and infinity become null).
    tables : dict
        File stem -> table, written as CSV, and shown on the page when short.
    figures : dict
        File stem -> figure (a `Figure` object without pyplot's state), written as PNG and inlined in the page.
    files_only : tuple of str
        Tables that are never shown on the page.
    rows_shown : int
        Rows up to which a table counts as short.
    """

    key: str
    title: str
    text: str
    summary: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    files_only: tuple[str, ...] = ()
    rows_shown: int = SHOWN_ROWS


def records(section: Section) -> dict[str, list[dict[str, Any]]]:
    """The tables of a section as lists of records, for the JSON file."""
    return {
        stem: [dict(zip(table.header, row, strict=True)) for row in table.rows]
        for stem, table in section.tables.items()
    }


@dataclass
class Headline:
    """What a reader must see first: a verdict in a few words, the sentence and the numbers that decided it.

    Each line of ``text`` is a paragraph; ``note`` is small print: thresholds, and where the numbers are from.
    """

    verdict: str
    text: str
    tone: Tone = "neutral"
    numbers: Mapping[str, Any] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    note: str = ""

    def record(self) -> dict[str, Any]:
        """For the JSON file of a study: verdict, answer, the rule behind them, numbers."""
        return {"verdict": self.verdict, "answer": self.text, "rule": self.note, "numbers": dict(self.numbers)}


def write_page(
    out: Path,
    title: str,
    headline: Headline | None,
    sections: Sequence[Section],
    *,
    data: Mapping[str, Any] | None = None,
    data_name: str = "summary.json",
) -> None:
    """Write ``summary.json``, a CSV file a table, a PNG file a figure, and last ``index.html``, which holds them all.

    Every file is whole or absent, and the page needs nothing from outside.

    Parameters
    ----------
    out : Path
        Folder; made if necessary.
    data : mapping, optional
        What the JSON file holds; by default the headline and each section's summary by its key.
    """
    keys = [section.key for section in sections]
    figures = [stem for part in (headline, *sections) if part is not None for stem in part.figures]
    tables = [stem for section in sections for stem in section.tables]
    for names in (keys, figures, tables):
        repeated = {name for name in names if names.count(name) > 1}
        assert not repeated, f"sections share the names {sorted(repeated)}"
    out.mkdir(parents=True, exist_ok=True)
    if data is None:
        first = {} if headline is None else {"verdict": headline.verdict, "numbers": dict(headline.numbers)}
        data = {"title": title, **first, **{section.key: section.summary for section in sections}}
    write_json(out / data_name, data)
    images: dict[str, bytes] = {}
    for part in (headline, *sections):
        if part is not None:
            images |= {stem: to_png(figure) for stem, figure in part.figures.items()}
    for stem, image in images.items():
        with atomic_path(out / f"{stem}.png") as path:
            path.write_bytes(image)
    for section in sections:
        for stem, table in section.tables.items():
            write_atomically(out / f"{stem}.csv", to_csv(table))
    write_atomically(out / "index.html", render_page(title, headline, sections, images))


def render_page(title: str, headline: Headline | None, sections: Sequence[Section], images: Mapping[str, bytes]) -> str:
    """The page as HTML; `images` holds the PNG of every figure by its stem."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    if headline is not None:
        body.append(_headline_html(headline))
        body += [_image(stem, images[stem]) for stem in headline.figures]
    if len(sections) > 3:
        links = (f'<a href="#{html.escape(s.key)}">{html.escape(s.title)}</a>' for s in sections)
        body.append(f"<nav>{''.join(links)}</nav>")
    for section in sections:
        body.append(f'<h2 id="{html.escape(section.key)}">{html.escape(section.title)}</h2>')
        body.append(f"<p>{html.escape(section.text)}</p>")
        body += [_image(stem, images[stem]) for stem in section.figures]
        limits = {stem: 0 if stem in section.files_only else section.rows_shown for stem in section.tables}
        body += [_table_html(stem, table, limits[stem]) for stem, table in section.tables.items()]
    head = f"<meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(body)}</body></html>\n"


def format_cell(value: Any) -> str:
    """A cell for people: three significant digits, ``-`` for what is not available."""
    if value is None:
        return "-"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, float | np.floating):
        number = float(value)
        return "-" if not math.isfinite(number) else "0" if number == 0 else f"{number:.3g}"
    return str(value)


def text_table(table: Table) -> str:
    """Columns aligned for a terminal."""
    lines = [table.header, *([format_cell(cell) for cell in row] for row in table.rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.header))]
    text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def to_csv(table: Table) -> str:
    """A table as CSV, numbers in full, what is not available as an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.header)
    writer.writerows(table.rows)
    return text.getvalue()


def to_png(figure: Figure) -> bytes:
    """A figure as PNG."""
    FigureCanvasAgg(figure)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=DPI)
    return data.getvalue()


def _headline_html(headline: Headline) -> str:
    numbers = "".join(
        f"<div><b>{html.escape(format_cell(value))}</b>{html.escape(name)}</div>"
        for name, value in headline.numbers.items()
    )
    note = f"<p class=note>{html.escape(headline.note)}</p>" if headline.note else ""
    paragraphs = "".join(f"<p>{html.escape(line)}</p>" for line in headline.text.split("\n"))
    return (
        f'<div class=verdict style="--tone: var(--{headline.tone})"><strong>{html.escape(headline.verdict)}</strong>'
        f"{paragraphs}<div class=numbers>{numbers}</div></div>{note}"
    )


def _table_html(stem: str, table: Table, limit: int) -> str:
    if len(table.rows) > limit:
        return f"<p class=note>{html.escape(stem)}.csv: {len(table.rows)} rows.</p>"
    columns = [[cell for cell in column if cell is not None] for column in zip(*table.rows, strict=True)]
    texts = [bool(column) and all(isinstance(cell, str) for cell in column) for column in columns]
    kinds = [" class=text" if text else "" for text in texts] or [""] * len(table.header)
    head = "".join(f"<th{kind}>{html.escape(name)}</th>" for name, kind in zip(table.header, kinds, strict=True))
    body = "".join(
        "<tr>"
        + "".join(f"<td{kind}>{html.escape(format_cell(c))}</td>" for c, kind in zip(row, kinds, strict=True))
        + "</tr>"
        for row in table.rows
    )
    return f"<div class=wide><table><tr>{head}</tr>{body}</table></div><p class=note>{html.escape(stem)}.csv</p>"


def _image(stem: str, png: bytes) -> str:
    return f'<img alt="{html.escape(stem)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
