"""A few hundred damaged files of every format; ``python tests/support/fuzz.py --files 1000`` tries more."""

from __future__ import annotations

import os
import time

import fuzz
import h5py
import numpy as np
import pytest
from layouts import pdebench_cfd

from shodh.data import hdf5
from shodh.data.formats import open_file
from shodh.data.formats.probe import probe
from shodh.core.errors import DataError

EVERY_PAIR = len(fuzz.ALL) * len(fuzz.DAMAGES)


@pytest.mark.exhaustive
def test_damaged_files_are_read_or_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "TIMEOUT", 6.0)
    result = fuzz.run(EVERY_PAIR, 1, tmp_path)
    assert result["wrong"] == []
    assert result["verdicts"]["refused"] > EVERY_PAIR // 3
    assert result["verdicts"]["read"] > EVERY_PAIR // 10
    assert result["hangs_and_crashes_of_the_library_caught"] < EVERY_PAIR // 50
    assert set(result["by_damage"]) == set(fuzz.DAMAGES)


def test_the_harness_sees_tracebacks_hangs_and_crashes(tmp_path, monkeypatch):
    """It must be able to fail: three readers that misbehave."""
    monkeypatch.setattr(fuzz, "TIMEOUT", 0.5)
    path = tmp_path / "a.hdf5"
    for misbehave, expected in (
        (lambda p, f: 1 / 0, "traceback"),
        (lambda p, f: time.sleep(30), "hang"),
        (lambda p, f: os._exit(3), "crash"),
    ):
        monkeypatch.setattr(fuzz, "examine", misbehave)
        worker = fuzz.Worker()
        assert worker.examine(path, "auto")[0] == expected
        worker.close()


def test_without_the_checks_absurd_claims_are_believed(tmp_path, monkeypatch):
    path = tmp_path / "2D_CFD.hdf5"
    pdebench_cfd(path, grid=(6, 7))
    with h5py.File(path, "r+") as file:
        del file["density"]
        file.create_dataset("density", shape=(3, 4, 6, 7), dtype="f4", external=[("/etc/passwd", 0, 2016)])
    with pytest.raises(DataError, match="other files"):
        open_file(path)
    monkeypatch.setattr(hdf5, "check_dataset", lambda *_: None)
    monkeypatch.setattr("shodh.data.formats.arrays.check_dataset", lambda *_: None)
    file = open_file(path)
    file.read("density", 0, range(1), np.empty((1, 1, 6, 7), dtype=np.float32), finite=False)


def test_a_structure_that_hangs_or_crashes_the_library_is_named(tmp_path, monkeypatch):
    path = tmp_path / "2D_CFD.hdf5"
    pdebench_cfd(path, grid=(6, 7))
    probe(path)
    for misbehave, reason in ((lambda *_: time.sleep(30), "hangs"), (lambda *_: os._exit(3), "crashes")):
        monkeypatch.setattr("shodh.data.formats.open_file", misbehave)
        with pytest.raises(DataError, match=reason):
            probe(path, timeout=1)


@pytest.mark.parametrize(
    "damage", ["external link", "soft link", "virtual", "objects", "huge", "huge chunk", "plug-in"]
)
def test_what_an_untrusted_file_may_not_do(tmp_path, damage):
    path = tmp_path / "2D_CFD.hdf5"
    pdebench_cfd(path, grid=(6, 7))
    with h5py.File(path, "r+") as file:
        del file["density"]
        if damage == "external link":
            file["density"] = h5py.ExternalLink("/tmp/other.h5", "/data")
        elif damage == "soft link":
            file["density"] = h5py.SoftLink("/pressure")
        elif damage == "virtual":
            layout = h5py.VirtualLayout(shape=(3, 4, 6, 7), dtype="f4")
            layout[...] = h5py.VirtualSource("/tmp/other.h5", "data", shape=(3, 4, 6, 7))
            file.create_virtual_dataset("density", layout)
        elif damage == "objects":
            file.create_dataset("density", shape=(3, 4, 6, 7), dtype=h5py.vlen_dtype("f4"))
        elif damage == "huge":
            file.create_dataset("density", shape=(10**9, 4, 6, 7), chunks=(1, 1, 6, 7), dtype="f4")
        elif damage == "huge chunk":
            chunks = (2**27, 1, 1, 1)
            shape = {"shape": (3, 4, 6, 7), "maxshape": (None,) * 4}
            file.create_dataset("density", **shape, chunks=chunks, dtype="f4", compression="gzip")
        else:
            plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            plan.set_chunk((1, 1, 6, 7))
            plan.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, ())
            space = h5py.h5s.create_simple((3, 4, 6, 7))
            h5py.h5d.create(file.id, b"density", h5py.h5t.IEEE_F32LE, space, plan)
    reason = {
        "external link": "external link",
        "soft link": "soft link",
        "virtual": "other files",
        "objects": "type",
        "huge": "absurd shape",
        "huge chunk": "absurd chunks",
        "plug-in": "filters",
    }[damage]
    with pytest.raises(DataError, match=reason) as error:
        open_file(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
