"""Reader of The Well's HDF5 layout: one file, snapshots by trajectory and frame."""

from __future__ import annotations

import os
from typing import Any

import h5py
import numpy as np

from shodh.data.formats.base import TrajectoryFile, rescale_
from shodh.data.hdf5 import H5PY_ERRORS, PlainSnapshots, damaged, open_hdf5
from shodh.data.well import is_finite
from shodh.data.well_header import StoredField, WellHeader, read_header
from shodh.core.errors import DataError
from shodh.ops.reading import can_read_into, read_snapshot


class WellFile(TrajectoryFile):
    """One file of trajectories.

    A file without our attribute ``lengths`` has boxes of cells times spacing (coordinates taken as cell centres).
    Snapshots that lie in the file as plain float32 are read past HDF5 if `shodh.ops` is built, in one pass over memory;
    with the same bits and the same errors.

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
        super().__init__(path, "well")
        self._datasets: dict[str, tuple[h5py.Dataset, PlainSnapshots | None]] = {}
        try:
            with open_hdf5(self.path) as file:
                self.header = read_header(file, str(self.path))
        except H5PY_ERRORS as error:  # damage can also show up while the header is read
            raise damaged(self.path, error) from error

    def stored(self, name: str) -> StoredField:
        """The stored field ``name``; DataError with the names there are if it is missing."""
        if name in self.header.tensor_fields:
            raise DataError(f"{self.path}: field {name!r} is a rank-2 tensor; only scalars and vectors are supported")
        found: StoredField = super().stored(name)
        return found

    def close(self) -> None:
        """Close the handle of this process; the next read opens it again."""
        self._datasets.clear()
        super().close()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_datasets": {}}

    def _open(self) -> h5py.File:
        return open_hdf5(self.path)

    def _read(
        self, stored: StoredField, trajectory: int, frames: range, out: np.ndarray, finite: bool, shift: float, scale: float
    ) -> None:
        leading = (trajectory,) if stored.sample_varying else ()
        for target, frame in zip(out, frames):
            index, where = leading, f"trajectory {trajectory}"
            if stored.time_varying:
                index, where = (*leading, frame), f"{where}, frame {frame}"
            self._snapshot(stored, index, target, shift, scale, finite, where)

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
        file = self._opened()
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
