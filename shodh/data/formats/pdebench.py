"""PDEBench (Takamoto et al. 2022): compressible and incompressible flow, shallow water, reaction-diffusion, Darcy.

Layouts as published on DaRUS; N trajectories, channels last where there is an axis of them::

    CFD 1-3-D          Vx, Vy, Vz, density, pressure [N, T, X(, Y, Z)]; t-coordinate has T + 1 entries
    1-D scalars        tensor [N, T, X]
    Darcy              nu [N, X, Y], tensor [N, 1, X, Y]
    SWE, diffusion     one group a trajectory, "0000" ...: data [T, X(, Y), C], grid/x, grid/y, grid/t
    incompressible     velocity [N, T, X, Y, 2], particles [N, T, X, Y, 1], force [N, X, Y, 2], t [N, T]

Boundaries stand in the papers and in file names alone; what was assumed is in the notes.
"""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from shodh.data import hdf5
from shodh.data.formats.arrays import ArrayField, ArrayHeader
from shodh.data.formats.base import FileHints
from shodh.data.formats.names import words
from shodh.data.well_header import axis_length
from shodh.core.errors import DataError
from shodh.schema.fields import AXES, Boundary, Field

VELOCITY = ("Vx", "Vy", "Vz")
# Of `data` in the groups, by the number of channels.
GROUP_CHANNELS = {1: ("height",), 2: ("activator", "inhibitor")}


def is_pdebench(file: h5py.File) -> bool:
    names = set(file)
    flow = bool(names & set(VELOCITY)) or {"density", "t-coordinate"} <= names or {"velocity", "particles"} <= names
    return flow or "tensor" in names or any(_is_sample(n) for n in names)


def describe(file: h5py.File, path: Path, hints: FileHints) -> ArrayHeader:
    """Header of a file of any of the layouts."""
    names = set(file)
    if {"velocity", "particles"} <= names:
        return _incompressible(file, str(path))
    if names & {*VELOCITY, "density"}:
        return _compressible(file, path)
    if "nu" in names:
        return _darcy(file, str(path))
    if "tensor" in names:
        return _scalar(file, path)
    return _groups(file, path)


def _is_sample(name: str) -> bool:
    return name.isdecimal() and len(name) >= 4


def _shape(file: h5py.File, name: str, ndim: tuple[int, ...], path: str) -> tuple[int, ...]:
    shape = hdf5.dataset(file, name, path).shape
    if len(shape) not in ndim:
        raise DataError(f"{path}: {name!r} has the shape {shape}; expected one of {list(ndim)} axes")
    return tuple(int(n) for n in shape)


def _lengths(parent: h5py.Group, pattern: str, grid: tuple[int, ...], path: str) -> tuple[tuple[float, ...], list[str]]:
    """Lengths from coordinates named ``pattern``; 1 and a note where there are none."""
    lengths, notes = [], []
    for axis, cells in zip(AXES, grid):
        name = pattern.format(axis)
        if hdf5.member(parent, name, path) is None:
            lengths.append(1.0)
            notes.append(f"lengths along {axis}: the file has no {name!r}; 1 is assumed")
            continue
        coordinates = hdf5.values(parent, name, path).astype(np.float64).ravel()
        if len(coordinates) == cells + 1:  # faces instead of centres
            coordinates = 0.5 * (coordinates[1:] + coordinates[:-1])
        if len(coordinates) != cells or not np.isfinite(coordinates).all():
            raise DataError(f"{path}: {name!r} has {len(coordinates)} entries for {cells} cells, all must be finite")
        lengths.append(axis_length(axis, coordinates, path))
    return tuple(lengths), notes


def _times(parent: h5py.Group, name: str, frames: int, path: str) -> tuple[np.ndarray, list[str]]:
    """Times of the frames: a list in the file may be one entry longer (the end of the last step)."""
    if hdf5.member(parent, name, path) is None:
        return np.arange(float(frames)), [f"time_step: the file has no {name!r}; 1 is assumed"]
    time = hdf5.values(parent, name, path).astype(np.float64)
    if time.ndim not in (1, 2) or time.shape[-1] not in (frames, frames + 1):
        raise DataError(f"{path}: {name!r} has the shape {time.shape}; expected {frames} or {frames + 1} times")
    return time[..., :frames], []


def _by_name(path: Path) -> tuple[Boundary, str]:
    """The boundary that a word of the file's name states: trans (transmissive), or periodic."""
    stated = {"trans": "open", "transmissive": "open", "outgoing": "open", "periodic": "periodic"}
    found = {word: stated[word] for word in words(path.stem) if word in stated}
    if len(set(found.values())) > 1:
        return "periodic", f"boundary: periodic is assumed; the file's name states {' and '.join(found)}"
    for word, kind in found.items():
        return ("open" if kind == "open" else "periodic"), f"boundary: {kind}, from {word!r} in the file's name"
    return "periodic", "boundary: periodic is assumed, as in the published sets of this kind"


def _compressible(file: h5py.File, path: Path) -> ArrayHeader:
    components = [v for v in VELOCITY if v in file]
    names = [*components, *(n for n in ("density", "pressure") if n in file)]
    count, frames, *cells = _shape(file, names[0], (3, 4, 5), str(path))
    if components and len(components) != len(cells):
        raise DataError(f"{path}: there are the velocities {components} on {len(cells)} axes; one for each is needed")
    letters = "nt" + "".join(AXES[: len(cells)])
    fields = {}
    if components:
        vector = tuple((name,) for name in components)
        fields["velocity"] = ArrayField(Field("velocity", "vector"), letters, vector)
    for name in names[len(components) :]:
        fields[name] = ArrayField(Field(name), letters, ((name,),))
    lengths, notes = _lengths(file, "{}-coordinate", tuple(cells), str(path))
    time, more = _times(file, "t-coordinate", frames, str(path))
    kind, note = _by_name(path)
    return ArrayHeader(tuple(cells), lengths, (kind,) * len(cells), count, time, fields, {}, (*notes, *more, note))


def _scalar(file: h5py.File, path: Path) -> ArrayHeader:
    count, frames, *cells = _shape(file, "tensor", (3, 4, 5), str(path))
    letters = "nt" + "".join(AXES[: len(cells)])
    lengths, notes = _lengths(file, "{}-coordinate", tuple(cells), str(path))
    time, more = _times(file, "t-coordinate", frames, str(path))
    kind, note = _by_name(path)
    fields = {"tensor": ArrayField(Field("tensor"), letters, (("tensor",),))}
    return ArrayHeader(tuple(cells), lengths, (kind,) * len(cells), count, time, fields, {}, (*notes, *more, note))


def _darcy(file: h5py.File, path: str) -> ArrayHeader:
    count, frames, *cells = _shape(file, "tensor", (4,), path)
    lengths, notes = _lengths(file, "{}-coordinate", tuple(cells), path)
    fields = {
        "tensor": ArrayField(Field("tensor"), "ntxy", (("tensor",),)),
        "nu": ArrayField(Field("nu", static=True), "nxy", (("nu",),)),
    }
    beta = hdf5.single(file, "beta", path, None)
    parameters = {} if beta is None else {"beta": float(beta)}
    notes.append("boundary: wall (the solution is zero there), as in the published set")
    return ArrayHeader(
        tuple(cells), lengths, ("wall",) * 2, count, np.arange(float(frames)), fields, parameters, tuple(notes)
    )


def _incompressible(file: h5py.File, path: str) -> ArrayHeader:
    count, frames, *cells, dimensions = _shape(file, "velocity", (5,), path)
    channels = tuple(range(len(cells)))
    if dimensions != len(cells):
        raise DataError(f"{path}: 'velocity' has {dimensions} components on {len(cells)} axes")
    fields = {
        "velocity": ArrayField(Field("velocity", "vector"), "ntxyc", (("velocity",),), channels=channels),
        "particles": ArrayField(Field("particles"), "ntxyc", (("particles",),), channels=(0,)),
    }
    if "force" in file:
        force = Field("force", "vector", static=True)
        fields["force"] = ArrayField(force, "nxyc", (("force",),), channels=channels)
    time, notes = _times(file, "t", frames, path)
    notes += ["lengths: 1 is assumed", "boundary: wall (no flow through the ends), as in the published set"]
    return ArrayHeader(tuple(cells), (1.0, 1.0), ("wall",) * 2, count, time, fields, {}, tuple(notes))


def _groups(file: h5py.File, path: Path) -> ArrayHeader:
    samples = sorted(n for n in file if _is_sample(n))
    if not samples:
        raise DataError(f"{path}: no layout of PDEBench; there are {sorted(file)[:8]}")
    where = str(path)
    frames, *cells, channels = _shape(hdf5.group(file, samples[0], where), "data", (3, 4, 5), where)
    first = hdf5.group(file, samples[0], where)
    grid = hdf5.group(first, "grid", where) if hdf5.member(first, "grid", where) is not None else first
    letters = "t" + "".join(AXES[: len(cells)]) + "c"
    names = GROUP_CHANNELS.get(channels) or tuple(f"channel_{i}" for i in range(channels))
    arrays = (tuple(f"{sample}/data" for sample in samples),)
    fields = {n: ArrayField(Field(n), letters, arrays, "n", (i,)) for i, n in enumerate(names)}
    lengths, notes = _lengths(grid, "{}", tuple(cells), where)
    time, more = _times(grid, "t", frames, where)
    kind: Boundary = "wall" if channels == 2 else "open"
    note = f"boundary: {'wall (no flux)' if channels == 2 else 'open (extrapolation)'}, as in the published set"
    return ArrayHeader(
        tuple(cells), lengths, (kind,) * len(cells), len(samples), time, fields, {}, (*notes, *more, note)
    )
