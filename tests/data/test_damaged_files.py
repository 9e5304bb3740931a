"""A file that cannot be used is refused with its name and the reason, on opening or at the latest on reading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from shodh.data import WellFile, write_trajectories
from shodh.data.formats.probe import probe
from shodh.core.errors import DataError


@pytest.fixture
def path(tmp_path, make_trajectories) -> Path:
    write_trajectories(tmp_path / "good.hdf5", make_trajectories())
    return tmp_path / "good.hdf5"


def replace(file: h5py.File, name: str, values: np.ndarray) -> None:
    attributes = dict(file[name].attrs)
    del file[name]
    file[name] = values
    file[name].attrs.update(attributes)


def remove_attribute(item: str, name: str) -> Callable[[h5py.File], None]:
    return lambda file: file[item].attrs.pop(name)


EDITS: dict[str, tuple[Callable[[h5py.File], object], str]] = {
    "no dimensions": (lambda f: f.pop("dimensions"), "dimensions"),
    "no time": (lambda f: f.pop("dimensions/time"), "dimensions/time"),
    "no axis": (lambda f: f.pop("dimensions/y"), "dimensions/y"),
    "no boundaries": (lambda f: f.pop("boundary_conditions"), "boundary_conditions"),
    "no mask": (lambda f: f.pop("boundary_conditions/z_wall/mask"), "mask"),
    "no group of fields": (lambda f: f.pop("t1_fields"), "t1_fields"),
    "listed field missing": (lambda f: f.pop("t0_fields/tracer"), "tracer"),
    "no list of fields": (remove_attribute("t0_fields", "field_names"), "field_names"),
    "frames differ": (lambda f: replace(f, "dimensions/time", np.arange(4.0)), "shape"),
    "cells differ": (lambda f: replace(f, "dimensions/x", np.arange(6.0)), "shape"),
    "trajectories differ": (lambda f: f.attrs.modify("n_trajectories", 4), "shape"),
    "no trajectories": (lambda f: f.attrs.modify("n_trajectories", 0), "n_trajectories"),
    "negative count": (lambda f: f.attrs.modify("n_trajectories", -3), "n_trajectories"),
    "a component too few": (lambda f: replace(f, "t1_fields/velocity", f["t1_fields/velocity"][..., :2]), "velocity"),
    "empty axis": (lambda f: replace(f, "dimensions/x", np.zeros(0)), "dimensions/x"),
    "integers": (lambda f: replace(f, "t0_fields/tracer", f["t0_fields/tracer"][:].astype(int)), "floating point"),
    "text": (lambda f: replace(f, "t0_fields/tracer", np.array([b"a"])), "floating point"),
    "polar grid": (lambda f: f.attrs.modify("grid_type", "spherical"), "cartesian"),
    "half a wall": (lambda f: f["boundary_conditions/z_wall/mask"].__setitem__(0, False), "OPEN below and WALL above"),
    "unknown boundary": (lambda f: f["boundary_conditions/z_wall"].attrs.modify("bc_type", "LEAKY"), "LEAKY"),
    "unknown placement": (lambda f: f["t1_fields/velocity"].attrs.modify("placement", "edge"), "edge"),
    "negative length": (lambda f: f.attrs.modify("lengths", [1.0, -1.0, 1.0]), "lengths"),
    "infinite time": (lambda f: replace(f, "dimensions/time", np.array([0, 1, np.inf, 3, 4])), "time"),
}


def absurd_time(file: h5py.File) -> None:
    del file["dimensions/time"]
    file["dimensions"].create_dataset("time", shape=(10**12,), chunks=(1024,), dtype="f8")


def periodic_below(file: h5py.File) -> None:
    group = file["boundary_conditions"]
    group.copy("z_wall", "z_below")
    group["z_below"].attrs["bc_type"] = "PERIODIC"
    group["z_below/mask"][-1] = False
    group["z_wall/mask"][0] = False


def wall_over_half_an_end(file: h5py.File) -> None:
    """A mask over the planes of y and z whose wall fills one half of each end of z."""
    group = file["boundary_conditions/z_wall"]
    group.attrs["associated_dims"] = ["y", "z"]
    mask = np.zeros((6, 7), dtype=bool)
    mask[:3, [0, -1]] = True
    del group["mask"]
    group["mask"] = mask


EDITS["absurd size"] = (absurd_time, "absurd")
EDITS["wall above only"] = (periodic_below, "PERIODIC below and WALL above")
EDITS["wall with a gap"] = (wall_over_half_an_end, "part of a WALL below")


@pytest.mark.parametrize("edit", EDITS, ids=lambda name: name.replace(" ", "_"))
def test_inconsistent_header_is_refused_on_opening(path, edit):
    change, reason = EDITS[edit]
    WellFile(path)
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(DataError, match=reason) as error:
        WellFile(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_all_that_is_missing_is_named_at_once(path):
    missing = ["dimensions/time", "dimensions/y", "boundary_conditions/z_wall/mask", "t0_fields/tracer"]
    with h5py.File(path, "r+") as file:
        for name in (*missing, "t1_fields"):
            del file[name]
        del file["dimensions"].attrs["spatial_dims"], file["boundary_conditions/x_periodic"].attrs["bc_type"]
    with pytest.raises(DataError) as error:
        WellFile(path)
    named = ["spatial_dims", "bc_type", "t1_fields", *(n for n in missing if n != "dimensions/y")]
    assert [n for n in named if n not in str(error.value)] == [] and "\n" not in str(error.value)


def test_what_follows_from_the_shapes_is_assumed(path):
    """Without flags, units and the empty group of tensors the file is what it was, and says what was assumed."""
    whole = WellFile(path)
    with h5py.File(path, "r+") as file:
        del file["t2_fields"], file.attrs["n_trajectories"]
        for name in ("t0_fields/tracer", "t0_fields/solid", "t1_fields/velocity"):
            for flag in ("time_varying", "sample_varying", "dim_varying", "units"):
                del file[name].attrs[flag]
    file = WellFile(path)
    assert {n: (f.static, f.kind) for n, f in file.fields.items()} == {
        n: (f.static, f.kind) for n, f in whole.fields.items()
    }
    assert file.header.num_trajectories == whole.num_trajectories and not whole.header.notes
    said = " ".join(file.header.notes)
    assert all(word in said for word in ("sample_varying", "dim_varying", "t2_fields", "units", "velocity"))
    with h5py.File(path, "r+") as handle:  # Five trajectories, five frames: a field of either has this shape.
        replace(handle, "dimensions/time", np.arange(3.0))
        for name in ("t0_fields/tracer", "t1_fields/velocity"):
            replace(handle, name, handle[name][:, :3])
    with pytest.raises(DataError, match=r"'solid'.*sample_varying and time_varying"):
        WellFile(path)


def test_stretched_axis_is_refused(path):
    with h5py.File(path, "r+") as file:
        del file.attrs["lengths"]
        file["dimensions/z"][:] = np.array([0, 1, 2, 3, 4, 5, 7])
    with pytest.raises(DataError, match="uniform"):
        WellFile(path)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_truncated_file_is_refused_on_opening(path, keep):
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(DataError, match="truncated or damaged") as error:
        WellFile(path)
    assert str(path) in str(error.value)


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.hdf5: no such file"):
        WellFile(tmp_path / "nowhere.hdf5")
    (tmp_path / "notes.hdf5").write_text("not HDF5 at all")
    with pytest.raises(DataError, match=r"notes\.hdf5"):
        WellFile(tmp_path / "notes.hdf5")
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file["tensor"] = np.zeros((3, 4))
    with pytest.raises(DataError, match="The Well's layout"):
        WellFile(tmp_path / "other.hdf5")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("name", "components"), [("tracer", 1), ("velocity", 3)])
def test_bad_values_are_named_when_they_are_read(path, name, components, value):
    with h5py.File(path, "r+") as file:
        dataset = file[f"t{0 if name == 'tracer' else 1}_fields/{name}"]
        dataset[(1, 3, 4, 5, 6, *(() if name == "tracer" else (2,)))] = value
    file = WellFile(path)
    out = np.empty((2, components, 5, 6, 7), dtype=np.float32)
    file.read(name, 1, range(1, 3), out)
    with pytest.raises(DataError, match="trajectory 1, frame 3") as error:
        file.read(name, 1, range(2, 4), out)
    assert name in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("files", [30, pytest.param(150, marks=pytest.mark.exhaustive)])
def test_random_damage_never_escapes_as_another_error(path, files):
    """Overwrite bytes of the structure at random: either the file still reads, or DataError says it does not."""
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(files):
        damaged = bytearray(content)
        for position in rng.integers(0, len(content) // 6, 6):
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            probe(path, timeout=1)  # HDF5 itself hangs on some of them
            file = WellFile(path)
            for field in file.fields.values():
                out = np.empty((1, field.num_components(3), *file.grid), dtype=np.float32)
                file.read(field.name, 0, range(1), out[0] if field.static else out)
            file.close()
        except DataError:
            refused += 1
    assert refused > 0
