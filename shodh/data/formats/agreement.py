"""What the files of one regime have in common."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from shodh.data.formats.base import TrajectoryFile
from shodh.core.errors import DataError


def time_steps(file: TrajectoryFile) -> np.ndarray:
    """Mean time from frame to frame, ``[B]``, or ``[1]`` where all trajectories have the same times; NaN of a frame."""
    time = np.atleast_2d(file.time)
    return (time[:, -1] - time[:, 0]) / (time.shape[1] - 1 or np.nan)


def differences(file: TrajectoryFile, first: TrajectoryFile, fields: Collection[str] | None = None) -> list[str]:
    """In what a file differs from the first one of its regime, both values and both files in each line.

    Grid, boundary, lengths, time step, names of parameters, and units of ``fields`` (by default all that both have).
    """
    found = []

    def compare(what: str, ours: object, theirs: object, equal: bool) -> None:
        if not equal:
            found.append(f"{file.path}: {what} {ours}, but {theirs} in {first.path}")

    compare("grid is", file.grid, first.grid, file.grid == first.grid)
    compare("boundary is", file.boundary, first.boundary, file.boundary == first.boundary)
    lengths = [tuple(float(f"{v:.6g}") for v in f.lengths) for f in (file, first)]
    same = len(file.lengths) == len(first.lengths) and np.allclose(file.lengths, first.lengths, rtol=1e-4)
    compare("lengths are", lengths[0], lengths[1], bool(same))
    (step, theirs), equal = _two_steps(file, first)
    compare("the time step is", f"{step:.6g}", f"{theirs:.6g}", equal)
    ours, others = sorted(file.parameters), sorted(first.parameters)
    compare("the parameters are", ours, others, ours == others)
    for name in sorted(set(file.fields) & set(first.fields) if fields is None else fields):
        units = [f.field(name).units for f in (file, first)]
        compare(f"the units of {name!r} are", repr(units[0]), repr(units[1]), units[0] == units[1])
    return found


def _two_steps(file: TrajectoryFile, first: TrajectoryFile) -> tuple[tuple[float, float], bool]:
    """The step of a file that is furthest from the first one's, that one, and whether both are the same."""
    ours, theirs = time_steps(file), time_steps(first)[0]
    apart = np.abs(ours - theirs)
    if not np.isfinite(apart).all():  # A single frame has no step.
        return (float(ours[0]), float(theirs)), True
    furthest = int(apart.argmax())
    # Times are often float32: their rounding is relative to the largest one, not to the step.
    rounding = max(np.abs(f.time).max() / max(1, f.num_frames - 1) for f in (file, first)) * 5e-7
    return (float(ours[furthest]), float(theirs)), bool(apart[furthest] <= 1e-3 * abs(theirs) + rounding)


def require_agreement(file: TrajectoryFile, first: TrajectoryFile, fields: Collection[str] | None = None) -> None:
    """Raise DataError with the first of `differences`."""
    for line in differences(file, first, fields)[:1]:
        raise DataError(f"{line}; what differs belongs into a regime of its own")
