"""Conversion keeps every bit, goes on after an interruption, and writes what The Well's own package reads."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from helper import Finished, run_script
from layouts import LAYOUTS, dpot_single, pdebench_cfd, pdebench_incompressible

from shodh.core.errors import DataError
from shodh.data import WellFile, read_stats
from shodh.data.formats import convert as conversion
from shodh.data.formats.convert import convert, plan_conversion


def run(*arguments: str) -> Finished:
    return run_script("tools/convert_data.py", *arguments)


def stored(out: Path, field: str) -> np.ndarray:
    """All trajectories of a field, train, valid, test, in the order of the shards."""
    parts = []
    for split in ("train", "valid", "test"):
        for path in sorted((out / "data" / split).glob("*.hdf5")):
            with h5py.File(path) as file:
                parts.append(next(file[f"t{i}_fields/{field}"][()] for i in (0, 1) if field in file[f"t{i}_fields"]))
    return np.concatenate(parts)


def rows(values: np.ndarray) -> set[bytes]:
    return {row.tobytes() for row in values}


@pytest.mark.parametrize("layout", [n for n, (kind, *_) in LAYOUTS.items() if kind != "rock"])
def test_every_format_is_copied_bitwise(layout, tmp_path):
    _, name, write = LAYOUTS[layout]
    expected = write(tmp_path / name)
    out = tmp_path / "out"
    # one split: a single trajectory would lose the frames between blocks of time
    convert(plan_conversion([tmp_path / name], out, shares=(1, 0, 0)), out)
    for field, values in expected.items():
        np.testing.assert_array_equal(stored(out, field), values.astype(np.float32), err_msg=field)
    assert set(read_stats(out / "stats.yaml")["mean"]) == set(expected)


def test_command_splits_shards_and_resumes(tmp_path):
    expected = pdebench_cfd(tmp_path / "a.hdf5", count=10, frames=20, grid=(16, 16, 16))
    out = tmp_path / "out"
    # 20 frames x 5 channels x 16^3 x 4 B = 1.6 MiB a trajectory
    done = run(str(tmp_path / "a.hdf5"), str(out), "--shard-mib", "4")
    assert done.code == 0, done.stderr
    assert "8 train, 1 valid, 1 test trajectories" in done.stdout and "6 of 6 shards" in done.stdout
    for field, values in expected.items():
        assert rows(stored(out, field)) == rows(values)
    first, *others = sorted((out / "data").rglob("*.hdf5"))
    kept = [p.stat().st_mtime_ns for p in others]
    content = first.read_bytes()
    first.unlink()
    again = run(str(tmp_path / "a.hdf5"), str(out), "--shard-mib", "4")
    assert "1 of 6 shards" in again.stdout, again.stderr
    assert [p.stat().st_mtime_ns for p in others] == kept
    assert len(first.read_bytes()) == len(content)
    np.testing.assert_array_equal(WellFile(first).time, WellFile(others[0]).time)


def test_an_interrupted_shard_leaves_nothing(tmp_path, monkeypatch):
    pdebench_cfd(tmp_path / "a.hdf5", count=3)
    shards = plan_conversion([tmp_path / "a.hdf5"], tmp_path / "out")

    def interrupt(size: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(shards, tmp_path / "out", interrupt)
    assert not list((tmp_path / "out").rglob("*.hdf5"))
    assert convert(shards, tmp_path / "out") == 3


def test_shards_are_chunked_by_snapshot_and_uncompressed(tmp_path):
    dpot_single(tmp_path / "ns2d_pdb_train.hdf5")
    convert(
        plan_conversion([tmp_path / "ns2d_pdb_train.hdf5"], tmp_path / "out", fields=["velocity"]), tmp_path / "out"
    )
    path = next((tmp_path / "out" / "data" / "train").glob("*.hdf5"))
    with h5py.File(path) as file:
        dataset = file["t1_fields/velocity"]
        assert dataset.chunks == (1, 1, 6, 7, 2) and dataset.compression is None
        assert list(file["t0_fields"]) == []


def test_memory_stays_bounded(tmp_path, monkeypatch):
    """No read is larger than the block, however long the trajectory."""
    pdebench_cfd(tmp_path / "a.hdf5", count=3, frames=30)
    monkeypatch.setattr(conversion, "BLOCK_BYTES", 4 * 3 * 120 * 4)
    sizes: list[int] = []
    convert(plan_conversion([tmp_path / "a.hdf5"], tmp_path / "out"), tmp_path / "out", sizes.append)
    assert max(sizes) <= 4 * 3 * 120 * 4 and len(sizes) > 30


def test_the_wells_own_package_reads_the_result(tmp_path):
    well = pytest.importorskip("the_well.data")
    expected = pdebench_cfd(tmp_path / "a.hdf5", count=10)
    out = tmp_path / "datasets" / "cfd"
    convert(plan_conversion([tmp_path / "a.hdf5"], out, name="cfd"), out)
    dataset = well.WellDataset(
        path=str(out), well_split_name="train",
        n_steps_input=1, n_steps_output=1, use_normalization=False,
    )  # fmt: skip
    assert len(dataset) == 8 * 3
    names = [n for group in dataset.metadata.field_names.values() for n in group]
    item = dataset[0]["input_fields"][0].numpy()
    for channel, name in enumerate(names):
        if name == "density":
            np.testing.assert_array_equal(item[..., channel], expected["density"][0, 0])
    assert "density" in names and item.shape == (6, 5, 4, 5)
    assert (dataset[0]["boundary_conditions"] == 2).all()  # periodic


def test_parameters_and_own_times_survive(tmp_path):
    pdebench_incompressible(tmp_path / "ns_incom.h5")
    with h5py.File(tmp_path / "ns_incom.h5", "r+") as file:
        file["t"][1] += 1.0
    convert(plan_conversion([tmp_path / "ns_incom.h5"], tmp_path / "a", shares=(1, 0, 0)), tmp_path / "a")
    file = WellFile(next((tmp_path / "a" / "data" / "train").glob("*")))
    np.testing.assert_allclose(file.time[1] - file.time[0], 1.0, rtol=1e-6)


def test_assumptions_are_printed_and_an_ambiguous_guess_is_refused(tmp_path):
    dpot_single(tmp_path / "mine.hdf5")
    refused = run(str(tmp_path / "mine.hdf5"), str(tmp_path / "out"))
    assert refused.code == 2 and "axes: nxytc" in refused.stderr and "axes: ntxyc" in refused.stderr
    assert not (tmp_path / "out").exists()
    hints = ("--axes", "nxytc", "--lengths", "1", "2")
    done = run(str(tmp_path / "mine.hdf5"), str(tmp_path / "out"), *hints)
    assert done.code == 0, done.stderr
    said = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("  - ")]
    assert said == ["channels:", "boundary:", "time_step:", "units:"]


def test_bad_input_is_one_line(tmp_path):
    pdebench_cfd(tmp_path / "a.hdf5")
    with h5py.File(tmp_path / "a.hdf5", "r+") as file:
        file["Vx"][0, 0, 0, 0, 0] = np.inf
    for arguments, reason in (
        ((str(tmp_path / "a.hdf5"), str(tmp_path / "out")), "NaN or infinity"),
        ((str(tmp_path / "none.hdf5"), str(tmp_path / "out")), "does not exist"),
        ((str(tmp_path / "a.hdf5"), str(tmp_path / "out"), "--fields", "heat"), "no field 'heat'"),
        ((str(tmp_path / "a.hdf5"), str(tmp_path / "out"), "--boundary", "wall"), "boundary"),
        ((str(tmp_path / "a.hdf5"), str(tmp_path / "out"), "--name", "../b"), "leave out slashes"),
        ((str(tmp_path / "a.hdf5"), str(tmp_path / "a.hdf5")), "File exists"),
    ):
        done = run(*arguments)
        assert done.code == 2, done.stderr
        assert reason in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_other_shards_are_not_overwritten(tmp_path):
    pdebench_cfd(tmp_path / "a.hdf5")
    out = tmp_path / "out"
    convert(plan_conversion([tmp_path / "a.hdf5"], out, name="x"), out)
    with pytest.raises(DataError, match="other files or settings"):
        convert(plan_conversion([tmp_path / "a.hdf5"], out, name="x", fields=["density"]), out)
    with pytest.raises(DataError, match="does not belong"):
        convert(plan_conversion([tmp_path / "a.hdf5"], out, name="y"), out)
