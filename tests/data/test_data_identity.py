"""A run goes on and is measured on what it learned from, wherever that lies; a new one keeps the splits it starts from."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
from layouts import dpot_scattered, dpot_single

from shodh.data import RegimeSource
from shodh.data.formats import FileHints
from shodh.data.formats.splits import SPLITS
from shodh.data.identity import RECORD, Choose, DataRecord, inherited
from shodh.core.errors import DataError
from shodh.schema.fields import Field

FIELDS = (Field("vorticity"),)


def opened(path: Path, choose: Choose | None = None, **settings: object) -> RegimeSource:
    former, leave_out = choose("ns", path) if choose is not None else ({}, ())
    return RegimeSource("ns", path, FIELDS, former=former, leave_out=leave_out, **settings)


def splits(source: RegimeSource) -> dict[str, set[tuple[str, int]]]:
    files = DataRecord.of([source], Path()).regimes["ns"]
    return {s: {(name, n) for name, entry in files.items() for n in entry.get(s, ())} for s in SPLITS}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "set").mkdir()
    for seed, (name, count) in enumerate((("a", 4), ("run_2", 1), ("run_10", 2))):
        dpot_single(tmp_path / "set" / f"{name}.hdf5", 1, seed, count)
    return tmp_path / "set"


@pytest.fixture
def record(data: Path) -> DataRecord:
    run = data.parent / "run"
    run.mkdir()
    DataRecord.of([opened(data)], run).save()
    found = DataRecord.load(run)
    assert found is not None
    return found


def test_the_same_data_are_split_the_same_also_elsewhere(data, record, tmp_path):
    before = splits(opened(data))
    assert sum(map(len, before.values())) == 7 and all(before.values())
    shutil.copytree(data, tmp_path / "moved", copy_function=shutil.copy)
    assert splits(opened(tmp_path / "moved", record.kept)) == before


def test_files_that_came_later_are_left_out_and_said(data, record, caplog):
    before = splits(opened(data))
    for seed, name in enumerate(("0_first.hdf5", "ns_train.hdf5", "ns_test.hdf5")):
        dpot_single(data / name, 1, 50 + seed, 3)
    with caplog.at_level(logging.INFO):
        assert splits(opened(data, record.kept)) == before
    (line,) = (r.getMessage() for r in caplog.records if "newer" in r.getMessage())
    assert all(name in line for name in ("0_first.hdf5", "ns_train.hdf5", "ns_test.hdf5"))


@pytest.mark.parametrize("change", ["missing", "grown", "rewritten"])
def test_changed_files_are_refused_by_name(data, record, change):
    file = data / "run_2.hdf5"
    if change == "missing":
        file.rename(data / "run_3.hdf5")
    else:
        dpot_single(file, 1, seed=9, count=2 if change == "grown" else 1)
    with pytest.raises(DataError, match="run_2.hdf5"):
        record.kept("ns", data)


def test_a_new_run_keeps_the_splits_that_the_old_one_knew(data, record, tmp_path):
    """Files under other names, beside many others."""
    before = splits(opened(data))
    grown = tmp_path / "grown"
    grown.mkdir()
    for number, file in enumerate(sorted(data.iterdir())):
        shutil.copy(file, grown / f"old_{number}.hdf5")
        before = {s: {(f"old_{number}.hdf5" if n == file.name else n, i) for n, i in v} for s, v in before.items()}
    for seed in range(20):
        dpot_single(grown / f"new_{seed}.hdf5", 1, 100 + seed, 2)
    after = splits(opened(grown, inherited([record])))
    assert all(before[s] <= after[s] for s in SPLITS) and sum(map(len, after.values())) == 47


def test_what_was_trained_on_cannot_be_held_out_later(data, record, tmp_path):
    held_out = tmp_path / "later" / "test"
    held_out.mkdir(parents=True)
    (tmp_path / "later" / "train").mkdir()
    dpot_single(tmp_path / "later" / "train" / "x.hdf5", 1, 77)
    shutil.copy(data / "a.hdf5", held_out / "b.hdf5")
    with pytest.raises(DataError, match=r"b\.hdf5.*was trained on it"):
        opened(tmp_path / "later", inherited([record]))


def test_blocks_of_time_are_kept(tmp_path):
    path = tmp_path / "data_0.hdf5"
    dpot_scattered(path, frames=20)
    fields = (Field("pressure"),)
    source = RegimeSource("long", path, fields, split=(0.6, 0.2, 0.2))
    record = DataRecord.of([source], tmp_path)
    record.save()
    assert record.regimes["long"]["data_0.hdf5"]["frames"] == {"train": [0, 10], "valid": [11, 15], "test": [16, 20]}
    former, _ = DataRecord.load(tmp_path).kept("long", path)
    again = RegimeSource("long", path, fields, split=(0.9, 0.05, 0.05), former=former)
    assert [again.num_frames(s) for s in SPLITS] == [[10], [4], [4]]


def test_another_reading_of_a_kept_file_is_refused(data, record):
    with pytest.raises(DataError, match="is read as"):
        opened(data, record.kept, hints=FileHints(axes="xnyt"), format="dpot")


def test_a_damaged_record_is_named_and_an_old_run_has_none(tmp_path):
    assert DataRecord.load(tmp_path) is None
    (tmp_path / RECORD).write_text('{"regimes": {"ns": {"a.hdf5": {"bytes": 3}}}}')
    with pytest.raises(DataError, match="is damaged"):
        DataRecord.load(tmp_path)
