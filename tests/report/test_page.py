"""The page: self-contained, escaped, strict JSON, whole or absent."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from shodh.report.page import SHOWN_ROWS, Headline, Section, Table, text_table, write_page


def figure() -> Figure:
    drawn = Figure(figsize=(2, 1))
    drawn.subplots().plot([0, 1], [1, 0])
    return drawn


def section(key: str = "load", rows: int = 2) -> Section:
    summary = {"share": np.array([0.25, 0.75]), "missing": float("nan"), "count": np.int64(3), "deep": [{"x": np.inf}]}
    table = Table(["expert", "share"], [[i, 0.123456789 if i else None] for i in range(rows)])
    return Section(key, f"Load <{key}>", "Who & what.", summary, {f"{key}_table": table}, {f"{key}_figure": figure()})


def test_everything_is_written_and_the_page_stands_alone(tmp_path: Path) -> None:
    headline = Headline(
        "collapsed", "one expert took <all>", "bad", {"share": 0.987654}, {"first": figure()}, "small print"
    )
    write_page(tmp_path / "out", "a run", headline, [section()])
    out = tmp_path / "out"
    names = {"summary.json", "index.html", "load_table.csv", "load_figure.png", "first.png"}
    assert {p.name for p in out.iterdir()} == names
    page = (out / "index.html").read_text()
    assert "Load &lt;load&gt;" in page and "&lt;all&gt;" in page and "<all>" not in page
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in page and 'src="data:' in page and "<link" not in page and "<script" not in page
    assert page.index("collapsed") < page.index("Load &lt;load&gt;")
    assert "small print" in page and "0.988" in page and "0.123" in page


def test_json_is_strict(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    write_page(tmp_path, "a run", Headline("mixed", "because", numbers={"u": np.float32(0.5)}), [section()])
    read = json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)
    assert read["verdict"] == "mixed" and read["numbers"] == {"u": 0.5}
    assert read["load"] == {"share": [0.25, 0.75], "missing": None, "count": 3, "deep": [{"x": None}]}


def test_numbers_of_the_headline_are_shown_and_what_is_nested_is_kept_in_the_file(tmp_path: Path) -> None:
    write_page(tmp_path, "a run", Headline("mixed", "because", numbers={"u": 0.5, "arm": {"ratio": 0.75}}), [])
    page = (tmp_path / "index.html").read_text()
    assert "<b>0.5</b>u" in page and "ratio" not in page
    assert json.loads((tmp_path / "summary.json").read_text())["numbers"]["arm"] == {"ratio": 0.75}


def test_tables_are_written_in_full_and_shown_when_short(tmp_path: Path) -> None:
    write_page(tmp_path, "a run", None, [section(rows=SHOWN_ROWS), section("long", SHOWN_ROWS + 1)])
    rows = list(csv.reader((tmp_path / "load_table.csv").open()))
    assert rows[:3] == [["expert", "share"], ["0", ""], ["1", "0.123456789"]]
    page = (tmp_path / "index.html").read_text()
    quiet = section("quiet")
    quiet.files_only = ("quiet_table",)
    write_page(tmp_path / "quiet", "a run", None, [quiet])
    assert "<table>" not in (tmp_path / "quiet" / "index.html").read_text()
    assert (tmp_path / "quiet" / "quiet_table.csv").exists()
    assert page.count("<table>") == 1 and f"long_table.csv: {SHOWN_ROWS + 1} rows" in page


def test_files_of_the_page_before_do_not_outlive_it(tmp_path: Path) -> None:
    other = tmp_path / "of_the_user.csv"
    other.write_text("1")
    write_page(tmp_path, "a run", None, [section(), section("gone & away")])
    assert (tmp_path / "gone & away_table.csv").exists() and (tmp_path / "gone & away_figure.png").exists()
    write_page(tmp_path, "a run", None, [section(), section("new")])
    names = {f"{key}_{what}" for key in ("load", "new") for what in ("table.csv", "figure.png")}
    assert {p.name for p in tmp_path.iterdir()} == names | {"summary.json", "index.html", other.name}


def test_names_that_would_overwrite_each_other_are_a_bug(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="load"):
        write_page(tmp_path, "a run", None, [section(), section()])


def test_text_table_is_aligned() -> None:
    lines = text_table(Table(["name", "value"], [["a", 1.23456], ["long name", None]])).splitlines()
    assert lines == ["name       value", "----------------", "a          1.23", "long name  -"]
