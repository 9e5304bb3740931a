"""Every JSON that the project writes is strict: no NaN, no Infinity."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path

import numpy as np
import pytest

from shodh.core.strict_json import dumps, to_json, write_json
from shodh.train.metrics import MetricWriter, read_metrics

ROOT = Path(__file__).resolve().parents[2]
# Their own writer; and a copy in memory, in which a setting that is not finite must stay what it is.
EXEMPT = {"shodh/core/strict_json.py", "shodh/config/reading.py"}


def bypasses(text: str) -> list[int]:
    """Lines that call `json.dump` or `json.dumps`, or import them by name, without ``allow_nan=False``."""
    nodes, found = list(ast.walk(ast.parse(text))), []
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module == "json":
            found += [node.lineno for alias in node.names if alias.name.startswith("dump")]
        if isinstance(node, ast.Attribute) and node.attr in ("dump", "dumps", "JSONEncoder"):
            if isinstance(node.value, ast.Name) and node.value.id in ("json", "simplejson", "orjson", "ujson"):
                found.append(node.lineno)
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    strict = {c.func.lineno for c in calls if any(ast.unparse(k) == "allow_nan=False" for k in c.keywords)}
    return [line for line in found if line not in strict]


def test_the_search_finds_what_bypasses_the_writer() -> None:
    assert bypasses("import json\njson.dump(1, f)\n") == [2]
    assert bypasses("from json import dumps\n") == [1]
    assert bypasses("import json\nx = map(json.dumps, y)\n") == [2]
    assert bypasses("import json\njson.loads('1')\njson.dumps(1, allow_nan=False)\n") == []


def test_no_file_writes_json_past_the_strict_writer() -> None:
    paths = [p for folder in ("shodh", "tools", "launch") for p in sorted((ROOT / folder).rglob("*.py"))]
    names = {p: str(p.relative_to(ROOT)) for p in paths}
    found = {names[p]: bypasses(p.read_text()) for p in paths if names[p] not in EXEMPT}
    assert len(found) > 100
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan"), np.array([1.0, np.inf])])
def test_what_is_not_finite_becomes_null(tmp_path: Path, value: object) -> None:
    write_json(tmp_path / "a.json", {"a": [value], 3: (1.5, "NaN")})
    text = (tmp_path / "a.json").read_text()
    read = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert read["3"] == [1.5, "NaN"] and read["a"] in ([None], [[1.0, None]])
    assert to_json(value) is None or to_json(value) == [1.0, None]
    assert json.loads(dumps([value]))[0] == read["a"][0]


def test_metrics_that_are_not_finite_are_null_in_the_file_and_nan_when_read(tmp_path: Path) -> None:
    writer = MetricWriter(tmp_path)
    writer.write(0, {"train/over_persistence": math.inf, "train/loss": 0.5})
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(name))
    [line] = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(line["train/over_persistence"]) and line["train/loss"] == 0.5
