"""Writer of The Well's HDF5 layout (PolymathicAI/the_well, data format 1.x).

A file holds trajectories of one regime on one grid::

    /                      dataset_name, grid_type, n_spatial_dims, n_trajectories, simulation_parameters, lengths
    /dimensions/           time [T], x [X], y [Y], z [Z] (cell centres)
    /boundary_conditions/  one group an axis: bc_type WALL or PERIODIC, mask [n]
    /scalars/              parameters and diagnostics: a number, or [B]
    /t0_fields/            scalar fields [B, T, X, Y, Z]; static ones [B, X, Y, Z] with time_varying = False
    /t1_fields/            vector fields [B, T, X, Y, Z, D]
    /t2_fields/            empty

Beyond The Well a vector carries ``placement`` ("face" or "center") and ``solenoidal``, every field ``units``, and the
root ``lengths``; readers that do not know them lose nothing. Fields are uncompressed float32 with one chunk per
snapshot: compression of turbulence saves 8-19 % and costs 4-10x of the reading speed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

import h5py
import numpy as np

from shodh.core.errors import DataError
from shodh.schema.fields import AXES, Boundary, Field, Trajectories
from shodh.core.files import atomic_path

TENSOR_GROUPS = ("t0_fields", "t1_fields", "t2_fields")
BOUNDARY_CODES: dict[Boundary, str] = {"wall": "WALL", "periodic": "PERIODIC", "open": "OPEN"}


def write_trajectories(
    path: str | os.PathLike[str],
    trajectories: Trajectories,
    *,
    attributes: Mapping[str, str | int | float] | None = None,
) -> None:
    """Write one file, atomically: after an error or a kill there is no file of this name, or the former one.

    Parameters
    ----------
    path : path-like
        File to write, customarily ``*.hdf5``; its folder is made if necessary.
    trajectories : Trajectories
        All fields of its schema, finite, in the shapes that `shodh.schema.fields.Trajectories` states.
    attributes : mapping, optional
        Further root attributes, for example the settings a generator wants to find again.

    Raises
    ------
    DataError
        If a field is missing, has another shape, or holds NaN or infinity.
    OSError
        If the disk is full or the folder cannot be written.
    """
    _check(os.fspath(path), trajectories)
    with atomic_path(path) as temporary, h5py.File(temporary, "w", locking=False) as file:
        for name, dataset in create_layout(file, trajectories, attributes or {}).items():
            dataset[...] = trajectories.values[name]


def create_layout(
    file: h5py.File, trajectories: Trajectories, attributes: Mapping[str, str | int | float]
) -> dict[str, h5py.Dataset]:
    """Everything of a file but the values of its fields, of which only the shapes are used; their datasets by name."""
    _write_root(file, trajectories, attributes)
    _write_dimensions(file, trajectories)
    _write_boundaries(file, trajectories)
    _write_scalars(file, trajectories)
    return _create_fields(file, trajectories)


def expected_shape(field: Field, trajectories: Trajectories) -> tuple[int, ...]:
    """Shape of ``field`` in ``trajectories`` and on disk: ``[B, (T,) *grid(, D)]``."""
    time = () if field.static else (np.shape(trajectories.time)[-1],)
    components = (trajectories.schema.ndim,) if field.kind == "vector" else ()
    return (len(trajectories), *time, *trajectories.grid, *components)


def _check(path: str, trajectories: Trajectories) -> None:
    schema = trajectories.schema
    if not schema.dynamic:
        raise DataError(f"{path}: regime {schema.name!r} has no field that changes in time; there is nothing to write")
    missing = [f.name for f in schema.fields if f.name not in trajectories.values]
    if missing:
        raise DataError(f"{path}: fields {missing} of regime {schema.name!r} are not in the trajectories")
    if len(trajectories.lengths) != schema.ndim:
        raise DataError(f"{path}: {len(trajectories.lengths)} lengths for {schema.ndim} axes")
    for field in schema.fields:
        values = trajectories.values[field.name]
        shape = expected_shape(field, trajectories)
        if values.shape != shape:
            raise DataError(f"{path}: field {field.name!r} has shape {values.shape}, expected {shape}")
        for index, trajectory in enumerate(values):
            if not is_finite(trajectory):
                raise DataError(f"{path}: field {field.name!r} of trajectory {index} holds NaN or infinity")
    both = sorted(set(trajectories.parameters) & set(trajectories.diagnostics))
    if both:
        raise DataError(f"{path}: {both} are both parameters and diagnostics; rename one of each")


def is_finite(values: np.ndarray) -> bool:
    """Whether all values are finite, in one pass over them: a finite sum has finite terms only.

    The sum of large finite values may overflow; then the extremes decide.
    """
    if values.size == 0:
        return True
    with np.errstate(over="ignore", invalid="ignore"):
        total = values.sum(dtype=values.dtype if values.dtype.kind == "f" else None)
    return bool(np.isfinite(total) or (np.isfinite(values.min()) and np.isfinite(values.max())))


def _strings(values: Iterable[str]) -> np.ndarray:
    return np.array(list(values), dtype=h5py.string_dtype())


def _write_root(file: h5py.File, trajectories: Trajectories, attributes: Mapping[str, str | int | float]) -> None:
    schema = trajectories.schema
    common = {k: float(v) for k, v in trajectories.parameters.items() if np.ndim(v) == 0}
    file.attrs["dataset_name"] = schema.name
    file.attrs["grid_type"] = "cartesian"
    file.attrs["n_spatial_dims"] = schema.ndim
    file.attrs["n_trajectories"] = len(trajectories)
    file.attrs["lengths"] = np.asarray(trajectories.lengths, dtype=np.float64)
    file.attrs["simulation_parameters"] = _strings(common)
    for name, value in (common | dict(attributes)).items():
        file.attrs[name] = value


def _write_dimensions(file: h5py.File, trajectories: Trajectories) -> None:
    group = file.create_group("dimensions")
    axes = AXES[: trajectories.schema.ndim]
    group.attrs["spatial_dims"] = _strings(axes)
    time = np.asarray(trajectories.time, dtype=np.float64)
    group.create_dataset("time", data=time).attrs["sample_varying"] = time.ndim == 2
    for axis, cells, spacing in zip(axes, trajectories.grid, trajectories.spacing):
        centres = group.create_dataset(axis, data=((np.arange(cells) + 0.5) * spacing).astype(np.float32))
        centres.attrs["sample_varying"] = False
        centres.attrs["time_varying"] = False


def _write_boundaries(file: h5py.File, trajectories: Trajectories) -> None:
    group = file.create_group("boundary_conditions")
    names = _strings(f.name for f in trajectories.schema.fields)
    for axis, cells, kind in zip(AXES, trajectories.grid, trajectories.schema.boundary):
        boundary = group.create_group(f"{axis}_{kind}")
        boundary.attrs["associated_dims"] = _strings([axis])
        boundary.attrs["associated_fields"] = names
        boundary.attrs["bc_type"] = BOUNDARY_CODES[kind]
        boundary.attrs["sample_varying"] = False
        boundary.attrs["time_varying"] = False
        mask = np.zeros(cells, dtype=bool)
        mask[[0, -1]] = True
        boundary.create_dataset("mask", data=mask)


def _write_scalars(file: h5py.File, trajectories: Trajectories) -> None:
    group = file.create_group("scalars")
    scalars = {**trajectories.parameters, **trajectories.diagnostics}
    group.attrs["field_names"] = _strings(scalars)
    for name, value in scalars.items():
        dataset = group.create_dataset(name, data=np.asarray(value, dtype=np.float32))
        dataset.attrs["sample_varying"] = np.ndim(value) > 0
        dataset.attrs["time_varying"] = False


def _create_fields(file: h5py.File, trajectories: Trajectories) -> dict[str, h5py.Dataset]:
    schema = trajectories.schema
    created = {}
    for order, group_name in enumerate(TENSOR_GROUPS):
        group = file.create_group(group_name)
        members = [f for f in schema.fields if (1 if f.kind == "vector" else 0) == order]
        group.attrs["field_names"] = _strings(f.name for f in members)
        for field in members:
            shape = expected_shape(field, trajectories)
            leading = 1 if field.static else 2
            dataset = group.create_dataset(
                field.name, shape=shape, dtype=np.float32, chunks=(1,) * leading + shape[leading:]
            )
            created[field.name] = dataset
            dataset.attrs["dim_varying"] = np.ones(schema.ndim, dtype=bool)
            dataset.attrs["sample_varying"] = True
            dataset.attrs["time_varying"] = not field.static
            dataset.attrs["units"] = field.units
            if field.kind == "vector":
                dataset.attrs["placement"] = field.placement
                dataset.attrs["solenoidal"] = field.solenoidal
    return created
