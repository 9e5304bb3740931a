"""Fields of all kinds, and two regimes of which one lacks an optional field."""

from __future__ import annotations

FIELDS = [
    {"name": "velocity", "kind": "vector", "solenoidal": True},
    {"name": "heat", "masked_by": "solid"},
    {"name": "dye", "optional": True},
    {"name": "solid", "static": True},
]
REGIMES = {"clear": ["velocity", "heat", "solid"], "dyed": ["velocity", "heat", "dye", "solid"]}
