"""Trajectories find their splits by folders, by names, by number, or by time; no frame is in two of them."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from layouts import dpot_scattered, dpot_single, jhtdb, pdebench_cfd

from shodh.data import RegimeSource, WindowDataset
from shodh.data.formats import open_file
from shodh.data.formats.splits import SPLITS, deal, find_files, open_splits, time_blocks
from shodh.errors import DataError
from shodh.fields import Field

SHARES = {"train": 0.8, "valid": 0.1, "test": 0.1}
FLOW = (Field("velocity", "vector", placement="center"), Field("pressure"))


@pytest.mark.parametrize("count", [3, 4, 10, 17, 500])
def test_dealing_meets_the_shares_and_never_changes_with_more(count):
    dealt = deal(count, SHARES)
    assert dealt == deal(count + 7, SHARES)[:count]
    for split, share in SHARES.items():
        assert dealt.count(split) >= 1
        assert abs(dealt.count(split) - share * count) <= (1.5 if count < 20 else 1.0)


def test_a_share_of_zero_gets_nothing():
    assert set(deal(50, {"train": 0.9, "valid": 0.1, "test": 0.0})) == {"train", "valid"}


@pytest.mark.parametrize("frames", [6, 20, 101])
def test_blocks_of_time_are_apart(frames):
    blocks = time_blocks(frames, SHARES)
    assert blocks["train"].start == 0 and blocks["test"].stop == frames
    gap = max(1, round(0.05 * frames))
    assert blocks["valid"].start - blocks["train"].stop == gap
    assert blocks["test"].start - blocks["valid"].stop == gap
    assert all(len(b) >= 1 for b in blocks.values())
    with pytest.raises(DataError, match="cannot be split"):
        time_blocks(4, SHARES)


def numbers(files: list, field: str = "density") -> np.ndarray:
    """The first value of each trajectory of a split."""
    found = []
    for file in files:
        out = np.empty((1, 1, *file.grid), dtype=np.float32)
        for trajectory in range(file.num_trajectories):
            file.read(field, trajectory, range(1), out)
            found.append(out.flat[0])
    return np.array(found)


def test_one_file_is_dealt_out_completely(tmp_path):
    values = pdebench_cfd(tmp_path / "a.hdf5", count=7)["density"]
    splits = open_splits(tmp_path / "a.hdf5")
    assert [sum(f.num_trajectories for f in splits[s]) for s in SPLITS] == [5, 1, 1]
    together = np.concatenate([numbers(splits[s]) for s in SPLITS])
    np.testing.assert_array_equal(np.sort(together), np.sort(values[:, 0, 0, 0, 0]))


def test_pairs_by_name_are_respected_and_validation_comes_from_training(tmp_path):
    dpot_single(tmp_path / "ns2d_train.hdf5", seed=1, count=9)
    test = dpot_single(tmp_path / "ns2d_test.hdf5", seed=2, count=2)["density"]
    splits = open_splits(tmp_path)
    np.testing.assert_array_equal(numbers(splits["test"]), test[:, 0, 0, 0])
    assert [sum(f.num_trajectories for f in splits[s]) for s in SPLITS] == [8, 1, 2]


def test_scattered_folders_are_respected(tmp_path):
    for split, count in (("train", 5), ("test", 2)):
        for i in range(count):
            dpot_scattered(tmp_path / split / f"data_{i}.hdf5", seed=10 * count + i)
    splits = open_splits(tmp_path)
    assert [len(splits[s]) for s in SPLITS] == [4, 1, 2]


def test_a_single_trajectory_is_split_in_time(tmp_path):
    dpot_scattered(tmp_path / "data_0.hdf5", frames=20)
    splits = open_splits(tmp_path / "data_0.hdf5", shares=(0.6, 0.2, 0.2))
    times = {s: splits[s][0].time for s in SPLITS}
    assert [len(times[s]) for s in SPLITS] == [10, 4, 4]
    assert len(np.unique(np.concatenate([*times.values()]))) == 18  # two gaps of one frame
    source = RegimeSource("long", tmp_path / "data_0.hdf5", FLOW, split=(0.6, 0.2, 0.2))
    item = WindowDataset(source, "test", history=1, horizon=1)[0]
    expected = dpot_scattered(tmp_path / "again" / "data_0.hdf5", frames=20)
    np.testing.assert_array_equal(item["fields"][0, 3], expected["pressure"][0, int(times["test"][0])])


def test_strides_in_a_view_count_its_own_frames(tmp_path):
    expected = dpot_scattered(tmp_path / "data_0.hdf5", frames=40)["pressure"][0]
    splits = open_splits(tmp_path / "data_0.hdf5")
    first = int(splits["valid"][0].time[0])
    out = np.empty((2, 1, 4, 5, 6), dtype=np.float32)
    splits["valid"][0].read("pressure", 0, range(0, 3, 2), out)
    np.testing.assert_array_equal(out[:, 0], expected[[first, first + 2]])
    with pytest.raises(IndexError):
        splits["valid"][0].read("pressure", 0, range(0, 40), np.empty((40, 1, 4, 5, 6), dtype=np.float32))


def test_a_cutout_is_a_regime(tmp_path: Path):
    jhtdb(tmp_path / "cut.h5")
    source = RegimeSource("cutout", tmp_path / "cut.h5", FLOW, split=(1.0, 0.0, 0.0))
    assert source.num_windows("train", 2) == 2 and source.boundary == ("open",) * 3


def test_no_files_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no training files"):
        RegimeSource("nothing", tmp_path / "empty", FLOW)


def test_no_file_of_a_folder_is_overlooked(tmp_path):
    """Both names of the validation folder, and suffixes in capitals."""
    for name in ("train/a.HDF5", "valid/b.h5", "val/c.hdf5"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    found = {split: [p.name for p in files] for split, files in find_files(tmp_path).items()}
    assert found == {"train": ["a.HDF5"], "valid": ["b.h5", "c.hdf5"]}


@pytest.mark.parametrize(("folder", "field"), [("swe_pdb", "height"), ("SWE", "height"), ("answers", "vorticity")])
def test_published_sets_are_known_by_words_of_the_path(tmp_path, folder, field):
    (tmp_path / folder).mkdir()
    with h5py.File(tmp_path / folder / "x_train.hdf5", "w") as file:
        file["data"] = np.zeros((2, 8, 8, 3, 1), dtype=np.float32)
    assert list(open_file(tmp_path / folder / "x_train.hdf5").fields) == [field]
