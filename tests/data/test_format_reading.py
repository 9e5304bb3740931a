"""Every published layout is read bitwise, recognised by itself, and says what it assumed."""

from __future__ import annotations

import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
from layouts import LAYOUTS, dpot_single, fno_hdf5, jhtdb, pdebench_cfd, pdebench_groups, random

from shodh.data.formats import FileHints, TrajectoryFile, detect_format, open_file
from shodh.core.errors import ConfigError, DataError


def read_all(file: TrajectoryFile, name: str) -> np.ndarray:
    """All of a field, components last as in `layouts`."""
    field = file.field(name)
    components = field.num_components(len(file.grid))
    out = np.empty((file.num_trajectories, file.num_frames, components, *file.grid), dtype=np.float32)
    for trajectory in range(file.num_trajectories):
        frames = range(file.num_frames)
        file.read(name, trajectory, frames, out[trajectory, 0] if field.static else out[trajectory])
    out = out[:, 0] if field.static else out
    axis = 1 if field.static else 2
    return np.moveaxis(out, axis, -1) if field.kind == "vector" else out.squeeze(axis)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_are_read_bitwise(layout, tmp_path):
    format, name, write = LAYOUTS[layout]
    expected = write(tmp_path / name)
    assert detect_format(tmp_path / name) == format
    file = open_file(tmp_path / name)
    assert file.format == format
    assert set(file.fields) == set(expected)
    for field, values in expected.items():
        np.testing.assert_array_equal(read_all(file, field), values, err_msg=field)
    assert file.time.shape[-1] == file.num_frames
    assert file.header.notes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_other_frame_into_a_view(layout, tmp_path):
    """A window with a stride, into part of a larger array, also where frames are interleaved in the file."""
    _, name, write = LAYOUTS[layout]
    expected = write(tmp_path / name)
    file = pickle.loads(pickle.dumps(open_file(tmp_path / name)))
    for field, values in expected.items():
        if file.field(field).static or file.num_frames < 3:
            continue
        components = file.field(field).num_components(len(file.grid))
        out = np.full((2, components + 2, *file.grid), 7.0, dtype=np.float32)
        file.read(field, 0, range(0, 3, 2), out[:, 1:-1])
        wanted = values[0, 0:3:2]
        wanted = np.moveaxis(wanted, -1, 1) if file.field(field).kind == "vector" else wanted[:, None]
        np.testing.assert_array_equal(out[:, 1:-1], wanted)
        assert (out[:, [0, -1]] == 7).all()


def test_times_of_pdebench_have_one_entry_more(tmp_path):
    pdebench_cfd(tmp_path / "a.hdf5")
    file = open_file(tmp_path / "a.hdf5")
    np.testing.assert_allclose(file.time, 0.05 * np.arange(4), rtol=1e-6)
    assert file.grid == (6, 5, 4)
    np.testing.assert_allclose(file.lengths, (1.0, 2.0, 0.5), rtol=1e-5)
    assert file.boundary == ("periodic",) * 3


def test_boundaries_come_from_the_published_sets(tmp_path):
    pdebench_cfd(tmp_path / "1D_CFD_Shock_trans.hdf5", grid=(9,))
    pdebench_groups(tmp_path / "2D_rdb_NA_NA.h5", 1)
    pdebench_groups(tmp_path / "2D_diff-react_NA_NA.h5", 2)
    assert open_file(tmp_path / "1D_CFD_Shock_trans.hdf5").boundary == ("open",)
    assert open_file(tmp_path / "2D_rdb_NA_NA.h5").boundary == ("open", "open")
    assert open_file(tmp_path / "2D_diff-react_NA_NA.h5").boundary == ("wall", "wall")
    np.testing.assert_allclose(open_file(tmp_path / "2D_rdb_NA_NA.h5").lengths, (5.0, 5.0), rtol=1e-5)


def test_hints_replace_what_was_assumed(tmp_path):
    dpot_single(tmp_path / "x_train.hdf5")
    hints = FileHints(("wall", "periodic"), (2.0, 3.0), 0.5, ("u", "u", "smoke", "heat"))
    file = open_file(tmp_path / "x_train.hdf5", hints=hints)
    assert (file.boundary, file.lengths) == (("wall", "periodic"), (2.0, 3.0))
    assert set(file.fields) == {"u", "smoke", "heat"} and file.field("u").kind == "vector"
    np.testing.assert_array_equal(file.time, 0.5 * np.arange(5))
    assert not any(note.startswith(("boundary", "lengths", "time_step", "channels")) for note in file.header.notes)
    for wrong, reason in (
        (FileHints(channels=("u", "v")), "2 channels are named"),
        (FileHints(channels=("u", "u", "u", "v")), "named 3 times"),
        (FileHints(axes="nxyz"), "axes"),
        (FileHints(boundary=("wall",)), "boundary"),
    ):
        with pytest.raises((ConfigError, DataError), match=reason):
            open_file(tmp_path / "x_train.hdf5", hints=wrong)


@pytest.mark.parametrize(
    ("write", "hint", "read"),
    [
        (pdebench_cfd, {"axes": "ntxyz"}, False),
        (pdebench_cfd, {"channels": ("a",)}, False),
        (pdebench_cfd, {"time_step": 0.5}, True),
        (jhtdb, {"channels": ("a", "b")}, False),
        (jhtdb, {"image_shape": (4, 4, 4)}, False),
        (dpot_single, {"pore_value": 0.0}, False),
        (fno_hdf5, {"image_dtype": "uint8"}, False),
    ],
)
def test_a_hint_is_read_or_refused_by_name(write, hint, read, tmp_path):
    path = tmp_path / ("a.mat" if write is fno_hdf5 else "a.hdf5")
    write(path)
    if read:
        assert open_file(path, hints=FileHints(**hint)).time[1] == pytest.approx(0.5)
        return
    with pytest.raises(ConfigError, match=next(iter(hint))):
        open_file(path, hints=FileHints(**hint))


@pytest.mark.parametrize("axes", ["zyx", "xyz"])
def test_axes_of_a_cube_of_jhtdb_can_be_stated(axes, tmp_path):
    values = random(0, 4, 4, 4, 3)
    with h5py.File(tmp_path / "cube.h5", "w") as file:
        file["velocity_0001"] = values
        for name in ("xcoor", "ycoor", "zcoor"):
            file[name] = np.arange(4.0)
    file = open_file(tmp_path / "cube.h5", hints=FileHints(axes=axes))
    expected = values if axes == "xyz" else values.transpose(2, 1, 0, 3)
    np.testing.assert_array_equal(read_all(file, "velocity")[0, 0], expected)
    assert not any(note.startswith("axes") for note in file.header.notes)
    with pytest.raises(ConfigError, match="axes"):
        open_file(tmp_path / "cube.h5", hints=FileHints(axes="txyz"))


def test_axes_of_an_array_can_be_stated(tmp_path):
    values = random(0, 5, 6, 7, 2)
    with h5py.File(tmp_path / "mine.hdf5", "w") as file:
        file["data"] = values
    file = open_file(tmp_path / "mine.hdf5", hints=FileHints(axes="txyc", channels=("a", "b")))
    assert (file.num_trajectories, file.num_frames, file.grid) == (1, 5, (6, 7))
    np.testing.assert_array_equal(read_all(file, "b")[0], values[..., 1])


def test_reversed_axes_of_matlab_are_told_apart_by_the_file(tmp_path):
    values = fno_hdf5(tmp_path / "a.mat")["vorticity"]
    file = open_file(tmp_path / "a.mat")
    assert (file.num_trajectories, file.num_frames, file.grid) == (3, 5, (6, 7))
    assert values.shape == (3, 5, 6, 7)
    np.testing.assert_array_equal(file.time, np.arange(1.0, 6.0))


@pytest.mark.parametrize("swapped", [False, True])
def test_axis_order_of_a_cutout_is_checked_by_its_coordinates(tmp_path, swapped):
    expected = jhtdb(tmp_path / "cut.h5", swapped=swapped)
    file = open_file(tmp_path / "cut.h5")
    np.testing.assert_array_equal(read_all(file, "velocity"), expected["velocity"])
    np.testing.assert_array_equal(file.time, (3, 5, 11))
    np.testing.assert_allclose(file.spacing, 0.01, rtol=1e-5)


def test_cutout_that_fits_no_axis_order_is_refused(tmp_path):
    jhtdb(tmp_path / "cut.h5")
    with h5py.File(tmp_path / "cut.h5", "r+") as file:
        values = file["velocity_0003"][()].swapaxes(0, 1)
        del file["velocity_0003"]
        file["velocity_0003"] = values
    with pytest.raises(DataError, match="velocity"):
        open_file(tmp_path / "cut.h5")


def test_bad_values_are_refused_unless_wanted(tmp_path):
    pdebench_cfd(tmp_path / "a.hdf5")
    with h5py.File(tmp_path / "a.hdf5", "r+") as file:
        file["density"][1, 2, 0, 0, 0] = np.nan
    file = open_file(tmp_path / "a.hdf5")
    out = np.empty((1, 1, 6, 5, 4), dtype=np.float32)
    file.read("density", 1, range(1, 2), out)
    with pytest.raises(DataError, match=r"density.*trajectory 1, frames \[2\]"):
        file.read("density", 1, range(2, 3), out)
    file.read("density", 1, range(2, 3), out, finite=False)
    assert np.isnan(out).sum() == 1


def test_unknown_layout_names_what_there_is(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["something"] = np.zeros(3)
    with pytest.raises(DataError, match=r"no known layout.*something"):
        open_file(tmp_path / "a.h5")
    with pytest.raises(ConfigError, match="unknown format 'zarr'"):
        open_file(tmp_path / "a.h5", "zarr")
    Path(tmp_path / "b.h5").write_text("no HDF5")
    with pytest.raises(DataError, match=r"b\.h5: cannot be read as HDF5"):
        open_file(tmp_path / "b.h5")


@pytest.mark.parametrize("hint", [{"time_step": 0.0}, {"time_step": float("nan")}, {"lengths": (1.0, -2.0)}])
def test_hints_that_no_grid_has_are_refused(hint):
    with pytest.raises(ConfigError, match="must be positive"):
        FileHints(**hint)
