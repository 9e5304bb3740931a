"""Reader of files whose fields are plain arrays: a format only has to say which array and axis is what."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import h5py
import numpy as np

from shodh.data.formats.base import FileHeader, FileHints, TrajectoryFile, rescale_
from shodh.data.hdf5 import H5PY_ERRORS, check_dataset, damaged, member, open_hdf5
from shodh.data.well import is_finite
from shodh.core.errors import ConfigError, DataError
from shodh.schema.fields import AXES, Field

# An open HDF5 file, or arrays by name.
Store: TypeAlias = Mapping[str, Any]

MAX_TRAJECTORIES = 10_000_000


@dataclass(frozen=True)
class ArrayField:
    """A field and the arrays it is kept in.

    Parameters
    ----------
    field : Field
    axes : str
        Letters of the axes of each array in order: n (trajectory), t, x, y, z, c (channel).
    arrays : tuple of tuples of str
        Names of arrays: one tuple a component, or a single one if all components are channels of one array. A tuple
        has one name, or one for each trajectory or frame (``along``).
    along : {"", "n", "t"}
        What the names of a tuple enumerate.
    channels : tuple of int, optional
        Channel of each component, where the arrays have an axis c.
    """

    field: Field
    axes: str
    arrays: tuple[tuple[str, ...], ...]
    along: str = ""
    channels: tuple[int, ...] | None = None

    @property
    def time_is_inner(self) -> bool:
        """Whether frames are interleaved in the array, so that several are better read at once."""
        return "t" in self.axes and any(a in self.axes[: self.axes.index("t")] for a in AXES)


@dataclass(frozen=True)
class ArrayHeader(FileHeader):
    """Header of a file of named arrays; ``with_units``: the fields whose units the file states."""

    with_units: frozenset[str] = frozenset()

    def with_hints(self, hints: FileHints, path: Path) -> ArrayHeader:
        """The header with what the user says in the place of what was assumed."""
        for name in ("boundary", "lengths"):
            given = getattr(hints, name)
            if given is not None and len(given) != len(self.grid):
                raise ConfigError(f"{path}: {name} {list(given)} has {len(given)} entries, the grid is {self.grid}")
        said = [n for n in ("boundary", "lengths", "time_step") if getattr(hints, n) is not None]
        notes = tuple(n for n in self.notes if n.replace(":", " ").split()[0] not in said)
        if without := [n for n in self.fields if n not in self.with_units]:
            notes += (f"units: '1' is assumed for {', '.join(without)}",)
        time = self.time if hints.time_step is None else _with_step(self.time, hints.time_step)
        return replace(
            self,
            boundary=hints.boundary or self.boundary,
            lengths=tuple(float(v) for v in hints.lengths or self.lengths),
            time=time,
            notes=notes,
        )


def _with_step(time: np.ndarray, step: float) -> np.ndarray:
    """Times ``[(B,) T]`` scaled so that ``step`` is the mean one: a later part of a trajectory stays later."""
    mean = (time[..., -1:] - time[..., :1]) / max(1, time.shape[-1] - 1)
    if not (mean > 0).all():  # One frame, or times that are none.
        return time * step if time.shape[-1] == 1 else np.broadcast_to(np.arange(time.shape[-1]) * step, time.shape)
    return time / mean * step


Describe = Callable[[Any, Path, FileHints], ArrayHeader]
Load = Callable[[Path, FileHints], Store]


class ArrayFile(TrajectoryFile):
    """A `TrajectoryFile` over named arrays.

    Parameters
    ----------
    path : path-like
    format : str
    describe : callable
        ``describe(store, path, hints)`` gives the `ArrayHeader`.
    hints : FileHints
    load : callable, optional
        ``load(path, hints)`` gives the arrays by name; HDF5 by default. A function of a module, so that files pickle.

    Raises
    ------
    DataError
        If the file is missing, damaged, not of this format, or claims what it does not have.
    """

    header: ArrayHeader

    def __init__(
        self,
        path: str | os.PathLike[str],
        format: str,
        describe: Describe,
        hints: FileHints,
        load: Load | None = None,
    ) -> None:
        super().__init__(path, format)
        self._hints, self._load = hints, load
        try:
            header = describe(self._opened(), self.path, hints).with_hints(hints, self.path)
            self.header = _check(header, self._opened(), self.path)
        except H5PY_ERRORS as error:  # damage can also show up while the header is read
            raise damaged(self.path, error) from error
        finally:
            self.close()

    def _open(self) -> Store:
        return open_hdf5(self.path) if self._load is None else self._load(self.path, self._hints)

    def _read(
        self, stored: ArrayField, trajectory: int, frames: range, out: np.ndarray, finite: bool, shift: float, scale: float
    ) -> None:
        if stored.time_is_inner and frames.step > 0:
            self._read_block(stored, trajectory, frames, out, finite)
        else:
            for target, frame in zip(out, frames):
                self._read_block(stored, trajectory, range(frame, frame + 1), target[None], finite)
        rescale_(out, shift, scale)

    def _read_block(self, stored: ArrayField, trajectory: int, frames: range, out: np.ndarray, finite: bool) -> None:
        """Frames of one field into ``out`` [T, C, *grid]; where each frame has its own array, ``frames`` is one."""
        number = {"n": trajectory, "t": frames.start, "": 0}[stored.along]
        per_array = out.shape[1] // len(stored.arrays)
        for position, names in enumerate(stored.arrays):
            target = out[:, position * per_array : (position + 1) * per_array]
            index, shape, letters = self._selection(stored, trajectory, frames)
            values = self._fetch(names[number], index, shape)
            if finite and not is_finite(values):
                where = f"trajectory {trajectory}, frames {list(frames)}"
                raise DataError(f"{self.path}: field {stored.field.name!r} holds NaN or infinity in {where}")
            _scatter(values, letters, stored.channels, target)

    def _selection(
        self, stored: ArrayField, trajectory: int, frames: range
    ) -> tuple[tuple[int | slice, ...], tuple[int, ...], str]:
        """Index into an array, the shape of what it selects, and the letters of its axes."""
        first = min(stored.channels) if stored.channels else 0
        last = max(stored.channels) + 1 if stored.channels else 1
        whole = {a: slice(0, n) for a, n in zip(AXES, self.grid)}
        chosen: dict[str, int | slice] = {
            "n": trajectory,
            "t": slice(frames.start, frames.stop, frames.step),
            "c": slice(first, last),
            **whole,
        }
        sizes = {"t": len(frames), "c": last - first, **dict(zip(AXES, self.grid))}
        letters = stored.axes.replace("n", "")
        return tuple(chosen[a] for a in stored.axes), tuple(sizes[a] for a in letters), letters

    def _fetch(self, name: str, index: tuple[int | slice, ...], shape: tuple[int, ...]) -> np.ndarray:
        """Part of an array as float32, in a buffer that the next call may reuse."""
        values = self._buffer(shape)
        try:
            array = self._opened()[name]
            if isinstance(array, h5py.Dataset) and array.dtype.kind == "f":
                array.read_direct(values, source_sel=index)
            else:
                values[...] = array[index]
        except H5PY_ERRORS as error:
            raise damaged(self.path, error) from error
        return values


def _scatter(values: np.ndarray, letters: str, channels: tuple[int, ...] | None, out: np.ndarray) -> None:
    """Put ``values`` with the axes ``letters`` into ``out`` [T, C, *grid]."""
    for letter in "tc":
        if letter not in letters:
            values, letters = values[None], letter + letters
    order = "tc" + "".join(a for a in AXES if a in letters)
    values = values.transpose([letters.index(a) for a in order])
    if channels is None:
        out[...] = values
        return
    for component, channel in enumerate(channels):
        out[:, component] = values[:, channel - min(channels)]


def _check(header: ArrayHeader, store: Store, path: Path) -> ArrayHeader:
    """Check every array of a header against it, before anything is read."""
    if not header.fields:
        raise DataError(f"{path}: there are no fields")
    if not (len(header.grid) in (1, 2, 3) and min(header.grid) > 0):
        raise DataError(f"{path}: the grid is {header.grid}; expected one to three axes with cells")
    if not all(math.isfinite(v) and v > 0 for v in header.lengths) or not np.isfinite(header.time).all():
        raise DataError(f"{path}: lengths {header.lengths} must be positive, and times finite")
    if not 1 <= header.num_trajectories <= MAX_TRAJECTORIES or header.num_frames < 1:
        raise DataError(f"{path}: {header.num_trajectories} trajectories of {header.num_frames} frames")
    for stored in header.fields.values():
        for names in stored.arrays:
            for name in names:
                _check_array(header, stored, store, name, path)
    return header


def _check_array(header: ArrayHeader, stored: ArrayField, store: Store, name: str, path: Path) -> None:
    array = member(store, name, str(path)) if isinstance(store, h5py.Group) else store.get(name)
    if array is None or isinstance(array, h5py.Group):
        raise DataError(f"{path}: dataset {name!r} is missing")
    if isinstance(array, h5py.Dataset):
        check_dataset(array, str(path))
    if array.dtype.kind not in ("buif" if stored.field.static else "f"):
        raise DataError(f"{path}: {name!r} has the type {array.dtype}; expected floating point")
    sizes = {"n": header.num_trajectories, "t": header.num_frames, **dict(zip(AXES, header.grid))}
    if stored.channels and "c" in stored.axes:
        channels = array.shape[stored.axes.index("c")] if len(array.shape) == len(stored.axes) else 0
        sizes["c"] = channels if channels > max(stored.channels) else max(stored.channels) + 1
    expected = tuple(sizes[a] for a in stored.axes)
    if tuple(array.shape) != expected:
        raise DataError(f"{path}: {name!r} has the shape {tuple(array.shape)}, expected {expected} ({stored.axes})")
