"""Statistics of fields over files, in the form of The Well's ``stats.yaml``."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from shodh.data.formats import TrajectoryFile, open_file
from shodh.core.distributed import Share, each
from shodh.core.errors import DataError
from shodh.schema.fields import Field, RegimeSchema
from shodh.core.files import atomic_path
from shodh.core.reading import read_yaml

Statistics = dict[str, dict[str, Any]]
KEYS = ("mean", "std", "mean_delta", "std_delta")
WHERE = "where_not"  # of stats.yaml: {mask: {"mean", "std"}} over the cells where the mask is 0; readers may pass it over


class Moments:
    """Running mean and variance per component, float64, merged block by block (Chan, Golub & LeVeque 1983)."""

    def __init__(self, components: int) -> None:
        self.count = 0
        self.mean = np.zeros(components)
        self.squares = np.zeros(components)

    def add(self, values: np.ndarray) -> None:
        """Add a block ``[C, ...]``."""
        block = values.reshape(len(values), -1)
        if block.shape[1]:
            mean = block.mean(axis=1, dtype=np.float64)
            self._merge(block.shape[1], mean, np.square(block - mean[:, None]).sum(axis=1))

    def merge(self, other: Moments) -> None:
        """Add what others were made of."""
        if other.count:
            self._merge(other.count, other.mean, other.squares)

    def _merge(self, count: int, mean: np.ndarray, squares: np.ndarray) -> None:
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
    share: Share = each,
) -> Statistics:
    """Mean and standard deviation of fields and of their change from frame to frame.

    Over all cells, as The Well has them; and of scalars that change in time also over the cells where a mask is 0, for
    every static scalar among the fields that is 0 or 1 everywhere. One snapshot is in memory at a time; sums are
    float64.

    Parameters
    ----------
    files : paths or TrajectoryFile
        Normally those of the training split, and of that alone.
    fields : RegimeSchema or names, optional
        Fields to treat, by their names in the files; all of them if omitted.
    progress : callable, optional
        Called with the fraction done.
    share : callable
        Who reads which trajectories. The numbers do not depend on it: those of trajectories are merged in their order.

    Returns
    -------
    dict
        ``{"mean", "std", "mean_delta", "std_delta"} -> {field: number}``, a list with one number per component for a
        vector; static fields have no delta. ``"where_not" -> {mask: {"mean", "std"}}`` of the same form.

    Raises
    ------
    DataError
        If there is no file, a field is missing, or values are not finite.
    """
    opened = [open_file(f) if isinstance(f, str | os.PathLike) else f for f in files]
    if not opened:
        raise DataError("statistics need at least one file")
    names = [f.name for f in fields.fields] if isinstance(fields, RegimeSchema) else list(fields or opened[0].fields)
    items = [(file, trajectory) for file in opened for trajectory in range(file.num_trajectories)]
    done = itertools.count(1)

    def measure(item: tuple[TrajectoryFile, int]) -> dict[str, _Sums]:
        sums = _sums_of(*item, names)
        if progress is not None:
            progress(next(done) / len(items))
        return sums

    parts = share(items, measure)
    masks = [name for name in names if all(part[name].is_mask for part in parts)]
    statistics: Statistics = {key: {} for key in KEYS}
    statistics[WHERE] = {mask: {"mean": {}, "std": {}} for mask in masks}
    for name in names:
        field = opened[0].field(name)
        components = field.num_components(len(opened[0].grid))
        values = _merged(components, (part[name].values for part in parts))
        statistics["mean"][name] = _plain(field, values.mean)
        statistics["std"][name] = _plain(field, values.std)
        if not field.static:
            deltas = _merged(components, (part[name].deltas for part in parts))
            statistics["mean_delta"][name] = _plain(field, deltas.mean)
            statistics["std_delta"][name] = _plain(field, deltas.std)
        for mask in masks if field.kind == "scalar" and not field.static else ():
            moments = _merged(1, (part[name].existing[mask] for part in parts))
            if moments.count:
                statistics[WHERE][mask]["mean"][name] = _plain(field, moments.mean)
                statistics[WHERE][mask]["std"][name] = _plain(field, moments.std)
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
    statistics: Statistics = {key: content.get(key) or {} for key in (*KEYS, WHERE)}
    tables = [(key, statistics[key]) for key in KEYS]
    for mask, parts in statistics[WHERE].items() if isinstance(statistics[WHERE], dict) else [("", None)]:
        if not isinstance(parts, dict) or not all(isinstance(parts.get(key), dict) for key in ("mean", "std")):
            raise DataError(f"{path}: {WHERE} must map masks to the mappings 'mean' and 'std'")
        tables += [(f"{WHERE} {mask} {key}", parts[key]) for key in ("mean", "std")]
    for key, by_field in tables:
        for name, value in by_field.items():
            if not all(_is_number(v) for v in (value if isinstance(value, list) else [value])):
                raise DataError(f"{path}: {key} of {name!r} is {value!r}; expected a finite number or a list of them")
    return statistics


@dataclass
class _Sums:
    """Of one field of one trajectory: its values, its changes, and its values where each mask is 0."""

    values: Moments
    deltas: Moments
    existing: dict[str, Moments]
    is_mask: bool = False


def _sums_of(file: TrajectoryFile, trajectory: int, names: Sequence[str]) -> dict[str, _Sums]:
    """Of one trajectory, by field; masks are static scalars of zeros and ones. Closes the file."""
    sums: dict[str, _Sums] = {}
    exists: dict[str, np.ndarray] = {}
    for name in sorted(names, key=lambda n: not file.field(n).static):  # Masks before what they mask.
        field = file.field(name)
        components = field.num_components(len(file.grid))
        existing = {mask: Moments(1) for mask in exists if field.kind == "scalar" and not field.static}
        sums[name] = own = _Sums(Moments(components), Moments(components), existing)
        current = np.empty((components, *file.grid), dtype=np.float32)
        previous = np.empty_like(current)
        for frame in range(1 if field.static else file.num_frames):
            file.read(name, trajectory, range(frame, frame + 1), current if field.static else current[None])
            own.values.add(current)
            for mask, moments in existing.items():
                moments.add(current[:, exists[mask]])
            if frame > 0:
                own.deltas.add(current.astype(np.float64) - previous)
            current, previous = previous, current
        own.is_mask = field.static and field.kind == "scalar" and bool(((previous == 0) | (previous == 1)).all())
        if own.is_mask:
            exists[name] = previous[0] == 0
    file.close()
    return sums


def _merged(components: int, parts: Iterable[Moments]) -> Moments:
    whole = Moments(components)
    for part in parts:
        whole.merge(part)
    return whole


def _plain(field: Field, value: np.ndarray) -> float | list[float]:
    return [float(v) for v in value] if field.kind == "vector" else float(value[0])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
