"""The benchmark runs and its table is whole."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch

from shodh.ops.extension import unavailable_reason

BENCH = Path(__file__).parents[2] / "tools" / "bench" / "decode.py"


@pytest.fixture(autouse=True)
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a script, whose folder is searched for what it imports."""
    monkeypatch.syspath_prepend(str(BENCH.parent))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_benchmark_reports_every_contestant(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(BENCH))["main"]
    table = tmp_path / "decode.json"
    small = ["--dtype", dtype, "--grid", "8", "--batch", "1", "--rounds", "2", "--skip", "compile", "physicsnemo"]
    assert main([*small, "--json", str(table)]) == 0
    rows = {row["name"]: row for row in json.loads(table.read_text())["rows"]}
    exact = {"fused exact", "fused exact + backward"} if dtype == "float32" else set()
    assert {"copy", "eager", "eager + backward", "fused", "fused + backward", *exact} <= rows.keys()
    assert ("fused backward alone" in rows) == (unavailable_reason("cpp") is None)
    assert rows["copy"]["over_copy"] == 1.0
    assert ("max |divergence| of the exact decode: 0.0" in capsys.readouterr().out) == bool(exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_benchmark_of_an_expert_layer_has_every_variant(dtype: torch.dtype) -> None:
    shapes = runpy.run_path(str(BENCH.with_name("expert_shapes.py")))
    for shape in shapes["TINY"].values():
        result = shapes["measure"](shape, torch.device("cpu"), dtype, 2)
        assert result["failed"] == {}
        assert result["variants"].keys() >= {"dense", "sparse", "sparse, all on one"}
        assert all(row["over_dense"] > 0 for row in result["variants"].values())
