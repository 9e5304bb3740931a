"""Sections of results, and the one self-contained page, tables and figures that are made of them."""

from __future__ import annotations

import base64
import csv
import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from shodh.core.files import atomic_path, write_atomically
from shodh.core.strict_json import write_json

SHOWN_ROWS = 24  # longer tables are files only
STUDY_ROWS = 60  # of the page of a study
INDEX = "index.html"
HEAD = 2**16  # bytes in which a page names its files
FILES = re.compile('<meta name=files content="(.*?)">')  # what stands beside a page; no name has a slash
DPI = 110

Tone = Literal["good", "fair", "bad", "neutral"]


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


def filled(
    key: str,
    title: str,
    text: str,
    tables: Mapping[str, Table],
    files_only: tuple[str, ...] = (),
    **figures: Figure | None,
) -> Section | None:
    """A section without tables that have no rows, and figures that are None; None if all tables are such."""
    known = {stem: table for stem, table in tables.items() if table.rows}
    if not known:
        return None
    drawn = {stem: figure for stem, figure in figures.items() if figure is not None}
    return Section(key, title, text, tables=known, figures=drawn, files_only=files_only, rows_shown=STUDY_ROWS)


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

    Every file is whole or absent, and the page needs nothing from outside. Files of the page that stood there before,
    which it names, and which the new one does not have, are removed.

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
    index = out / INDEX
    before = _files_before(index)
    write_atomically(index, render_page(title, headline, sections, images))
    written = set(_files(sections, images))
    for name in before - written:
        (out / name).unlink(missing_ok=True)


def _files_before(index: Path) -> set[str]:
    """What the page that stands there names in its head."""
    if not index.is_file():
        return set()
    with index.open("rb") as file:
        found = FILES.search(file.read(HEAD).decode("utf-8", "replace"))
    names = html.unescape(found[1]).split("/") if found else []
    return {name for name in names if name.endswith((".csv", ".png"))}


def _files(sections: Sequence[Section], images: Mapping[str, bytes]) -> list[str]:
    """What stands beside a page, but for its JSON file."""
    return [f"{stem}.csv" for section in sections for stem in section.tables] + [f"{stem}.png" for stem in images]


def render_page(title: str, headline: Headline | None, sections: Sequence[Section], images: Mapping[str, bytes]) -> str:
    """The page as HTML, by the template of all pages; `images` holds the PNG of every figure by its stem."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    environment.filters |= {"cell": format_cell, "text_columns": text_columns}
    inlined = {stem: base64.b64encode(png).decode() for stem, png in images.items()}
    template = environment.get_template("page.html.j2")
    files = _files(sections, images)
    return template.render(title=title, headline=headline, sections=sections, images=inlined, files=files) + "\n"


def text_columns(table: Table) -> list[bool]:
    """Which columns hold text alone, and are aligned to the left."""
    columns = [[row[i] for row in table.rows if row[i] is not None] for i in range(len(table.header))]
    return [bool(column) and all(isinstance(cell, str) for cell in column) for column in columns]


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
    figure.set_dpi(DPI)
    data = io.BytesIO()
    FigureCanvasAgg(figure).print_png(data)  # `savefig` draws twice where a layout is to be found
    return data.getvalue()
