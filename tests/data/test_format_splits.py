"""Trajectories find their splits by folders, by names, by number, or by time; no frame is in two of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path, PurePath

import h5py
import numpy as np
import pytest
from layouts import dpot_scattered, dpot_single, jhtdb, pdebench_cfd

from shodh.data import RegimeSource, WindowDataset
from shodh.data.formats import open_file
from shodh.data.formats.names import natural_key, stated_split, words
from shodh.data.formats.splits import SPLITS, Key, Split, deal, find_files, open_splits, time_blocks
from shodh.core.errors import DataError
from shodh.schema.fields import Field

SHARES = {"train": 0.8, "valid": 0.1, "test": 0.1}
FLOW = (Field("velocity", "vector", placement="center"), Field("pressure"))


def keys(rng: np.random.Generator, count: int) -> list[Key]:
    """Trajectories of files with one to seven of them, with and without numbers in their names, in random order."""
    found: list[Key] = []
    while len(found) < count:
        stem = "".join(rng.choice(list("abcdef"), 4)) + (f"_{rng.integers(50)}" if rng.random() < 0.7 else "")
        found += [(stem, n) for n in range(rng.integers(1, 8))]
    return [found[i] for i in rng.permutation(len(found))[:count]]


@pytest.mark.parametrize("seed", range(20))
def test_neither_order_nor_more_trajectories_change_a_choice(seed):
    rng = np.random.default_rng(seed)
    every = keys(rng, 200)
    whole = deal(every, SHARES)
    assert deal([every[i] for i in rng.permutation(200)], SHARES) == whole
    for count in (90, 120, 160):
        assert deal(every[:count], SHARES).items() <= whole.items()


@pytest.mark.parametrize("seed", range(20))
def test_what_a_run_knows_stays_however_small_the_set_was(seed):
    every = keys(np.random.default_rng(seed), 60)
    known: dict[Key, Split] = {}
    for count in (1, 2, 3, 4, 5, 9, 16, 60):
        grown = deal(every[:count], SHARES, known)
        assert known.items() <= grown.items()
        known = grown


@pytest.mark.parametrize("count", [3, 4, 10, 16, 500])
@pytest.mark.parametrize("seed", range(10))
def test_every_split_has_some_and_about_its_share(seed, count):
    one_file = Counter(deal([(f"run{seed}", n) for n in range(count)], SHARES).values())
    files = Counter(deal(keys(np.random.default_rng(seed), count), SHARES).values())
    for split, share in SHARES.items():
        assert one_file[split] >= 1 and files[split] >= 1
        assert abs(one_file[split] - share * count) <= (1.5 if count < 10 else 3)
        assert abs(files[split] - share * count) <= 1 + 4 * (share * (1 - share) * count) ** 0.5


def test_a_share_of_zero_gets_nothing():
    assert set(deal([("a", n) for n in range(50)], {"train": 0.9, "valid": 0.1, "test": 0.0}).values()) == {
        "train",
        "valid",
    }


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
    assert min(sum(f.num_trajectories for f in splits[s]) for s in SPLITS) >= 1
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
    assert len(splits["train"]) + len(splits["valid"]) == 5 and len(splits["valid"]) >= 1 and len(splits["test"]) == 2


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
    assert source.num_frames("train") == [3] and source.boundary == ("open",) * 3


def test_no_files_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no training files"):
        RegimeSource("nothing", tmp_path / "empty", FLOW)


def test_no_file_of_a_folder_is_overlooked(tmp_path):
    """Both names of the validation folder, and suffixes in capitals."""
    for name in ("train/a.HDF5", "valid/b.h5", "val/c.hdf5"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    found = {split: sorted(p.name for p in files) for split, files in find_files(tmp_path).items()}
    assert found == {"train": ["a.HDF5"], "valid": ["b.h5", "c.hdf5"]}


@pytest.mark.parametrize(("folder", "field"), [("swe_pdb", "height"), ("SWE", "height"), ("answers", "vorticity")])
def test_published_sets_are_known_by_words_of_the_path(tmp_path, folder, field):
    (tmp_path / folder).mkdir()
    with h5py.File(tmp_path / folder / "x_train.hdf5", "w") as file:
        file["data"] = np.zeros((2, 8, 8, 3, 1), dtype=np.float32)
    assert list(open_file(tmp_path / folder / "x_train.hdf5").fields) == [field]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("ns_train.hdf5", "train"),
        ("train_ns.hdf5", "train"),
        ("ns_train_part0.hdf5", "train"),
        ("nsTrain2.h5", "train"),
        ("3D_CFD_Rand_periodic_Train.hdf5", "train"),
        ("testing/a.h5", "test"),
        ("a_eval.h5", "test"),
        ("held-out_3.h5", "test"),
        ("VAL_1.h5", "valid"),
        ("validation_set/a.h5", "valid"),
        ("test/2D_CFD_Rand_Train.hdf5", "test"),
        ("strain_rate.h5", None),
        ("contest.h5", None),
        ("interval_latest.h5", None),
        ("values_attest.h5", None),
    ],
)
def test_words_of_a_name_state_its_split(name, split):
    assert stated_split(PurePath(name)) == split


@pytest.mark.parametrize("name", ["train/ns_test.h5", "train_test.h5", "test/a_valid.h5"])
def test_a_name_that_states_two_splits_is_refused(name):
    with pytest.raises(DataError, match="states the splits"):
        stated_split(PurePath(name))


def test_words_and_numbers_of_names():
    assert words("2D_Transport_periodicBC") == ["d", "transport", "periodic", "bc"]
    assert sorted(["data_10", "data_2", "data_1"], key=natural_key) == ["data_1", "data_2", "data_10"]


@pytest.mark.parametrize("names", [("ns_train", "ns_test"), ("train_ns", "test_ns"), ("ns_train_part0", "ns_test_part0")])
def test_what_calls_itself_test_is_never_trained_on(tmp_path, names):
    for seed, name in enumerate(names):
        dpot_single(tmp_path / f"{name}.hdf5", seed=seed, count=4)
    splits = open_splits(tmp_path)
    assert {f.path.stem for f in splits["test"]} == {names[1]}
    assert {f.path.stem for s in ("train", "valid") for f in splits[s]} == {names[0]}
    dpot_single(tmp_path / "ns_extra.hdf5", count=1)
    with pytest.raises(DataError, match="ns_extra.hdf5"):
        open_splits(tmp_path)


def test_held_out_files_alone_are_not_trained_on(tmp_path):
    for name in ("ns_test", "ns_valid"):
        dpot_single(tmp_path / f"{name}.hdf5")
    for paths in ([tmp_path], [tmp_path / "ns_test.hdf5"], sorted(tmp_path.iterdir())):
        with pytest.raises(DataError, match="no training files"):
            open_splits(*paths)


@pytest.mark.parametrize("start", [0, 10])
def test_parts_of_a_trajectory_are_in_one_split(tmp_path, start):
    """Ten trajectories, each in three files that follow each other in time, and ten that all begin at once."""
    for run in range(10):
        for part in range(3):
            path = tmp_path / f"run{run}_part{part}.h5"
            pdebench_cfd(path, seed=run, count=1, grid=(6, 5))
            with h5py.File(path, "r+") as file:
                file["t-coordinate"][...] += start * part * 0.05 * 4 / 10
    splits = open_splits(tmp_path, shares=(0.4, 0.3, 0.3))
    found = [{f.path.name.split("_")[0] for f in splits[s]} for s in SPLITS]
    assert all(found)
    apart = not any(a & b for a, b in zip(found, [*found[1:], found[0]]))
    assert apart == (start > 0)


def test_slabs_of_one_cutout_are_split_in_time(tmp_path):
    """Frames 1 .. 40 of one cutout in four files, two of which share a frame."""
    for first, last in ((1, 10), (11, 20), (20, 30), (31, 40)):
        with h5py.File(tmp_path / f"iso_t{first}_{last}.h5", "w") as file:
            for index in range(first, last + 1):
                file[f"pressure_{index:04d}"] = np.full((4, 4, 4, 1), index, dtype=np.float32)
            for axis in "xyz":
                file[f"{axis}coor"] = np.arange(4.0)
    splits = open_splits(tmp_path)
    seen = {s: sorted(int(t) for f in splits[s] for t in f.time) for s in SPLITS}
    assert [len(seen[s]) for s in SPLITS] == [28, 4, 4]
    assert seen["valid"][0] - seen["train"][-1] == seen["test"][0] - seen["valid"][-1] == 3
    assert [numbers([f], "pressure")[0] for f in splits["test"]] == [37.0]
