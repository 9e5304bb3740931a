"""The benchmark runs and its table is whole."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "tools" / "bench" / "decode.py"


def test_benchmark_reports_every_contestant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(BENCH))["main"]
    table = tmp_path / "decode.json"
    small = ["--grid", "8", "--batch", "1", "--rounds", "2", "--skip", "compile", "physicsnemo"]
    assert main([*small, "--json", str(table)]) == 0
    rows = {row["name"]: row for row in json.loads(table.read_text())["rows"]}
    assert {"copy", "eager", "eager + backward", "fused", "fused exact", "fused exact + backward"} <= rows.keys()
    assert rows["copy"]["over_copy"] == 1.0
    assert "max |divergence| of the exact decode: 0.0" in capsys.readouterr().out
