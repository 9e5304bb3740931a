"""What a run met: a line of ``events.jsonl`` each, which nothing cuts off when the run goes back."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from shodh.core.files import UNREADABLE
from shodh.core.reading import read_lines
from shodh.core.strict_json import dumps

EVENTS = "events.jsonl"


def record_event(run: Path, kind: str, step: int, **what: Any) -> None:
    """Add an event; for rank 0, or the one rank that speaks. Where the disk is full the log alone has it."""
    try:
        with (run / EVENTS).open("a") as file:
            file.write(dumps({"time": time.time(), "kind": kind, "step": step, **what}) + "\n")
    except OSError:
        pass


def read_events(run: Path) -> list[dict[str, Any]]:
    """The events of a run in order; damaged lines are left out."""
    found = []
    for event in read_lines(run / EVENTS):
        with suppress(*UNREADABLE):
            found.append({**event, "kind": str(event["kind"]), "step": int(event["step"])})
    return found
