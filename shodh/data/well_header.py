"""What a The Well file says about itself, checked before any of its numbers is used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import h5py
import numpy as np

from shodh.data import hdf5
from shodh.data.formats.base import FileHeader
from shodh.data.well import BOUNDARY_CODES, TENSOR_GROUPS
from shodh.data.well_items import Flags, require_items
from shodh.core.errors import DataError
from shodh.schema.fields import Boundary, Field

KINDS: dict[str, Boundary] = {code: kind for kind, code in BOUNDARY_CODES.items()}


@dataclass(frozen=True)
class StoredField:
    """A field of a file: what it is, and which axes its dataset has.

    ``varying`` tells for each space axis whether values differ along it; if not, the dataset has length 1 there.
    """

    field: Field
    dataset: str
    sample_varying: bool
    time_varying: bool
    varying: tuple[bool, ...]

    def shape(self, num_trajectories: int, num_frames: int, grid: tuple[int, ...]) -> tuple[int, ...]:
        """Shape the dataset must have."""
        leading = (num_trajectories,) * self.sample_varying + (num_frames,) * self.time_varying
        space = tuple(cells if varies else 1 for cells, varies in zip(grid, self.varying))
        return (*leading, *space, *((len(grid),) if self.field.kind == "vector" else ()))


@dataclass(frozen=True)
class WellHeader(FileHeader):
    """Header of a file, with the names of its data set, of its axes and of fields that are tensors."""

    dataset_name: str = ""
    axes: tuple[str, ...] = ()
    tensor_fields: tuple[str, ...] = ()


def read_header(file: h5py.File, path: str) -> WellHeader:
    """Read and check the header of an open file.

    Raises
    ------
    DataError
        Naming the file and all that is missing, or what is contradictory or not supported.
    """
    require_items(file, path)
    group = _group(file, "dimensions", path)
    axes = tuple(hdf5.text(name) for name in np.atleast_1d(hdf5.attribute(group, "spatial_dims", path)))
    if not 1 <= len(axes) <= 3:
        raise DataError(f"{path}: {len(axes)} space dimensions {list(axes)}; 1, 2 or 3 are supported")
    grid_type = hdf5.text(hdf5.single(file, "grid_type", path, "cartesian"))
    if grid_type != "cartesian":
        raise DataError(f"{path}: grid_type is {grid_type!r}; only 'cartesian' is supported")
    coordinates = [_coordinates(group, axis, path) for axis in axes]
    grid = tuple(len(c) for c in coordinates)
    time = _time(group, path)
    num_trajectories = _num_trajectories(file, len(axes), path)
    flags = Flags(path, num_trajectories, time.shape[-1], grid)
    fields, tensors = _fields(file, flags, path)
    header = WellHeader(
        dataset_name=hdf5.text(hdf5.single(file, "dataset_name", path, "")),
        axes=axes,
        grid=grid,
        lengths=_lengths(file, axes, coordinates, path),
        boundary=_boundary(file, axes, path),
        num_trajectories=num_trajectories,
        time=time,
        fields=fields,
        tensor_fields=tensors,
        parameters=_parameters(file, num_trajectories, path),
        notes=tuple(flags.notes),
    )
    _check_shapes(file, header, path)
    return header


def _group(parent: h5py.Group, name: str, path: str) -> h5py.Group:
    if not isinstance(hdf5.member(parent, name, path), h5py.Group):
        raise DataError(f"{path}: group {name!r} is missing; is this a file in The Well's layout?")
    return hdf5.group(parent, name, path)


def _coordinates(group: h5py.Group, axis: str, path: str) -> np.ndarray:
    """Coordinates [n] of an axis; per-sample copies must agree."""
    values = np.asarray(hdf5.values(group, axis, path), dtype=np.float64)
    if values.ndim == 0 or values.size == 0:
        raise DataError(f"{path}: dimensions/{axis} has shape {values.shape}; expected the coordinates of its cells")
    values = values.reshape(-1, values.shape[-1])
    if not np.isfinite(values).all() or not np.allclose(values, values[0]):
        raise DataError(f"{path}: dimensions/{axis} is not one finite list of coordinates shared by all samples")
    return values[0]


def _time(group: h5py.Group, path: str) -> np.ndarray:
    time = np.asarray(hdf5.values(group, "time", path), dtype=np.float64)
    if time.ndim not in (1, 2) or time.size == 0 or not np.isfinite(time).all():
        raise DataError(f"{path}: dimensions/time has shape {time.shape}; expected finite times [T] or [B, T], T >= 1")
    return time


def _lengths(file: h5py.File, axes: tuple[str, ...], coordinates: list[np.ndarray], path: str) -> tuple[float, ...]:
    """Box lengths: the attribute of our own files, else number of cells times their uniform spacing."""
    stored = hdf5.attribute(file, "lengths", path, None)
    if stored is not None:
        lengths = tuple(float(v) for v in np.atleast_1d(stored))
        if len(lengths) != len(axes) or not all(np.isfinite(v) and v > 0 for v in lengths):
            raise DataError(f"{path}: attribute 'lengths' is {lengths}; expected {len(axes)} positive numbers")
        return lengths
    return tuple(axis_length(axis, values, path) for axis, values in zip(axes, coordinates))


def axis_length(axis: str, values: np.ndarray, path: str) -> float:
    """Length of an axis from the coordinates of its cells: their number times their spacing, which is uniform."""
    if len(values) == 1:
        return 1.0
    spacing = (values[-1] - values[0]) / (len(values) - 1)
    # Coordinates are often float32: their rounding is relative to the largest one, not to the spacing.
    tolerance = 1e-3 * abs(spacing) + 4e-7 * float(np.abs(values).max())
    if spacing <= 0 or np.abs(np.diff(values) - spacing).max() > tolerance:
        raise DataError(f"{path}: dimensions/{axis} is not increasing with uniform spacing; resample the data to one")
    return float(spacing * len(values))


def _boundary(file: h5py.File, axes: tuple[str, ...], path: str) -> tuple[Boundary, ...]:
    """Kind of each axis from both its ends; as in The Well an end that nothing is said about is OPEN."""
    ends = {axis: ["OPEN", "OPEN"] for axis in axes}
    group = _group(file, "boundary_conditions", path)
    for name in group:
        for axis, end, code in _marked_ends(_group(group, name, path), path):
            if axis not in ends:
                raise DataError(f"{path}: boundary_conditions/{name} names the axis {axis!r}; there are {list(axes)}")
            ends[axis][end] = code
    for axis, (lower, upper) in ends.items():
        if lower != upper or lower not in KINDS:
            raise DataError(
                f"{path}: the boundary of axis {axis!r} is {lower} below and {upper} above; supported are PERIODIC, "
                "WALL or OPEN at both ends (an end that no group of boundary_conditions marks is OPEN)"
            )
    return tuple(KINDS[ends[axis][0]] for axis in axes)


def _marked_ends(group: h5py.Group, path: str) -> Iterator[tuple[str, int, str]]:
    """The (axis, end, code) a boundary condition touches; "part of a WALL" where a wall leaves a gap."""
    code = hdf5.text(hdf5.single(group, "bc_type", path)).upper()
    if code not in ("WALL", "OPEN", "PERIODIC"):
        raise DataError(f"{path}: {group.name.strip('/')} has bc_type {code!r}; expected WALL, OPEN or PERIODIC")
    axes = [hdf5.text(a) for a in np.atleast_1d(hdf5.attribute(group, "associated_dims", path))]
    mask = np.asarray(hdf5.values(group, "mask", path), dtype=bool)
    if mask.ndim < len(axes) or mask.size == 0:
        raise DataError(f"{path}: {group.name.strip('/')}/mask has shape {mask.shape}, expected one axis for {axes}")
    mask = mask.reshape(-1, *mask.shape[mask.ndim - len(axes) :])
    for number, axis in enumerate(axes):
        for end in (0, -1):
            touched = np.take(mask, end, axis=number + 1)
            if touched.any():
                yield axis, end, "part of a WALL" if code == "WALL" and not touched.all() else code


def _listed(file: h5py.File, order: int, path: str) -> dict[str, h5py.Dataset]:
    """The datasets of the fields of a rank, by their names."""
    group = _group(file, TENSOR_GROUPS[order], path)
    names = (hdf5.text(n) for n in np.atleast_1d(hdf5.attribute(group, "field_names", path)))
    return {name: hdf5.dataset(group, name, path) for name in names}


def _fields(file: h5py.File, flags: Flags, path: str) -> tuple[dict[str, StoredField], tuple[str, ...]]:
    fields: dict[str, StoredField] = {}
    for order in (0, 1):
        for name, dataset in _listed(file, order, path).items():
            fields[name] = _field(dataset, name, order, flags, path)
    if not fields:
        raise DataError(f"{path}: there are no scalar or vector fields (t0_fields, t1_fields)")
    if without := [n for n, f in fields.items() if "units" not in file[f.dataset].attrs]:
        flags.notes.append(f"units: '1' is assumed for {', '.join(without)}")
    if hdf5.member(file, TENSOR_GROUPS[2], path) is None:
        flags.notes.append(f"{TENSOR_GROUPS[2]}: none are assumed")
        return fields, ()
    tensors = hdf5.attribute(_group(file, TENSOR_GROUPS[2], path), "field_names", path, ())
    return fields, tuple(hdf5.text(n) for n in np.atleast_1d(tensors))


def _field(dataset: h5py.Dataset, name: str, order: int, flags: Flags, path: str) -> StoredField:
    sample_varying, time_varying, varying = flags.of(dataset, name, order)
    static, ndim = not time_varying, len(flags.grid)
    # Masks may be bool or integers; whatever is learned must be floating point.
    if dataset.dtype.kind not in ("buif" if static else "f"):
        raise DataError(f"{path}: field {name!r} has the type {dataset.dtype}; expected floating point")
    if len(varying) != ndim:
        raise DataError(f"{path}: attribute 'dim_varying' of {name!r} has {len(varying)} entries for {ndim} axes")
    placement = hdf5.text(hdf5.single(dataset, "placement", path, "center"))
    if placement not in ("center", "face"):
        raise DataError(f"{path}: field {name!r} has the placement {placement!r}; expected 'center' or 'face'")
    field = Field(
        name=name,
        kind="vector" if order else "scalar",
        units=hdf5.text(hdf5.single(dataset, "units", path, "1")),
        placement="face" if order and placement == "face" else "center",
        solenoidal=bool(order and hdf5.single(dataset, "solenoidal", path, False)),
        static=static,
    )
    return StoredField(field, dataset.name, sample_varying, not static, varying)


def _num_trajectories(file: h5py.File, ndim: int, path: str) -> int:
    """As stated, or as many as a field of trajectories and frames has."""
    stored = hdf5.single(file, "n_trajectories", path, None)
    if stored is not None:
        count = int(stored)
    else:
        found = [
            (dataset.shape, len(dataset.shape) - ndim - order, bool(hdf5.single(dataset, "sample_varying", path, False)))
            for order in (0, 1)
            for dataset in _listed(file, order, path).values()
        ]
        count = next((shape[0] for shape, leading, varies in found if leading == 2 or (leading == 1 and varies)), 1)
    if count < 1:
        raise DataError(f"{path}: n_trajectories is {count}; expected at least 1")
    return count


def _parameters(file: h5py.File, num_trajectories: int, path: str) -> dict[str, float | np.ndarray]:
    """Scalars that do not change in time: a number, or an array [B]; others are left alone."""
    found: dict[str, float | np.ndarray] = {}
    scalars = hdf5.member(file, "scalars", path)
    if isinstance(scalars, h5py.Group):
        for name in (hdf5.text(n) for n in np.atleast_1d(hdf5.attribute(scalars, "field_names", path, ()))):
            values = np.asarray(hdf5.values(scalars, name, path), dtype=np.float64)
            if values.size == 1 and values.shape != (num_trajectories,):
                values = values.reshape(())
            if values.shape in ((), (num_trajectories,)):
                found[name] = float(values) if values.ndim == 0 else values
    return found


def _check_shapes(file: h5py.File, header: WellHeader, path: str) -> None:
    for name, stored in header.fields.items():
        expected = stored.shape(header.num_trajectories, header.num_frames, header.grid)
        shape = file[stored.dataset].shape
        if shape != expected:
            raise DataError(
                f"{path}: field {name!r} has shape {shape}, expected {expected} from n_trajectories="
                f"{header.num_trajectories}, {header.num_frames} times and the grid {header.grid}"
            )
