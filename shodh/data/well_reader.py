"""Reader of The Well's HDF5 layout: one file, snapshots by trajectory and frame."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from shodh.data.formats.base import DescribedFile, rescale_
from shodh.data.hdf5 import H5PY_ERRORS, PlainSnapshots, damaged, open_hdf5
from shodh.data.well import is_finite
from shodh.data.well_header import StoredField, WellHeader, read_header
from shodh.core.errors import DataError
from shodh.schema.fields import Boundary, Field
from shodh.ops.reading import can_read_into, read_snapshot


class WellFile(DescribedFile):
    """One file of trajectories.

    A file without our attribute ``lengths`` has boxes of cells times spacing (coordinates taken as cell centres). The
    header is read and checked when the object is made, and the file closed again. Reading opens it once per
    process: a handle that a forked worker inherited is dropped, never shared, and a pickled object carries none.

    Parameters
    ----------
    path : path-like

    Raises
    ------
    DataError
        If the file is missing, truncated, not HDF5, or not a consistent file of The Well's layout; if the two ends
        of an axis differ.
    """

    header: WellHeader

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._handle: h5py.File | None = None
        self._datasets: dict[str, tuple[h5py.Dataset, PlainSnapshots | None]] = {}
        self._process = 0
        self._scratch: dict[tuple[int, ...], np.ndarray] = {}
        try:
            with open_hdf5(self.path) as file:
                self.header = read_header(file, str(self.path))
        except H5PY_ERRORS as error:  # damage can also show up while the header is read
            raise damaged(self.path, error) from error

    @property
    def format(self) -> str:
        return "well"

    def field(self, name: str) -> Field:
        """One field; DataError with the names there are if it is missing."""
        return self.stored(name).field

    @property
    def placement(self) -> dict[str, str]:
        """Placement of each vector field; "center" where the file does not say."""
        return {name: f.placement for name, f in self.fields.items() if f.kind == "vector"}

    def stored(self, name: str) -> StoredField:
        """The stored field ``name``; DataError with the names there are if it is missing."""
        if name in self.header.fields:
            return self.header.fields[name]
        if name in self.header.tensor_fields:
            raise DataError(f"{self.path}: field {name!r} is a rank-2 tensor; only scalars and vectors are supported")
        raise DataError(f"{self.path}: there is no field {name!r}; there are {sorted(self.header.fields)}")

    def read(
        self,
        name: str,
        trajectory: int,
        frames: range,
        out: np.ndarray,
        *,
        finite: bool = True,
        shift: float = 0.0,
        scale: float = 1.0,
    ) -> None:
        """Read ``(x - shift) / scale`` of frames of one field, components first.

        Snapshots that lie in the file as plain float32 are read past HDF5 if `shodh.ops` is built, in one pass over
        memory; with the same bits and the same errors.

        Parameters
        ----------
        name : str
        trajectory : int
        frames : range
            Frames to read, in order; ignored for a static field.
        out : ndarray, float32
            ``[len(frames), C, *grid]``, or ``[C, *grid]`` for a static field; C is the number of space dimensions
            for a vector and 1 for a scalar. May be a view with any strides.
        finite : bool
            Refuse NaN and infinity.
        shift, scale : float
            Of float32 arithmetic.

        Raises
        ------
        DataError
            If the values cannot be read, or hold NaN or infinity: names file, field, trajectory and frame.
        """
        stored = self.stored(name)
        if not 0 <= trajectory < self.num_trajectories:
            raise IndexError(f"trajectory {trajectory} of {self.num_trajectories} in {self.path}")
        leading = (trajectory,) if stored.sample_varying else ()
        where = f"trajectory {trajectory}"
        if not stored.time_varying:
            self._snapshot(stored, leading, out, shift, scale, finite, where)
            return
        if frames and not (0 <= min(frames) and max(frames) < self.num_frames):
            raise IndexError(f"frames {frames} of {self.num_frames} in {self.path}")
        for target, frame in zip(out, frames, strict=True):
            self._snapshot(stored, (*leading, frame), target, shift, scale, finite, f"{where}, frame {frame}")

    def close(self) -> None:
        """Close the handle of this process; the next read opens it again."""
        if self._handle is not None:
            self._datasets.clear()
            self._handle.close()
            self._handle = None

    def __enter__(self) -> WellFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handle": None, "_datasets": {}, "_scratch": {}}

    def __repr__(self) -> str:
        return f"WellFile({str(self.path)!r}, grid={self.grid}, {self.num_trajectories} x {self.num_frames} frames)"

    def _snapshot(
        self,
        stored: StoredField,
        index: tuple[int, ...],
        out: np.ndarray,
        shift: float,
        scale: float,
        finite: bool,
        where: str,
    ) -> None:
        """One snapshot into ``out`` [C, *grid]."""
        values = None
        try:
            dataset, plain = self._dataset(stored, len(index))
            fits = plain is not None and can_read_into(out) and out.shape == self._snapshot_shape(stored)
            offset = plain.offset(index) if plain is not None and fits else None
            if plain is not None and offset is not None:
                good = read_snapshot(plain.descriptor, offset, out, shift=shift, scale=scale, finite=finite)
            else:
                values = self._values(stored, dataset, index, out)
                good = not finite or is_finite(values)
        except H5PY_ERRORS as error:
            raise damaged(self.path, error) from error
        if not good:
            raise DataError(f"{self.path}: field {stored.field.name!r} holds NaN or infinity in {where}")
        if values is not None:
            _scatter(stored, values, out)
            rescale_(out, shift, scale)

    def _dataset(self, stored: StoredField, leading: int) -> tuple[h5py.Dataset, PlainSnapshots | None]:
        """The dataset of a field, and its plain snapshots if all of them are."""
        file = self._file()
        if stored.dataset not in self._datasets:
            dataset = file[stored.dataset]
            whole = dataset.shape[leading:] == stored.shape(1, 1, self.grid)[leading:] and all(stored.varying)
            self._datasets[stored.dataset] = dataset, PlainSnapshots.of(dataset, leading) if whole else None
        return self._datasets[stored.dataset]

    def _snapshot_shape(self, stored: StoredField) -> tuple[int, ...]:
        return (stored.field.num_components(len(self.grid)), *self.grid)

    def _values(
        self, stored: StoredField, dataset: h5py.Dataset, index: tuple[int, ...], out: np.ndarray
    ) -> np.ndarray:
        """One snapshot as it is stored, in float32: in its place in ``out`` if it fits, else in a buffer."""
        shape = stored.shape(1, 1, self.grid)[stored.sample_varying + stored.time_varying :]
        fits = stored.field.kind == "scalar" and all(stored.varying)
        values = out[0] if fits and out.dtype == np.float32 and out.flags.c_contiguous else self._buffer(shape)
        if dataset.dtype.kind == "f":
            dataset.read_direct(values, source_sel=(*index, ...))
        else:
            values[...] = dataset[(*index, ...)]
        return values

    def _buffer(self, shape: tuple[int, ...]) -> np.ndarray:
        if shape not in self._scratch:
            self._scratch[shape] = np.empty(shape, dtype=np.float32)
        return self._scratch[shape]

    def _file(self) -> h5py.File:
        if self._process != os.getpid():
            # A handle inherited through fork shares the parent's file description; this process opens its own.
            self.close()
            self._process = os.getpid()
        if self._handle is None:
            self._handle = open_hdf5(self.path)
        return self._handle


def _scatter(stored: StoredField, values: np.ndarray, out: np.ndarray) -> None:
    """Put the ``values`` of a snapshot as it is stored into ``out`` [C, *grid], unless they lie there."""
    vector = stored.field.kind == "vector"
    if vector and all(stored.varying):
        # Slab by slab, so that the components that lie side by side are fetched into the cache once.
        for slab in range(len(values)):
            for component in range(len(out)):
                out[component][slab] = values[slab, ..., component]
    elif not np.may_share_memory(values, out):
        for component in range(len(out)):  # a length-1 axis broadcasts
            out[component] = values[..., component] if vector else values
