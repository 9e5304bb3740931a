"""Exported files are read back by hand-written and independent readers with every bit in its place."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from layouts import pdebench_cfd
from scipy.io import netcdf_file

from shodh.data.formats.export import write_vti

ROOT = Path(__file__).resolve().parents[2]


def read_vti(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Attributes of the image, and arrays [x, y, z, C], straight from the file format's definition."""
    content = path.read_bytes()
    head, raw = content.split(b'<AppendedData encoding="raw">\n_', 1)
    root = ElementTree.fromstring(head.decode() + "</VTKFile>")
    image = root.find("ImageData")
    cells = [int(n) for n in image.get("WholeExtent").split()[1::2]]
    arrays = {}
    for array in image.iter("DataArray"):
        offset, components = int(array.get("offset")), int(array.get("NumberOfComponents"))
        size = int(np.frombuffer(raw, "<u8", 1, offset)[0])
        values = np.frombuffer(raw, "<f4", size // 4, offset + 8)
        arrays[array.get("Name")] = values.reshape(*cells[::-1], components).transpose(2, 1, 0, 3)
    return dict(image.attrib), arrays


def export(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/export_fields.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_vtk_series_holds_every_value(tmp_path):
    expected = pdebench_cfd(tmp_path / "cfd.hdf5")
    done = export(str(tmp_path / "cfd.hdf5"), "--trajectory", "1", "--out", str(tmp_path / "vtk"))
    assert done.returncode == 0, done.stderr
    series = (tmp_path / "vtk" / "cfd_0001.pvd").read_text()
    names = re.findall(r'file="([^"]+)"', series)
    assert len(names) == 4 and 'timestep="0.05' in series
    image, arrays = read_vti(tmp_path / "vtk" / names[2])
    np.testing.assert_allclose([float(v) for v in image["Spacing"].split()], (1 / 6, 2 / 5, 0.5 / 4), rtol=1e-5)
    np.testing.assert_array_equal(arrays["velocity"], expected["velocity"][1, 2])
    np.testing.assert_array_equal(arrays["density"][..., 0], expected["density"][1, 2])


def test_independent_reader_agrees(tmp_path):
    vtk = pytest.importorskip("vtk", reason="the package vtk is not installed")
    from vtk.util.numpy_support import vtk_to_numpy

    velocity = np.random.default_rng(0).random((3, 5, 4, 3), dtype=np.float32)
    write_vti(tmp_path / "a.vti", {"velocity": velocity}, (0.1, 0.2, 0.3))
    reader = vtk.vtkXMLImageDataReader()
    reader.SetFileName(str(tmp_path / "a.vti"))
    reader.Update()
    image = reader.GetOutput()
    assert image.GetSpacing() == (0.1, 0.2, 0.3)
    values = vtk_to_numpy(image.GetCellData().GetArray("velocity"))
    np.testing.assert_array_equal(values.reshape(3, 4, 5, 3).transpose(3, 2, 1, 0), velocity)


def test_two_dimensions_become_one_layer(tmp_path):
    velocity = np.random.default_rng(0).random((2, 5, 4), dtype=np.float32)
    write_vti(tmp_path / "a.vti", {"velocity": velocity}, (0.1, 0.2))
    _, arrays = read_vti(tmp_path / "a.vti")
    np.testing.assert_array_equal(arrays["velocity"][:, :, 0, :2], np.moveaxis(velocity, 0, -1))
    assert not arrays["velocity"][..., 2].any()


def test_netcdf_holds_every_value(tmp_path):
    expected = pdebench_cfd(tmp_path / "cfd.hdf5")
    done = export(str(tmp_path / "cfd.hdf5"), "--format", "netcdf", "--frames", "1", "2", "--out", str(tmp_path / "nc"))
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "nc").glob("*.nc")
    with netcdf_file(path, mmap=False) as file:
        np.testing.assert_array_equal(file.variables["velocity_z"][0], expected["velocity"][0, 1, ..., 2])
        np.testing.assert_array_equal(file.variables["pressure"][0], expected["pressure"][0, 1])
        assert file.variables["pressure"].dimensions == ("time", "x", "y", "z")
        np.testing.assert_allclose(file.variables["y"][:], (np.arange(5) + 0.5) * 0.4, rtol=1e-5)


def test_bad_input_is_one_line(tmp_path):
    cfd = str(tmp_path / "cfd.hdf5")
    pdebench_cfd(tmp_path / "cfd.hdf5")
    for arguments, reason in (
        (("--trajectory", "9", "--out", str(tmp_path / "vtk")), "3 trajectories of 4 frames"),
        (("--frames", "-2", "1", "--out", str(tmp_path / "vtk")), "3 trajectories of 4 frames"),
        (("--out", cfd), "File exists"),
    ):
        done = export(cfd, *arguments)
        assert done.returncode == 2 and reason in done.stderr and done.stderr.count("\n") == 1, done.stderr
