"""Why a file cannot be opened, in its own words: a writer, a killed writer, no locks, no permission, or damage."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from layouts import dpot_single, pdebench_cfd

from shodh.data import RegimeSource, WellFile, write_trajectories
from shodh.data.formats import FileHints, open_file
from shodh.data.hdf5 import open_hdf5
from shodh.core.errors import DataError
from shodh.schema.fields import Field


@pytest.fixture
def path(tmp_path: Path) -> Path:
    dpot_single(tmp_path / "ns2d.hdf5")
    return tmp_path / "ns2d.hdf5"


def test_a_file_that_is_being_written_is_not_read(path):
    with open(path, "r+b") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process has it open for writing"):
            open_hdf5(path)
    open_hdf5(path).close()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_read(path, number, monkeypatch):
    opened = h5py.File

    def refuse(name, mode, locking=None):
        if locking is not False:
            raise OSError(number, f"Unable to open file (unable to lock file, errno = {number})")
        return opened(name, mode, locking=False)

    monkeypatch.setattr(h5py, "File", refuse)
    open_hdf5(path).close()


def test_a_writer_that_was_killed_is_named_with_the_cure(tmp_path):
    path = tmp_path / "killed.h5"
    code = f"import h5py, os; f = h5py.File({str(path)!r}, 'w', libver='latest'); f['data'] = 1.0; f.flush(); os._exit(0)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    with pytest.raises(DataError, match="h5clear -s") as error:
        open_hdf5(path)
    assert "truncated" not in str(error.value)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.EIO])
def test_errors_of_the_system_do_not_ask_for_a_new_file(path, number, monkeypatch):
    def refuse(*_, **__):
        raise OSError(number, "Unable to open file")

    monkeypatch.setattr(h5py, "File", refuse)
    with pytest.raises(DataError, match=os.strerror(number)) as error:
        open_hdf5(path)
    assert "write it anew" not in str(error.value)


def test_lists_of_one_are_what_they_hold(tmp_path, make_trajectories):
    """Every attribute of a file as a list of one, as netCDF libraries write them."""
    write_trajectories(tmp_path / "a.hdf5", make_trajectories(batch=2))
    write_trajectories(tmp_path / "b.hdf5", make_trajectories(batch=2))

    def listed(_: str, item: h5py.Group | h5py.Dataset) -> None:
        for name, value in list(item.attrs.items()):
            if np.ndim(value) == 0:
                text = isinstance(value, str)
                item.attrs.create(name, [value], dtype=h5py.string_dtype() if text else None)

    with h5py.File(tmp_path / "b.hdf5", "r+") as file:
        listed("", file)
        file.visititems(listed)
        del file["scalars/re_tau"]
        file["scalars/re_tau"] = np.array([180.0], dtype=np.float32)
    plain, lists = (WellFile(tmp_path / name).header for name in ("a.hdf5", "b.hdf5"))
    for what in ("dataset_name", "boundary", "lengths", "num_trajectories", "fields"):
        assert getattr(plain, what) == getattr(lists, what)
    assert float(lists.parameters["re_tau"]) == 180.0
    with h5py.File(tmp_path / "b.hdf5", "r+") as file:
        file["t1_fields/velocity"].attrs["placement"] = ["face", "center"]
    with pytest.raises(DataError, match="'placement' of t1_fields/velocity has 2 values"):
        WellFile(tmp_path / "b.hdf5")


HEAT = (Field("density"),)


def change_time(file: h5py.File) -> None:
    file["t-coordinate"][...] *= 2


def change_box(file: h5py.File) -> None:
    file["x-coordinate"][...] *= 1.01


@pytest.mark.parametrize(
    ("change", "values"), [(change_time, ("0.1", "0.05")), (change_box, ("1.01", "1.0"))], ids=["time step", "lengths"]
)
def test_files_of_a_regime_agree_or_both_are_named(tmp_path, change, values):
    for seed, name in enumerate(("a_train.hdf5", "b_train.hdf5")):
        pdebench_cfd(tmp_path / name, seed=seed)
    RegimeSource("gas", tmp_path, HEAT, split=(1, 0, 0))
    with h5py.File(tmp_path / "b_train.hdf5", "r+") as file:
        change(file)
    with pytest.raises(DataError) as error:
        RegimeSource("gas", tmp_path, HEAT, split=(1, 0, 0))
    assert all(word in str(error.value) for word in ("a_train.hdf5", "b_train.hdf5", *values))
    assert "\n" not in str(error.value)


def test_units_and_parameters_agree_too(tmp_path, make_trajectories, fields):
    for name, unit, parameter in (("a", "K", "re_tau"), ("b", "C", "re_tau"), ("c", "K", "mach")):
        path = tmp_path / f"{name}_train.hdf5"
        write_trajectories(path, make_trajectories())
        with h5py.File(path, "r+") as file:
            file["t0_fields/tracer"].attrs["units"] = unit
            file["scalars"].attrs["field_names"] = [parameter, "porosity", "residual"]
            if parameter != "re_tau":
                file.move("scalars/re_tau", f"scalars/{parameter}")
    for other, said in (("b", "units of 'tracer'"), ("c", "parameters")):
        folder = tmp_path / f"with_{other}"
        folder.mkdir()
        for name in ("a", other):
            (folder / f"{name}_train.hdf5").symlink_to(tmp_path / f"{name}_train.hdf5")
        with pytest.raises(DataError, match=said):
            RegimeSource("flow", folder, fields, split=(1, 0, 0))


def test_a_stated_time_step_holds_for_all_files(tmp_path):
    for seed, name in enumerate(("a_train.hdf5", "b_train.hdf5")):
        pdebench_cfd(tmp_path / name, seed=seed)
    with h5py.File(tmp_path / "b_train.hdf5", "r+") as file:
        change_time(file)
    source = RegimeSource("gas", tmp_path, HEAT, split=(1, 0, 0), hints=FileHints(time_step=0.5))
    np.testing.assert_allclose(np.diff(source.files["train"][1].time), 0.5)


@pytest.mark.parametrize(
    ("name", "boundary"),
    [
        ("2D_Transport_periodic", "periodic"),
        ("1D_CFD_Shock_Trans_Train", "open"),
        ("1D_CFD_Rand_trans", "open"),
        ("2D_transition_Turb", "periodic"),
    ],
)
def test_boundaries_are_words_of_the_name(tmp_path, name, boundary):
    pdebench_cfd(tmp_path / f"{name}.hdf5", grid=(6, 7))
    assert set(open_file(tmp_path / f"{name}.hdf5").boundary) == {boundary}


@pytest.mark.parametrize("name", ["rock128bit_6x5x4_uint8", "v2x6x5x4_6x5x4_8bit", "1.6x5x4.2_6x5x4_uint8"])
def test_shape_and_type_of_a_raw_image_are_words_of_the_name(tmp_path, name):
    np.arange(120, dtype=np.uint8).tofile(tmp_path / f"{name}.raw")
    assert open_file(tmp_path / f"{name}.raw").grid == (6, 5, 4)
