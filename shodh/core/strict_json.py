"""JSON as the standard has it: every file that the project writes goes through `dumps`.

NaN and infinity are no JSON; strict readers refuse them, or stop in the middle of a file. They are written as null,
which in all of the project's files means: not finite (a quotient by zero, an overflow), or not measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shodh.core.files import write_atomically


def to_json(value: Any) -> Any:
    """Plain values that strict JSON can hold: numpy becomes Python, NaN and infinity become null."""
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    if isinstance(value, np.ndarray | np.generic):
        return to_json(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def dumps(value: Any, **options: Any) -> str:
    """`json.dumps` of `to_json`, with its options."""
    return json.dumps(to_json(value), allow_nan=False, **options)


def write_json(path: Path, value: Any, indent: int = 1, **options: Any) -> None:
    """Write a small file whole or not at all."""
    write_atomically(path, dumps(value, indent=indent, **options) + "\n")
