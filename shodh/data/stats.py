"""Statistics of fields over files, in the form of The Well's ``stats.yaml``."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from shodh.data.formats import TrajectoryFile, open_file
from shodh.errors import DataError
from shodh.fields import Field, RegimeSchema
from shodh.files import atomic_path
from shodh.reading import read_yaml

Statistics = dict[str, dict[str, Any]]
KEYS = ("mean", "std", "mean_delta", "std_delta")


class Moments:
    """Running mean and variance per component, float64, merged block by block (Chan, Golub & LeVeque 1983)."""

    def __init__(self, components: int) -> None:
        self.count = 0
        self.mean = np.zeros(components)
        self.squares = np.zeros(components)

    def add(self, values: np.ndarray) -> None:
        """Add a block ``[C, ...]``."""
        block = values.reshape(len(values), -1)
        count = block.shape[1]
        mean = block.mean(axis=1, dtype=np.float64)
        squares = np.square(block - mean[:, None]).sum(axis=1)
        total = self.count + count
        shift = mean - self.mean
        self.squares += squares + shift**2 * (self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total

    @property
    def std(self) -> np.ndarray:
        """Population standard deviation; 0 before anything was added."""
        return np.sqrt(self.squares / max(self.count, 1))


def compute_statistics(
    files: Iterable[str | os.PathLike[str] | TrajectoryFile],
    fields: RegimeSchema | Sequence[str] | None = None,
    *,
    progress: Callable[[float], None] | None = None,
) -> Statistics:
    """Mean and standard deviation of fields and of their change from frame to frame.

    One snapshot is in memory at a time; sums are float64.

    Parameters
    ----------
    files : paths or TrajectoryFile
        Normally those of the training split, and of that alone.
    fields : RegimeSchema or names, optional
        Fields to treat, by their names in the files; all of them if omitted.
    progress : callable, optional
        Called with the fraction done.

    Returns
    -------
    dict
        ``{"mean", "std", "mean_delta", "std_delta"} -> {field: number}``, a list with one number per component for a
        vector. Static fields have no delta.

    Raises
    ------
    DataError
        If there is no file, a field is missing, or values are not finite.
    """
    opened = [open_file(f) if isinstance(f, str | os.PathLike) else f for f in files]
    if not opened:
        raise DataError("statistics need at least one file")
    names = [f.name for f in fields.fields] if isinstance(fields, RegimeSchema) else list(fields or opened[0].fields)
    statistics: Statistics = {key: {} for key in KEYS}
    steps = len(names) * len(opened)
    for number, name in enumerate(names):
        field = opened[0].field(name)
        components = field.num_components(len(opened[0].grid))
        values, deltas = Moments(components), Moments(components)
        for position, file in enumerate(opened):
            _add_file(file, name, components, values, deltas)
            file.close()
            if progress is not None:
                progress((number * len(opened) + position + 1) / steps)
        statistics["mean"][name] = _plain(field, values.mean)
        statistics["std"][name] = _plain(field, values.std)
        if not field.static:
            statistics["mean_delta"][name] = _plain(field, deltas.mean)
            statistics["std_delta"][name] = _plain(field, deltas.std)
    return statistics


def write_stats(path: str | os.PathLike[str], statistics: Statistics) -> None:
    """Write ``stats.yaml`` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(yaml.safe_dump(statistics, sort_keys=False))


def read_stats(path: str | os.PathLike[str]) -> Statistics:
    """Read a ``stats.yaml`` of ours or of The Well.

    Raises
    ------
    DataError
        If it is missing, no YAML, without ``mean`` and ``std``, or has values that are not finite numbers.
    """
    content = read_yaml(Path(path), "statistics", DataError)
    if not isinstance(content, dict) or not all(isinstance(content.get(key), dict) for key in ("mean", "std")):
        raise DataError(f"{path}: expected the mappings 'mean' and 'std' from field names to numbers")
    statistics: Statistics = {key: content.get(key) or {} for key in KEYS}
    for key, by_field in statistics.items():
        for name, value in by_field.items():
            if not all(_is_number(v) for v in (value if isinstance(value, list) else [value])):
                raise DataError(f"{path}: {key} of {name!r} is {value!r}; expected a finite number or a list of them")
    return statistics


def _add_file(file: TrajectoryFile, name: str, components: int, values: Moments, deltas: Moments) -> None:
    static = file.field(name).static
    current = np.empty((components, *file.grid), dtype=np.float32)
    previous = np.empty_like(current)
    for trajectory in range(file.num_trajectories):
        for frame in range(1 if static else file.num_frames):
            file.read(name, trajectory, range(frame, frame + 1), current if static else current[None])
            values.add(current)
            if frame > 0:
                deltas.add(current.astype(np.float64) - previous)
            current, previous = previous, current


def _plain(field: Field, value: np.ndarray) -> float | list[float]:
    return [float(v) for v in value] if field.kind == "vector" else float(value[0])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
