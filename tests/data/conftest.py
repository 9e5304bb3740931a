"""Random trajectories, written by the project and by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from shodh.data import write_trajectories
from shodh.schema.fields import Field, RegimeSchema, Trajectories

FIELDS = (
    Field("velocity", "vector", units="u_tau", placement="face", solenoidal=True),
    Field("tracer"),
    Field("solid", static=True),
)


@pytest.fixture
def fields() -> tuple[Field, ...]:
    return FIELDS


@pytest.fixture
def make_trajectories() -> Callable[..., Trajectories]:
    def make(
        seed: int = 0,
        batch: int = 3,
        frames: int = 5,
        grid: tuple[int, ...] = (5, 6, 7),
        boundary: tuple[str, ...] = ("periodic", "periodic", "wall"),
        name: str = "open_channel",
    ) -> Trajectories:
        rng = np.random.default_rng(seed)
        values = {
            "velocity": 2 + rng.standard_normal((batch, frames, *grid, len(grid)), dtype=np.float32),
            "tracer": 5 + rng.standard_normal((batch, frames, *grid), dtype=np.float32),
            "solid": rng.random((batch, *grid)) < 0.4,
        }
        return Trajectories(
            RegimeSchema(name, FIELDS, boundary),
            tuple(float(length) for length in (1.5, 3.0, 1.0)[: len(grid)]),
            0.25 * np.arange(frames),
            values,
            {"re_tau": 180.0, "porosity": rng.random(batch)},
            {"residual": rng.random(batch)},
        )

    return make


@pytest.fixture
def make_folder(tmp_path: Path, make_trajectories: Callable[..., Trajectories]) -> Callable[..., Path]:
    """A regime of two training files (3 + 2 trajectories) and one each of validation and test (1)."""

    def make(name: str = "open_channel", seed: int = 0, **kwargs: object) -> Path:
        root = tmp_path / name
        for number, (split, batch) in enumerate((("train", 3), ("train", 2), ("valid", 1), ("test", 1))):
            trajectories = make_trajectories(seed=100 * seed + number, batch=batch, name=name, **kwargs)
            write_trajectories(root / "data" / split / f"{name}_{number:05d}.hdf5", trajectories)
        return root

    return make


@pytest.fixture
def foreign_folder(tmp_path: Path) -> Path:
    """A file as another group would write it: other names, a wall across y, values at centres, no extra attributes."""
    root = tmp_path / "foreign"
    (root / "train").mkdir(parents=True)
    write_foreign(root / "train" / "run.h5")
    return root


def write_foreign(path: Path) -> None:
    rng = np.random.default_rng(7)
    grid, batch, frames = (6, 4, 9), 2, 5
    with h5py.File(path, "w") as file:
        file.attrs.update(dataset_name="theirs", grid_type="cartesian", n_spatial_dims=3, n_trajectories=batch)
        file.attrs["simulation_parameters"] = np.array([], dtype=h5py.string_dtype())
        dimensions = file.create_group("dimensions")
        dimensions.attrs["spatial_dims"] = ["x", "y", "z"]
        time = dimensions.create_dataset("time", data=np.tile(np.arange(frames, dtype=np.float32), (batch, 1)))
        time.attrs["sample_varying"] = True
        for axis, cells, spacing in zip("xyz", grid, (0.5, 0.25, 2.0)):
            coordinates = dimensions.create_dataset(axis, data=(10 + spacing * np.arange(cells)).astype(np.float32))
            coordinates.attrs.update(sample_varying=False, time_varying=False)
        boundaries = file.create_group("boundary_conditions")
        for axis, cells, code in zip("xyz", grid, ("PERIODIC", "WALL", "PERIODIC")):
            group = boundaries.create_group(f"{axis}_{code.lower()}")
            group.attrs.update(bc_type=code, sample_varying=False, time_varying=False)
            group.attrs["associated_dims"] = [axis]
            group.attrs["associated_fields"] = ["vel"]
            group.create_dataset("mask", data=np.isin(np.arange(cells), (0, cells - 1)))
        file.create_group("scalars").attrs["field_names"] = np.array([], dtype=h5py.string_dtype())
        groups = [file.create_group(f"t{order}_fields") for order in range(3)]
        groups[0].attrs["field_names"] = ["dye", "rock", "layer"]
        groups[1].attrs["field_names"] = ["vel"]
        groups[2].attrs["field_names"] = np.array([], dtype=h5py.string_dtype())
        data = {
            (0, "dye"): (rng.standard_normal((batch, frames, *grid), dtype=np.float32), True, True, [True] * 3),
            (0, "rock"): (rng.random(grid) < 0.5, False, False, [True] * 3),
            (0, "layer"): (rng.random((batch, frames, 1, 4, 1)), True, True, [False, True, False]),
            (1, "vel"): (rng.standard_normal((batch, frames, *grid, 3)).astype(np.float64), True, True, [True] * 3),
        }
        for (order, name), (values, sample_varying, time_varying, varying) in data.items():
            dataset = groups[order].create_dataset(name, data=values)
            dataset.attrs.update(sample_varying=sample_varying, time_varying=time_varying, dim_varying=varying)
