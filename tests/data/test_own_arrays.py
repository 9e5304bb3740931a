"""Arrays of one's own: one dataset a field, the axes stated once; what is unclear is asked for, not guessed."""

from __future__ import annotations

import re
from pathlib import Path

import h5py
import numpy as np
import pytest
from layouts import random

from shodh.config import load_config
from shodh.core.errors import ConfigError, DataError
from shodh.data.formats import FileHints, detect_format, open_file
from shodh.data.formats.splits import open_splits
from shodh.schema.fields import Field

N, T, GRID = 2, 5, (6, 7, 8)
VELOCITY, HEAT, SOLID = random(0, N, T, *GRID, 3), random(1, N, T, *GRID), random(2, N, *GRID)


def write(path: Path, arrays: dict[str, np.ndarray], **attributes: object) -> Path:
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file[name] = values
        file.attrs.update(attributes)
    return path


SCALARS = dict(zip("uvw", np.moveaxis(VELOCITY, -1, 0)))
FORMS = {
    "components last": ("ntxyz", {"velocity": VELOCITY, "heat": HEAT, "solid": SOLID}),
    "components stated": ("ntcxyz", {"velocity": np.moveaxis(VELOCITY, -1, 2), "heat": HEAT, "solid": SOLID}),
    "u, v, w": ("ntxyz", {**SCALARS, "heat": HEAT, "solid": SOLID}),
    "velocity_x ...": ("ntxyz", {**{f"velocity_{a}": v for a, v in zip("xyz", SCALARS.values())}, "heat": HEAT, "solid": SOLID}),
    "beside density": ("ntxyz", {"velocity": VELOCITY, "heat": HEAT, "solid": SOLID, "density": HEAT}),
    "frames first": ("tnzyx", {"velocity": VELOCITY.transpose(1, 0, 4, 3, 2, 5), "heat": HEAT.transpose(1, 0, 4, 3, 2), "solid": SOLID.transpose(0, 3, 2, 1)}),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_fields_are_read_bitwise(form, tmp_path):
    axes, arrays = FORMS[form]
    path = write(tmp_path / "a.hdf5", {**arrays, "time": 0.5 * np.arange(T), "nu": np.float64(0.1), "profile": HEAT[0, :, 0, 0]}, lengths=(1, 2, 3))
    hints = FileHints(axes=axes)
    file = open_file(path, hints=hints)
    assert (file.format, file.grid, file.num_trajectories, file.num_frames) == ("arrays", GRID, N, T)
    assert (file.lengths, file.parameters["nu"]) == ((1, 2, 3), 0.1)
    np.testing.assert_array_equal(file.time, 0.5 * np.arange(T))
    assert "datasets: profile not read" in file.header.notes
    assert file.field("velocity").kind == "vector" and file.field("solid").static
    velocity, heat, solid = (np.empty(s, "f4") for s in ((2, 3, *GRID), (2, 1, *GRID), (1, *GRID)))
    file.read("velocity", 1, range(1, 4, 2), velocity)
    file.read("heat", 1, range(1, 4, 2), heat)
    file.read("solid", 1, range(1), solid)
    np.testing.assert_array_equal(velocity, np.moveaxis(VELOCITY[1, 1:4:2], -1, 1))
    np.testing.assert_array_equal(heat[:, 0], HEAT[1, 1:4:2])
    np.testing.assert_array_equal(solid[0], SOLID[1])


def test_a_file_may_describe_itself_and_hints_replace_it(tmp_path):
    path = write(tmp_path / "a.h5", {"heat": HEAT[0], "x": 0.5 * np.arange(6), "y": np.arange(7.0), "z": np.arange(8.0)},
                 axes="txyz", boundary=("wall", "wall", "open"))  # fmt: skip
    with h5py.File(path, "r+") as file:
        file["heat"].attrs["units"] = "K"
    file = open_file(path)
    assert (file.boundary, file.lengths) == (("wall", "wall", "open"), (3.0, 7.0, 8.0))
    assert file.fields == {"heat": Field("heat", units="K")}
    assert [n.split(":")[0] for n in file.header.notes] == ["time_step"]
    hints = FileHints(boundary=("periodic",) * 3, lengths=(1.0, 1.0, 1.0), time_step=0.1)
    again = open_file(path, hints=hints)
    assert (again.boundary, again.lengths, again.header.notes) == (hints.boundary, hints.lengths, ())


REFUSED = {
    "no axes": (FORMS["components last"][1], {}, "axes: ntxyz"),
    "u, v, w without axes": (SCALARS, {}, "axes: ntxyz"),
    "u alone, not of MATLAB": ({"u": HEAT[..., 0]}, {}, "state its axes"),
    "other axes": ({"heat": HEAT}, {"axes": "txyz"}, "8 components with the axes 'txyzc'"),
    "another grid": ({"heat": HEAT, "dye": HEAT[..., :-1]}, {"axes": "ntxyz"}, "do not fit"),
    "two components": ({"heat": HEAT, "v": VELOCITY[..., :2]}, {"axes": "ntxyz"}, "2 components"),
    "times": ({"heat": HEAT, "time": np.arange(3.0)}, {"axes": "ntxyz"}, "time has the shape"),
    "lengths": ({"heat": HEAT}, {"axes": "ntxyz", "lengths": (1.0, 1.0)}, "lengths"),
    "boundary": ({"heat": HEAT}, {"axes": "ntxyz", "boundary": "leaky"}, "boundary"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_named_with_the_cure(what, tmp_path):
    arrays, attributes, reason = REFUSED[what]
    path = write(tmp_path / "a.hdf5", arrays, **attributes)
    with pytest.raises((ConfigError, DataError), match=reason) as error:
        open_file(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_guess_of_axes_that_the_shape_contradicts_is_refused(tmp_path):
    path = write(tmp_path / "a.hdf5", {"data": np.zeros((2, 6, 8, 8, 8, 4), "f4")})
    with pytest.raises(DataError, match=r"axes: nxyztc .*axes: ntxyzc"):
        open_file(path)
    assert open_file(path, hints=FileHints(axes="ntxyzc")).grid == (8, 8, 8)
    with h5py.File(path, "r+") as file:
        file.attrs["axes"] = "ntxyzc"
    channels = ("velocity", "velocity", "velocity", "heat")
    assert {n: f.kind for n, f in open_file(path, hints=FileHints(channels=channels)).fields.items()} == {
        "velocity": "vector",
        "heat": "scalar",
    }


def test_parts_without_times_are_one_trajectory(tmp_path):
    """Files that a word like part numbers are never dealt apart, in splits that would share their trajectory."""
    for part in range(2):
        write(tmp_path / f"run_part{part}.hdf5", {"heat": random(part, 20, 6, 8, 8)}, axes="ntxy")
    for files in open_splits(tmp_path).values():
        assert len({f.trajectories for f in files}) == 1 and len(files) == 2  # type: ignore[attr-defined]


def test_the_page_on_own_arrays_is_true(tmp_path, monkeypatch):
    """Its Python runs, its configuration is one, and the files have the fields that this names."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text().split("## Arrays of your own")[1]
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, {})
    Path("mine.yaml").write_text(re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)[0])
    config = load_config("mine.yaml")
    for path in ("mine.hdf5", "data/well/data/train/mine.hdf5"):
        file = open_file(path)
        assert file.grid == config.data.grid
        assert {n: f.kind for n, f in file.fields.items()} == {f.name: f.kind for f in config.data.fields}


def test_stated_axes_of_u_alone_stay_those_of_fno(tmp_path):
    path = write(tmp_path / "a.h5", {"u": HEAT[..., 0]})
    assert detect_format(path, FileHints(axes="ntxy")) == "fno"


def test_hints_for_the_well_say_how_to_correct_it(tmp_path):
    with pytest.raises(ConfigError, match="convert the original files again with --boundary, --lengths or --time-step"):
        open_file(tmp_path / "a.h5", "well", FileHints(time_step=1.0))
