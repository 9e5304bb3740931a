"""What a run learned from is kept: the commands refuse changed data, and leave out what came later."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml
from helper import ROOT, run_script
from published import published


def write(path: Path, seed: int, count: int, frames: int = 7) -> None:
    values = np.random.default_rng(seed).standard_normal((count, 8, 8, frames)).astype(np.float32)
    with h5py.File(path, "w") as file:
        file["data"] = values


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("learned")
    data = folder / "ns"
    data.mkdir()
    for seed, (name, count) in enumerate((("train_ns", 6), ("test_ns", 2))):
        write(data / f"{name}.hdf5", seed, count)
    write(data / "test_short.hdf5", 9, 1, frames=4)
    train = {"steps": 2, "global_batch": 4, "warmup": 1, "valid_batches": 1, "checkpoint_every": 1}
    settings = {
        "name": "ns",
        "out": str(folder / "runs"),
        "deepspeed": str(ROOT / "ds_configs" / "cpu.json"),
        "data": {
            "grid": [8, 8],
            "fields": [{"name": "vorticity"}],
            "regimes": [{"name": "ns", "path": str(data), "format": "dpot"}],
        },
        "operator": published({"kind": "fno", "dim": 8, "modes": 2, "depth": 1, "train": train}),
        "evaluation": {"rollout": 3},
    }
    config = folder / "ns.yaml"
    config.write_text(yaml.safe_dump(settings))
    assert run_script("launch/pretrain.py", "--config", str(config)).code == 0
    return {"data": data, "config": config, "run": folder / "runs" / "ns"}


def test_later_files_are_left_out_and_short_trajectories_named(run: dict[str, Path]) -> None:
    record = json.loads((run["run"] / "data.json").read_text())["regimes"]["ns"]
    assert record["test_ns.hdf5"]["test"] == [0, 1] and "train" not in record["test_ns.hdf5"]
    assert sorted(record["train_ns.hdf5"]["train"] + record["train_ns.hdf5"]["valid"]) == list(range(6))
    write(run["data"] / "extra.hdf5", 5, 3)
    evaluated = run_script("launch/evaluate.py", "--run", str(run["run"]))
    assert evaluated.code == 0, evaluated.stderr
    assert "extra.hdf5" in evaluated.stderr and "test_short.hdf5[0] with 4" in evaluated.stderr
    metrics = json.loads((run["run"] / "report" / "metrics.json").read_text())
    assert len(metrics["regimes"]["ns"]["rollout"]["vorticity"]["model"]) == 3
    (run["data"] / "extra.hdf5").unlink()


def kept(folder: Path) -> dict[Path, bytes]:
    """Every file but the lock, which names the job that had the folder last."""
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def test_changed_data_is_refused_before_anything_is_written(run: dict[str, Path]) -> None:
    changed = run["data"] / "train_ns.hdf5"
    content = changed.read_bytes()
    write(changed, 77, 6)
    before = kept(run["run"])
    for words in (
        ("launch/pretrain.py", "--config", str(run["config"]), "--resume", "auto", "--set", "operator.train.steps=3"),
        ("launch/evaluate.py", "--run", str(run["run"])),
    ):
        done = run_script(*words)
        assert done.code == 2
        assert [line for line in done.stderr.splitlines() if line.startswith("error: ") and "train_ns.hdf5" in line]
    assert kept(run["run"]) == before
    changed.write_bytes(content)
