"""The report says what is in a file and what is wrong with it, for every format."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from helper import Finished, run_script
from layouts import LAYOUTS, dpot_scattered, pdebench_cfd, pdebench_incompressible

from shodh.data import write_trajectories
from shodh.data.formats import FileHints
from shodh.data.formats.inspection import inspect_file, inspect_folder
from shodh.schema.fields import Field, RegimeSchema, Trajectories


def run(*arguments: str) -> Finished:
    return run_script("tools/inspect_data.py", *arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranges_are_those_of_the_values(layout, tmp_path):
    format, name, write = LAYOUTS[layout]
    expected = write(tmp_path / name)
    report = inspect_file(tmp_path / name, every_frame=True)
    assert report.format == format and report.assumed
    json.dumps(report.to_dict(), allow_nan=False)
    for field in report.fields:
        values = expected[field.name].astype(np.float64)
        axes = tuple(range(values.ndim - 1)) if field.kind == "vector" else None
        np.testing.assert_allclose(field.minimum, np.atleast_1d(values.min(axes)), rtol=1e-6)
        np.testing.assert_allclose(field.maximum, np.atleast_1d(values.max(axes)), rtol=1e-6)
        np.testing.assert_allclose(field.mean, np.atleast_1d(values.mean(axes)), atol=1e-6)
        np.testing.assert_allclose(field.std, np.atleast_1d(values.std(axes)), rtol=1e-5)
        assert field.not_finite == 0


def test_bad_values_are_counted(tmp_path):
    pdebench_cfd(tmp_path / "a.hdf5")
    with h5py.File(tmp_path / "a.hdf5", "r+") as file:
        file["density"][1, 2, 0, 0, :3] = (np.nan, np.inf, -np.inf)
    report = inspect_file(tmp_path / "a.hdf5")
    density = next(f for f in report.fields if f.name == "density")
    assert density.not_finite == 3
    assert any("3 values that are NaN" in p for p in report.problems)


def solenoidal_file(path: Path, staggered: bool) -> None:
    """curl of a random potential, by one-sided or central differences on a periodic box."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((3, 8, 8, 8))

    def difference(values: np.ndarray, axis: int) -> np.ndarray:
        if staggered:
            return values - np.roll(values, 1, axis)
        return 0.5 * (np.roll(values, -1, axis) - np.roll(values, 1, axis))

    u = [difference(a[(i + 2) % 3], (i + 1) % 3) - difference(a[(i + 1) % 3], (i + 2) % 3) for i in range(3)]
    velocity = np.stack(u, -1).astype(np.float32)[None, None].repeat(2, 1)
    schema = RegimeSchema("flow", (Field("velocity", "vector"),), ("periodic",) * 3)
    write_trajectories(path, Trajectories(schema, (1.0, 1.0, 1.0), np.arange(2.0), {"velocity": velocity}))


@pytest.mark.parametrize("staggered", [True, False])
def test_divergence_tells_staggered_from_collocated(tmp_path, staggered):
    solenoidal_file(tmp_path / "a.hdf5", staggered)
    (velocity,) = inspect_file(tmp_path / "a.hdf5").fields
    assert velocity.divergence is not None
    ours, other = ("staggered", "collocated") if staggered else ("collocated", "staggered")
    assert velocity.divergence[ours] < 1e-6 < 1e-2 < velocity.divergence[other]
    assert velocity.solenoidal == ours


def test_compressible_flow_is_not_solenoidal(tmp_path):
    pdebench_cfd(tmp_path / "a.hdf5")
    velocity = inspect_file(tmp_path / "a.hdf5").fields[0]
    assert velocity.solenoidal == "no"


def test_slow_layouts_are_named(tmp_path):
    dpot_scattered(tmp_path / "data_0.hdf5")
    pdebench_incompressible(tmp_path / "b.h5")
    assert any("interleaved" in p for p in inspect_file(tmp_path / "data_0.hdf5").problems)
    report = inspect_file(tmp_path / "b.h5")
    assert any("compressed" in p for p in report.problems)
    velocity = next(f for f in report.fields if f.name == "velocity")
    assert (velocity.compression, velocity.chunks) == ("lzf+shuffle", [1, 1, 6, 7, 2])


def test_folder_names_files_that_differ_or_are_damaged(tmp_path):
    for split in ("train", "test"):
        for i in range(2):
            dpot_scattered(tmp_path / split / f"data_{i}.hdf5", seed=i)
    dpot_scattered(tmp_path / "test" / "data_7.hdf5", grid=(4, 4, 4))
    (tmp_path / "train" / "data_9.hdf5").write_bytes(b"nothing")
    report = inspect_folder(tmp_path)
    assert report.files == {"train": 3, "test": 3} and report.trajectories == {"train": 2, "test": 3}
    text = "\n".join(report.problems)
    assert "data_7.hdf5: grid is (4, 4, 4)" in text and "data_9.hdf5: cannot be read" in text
    assert "no split 'valid'" in text


@pytest.mark.parametrize("frame", [0, 4])
def test_values_and_times_of_every_file_of_a_folder_are_checked(tmp_path, frame):
    """The ends of every file always, all of it on demand; times of all trajectories."""
    for name in ("a", "b"):
        pdebench_cfd(tmp_path / f"{name}.hdf5", count=3, frames=9)
    with h5py.File(tmp_path / "b.hdf5", "r+") as file:
        file["density"][2, frame, 0, 0, 0] = np.nan
        file["t-coordinate"][5:] += 0.04
    report = inspect_folder(tmp_path)
    assert (report.frames_read, report.frames) == (3 * 8 + 2 * 2, 54)
    assert any("b.hdf5: times are not evenly spaced" in p for p in report.problems)
    assert any("b.hdf5" in p and "NaN" in p for p in report.problems) == (frame == 0)
    report = inspect_folder(tmp_path, every_frame=True)
    assert report.frames_read == report.frames
    assert any("b.hdf5" in p and "NaN" in p for p in report.problems)
    assert "values of 28 of 54 frames were read" in run(str(tmp_path)).stdout


def test_image_with_a_pore_value_is_a_mask(tmp_path):
    image = np.zeros((6, 5, 4), dtype=np.uint8)
    image[:3] = 255
    image.tofile(tmp_path / "rock.raw")
    report = inspect_file(tmp_path / "rock.raw", hints=FileHints(None, None, None, None, None, (6, 5, 4), "uint8", 0.0))
    (solid,) = report.fields
    assert (solid.name, solid.static, solid.mean) == ("solid", True, [0.5])


def test_command_takes_what_a_file_does_not_say(tmp_path):
    dpot_scattered(tmp_path / "data_0.hdf5")
    options = ["--boundary", "wall", "periodic", "open", "--lengths", "2", "3", "1", "--time-step", "0.5"]
    report = json.loads(run(str(tmp_path / "data_0.hdf5"), *options, "--json").stdout)
    assert (report["boundary"], report["lengths"], report["time_step"]) == (
        ["wall", "periodic", "open"],
        [2.0, 3.0, 1.0],
        0.5,
    )


def test_command_prints_text_and_json(tmp_path):
    pdebench_cfd(tmp_path / "3D_CFD_periodic.hdf5")
    done = run(str(tmp_path / "3D_CFD_periodic.hdf5"))
    assert done.code == 0, done.stderr
    for part in ("pdebench", "3 trajectories of 4 frames", "step 0.05", "velocity", "assumed", "boundary: periodic"):
        assert part in done.stdout
    report = json.loads(run(str(tmp_path / "3D_CFD_periodic.hdf5"), "--json").stdout)
    assert report["grid"] == [6, 5, 4]
    assert inspect_folder(tmp_path).files == {"not split": 1}
    bad = run(str(tmp_path / "none.hdf5"))
    assert bad.code == 2 and bad.stderr.count("\n") == 1 and "no such file" in bad.stderr
