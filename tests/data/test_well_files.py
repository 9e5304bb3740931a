"""What is written is read back to the bit, by us and by The Well's own reader; a failed write leaves nothing."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest

from shodh.data import WellFile, compute_statistics, remove_partial_files, write_stats, write_trajectories
from shodh.core.errors import DataError
from shodh.schema.fields import Field
from shodh.ops import extension
from shodh.ops.reading import read_snapshot


def read_all(file: WellFile, name: str, components: int) -> np.ndarray:
    """[B, T, C, *grid]"""
    out = np.empty((file.num_trajectories, file.num_frames, components, *file.grid), dtype=np.float32)
    for trajectory in range(file.num_trajectories):
        file.read(name, trajectory, range(file.num_frames), out[trajectory])
    return out


@pytest.mark.parametrize(
    ("grid", "boundary"),
    [((5, 6, 7), ("periodic", "periodic", "wall")), ((9, 4), ("wall", "periodic")), ((1, 3, 2), ("periodic",) * 3)],
)
def test_reader_returns_what_the_writer_got_to_the_bit(tmp_path, make_trajectories, grid, boundary):
    trajectories = make_trajectories(grid=grid, boundary=boundary)
    write_trajectories(tmp_path / "a.hdf5", trajectories)
    file = WellFile(tmp_path / "a.hdf5")
    assert file.fields == {f.name: f for f in trajectories.schema.fields}
    assert (file.grid, file.boundary, file.lengths) == (grid, boundary, trajectories.lengths)
    assert (file.num_trajectories, file.num_frames) == (3, 5)
    assert file.spacing == trajectories.spacing
    assert file.field("velocity").placement == "face"
    np.testing.assert_array_equal(file.time, trajectories.time)
    velocity = np.moveaxis(read_all(file, "velocity", len(grid)), 2, -1)
    np.testing.assert_array_equal(velocity, trajectories.values["velocity"])
    np.testing.assert_array_equal(read_all(file, "tracer", 1)[:, :, 0], trajectories.values["tracer"])
    solid = np.empty((1, *grid), dtype=np.float32)
    for trajectory in range(3):
        file.read("solid", trajectory, range(1), solid)
        np.testing.assert_array_equal(solid[0], trajectories.values["solid"][trajectory])


def test_frames_are_read_with_a_stride_into_any_view(tmp_path, make_trajectories):
    trajectories = make_trajectories()
    write_trajectories(tmp_path / "a.hdf5", trajectories)
    buffer = np.zeros((2, 7, 4, 6, 5), dtype=np.float32)
    view = buffer.transpose(0, 2, 4, 3, 1)  # [T, C, X, Y, Z], nothing contiguous
    file = WellFile(tmp_path / "a.hdf5")
    file.read("velocity", 1, range(1, 5, 3), view[:, :3])
    file.read("tracer", 1, range(1, 5, 3), view[:, 3:])
    np.testing.assert_array_equal(np.moveaxis(view[:, :3], 1, -1), trajectories.values["velocity"][1, 1:5:3])
    np.testing.assert_array_equal(view[:, 3], trajectories.values["tracer"][1, 1:5:3])


def test_the_well_reads_our_files_to_the_bit(tmp_path, make_trajectories):
    well = pytest.importorskip("the_well.data")
    trajectories = make_trajectories()
    write_trajectories(tmp_path / "data" / "train" / "a.hdf5", trajectories)
    dataset = well.WellDataset(
        path=str(tmp_path), well_split_name="train", n_steps_input=2, n_steps_output=1, normalize_time_grid=False
    )
    assert len(dataset) == 3 * 3
    for index in range(len(dataset)):
        trajectory, frame = divmod(index, 3)
        item = dataset[index]
        frames = np.concatenate([item["input_fields"], item["output_fields"]])
        window = slice(frame, frame + 3)
        np.testing.assert_array_equal(frames[..., 0], trajectories.values["tracer"][trajectory, window])
        np.testing.assert_array_equal(frames[..., 1:], trajectories.values["velocity"][trajectory, window])
        np.testing.assert_array_equal(item["constant_fields"][..., 0], trajectories.values["solid"][trajectory])
        np.testing.assert_array_equal(item["boundary_conditions"], [[2, 2], [2, 2], [0, 0]])
        np.testing.assert_allclose(item["input_time_grid"], 0.25 * np.arange(frame, frame + 2))
        expected = [
            180.0,
            trajectories.parameters["porosity"][trajectory],
            trajectories.diagnostics["residual"][trajectory],
        ]
        np.testing.assert_allclose(item["constant_scalars"], expected, rtol=1e-6)


def test_the_well_normalises_with_our_statistics(tmp_path, make_trajectories):
    well = pytest.importorskip("the_well.data")
    normalization = pytest.importorskip("the_well.data.normalization")
    path = tmp_path / "data" / "train" / "a.hdf5"
    write_trajectories(path, make_trajectories(batch=6, frames=9))
    write_stats(tmp_path / "stats.yaml", compute_statistics([path]))
    dataset = well.WellDataset(
        path=str(tmp_path),
        well_split_name="train",
        use_normalization=True,
        normalization_type=normalization.ZScoreNormalization,
    )
    values = np.concatenate([dataset[i]["input_fields"].reshape(-1, 4) for i in range(len(dataset))])
    assert np.abs(values.mean(0)).max() < 0.05
    assert np.abs(values.std(0) - 1).max() < 0.05


def test_our_reader_agrees_with_the_well_on_a_foreign_file(foreign_folder):
    well = pytest.importorskip("the_well.data")
    file = WellFile(foreign_folder / "train" / "run.h5")
    item = well.WellDataset(path=str(foreign_folder / "train"), n_steps_input=4, n_steps_output=1)[1]
    theirs = np.concatenate([item["input_fields"], item["output_fields"]])  # dye, layer, vel; second trajectory
    codes = {"periodic": 2, "wall": 0}
    np.testing.assert_array_equal(item["boundary_conditions"], [[codes[b]] * 2 for b in file.boundary])
    for name, channels in (("dye", slice(0, 1)), ("layer", slice(1, 2)), ("vel", slice(2, 5))):
        ours = np.moveaxis(read_all(file, name, channels.stop - channels.start)[1], 1, -1)
        np.testing.assert_array_equal(ours, theirs[..., channels].astype(np.float32))
    rock = np.empty((1, *file.grid), dtype=np.float32)
    file.read("rock", 1, range(1), rock)
    np.testing.assert_array_equal(rock[0], item["constant_fields"][..., 0])


def test_foreign_file_without_our_attributes(foreign_folder):
    file = WellFile(foreign_folder / "train" / "run.h5")
    assert file.boundary == ("periodic", "wall", "periodic")
    assert file.lengths == pytest.approx((3.0, 1.0, 18.0))
    assert file.fields["vel"] == Field("vel", "vector")
    assert file.fields["rock"] == Field("rock", static=True)
    assert file.time.shape == (2, 5)


def test_snapshots_are_chunks_and_uncompressed(tmp_path, make_trajectories):
    write_trajectories(tmp_path / "a.hdf5", make_trajectories(), attributes={"generator_seed": 3})
    with h5py.File(tmp_path / "a.hdf5") as file:
        dataset = file["t1_fields/velocity"]
        assert dataset.chunks == (1, 1, 5, 6, 7, 3)
        assert dataset.compression is None
        assert dataset.attrs["solenoidal"]
        assert file.attrs["generator_seed"] == 3
        assert list(file.attrs["simulation_parameters"]) == ["re_tau"]


@pytest.mark.parametrize("existing", [False, True])
def test_a_write_that_fails_midway_leaves_no_trace(tmp_path, make_trajectories, monkeypatch, existing):
    path = tmp_path / "a.hdf5"
    if existing:
        write_trajectories(path, make_trajectories(seed=1))
    before = path.read_bytes() if existing else None

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shodh.data.well._write_scalars", fail)
    with pytest.raises(OSError, match="No space left"):
        write_trajectories(path, make_trajectories())
    assert [p.name for p in tmp_path.iterdir()] == (["a.hdf5"] if existing else [])
    assert not existing or path.read_bytes() == before


def test_a_file_is_on_disk_before_it_gets_its_name(tmp_path, make_trajectories, monkeypatch):
    order: list[str] = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (order.append("fsync"), fsync(descriptor))[1])
    monkeypatch.setattr(os, "replace", lambda old, new: (order.append("rename"), rename(old, new))[1])
    write_trajectories(tmp_path / "a.hdf5", make_trajectories())
    assert order == ["fsync", "rename", "fsync"]  # the file, its name, the folder


def test_a_killed_write_publishes_nothing_and_is_cleaned_up(tmp_path, make_trajectories, monkeypatch):
    monkeypatch.setattr("shodh.data.well._write_scalars", lambda *_: os.kill(os.getpid(), 9))
    child = os.fork()
    if child == 0:
        write_trajectories(tmp_path / "a.hdf5", make_trajectories())
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == 9
    assert not (tmp_path / "a.hdf5").exists()
    assert len(list(tmp_path.iterdir())) == 1
    assert len(remove_partial_files(tmp_path)) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["missing", "shape", "nan", "inf", "name"])
def test_writer_refuses_bad_trajectories(tmp_path, make_trajectories, damage):
    trajectories = make_trajectories()
    if damage == "missing":
        del trajectories.values["solid"]
    elif damage == "shape":
        trajectories.values["velocity"] = trajectories.values["velocity"][..., :2]
    elif damage == "name":
        trajectories.diagnostics["porosity"] = np.zeros(3)
    else:
        trajectories.values["tracer"][2, 1, 0, 0, 0] = np.nan if damage == "nan" else -np.inf
    word = {"missing": "solid", "shape": "velocity", "name": "porosity"}.get(damage, "'tracer' of trajectory 2")
    with pytest.raises(DataError, match=word):
        write_trajectories(tmp_path / "a.hdf5", trajectories)
    assert list(tmp_path.iterdir()) == []


def test_handles_are_not_shared_with_a_forked_process(tmp_path, make_trajectories):
    trajectories = make_trajectories()
    write_trajectories(tmp_path / "a.hdf5", trajectories)
    file = WellFile(tmp_path / "a.hdf5")
    out = np.empty((1, 1, 5, 6, 7), dtype=np.float32)
    file.read("tracer", 0, range(1), out)
    parents = file._handle
    child = os.fork()
    if child == 0:  # no assertion may run here: the child must not go on as a second pytest
        file.read("tracer", 2, range(3, 4), out)
        good = np.array_equal(out[0, 0], trajectories.values["tracer"][2, 3]) and file._handle is not parents
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
    file.read("tracer", 1, range(2, 3), out)
    assert file._handle is parents
    np.testing.assert_array_equal(out[0, 0], trajectories.values["tracer"][1, 2])


def test_a_pickled_file_reads_on(tmp_path, make_trajectories):
    trajectories = make_trajectories()
    write_trajectories(tmp_path / "a.hdf5", trajectories)
    file = WellFile(tmp_path / "a.hdf5")
    out = np.empty((1, 1, 5, 6, 7), dtype=np.float32)
    file.read("tracer", 0, range(1), out)
    pickle.loads(pickle.dumps(file)).read("tracer", 1, range(1), out)
    np.testing.assert_array_equal(out[0, 0], trajectories.values["tracer"][1, 0])


def test_indices_out_of_range_are_refused(tmp_path: Path, make_trajectories):
    write_trajectories(tmp_path / "a.hdf5", make_trajectories())
    file = WellFile(tmp_path / "a.hdf5")
    out = np.empty((1, 1, 5, 6, 7), dtype=np.float32)
    for trajectory, frame in ((3, 0), (-1, 0), (0, 5), (0, -1)):
        with pytest.raises(IndexError):
            file.read("tracer", trajectory, range(frame, frame + 1), out)


@pytest.mark.parametrize(
    "edit",
    [
        lambda file: file["boundary_conditions/z_wall"].attrs.modify("bc_type", "OPEN"),
        lambda file: file.pop("boundary_conditions/z_wall"),
    ],
    ids=["declared", "unmarked"],
)
def test_an_end_that_nothing_is_said_about_is_open(tmp_path, make_trajectories, edit):
    write_trajectories(tmp_path / "a.hdf5", make_trajectories())
    with h5py.File(tmp_path / "a.hdf5", "r+") as file:
        edit(file)
    assert WellFile(tmp_path / "a.hdf5").boundary == ("periodic", "periodic", "open")


def restored(path: Path, **how: object) -> Path:
    """The file with its dynamic fields stored in another way."""
    with h5py.File(path, "r+") as file:
        for name in ("t0_fields/tracer", "t1_fields/velocity"):
            values, attributes = file[name][()], dict(file[name].attrs)
            del file[name]
            file.create_dataset(name, data=values, **how).attrs.update(attributes)
    return path


STORAGE = {
    "snapshots": ({}, True),
    "contiguous": ({"chunks": None}, True),
    "compressed": ({"compression": "gzip"}, False),
    "checksums": ({"fletcher32": True}, False),
    "float64": ({"dtype": "<f8"}, False),
    "big-endian": ({"dtype": ">f4"}, False),
    "other chunks": ({"chunks": True}, False),
}


@pytest.mark.parametrize("storage", STORAGE)
def test_reading_past_hdf5_gives_the_same_bits(tmp_path, make_trajectories, monkeypatch, storage):
    how, plain = STORAGE[storage]
    trajectories = make_trajectories()
    path = tmp_path / "a.hdf5"
    write_trajectories(path, trajectories)
    if storage != "snapshots":
        restored(path, **how)
    past = []
    monkeypatch.setattr(
        "shodh.data.well_reader.read_snapshot", lambda *a, **k: (past.append(1), read_snapshot(*a, **k))[1]
    )
    for name, mean, scale in (("velocity", 0.0, 2.0), ("tracer", 4.7, 0.3)):
        components = 3 if name == "velocity" else 1
        out = [np.empty((3, components, 5, 6, 7), dtype=np.float32) for _ in range(2)]
        with WellFile(path) as file:
            file.read(name, 1, range(0, 5, 2), out[0], shift=mean, scale=scale)
            with monkeypatch.context() as without:
                without.setattr("shodh.data.well_reader.can_read_into", lambda _: False)
                file.read(name, 1, range(0, 5, 2), out[1], shift=mean, scale=scale)
        stored = trajectories.values[name][1, ::2].reshape(3, 5, 6, 7, components)
        expected = (np.moveaxis(stored, -1, 1) - np.float32(mean)) / np.float32(scale)
        for values in out:
            np.testing.assert_array_equal(values.view(np.int32), expected.view(np.int32))
    built = extension.unavailable_reason("cpp") is None
    assert len(past) == (6 if plain and built else 0)


def test_a_snapshot_that_was_never_written_reads_as_hdf5_says(tmp_path, make_trajectories):
    path = tmp_path / "a.hdf5"
    write_trajectories(path, make_trajectories())
    with h5py.File(path, "r+") as file:
        shape, attributes = file["t0_fields/tracer"].shape, dict(file["t0_fields/tracer"].attrs)
        del file["t0_fields/tracer"]
        chunks = (1, 1, *shape[2:])
        tracer = file.create_dataset("t0_fields/tracer", shape, np.float32, chunks=chunks, fillvalue=3.0)
        tracer.attrs.update(attributes)
        tracer[1, 2] = 4.0
    out = np.empty((2, 1, 5, 6, 7), dtype=np.float32)
    WellFile(path).read("tracer", 1, range(1, 3), out)
    assert (out[0] == 3.0).all() and (out[1] == 4.0).all()


def test_a_file_cut_while_it_is_open_is_named(tmp_path, make_trajectories):
    path = tmp_path / "a.hdf5"
    write_trajectories(path, make_trajectories())
    out = np.empty((5, 3, 5, 6, 7), dtype=np.float32)
    file = WellFile(path)
    file.read("velocity", 0, range(5), out)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(DataError, match="truncated or damaged") as error:
        for trajectory in range(3):
            file.read("velocity", trajectory, range(5), out)
            file.read("tracer", trajectory, range(5), out[:, :1])
    assert str(path) in str(error.value) and "\n" not in str(error.value)
