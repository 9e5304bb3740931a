"""A folder of files is one regime only if the files agree; foreign names and placements are mapped to ours."""

from __future__ import annotations

import shutil

import h5py
import numpy as np
import pytest

from shodh.data import RegimeSource, WindowDataset, write_trajectories
from shodh.data.source import average_to_faces
from shodh.core.errors import ConfigError, DataError
from shodh.schema.fields import Field

MAPPING = {"velocity": "vel", "tracer": "dye", "solid": "rock"}


def divergence(velocity: np.ndarray, boundary: tuple[str, ...]) -> np.ndarray:
    """Staggered divergence of [3, X, Y, Z] at unit spacing; faces below a walled axis carry nothing."""
    total = np.zeros(velocity.shape[1:])
    for axis, kind in enumerate(boundary):
        below = np.roll(velocity[axis], 1, axis)
        if kind == "wall":
            below[tuple(0 if a == axis else slice(None) for a in range(3))] = 0
        total += velocity[axis] - below
    return total


def test_channels_follow_the_wanted_fields(make_folder, make_trajectories, fields):
    wanted = (fields[1], fields[2], fields[0])
    source = RegimeSource("open_channel", make_folder(), wanted)
    assert source.num_trajectories("train") == 5
    assert source.num_channels == 4
    assert source.num_static_channels == 1
    assert source.boundary == ("periodic", "periodic", "wall")
    second = make_trajectories(seed=1, batch=2)  # trajectories 3 and 4 of the split
    out = np.empty((2, 4, 5, 6, 7), dtype=np.float32)
    source.read("train", 4, range(1, 4, 2), out)
    np.testing.assert_array_equal(out[:, 0], second.values["tracer"][1, 1:4:2])
    np.testing.assert_array_equal(np.moveaxis(out[:, 1:], 1, -1), second.values["velocity"][1, 1:4:2])
    static = np.empty((1, 5, 6, 7), dtype=np.float32)
    source.read_static("train", 4, static)
    np.testing.assert_array_equal(static[0], second.values["solid"][1])


def test_splits_are_found_with_and_without_the_data_folder(make_folder, fields):
    root = make_folder()
    assert RegimeSource("r", root / "data", fields).num_trajectories("test") == 1
    shutil.rmtree(root / "data" / "valid")
    counts = {s: RegimeSource("r", root, fields).num_trajectories(s) for s in ("train", "valid", "test")}
    assert counts["valid"] >= 1, "validation gets its share of the training trajectories"
    assert counts["train"] + counts["valid"] == 5 and counts["test"] == 1
    whole = RegimeSource("r", root, fields, split=(1, 0, 0))
    assert (whole.num_trajectories("train"), whole.num_trajectories("valid")) == (5, 0)


def test_windows_never_cross_trajectories(make_folder, fields):
    source = RegimeSource("open_channel", make_folder(frames=5), fields)
    for history, horizon, stride, windows in ((1, 1, 1, 4), (2, 1, 2, 1), (4, 1, 1, 1)):
        dataset = WindowDataset(source, "train", history=history, horizon=horizon, stride=stride)
        assert len(dataset) == 5 * windows
        seen = [(dataset[i]["trajectory"], dataset[i]["frame"]) for i in range(len(dataset))]
        assert seen == [(t, f) for t in range(5) for f in range(windows)]
    with pytest.raises(IndexError):
        dataset[len(dataset)]
    with pytest.raises(DataError, match="6 frames.* 5 trajectories has 5"):
        WindowDataset(source, "train", history=5, horizon=1)


def test_window_items_hold_the_frames_in_order(make_folder, make_trajectories, fields):
    source = RegimeSource("open_channel", make_folder(), fields)
    item = WindowDataset(source, "train", history=1, horizon=1, stride=3, regime=7)[5]  # trajectory 2, frame 1
    values = make_trajectories(seed=0).values
    assert (item["regime"], item["trajectory"], item["frame"]) == (7, 2, 1)
    assert item["fields"].shape == (2, 4, 5, 6, 7)
    np.testing.assert_array_equal(item["fields"][:, 3], values["tracer"][2, 1:5:3])
    np.testing.assert_array_equal(item["fields"][:, :3].movedim(1, -1), values["velocity"][2, 1:5:3])
    np.testing.assert_array_equal(item["static"][0], values["solid"][2])


def test_foreign_files_are_used_through_a_mapping(foreign_folder, fields):
    source = RegimeSource("theirs", foreign_folder, fields, mapping=MAPPING, split=(1, 0, 0))
    assert (source.grid, source.boundary) == ((6, 4, 9), ("periodic", "wall", "periodic"))
    item = WindowDataset(source, "train", history=2, horizon=1)[4]  # trajectory 1, frame 1
    with h5py.File(foreign_folder / "train" / "run.h5") as file:
        dye, rock, vel = file["t0_fields/dye"][1, 1:4], file["t0_fields/rock"][()], file["t1_fields/vel"][1, 1:4]
    np.testing.assert_array_equal(item["fields"][:, 3], dye)
    np.testing.assert_array_equal(item["static"][0], rock)
    expected = np.stack([0.5 * (vel[..., a] + np.roll(vel[..., a], -1, axis=a + 1)) for a in range(3)], axis=1)
    expected[:, 1, :, -1] = 0  # the wall above y
    np.testing.assert_allclose(item["fields"][:, :3], expected, atol=1e-6)


def test_placement_can_be_stated_for_files_that_do_not(foreign_folder, fields):
    source = RegimeSource("theirs", foreign_folder, fields, mapping=MAPPING, placement={"velocity": "face"})
    out = np.empty((1, 4, 6, 4, 9), dtype=np.float32)
    source.read("train", 0, range(1), out)
    with h5py.File(foreign_folder / "train" / "run.h5") as file:
        np.testing.assert_array_equal(np.moveaxis(out[0, :3], 0, -1), file["t1_fields/vel"][0, 0].astype(np.float32))


def test_absent_static_field_is_zero_only_if_said(foreign_folder, fields):
    source = RegimeSource("theirs", foreign_folder, fields, mapping=MAPPING | {"solid": None})
    static = np.ones((1, 6, 4, 9), dtype=np.float32)
    source.read_static("train", 0, static)
    assert not static.any()
    with pytest.raises(DataError, match="no field 'solid'.*null"):
        RegimeSource("theirs", foreign_folder, fields, mapping={"velocity": "vel", "tracer": "dye"})
    with pytest.raises(ConfigError, match="cannot be mapped to null"):
        RegimeSource("theirs", foreign_folder, fields, mapping=MAPPING | {"tracer": None})


def test_averaging_keeps_constants_and_closes_walls():
    vector = np.ones((2, 3, 5, 4, 3), dtype=np.float32) * np.arange(1, 4, dtype=np.float32)[:, None, None, None]
    average_to_faces(vector, ("periodic", "wall", "periodic"))
    assert (vector[:, 0] == 1).all() and (vector[:, 2] == 3).all()
    assert (vector[:, 1, :, :-1] == 2).all() and (vector[:, 1, :, -1] == 0).all()


def test_averaging_is_second_order():
    errors = []
    for cells in (16, 32):
        x = (np.arange(cells) + 0.5) / cells * 2 * np.pi
        vector = np.broadcast_to(np.sin(x)[None, :, None, None], (3, cells, 2, 2)).copy()
        average_to_faces(vector, ("periodic",) * 3)
        errors.append(np.abs(vector[0, :, 0, 0] - np.sin(x + np.pi / cells)).max())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)


def test_averaging_turns_central_into_staggered_divergence_but_not_at_walls():
    """The documented price: only a field whose central divergence is zero, in a periodic box, stays one."""
    rng = np.random.default_rng(0)
    potential = rng.standard_normal((3, 6, 5, 7))

    def central(values: np.ndarray, axis: int) -> np.ndarray:
        return 0.5 * (np.roll(values, -1, axis) - np.roll(values, 1, axis))

    velocity = np.stack(
        [central(potential[i - 1], (i + 1) % 3) - central(potential[i - 2], (i + 2) % 3) for i in range(3)]
    )
    closed = velocity.copy()
    assert np.abs(sum(central(velocity[i], i) for i in range(3))).max() < 1e-12
    average_to_faces(velocity, ("periodic",) * 3)
    assert np.abs(divergence(velocity, ("periodic",) * 3)).max() < 1e-12
    average_to_faces(closed, ("periodic", "wall", "periodic"))
    assert np.abs(divergence(closed, ("periodic", "wall", "periodic"))).max() > 0.1


@pytest.mark.parametrize("what", ["grid", "boundary", "lengths", "field", "damaged"])
def test_files_that_differ_are_named(make_folder, make_trajectories, fields, what):
    root = make_folder()
    bad = root / "data" / "valid" / "z_other.h5"
    if what == "grid":
        trajectories = make_trajectories(grid=(5, 6, 8))
    elif what == "boundary":
        trajectories = make_trajectories(boundary=("periodic", "wall", "wall"))
    else:
        trajectories = make_trajectories()
    if what == "lengths":
        trajectories.lengths = (1.5, 3.0, 2.0)
    write_trajectories(bad, trajectories)
    if what == "field":
        with h5py.File(bad, "r+") as file:
            file["t0_fields"].attrs["field_names"] = ["solid"]
    if what == "damaged":
        bad.write_bytes(bad.read_bytes()[:-5000])
    with pytest.raises(DataError, match={"field": "tracer", "damaged": "truncated"}.get(what, what)) as error:
        RegimeSource("open_channel", root, fields)
    assert str(bad) in str(error.value)


def test_wanted_kind_and_time_dependence_must_match(make_folder, fields):
    root = make_folder()
    with pytest.raises(DataError, match="kind=scalar, wanted is kind=vector"):
        RegimeSource("r", root, [fields[0], Field("tracer", "vector")])
    with pytest.raises(DataError, match="static=True, wanted is static=False"):
        RegimeSource("r", root, [fields[0], Field("solid")])
    with pytest.raises(DataError, match="lives on faces"):
        RegimeSource("r", root, [Field("velocity", "vector")])


def test_senseless_wishes_are_refused(make_folder, fields):
    root = make_folder()
    with pytest.raises(ConfigError, match="repeated"):
        RegimeSource("r", root, [fields[0], fields[0]])
    with pytest.raises(ConfigError, match="changes in time"):
        RegimeSource("r", root, [fields[2]])
    with pytest.raises(ConfigError, match="veloctiy"):
        RegimeSource("r", root, fields, mapping={"veloctiy": "u"})
    with pytest.raises(ConfigError, match="placement tracer='face'"):
        RegimeSource("r", root, fields, placement={"tracer": "face"})
    with pytest.raises(DataError, match="generate_data"):
        RegimeSource("r", root / "nowhere", fields)


def test_only_some_files_stay_open(make_folder, make_trajectories, fields, monkeypatch):
    monkeypatch.setattr("shodh.data.source.MAX_OPEN_FILES", 1)
    source = RegimeSource("open_channel", make_folder(), fields)
    out = np.empty((1, 4, 5, 6, 7), dtype=np.float32)
    for trajectory in (0, 4, 1, 3):
        source.read("train", trajectory, range(1), out)
        assert sum(f._handle is not None for f in source.files["train"]) == 1
    np.testing.assert_array_equal(out[0, 3], make_trajectories(seed=1, batch=2).values["tracer"][0, 0])
