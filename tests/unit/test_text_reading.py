"""The one reader of YAML and JSON: strict, one line for what it refuses, in bounded memory and time."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from shodh.core.errors import ConfigError, DataError
from shodh.core.reading import MAX_DEPTH, MAX_YAML, parse_json, parse_yaml, read_json, read_text, read_yaml

ROOT = Path(__file__).resolve().parents[2]
BOMB = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1e-3", {"a": 0.001}),  # text, to YAML 1.1
        ("a: 010", {"a": "010"}),  # eight
        ("a: 1:30", {"a": "1:30"}),  # ninety
        ("a: 2024-13-45", {"a": "2024-13-45"}),  # a ValueError
        ("a: [1, -2, 3.5, .5, 1., +4, true, null, ~, x]", {"a": [1, -2, 3.5, 0.5, 1.0, 4, True, None, None, "x"]}),
        ("a: &x {b: 1}\nc: {<<: *x, d: 2}\ne: *x", {"a": {"b": 1}, "c": {"b": 1, "d": 2}, "e": {"b": 1}}),
        ("'1': a\n\"no\": b", {"1": "a", "no": "b"}),
        ("", None),
    ],
)
def test_plain_values_are_what_they_look_like(text: str, value: object) -> None:
    assert parse_yaml(text, "here") == value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3", "line 3, column 1: key 'a' is repeated"),
        ("a:\n  b: 1\n  c: {d: 1, d: 2}", "line 3, column 13: key 'd' is repeated"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n  <<: *x", "line 4, column 3: key '<<' is repeated"),
        ("1: a", "line 1, column 1: the key '1' is no text; quote it"),
        ("no: a", "quote it"),
        ("? [a, b]\n: c", "is no text"),
        ("[" * 10**6, "levels deep"),
        ("\n".join(" " * n + f"k{n}:" for n in range(MAX_DEPTH + 9)), "levels deep"),
        (BOMB, "more than 200000 values"),
        ("a: &a [*a]", "*a stands in itself"),
        ("x: " + "1" * 5000, "is not valid YAML"),
        ("a: !!binary xxx", "could not determine a constructor"),
        ("a: !!timestamp 2024-13-45", "could not determine a constructor"),
        ("a: !!int x", "is not valid YAML"),
        ("a: !!bool x", "is not valid YAML"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ('a: "\\0"', "zero byte"),
        ('a: "\\ud800"', "half a character"),
        ("a: b: c", "line 1"),
        ("a: [", "line 1"),
        ("a: 1\n---\nb: 2", "line 2"),
        ("\x07", "is not valid YAML"),
        ("a: *x", "undefined alias"),
        ("x" * (MAX_YAML + 1), "at most 1048576"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_yaml_that_is_refused_with_its_line(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "here.yaml")
    line = str(caught.value)
    assert line.startswith("here.yaml") and expected in line and "\n" not in line and len(line) < 400


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1,\n "a": 2}', "line 2, column 2: key 'a' is repeated"),
        ('{"b": {"a": 1, "a": 2}}', "key 'a' is repeated"),
        ('{"a": NaN}', "NaN is no number of JSON"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ("[" * 10**6, "nested too deeply"),
        ("{", "line 1"),
        ("1" * 5000, "is not valid JSON"),
        ("", "is not valid JSON"),
    ],
    ids=lambda value: value[:20],
)
def test_json_that_is_refused(text: str, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_json(text, "here.json", DataError)
    line = str(caught.value)
    assert line.startswith("here.json is not valid JSON") and expected in line and "\n" not in line and len(line) < 400


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a: \xff\n")
    with pytest.raises(ConfigError, match=r"file is not UTF-8 text \(byte 3\)"):
        read_yaml(path)
    with pytest.raises(ConfigError, match="absent.*No such file"):
        read_yaml(tmp_path / "absent")
    with pytest.raises(ConfigError, match="cannot read file .*: Is a directory"):
        read_json(tmp_path)
    with pytest.raises(ConfigError, match="File name too long"):
        read_yaml(tmp_path / ("x" * 300))
    with pytest.raises(ConfigError, match="null byte"):
        read_yaml(Path("a\0b"))
    with pytest.raises(ConfigError, match="is larger than the 1048576 bytes"):
        read_yaml(Path("/dev/zero"))
    path.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_yaml(path) == {"a": 1} and read_text(path) == "a: 1\n"


#: Not written by users: what a process tells another, its own lines, files of the system, results of a benchmark.
OWN = {
    "shodh/core/reading.py",
    "shodh/train/metrics.py",
    "shodh/experiments/harness/ranks.py",
    "shodh/experiments/harness/workers.py",
    "shodh/data/formats/probe.py",
    "shodh/ops/build.py",
}


def bypasses(path: Path) -> list[str]:
    """Places that read YAML, JSON or text without the reader; a round trip through JSON is none."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner, name = node.func.value, node.func.attr
        module = owner.id if isinstance(owner, ast.Name) else ""
        again = node.args and isinstance(node.args[0], ast.Call) and "dumps" in ast.dump(node.args[0].func)
        yaml_ = module == "yaml" and ("load" in name or name in ("parse", "scan", "compose"))
        if yaml_ or (module in ("json", "tomllib") and name in ("load", "loads") and not again) or name == "read_text":
            found.append(f"{path.name}:{node.lineno}")
    return found


def test_nothing_reads_what_users_write_but_the_reader(tmp_path: Path) -> None:
    files = [p for top in ("shodh", "launch", "tools") for p in sorted((ROOT / top).rglob("*.py"))]
    chosen = [p for p in files if str(p.relative_to(ROOT)) not in OWN and "bench" not in p.parts]
    assert len(chosen) > 200
    assert [place for path in chosen for place in bypasses(path)] == []
    bad = tmp_path / "bad.py"
    bad.write_text("import json, yaml\nyaml.safe_load(x)\njson.load(f)\njson.loads(t)\np.read_text()\n")
    assert len(bypasses(bad)) == 4
