"""What a run met: a line of ``events.jsonl`` each, which nothing cuts off when the run goes back."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from shodh.core.files import UNREADABLE, naming
from shodh.core.reading import read_lines
from shodh.core.strict_json import dumps

EVENTS = "events.jsonl"


def add_line(path: Path, **values: Any) -> None:
    """Add a line of JSON with the time of day to a file."""
    with naming(path), path.open("a") as file:
        file.write(dumps({"time": time.time(), **values}) + "\n")


def read_with(path: Path, **types: Callable[[Any], Any]) -> list[dict[str, Any]]:
    """Lines of JSON in order, with values of these types; lines that are damaged or lack one are left out."""
    found = []
    for line in read_lines(path):
        with suppress(*UNREADABLE):
            found.append({**line, **{key: convert(line[key]) for key, convert in types.items()}})
    return found


def record_event(run: Path, kind: str, step: int, **what: Any) -> None:
    """Add an event; for rank 0, or the one rank that speaks. Where the disk is full the log alone has it."""
    with suppress(OSError):
        add_line(run / EVENTS, kind=kind, step=step, **what)


def read_events(run: Path) -> list[dict[str, Any]]:
    """The events of a run in order; damaged lines are left out."""
    return read_with(run / EVENTS, kind=str, step=int)
