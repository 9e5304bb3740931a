"""Arrays of one's own: HDF5 with one dataset a field, whose axes are stated once for all.

With ``axes: ntxyz``, in the configuration or as an attribute of the file::

    temperature    [N, T, X, Y, Z]         a scalar
    velocity       [N, T, X, Y, Z, 3]      a vector: components last, or where ``axes`` has a c
    solid          [N, X, Y, Z], [X, Y, Z] a field that does not change, of each trajectory or of all
    u, v, w        [N, T, X, Y, Z]         joined to the vector velocity; name_x, name_y, name_z: to name
    time           [T], [N, T]             optional
    x, y, z        [X], [Y], [Z]           optional coordinates, from which lengths follow
    viscosity      (), [N]                 a parameter

Attributes of the file that are used if the configuration is silent: ``axes``, ``lengths``, ``boundary``; of a dataset:
``units``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import get_args

import h5py
import numpy as np

from shodh.data import hdf5
from shodh.data.formats.arrays import ArrayField, ArrayHeader
from shodh.data.formats.base import FileHints
from shodh.data.formats.dpot import array_sizes, named_fields
from shodh.data.well_header import axis_length
from shodh.core.errors import ConfigError, DataError
from shodh.schema.fields import AXES, Boundary, Field

TIMES = ("time", "t")
Shapes = Mapping[str, tuple[int, ...]]


def is_named(file: h5py.File, hints: FileHints) -> bool:
    """Whether axes are stated, and a dataset has as many."""
    axes = stated_axes(file, hints)
    return bool(axes) and any(len(s) >= len(axes.replace("c", "")) for s in shapes_of(file).values())


def stated_axes(file: h5py.File, hints: FileHints) -> str:
    """Letters of the axes, from the configuration or from the file; empty if neither states them."""
    return hints.axes or hdf5.text(hdf5.single(file, "axes", file.filename, ""))


def shapes_of(file: h5py.File) -> Shapes:
    """Shapes of the datasets at the root."""
    links = {name: file.get(name, getlink=True) for name in file}
    items = {name: file.get(name) for name, link in links.items() if isinstance(link, h5py.HardLink)}
    return {n: tuple(map(int, d.shape)) for n, d in items.items() if isinstance(d, h5py.Dataset) and d.shape is not None}


def describe(file: h5py.File, path: Path, hints: FileHints) -> ArrayHeader:
    """Header of one file."""
    where = str(path)
    axes = stated_axes(file, hints)
    for name in file:
        hdf5.member(file, name, where)  # Links are refused.
    every = shapes_of(file)
    if not axes:
        raise ConfigError(f"{path}: state the axes that its datasets share, for example axes: ntxyz; {_shown(every)}")
    ndim = sum(a in AXES for a in axes)
    rest = {n: s for n, s in every.items() if len(s) >= max(2, ndim) and n not in TIMES}
    letters = _letters(rest, axes, path)
    main = max(letters, key=lambda n: ("t" in letters[n], "n" in letters[n]))
    sizes = array_sizes(letters[main], rest[main], path)
    grid = tuple(sizes[a] for a in AXES if a in sizes)
    fields = _joined(_fields(file, letters, rest, len(grid), hints, path), len(grid))
    count, said = sizes.get("n", 1), [n for n in rest if "units" in file[n].attrs]
    parameters = _parameters(file, every, count, where)
    lengths, boundary, time = _lengths(file, grid, where), _boundary(file, len(grid), where), _time(file, where)
    notes = [f"{n}: {'1' if n != 'boundary' else 'periodic'} is assumed; the file does not say"
             for n, v in (("boundary", boundary), ("lengths", lengths), ("time_step", time)) if v is None]  # fmt: skip
    notes += [f"fields: {n} is joined from {', '.join(name for (name,) in f.arrays)}"
              for n, f in fields.items() if len(f.arrays) > 1]  # fmt: skip
    unread = sorted(set(file) - {*rest, *parameters, *TIMES, *AXES})
    notes += [f"datasets: {', '.join(unread)} not read"] if unread else []
    frames = sizes["t"]
    periodic: Boundary = "periodic"
    if time is not None and time.shape not in ((frames,), (count, frames)):
        raise DataError(f"{path}: time has the shape {time.shape}; expected ({frames},) or ({count}, {frames})")
    return ArrayHeader(
        grid, lengths or (1.0,) * len(grid), boundary or (periodic,) * len(grid), count,
        np.arange(float(frames)) if time is None else time, fields, parameters, tuple(notes),
        with_units=frozenset(n for n, f in fields.items() if f.arrays[0][0] in said), timeless=time is None,
    )  # fmt: skip


def _forms(axes: str) -> list[str]:
    """Letters of arrays that go with ``axes``: with and without components, time, and trajectories."""
    plain, full = axes.replace("c", ""), axes if "c" in axes else axes + "c"
    static = [form.replace("t", "") for form in (plain, full)]
    return list(dict.fromkeys([plain, full, *static, *(form.replace("n", "") for form in static)]))


def _letters(shapes: Shapes, axes: str, path: Path) -> dict[str, str]:
    """Letters of the axes of every array: those forms in which all agree in the sizes that they share."""
    plain = axes.replace("c", "")
    for reference in (s for form in _forms(axes)[:2] for s in shapes.values() if len(s) == len(form)):
        sizes = array_sizes(plain, _without_components(reference, axes), path)
        found = {}
        for name, shape in shapes.items():
            fits = (f for f in _forms(axes) if len(f) == len(shape)
                    and all(sizes.get(a, n) == n for a, n in zip(f, shape)))  # fmt: skip
            found[name] = next(fits, "")
        if all(found.values()) and any("t" in f for f in found.values()):
            return found
    raise DataError(
        f"{path}: the datasets do not fit the axes {axes!r}; expected every one to have these, a vector its components "
        f"{'at c' if 'c' in axes else 'last'}, a static field no t; {_shown(shapes)}"
    )


def _without_components(shape: tuple[int, ...], axes: str) -> tuple[int, ...]:
    plain = axes.replace("c", "")
    if len(shape) == len(plain):
        return shape
    position = axes.index("c") if "c" in axes else len(plain)
    return shape[:position] + shape[position + 1 :]


def _fields(
    file: h5py.File, letters: Mapping[str, str], shapes: Shapes, ndim: int, hints: FileHints, path: Path
) -> dict[str, ArrayField]:
    fields: dict[str, ArrayField] = {}
    for name, form in letters.items():
        components = shapes[name][form.index("c")] if "c" in form else 1
        if components not in (1, ndim) and (hints.channels is None or len(letters) > 1):
            raise DataError(
                f"{path}: {name!r} {list(shapes[name])} has {components} components with the axes {form!r}; a vector has "
                f"{ndim}: correct the axes, write one dataset a field, or a single dataset and name its channels"
            )
        names = (name,) * components
        if hints.channels is not None:
            names = hints.channels
            if len(letters) > 1 or len(names) != components:
                raise ConfigError(
                    f"{path}: {len(names)} channels are named; that goes with a single dataset of as many channels, and "
                    f"{_shown(shapes)}"
                )
        units = hdf5.text(hdf5.single(file[name], "units", str(path), "1"))
        for key, stored in named_fields(names, form, (name,), ndim, path).items():
            fields[key] = replace(stored, field=replace(stored.field, units=units, static="t" not in form))
    return fields


def _joined(fields: dict[str, ArrayField], ndim: int) -> dict[str, ArrayField]:
    """Scalars that are components, by their names, as one vector."""
    stems = {"velocity": ("u", "v", "w")[:ndim]}
    stems |= {n[:-2]: tuple(f"{n[:-2]}_{a}" for a in AXES[:ndim]) for n in fields if n.endswith("_x")}
    for name, parts in stems.items():
        found = [fields[p] for p in parts if p in fields and fields[p].field.kind == "scalar"]
        if ndim > 1 and name and name not in fields and len(found) == ndim and len({f.axes for f in found}) == 1:
            whole = Field(name, "vector", units=found[0].field.units, static=found[0].field.static)
            arrays = tuple(f.arrays[0] for f in found)
            fields = {n: f for n, f in fields.items() if n not in parts}
            fields[name] = ArrayField(whole, found[0].axes, arrays, "", found[0].channels)
    return fields


def _time(file: h5py.File, path: str) -> np.ndarray | None:
    name = next((n for n in TIMES if n in file), None)
    return None if name is None else np.asarray(hdf5.values(file, name, path), dtype=np.float64)


def _lengths(file: h5py.File, grid: tuple[int, ...], path: str) -> tuple[float, ...] | None:
    """The attribute, or from coordinates of all axes."""
    stored = hdf5.attribute(file, "lengths", path, None)
    if stored is not None:
        lengths = tuple(float(v) for v in np.atleast_1d(stored))
        if len(lengths) != len(grid):
            raise DataError(f"{path}: attribute 'lengths' has {len(lengths)} entries for {len(grid)} axes")
        return lengths
    coordinates = [hdf5.values(file, a, path).astype(np.float64) for a in AXES[: len(grid)] if a in file]
    if [c.shape for c in coordinates] != [(n,) for n in grid]:
        return None
    return tuple(axis_length(a, c, path) for a, c in zip(AXES, coordinates))


def _boundary(file: h5py.File, ndim: int, path: str) -> tuple[Boundary, ...] | None:
    stored = hdf5.attribute(file, "boundary", path, None)
    if stored is None:
        return None
    kinds = tuple(hdf5.text(v).lower() for v in np.atleast_1d(stored))
    if len(kinds) != ndim or set(kinds) - set(get_args(Boundary)):
        raise DataError(f"{path}: attribute 'boundary' is {list(kinds)}; expected {ndim} of {list(get_args(Boundary))}")
    return kinds  # type: ignore[return-value]


def _parameters(file: h5py.File, shapes: Shapes, count: int, path: str) -> dict[str, float | np.ndarray]:
    names = [n for n, s in shapes.items() if s in ((), (count,)) and n not in (*TIMES, *AXES)]
    stored = {n: hdf5.values(file, n, path).astype(np.float64) for n in names}
    return {n: float(v) if v.ndim == 0 else v for n, v in stored.items()}


def _shown(shapes: Shapes) -> str:
    return "the file holds " + ", ".join(f"{n} {list(s)}" for n, s in [*shapes.items()][:8])
