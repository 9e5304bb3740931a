"""The library logs and returns; it does not print, and it hides no errors."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_library_prints_nothing_and_catches_nothing_blindly() -> None:
    found = []
    for path in sorted((ROOT / "shodh").rglob("*.py")):
        if path.name == "__main__.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            printed = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            if printed or (isinstance(node, ast.ExceptHandler) and node.type is None):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []
