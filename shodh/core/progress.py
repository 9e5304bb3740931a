"""Signs of work: whatever gets on says so, and a watchdog counts."""

from __future__ import annotations

_signs = 0


def get_on() -> None:
    """Say that something was done: a micro-batch, a part of a file. May be called from any thread."""
    global _signs
    _signs += 1  # Two threads at once may count one sign: it is a sign still.


def signs() -> int:
    """How often this process has said so."""
    return _signs
