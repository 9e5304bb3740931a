"""What a file must have to be one of The Well's, and what follows from the shapes where its flags are absent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import h5py
import numpy as np

from shodh.data import hdf5
from shodh.data.well import TENSOR_GROUPS
from shodh.core.errors import DataError
from shodh.schema.fields import AXES

GROUPS = ("dimensions", "boundary_conditions", *TENSOR_GROUPS[:2])


def require_items(file: h5py.File, path: str) -> None:
    """Raise DataError with all groups, datasets and attributes that are missing, unless the file has every one."""
    if missing := list(_missing(file, path)):
        raise DataError(
            f"{path}: not a whole file of The Well's layout; missing are {', '.join(missing)} "
            "(shodh.data.write_trajectories writes them all)"
        )


def _missing(file: h5py.File, path: str) -> Iterator[str]:
    groups = {name: hdf5.member(file, name, path) for name in GROUPS}
    yield from (f"group {name!r}" for name, found in groups.items() if not isinstance(found, h5py.Group))
    there = {name: found for name, found in groups.items() if isinstance(found, h5py.Group)}
    if dimensions := there.get("dimensions"):
        if "spatial_dims" not in dimensions.attrs:
            yield "attribute 'spatial_dims' of dimensions"
            if not set(AXES) & set(dimensions):
                yield "the coordinates of its axes in dimensions"
        axes = np.atleast_1d(hdf5.attribute(dimensions, "spatial_dims", path, ()))
        yield from _datasets(dimensions, ["time", *(hdf5.text(a) for a in axes)], path)
    for name in there.get("boundary_conditions", ()):
        boundary = hdf5.member(there["boundary_conditions"], name, path)
        if isinstance(boundary, h5py.Group):
            where = f"boundary_conditions/{name}"
            yield from (f"attribute {a!r} of {where}" for a in ("bc_type", "associated_dims") if a not in boundary.attrs)
            yield from _datasets(boundary, ["mask"], path)
    for group in (there[name] for name in TENSOR_GROUPS[:2] if name in there):
        if "field_names" not in group.attrs:
            yield f"attribute 'field_names' of {group.name.strip('/')}"
        names = np.atleast_1d(hdf5.attribute(group, "field_names", path, ()))
        yield from _datasets(group, [hdf5.text(n) for n in names], path)


def _datasets(group: h5py.Group, names: list[str], path: str) -> Iterator[str]:
    absent = (n for n in names if not isinstance(hdf5.member(group, n, path), h5py.Dataset))
    yield from (f"dataset {group.name.strip('/')}/{name}" for name in absent)


@dataclass
class Flags:
    """Flags of the fields of a file, from their attributes, or from the shapes of the datasets where these are absent.

    Parameters
    ----------
    num_trajectories, num_frames, grid
        As the file states them.
    notes : list of str
        Receives what was assumed.
    """

    path: str
    num_trajectories: int
    num_frames: int
    grid: tuple[int, ...]
    notes: list[str] = field(default_factory=list)

    def of(self, dataset: h5py.Dataset, name: str, order: int) -> tuple[bool, bool, tuple[bool, ...]]:
        """``sample_varying``, ``time_varying`` and ``dim_varying`` of a field of a rank.

        Raises
        ------
        DataError
            The shape fits both a field of trajectories and one of frames.
        """
        said = {a: hdf5.single(dataset, a, self.path, None) for a in ("sample_varying", "time_varying")}
        leading = len(dataset.shape) - len(self.grid) - order
        sample, time = (None if v is None else bool(v) for v in said.values())
        if sample is None or time is None:
            sample, time = self._leading(dataset, name, leading, sample, time)
            self.notes.append(f"sample_varying, time_varying: {sample}, {time} is assumed for {name} from its shape")
        varying = hdf5.attribute(dataset, "dim_varying", self.path, None)
        if varying is None:
            cells = dataset.shape[max(0, leading) :][: len(self.grid)]
            varying = [n != 1 or whole == 1 for n, whole in zip(cells, self.grid)]
            self.notes.append(f"dim_varying: {varying} is assumed for {name} from its shape")
        return sample, time, tuple(bool(v) for v in np.atleast_1d(varying))

    def _leading(
        self, dataset: h5py.Dataset, name: str, leading: int, sample: bool | None, time: bool | None
    ) -> tuple[bool, bool]:
        possible = [(s, t) for s in (True, False) for t in (True, False) if s + t == leading]
        possible = [(s, t) for s, t in possible if sample in (None, s) and time in (None, t)]
        if len(possible) > 1:
            counts = {(True, False): self.num_trajectories, (False, True): self.num_frames}
            possible = [flags for flags in possible if counts[flags] == dataset.shape[0]]
        if len(possible) != 1:
            raise DataError(
                f"{self.path}: field {name!r} has the shape {dataset.shape}, which does not tell whether trajectories or "
                "frames come first; write its attributes sample_varying and time_varying"
            )
        return possible[0]
