"""Training on a The Well file that our generator did not write, through a configuration alone."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml
from helper import ROOT, run_script

GRID = (16, 8, 24)


def write_foreign_file(path: Path, trajectories: int, frames: int, seed: int) -> None:
    """A file as another group might write it: own field names, unequal sides, collocated velocity, walls along x."""
    rng = np.random.default_rng(seed)
    axes = [(np.arange(n) + 0.5) / n for n in GRID]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    phase = rng.uniform(0, 2 * np.pi, (trajectories, 1, 1, 1, 1))
    time = 0.1 * np.arange(frames)
    swirl = 2 * np.pi * (y + z)[None, None] + phase + time[None, :, None, None, None]
    profile = np.sin(np.pi * x)[None, None]
    velocity = np.stack((0 * swirl, profile * np.sin(swirl), -profile * np.sin(swirl)), -1)
    heat = 300 + 5 * np.cos(swirl) * np.cos(np.pi * x)
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        file.attrs.update(dataset_name="stirred_box", grid_type="cartesian", n_spatial_dims=3)
        file.attrs.update(n_trajectories=trajectories, simulation_parameters=[])
        dimensions = file.create_group("dimensions")
        dimensions.attrs["spatial_dims"] = ["x", "y", "z"]
        dimensions.create_dataset("time", data=time.astype("f4")).attrs["sample_varying"] = False
        for name, values in zip("xyz", axes, strict=True):
            dataset = dimensions.create_dataset(name, data=values.astype("f4"))
            dataset.attrs.update(sample_varying=False, time_varying=False)
        conditions = file.create_group("boundary_conditions")
        for name, kind in zip("xyz", ("WALL", "PERIODIC", "PERIODIC"), strict=True):
            group = conditions.create_group(f"{name}_{kind.lower()}")
            group.attrs.update(associated_dims=[name], associated_fields=[], bc_type=kind)
            group.attrs.update(sample_varying=False, time_varying=False)
            mask = np.zeros(GRID["xyz".index(name)], dtype=bool)
            mask[[0, -1]] = True
            group.create_dataset("mask", data=mask)
        file.create_group("scalars").attrs["field_names"] = []
        groups = {"t0_fields": {"heat": heat}, "t1_fields": {"flow": velocity}, "t2_fields": {}}
        for name, fields in groups.items():
            group = file.create_group(name)
            group.attrs["field_names"] = list(fields)
            for field, values in fields.items():
                dataset = group.create_dataset(field, data=values.astype("f4"))
                dataset.attrs.update(dim_varying=[True] * 3, sample_varying=True, time_varying=True)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    for split, seed in (("train", 0), ("valid", 1), ("test", 2)):
        write_foreign_file(tmp_path / "theirs" / "data" / split / "box.hdf5", 2, 6, seed)
    train = {"steps": 3, "global_batch": 4, "warmup": 1, "log_every": 1, "valid_batches": 1}
    settings = {
        "name": "foreign",
        "out": str(tmp_path / "runs"),
        "deepspeed": str(ROOT / "ds_configs" / "cpu.json"),
        "data": {
            "grid": list(GRID),
            "fields": [
                {"name": "velocity", "kind": "vector", "solenoidal": True},
                {"name": "temperature"},
                {"name": "solid", "static": True},
            ],
            "regimes": [
                {
                    "name": "stirred_box",
                    "path": str(tmp_path / "theirs"),
                    "fields": {"velocity": "flow", "temperature": "heat", "solid": None},
                }
            ],
        },
        "tokenizer": {"latent_channels": 8, "strides": [4, 2], "widths": [8, 16], "train": train},
        "operator": {"dim": 32, "depth": 2, "heads": 2, "experts": {"hidden": 32}, "train": train},
        "evaluation": {"rollout": 2},
    }
    path = tmp_path / "foreign.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def run(*command: str) -> str:
    done = run_script(*command)
    assert done.code == 0, done.stderr[-2000:]
    return done.stdout


def test_training_and_evaluation_on_a_foreign_file(config: Path, tmp_path: Path) -> None:
    run("launch/train_tokenizer.py", "--config", str(config))
    run("launch/pretrain.py", "--config", str(config))
    table = run("launch/evaluate.py", "--run", str(tmp_path / "runs" / "foreign"))
    assert "stirred_box" in table
    metrics = json.loads((tmp_path / "runs" / "foreign" / "report" / "metrics.json").read_text())
    regime = metrics["regimes"]["stirred_box"]
    assert regime["divergence"]["velocity/exact_flux"]["max"] == 0.0
    assert regime["divergence"]["velocity/fp64"]["max_over_gradient"] < 1e-12
    assert np.isfinite(regime["latent_mse"]["model"])
    assert len(regime["rollout"]["temperature"]["model"]) == 2
