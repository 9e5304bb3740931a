"""Cutouts of the Johns Hopkins Turbulence Databases, of the client givernylocal and of the older web service.

``velocity_0001`` (or ``Velocity_0001``) ``[z, y, x, 3]`` and ``pressure_0001`` ``[z, y, x, 1]``, one dataset a time
index, with the coordinates ``xcoor``, ``ycoor``, ``zcoor``. A file is one trajectory. The lengths of the coordinates
say whether axes come as z, y, x or as x, y, z; a cube tells nothing and is taken as z, y, x, unless hints say ``xyz``.
"""

from __future__ import annotations

import re
from pathlib import Path

import h5py
import numpy as np

from shodh.data import hdf5
from shodh.data.formats.arrays import ArrayField, ArrayHeader
from shodh.data.formats.base import FileHints
from shodh.data.well_header import axis_length
from shodh.core.errors import ConfigError, DataError
from shodh.schema.fields import AXES, Field

COORDINATES = ("xcoor", "ycoor", "zcoor")
NAME = re.compile(r"([A-Za-z]+)_(\d+)")


def is_jhtdb(file: h5py.File) -> bool:
    return any(NAME.fullmatch(n) for n in file) and any(c in file for c in COORDINATES)


def describe(file: h5py.File, path: Path, hints: FileHints) -> ArrayHeader:
    """Header of one cutout."""
    where = str(path)
    frames = _frames(file, where)
    coordinates = [hdf5.values(file, c, where).astype(np.float64).ravel() for c in COORDINATES]
    if not all(len(c) and np.isfinite(c).all() for c in coordinates):
        raise DataError(f"{path}: the coordinates {COORDINATES} must be finite lists")
    grid = tuple(len(c) for c in coordinates)
    fields, notes = {}, []
    for name, datasets in frames.items():
        shape = tuple(int(n) for n in hdf5.dataset(file, next(iter(datasets.values())), where).shape)
        axes = _axes(shape, grid, name, hints.axes, where)
        vector = shape[3] == 3
        channels = (0, 1, 2) if vector else (0,)
        names = (tuple(datasets.values()),)
        fields[name] = ArrayField(Field(name, "vector" if vector else "scalar"), axes, names, "t", channels)
    if len(set(grid)) == 1 and hints.axes is None:
        notes.append("axes: z, y, x is assumed (a cube does not tell; axes: xyz says otherwise)")
    indices = next(iter(frames.values()))
    notes += [
        "boundary: open is assumed; a cutout that spans the whole box may be periodic",
        "time_step: one unit a time index is assumed; see the page of the data set",
    ]
    lengths = tuple(axis_length(a, c, where) for a, c in zip(AXES, coordinates))
    return ArrayHeader(
        grid, lengths, ("open",) * 3, 1, np.array([*indices], dtype=np.float64), fields, {}, tuple(notes)
    )


def _frames(file: h5py.File, path: str) -> dict[str, dict[int, str]]:
    """``{field: {time index: dataset}}``, the same indices for every field, in their order."""
    found: dict[str, dict[int, str]] = {}
    for dataset in file:
        if match := NAME.fullmatch(dataset):
            found.setdefault(match[1].lower(), {})[int(match[2])] = dataset
    if not found:
        raise DataError(f"{path}: no dataset is called like velocity_0001")
    first, *rest = (sorted(indices) for indices in found.values())
    if any(indices != first for indices in rest):
        counts = {name: len(indices) for name, indices in found.items()}
        raise DataError(f"{path}: the fields have different time indices {counts}; cut them out for the same times")
    return {name: dict(sorted(indices.items())) for name, indices in found.items()}


def _axes(shape: tuple[int, ...], grid: tuple[int, ...], name: str, stated: str | None, path: str) -> str:
    known = {"zyxc": grid[::-1], "xyzc": grid}
    if stated is not None and stated.removesuffix("c") + "c" not in known:
        raise ConfigError(f"{path}: axes {stated!r}; expected zyx or xyz, as the cutout stores each frame")
    for axes, expected in known.items():
        if len(shape) == 4 and shape[3] in (1, 3) and shape[:3] == expected and axes.startswith(stated or ""):
            return axes
    said = f", axes are stated as {stated}" if stated else ""
    raise DataError(f"{path}: {name!r} has the shape {shape}, the coordinates x, y, z have the lengths {grid}{said}")
