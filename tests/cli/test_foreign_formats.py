"""Training from PDEBench and DPOT files, mixed in one run, by configuration alone."""

from __future__ import annotations

import json

import h5py
import numpy as np
import yaml
from helper import ROOT, run_script

GRID, FRAMES = (16, 16, 16), 6


def fields(seed: int, count: int) -> list[np.ndarray]:
    """Vx, Vy, Vz, density, pressure [N, T, X, Y, Z]: waves that travel through a periodic box."""
    rng = np.random.default_rng(seed)
    x = 2 * np.pi * (np.arange(16) + 0.5) / 16
    phase = rng.uniform(0, 6, (5, count, 1, 1, 1, 1)) + 0.2 * np.arange(FRAMES)[:, None, None, None]
    wave = np.sin(x[:, None, None] + 2 * x[None, :, None] - x + phase)
    return [(offset + w).astype(np.float32) for offset, w in zip((0, 0, 0, 3, 5), wave)]


def test_pdebench_and_dpot_files_train_together(tmp_path):
    with h5py.File(tmp_path / "3D_CFD_Rand_periodic_Train.hdf5", "w") as file:
        for name, values in zip(("Vx", "Vy", "Vz", "density", "pressure"), fields(0, 4)):
            file[name] = values
        for axis in "xyz":
            file[f"{axis}-coordinate"] = ((np.arange(16) + 0.5) / 16).astype("f4")
        file["t-coordinate"] = 0.05 * np.arange(FRAMES + 1)
    for split, count in (("train", 3), ("test", 1)):
        (tmp_path / "dpot" / split).mkdir(parents=True)
        u, v, w, density, pressure = fields(7, count)
        stacked = np.stack((u, v, w, pressure, density), -1)  # N T X Y Z C
        for number, values in enumerate(stacked):
            with h5py.File(tmp_path / "dpot" / split / f"data_{number}.hdf5", "w") as file:
                file["data"] = np.moveaxis(values, 0, 3)
    train = {"steps": 3, "global_batch": 4, "warmup": 1, "log_every": 1, "valid_batches": 1}
    settings = {
        "name": "mixed",
        "out": str(tmp_path / "runs"),
        "deepspeed": str(ROOT / "ds_configs" / "cpu.json"),
        "data": {
            "grid": list(GRID),
            "mixture_temperature": 2.0,
            "fields": [{"name": "velocity", "kind": "vector"}, {"name": "density"}, {"name": "pressure"}],
            "regimes": [
                {"name": "cfd", "path": str(tmp_path / "3D_CFD_Rand_periodic_Train.hdf5"), "split": [0.5, 0.25, 0.25]},
                {"name": "dpot", "path": str(tmp_path / "dpot"), "format": "dpot", "lengths": [1, 1, 1]},
            ],
        },
        "tokenizer": {"latent_channels": 8, "strides": [4, 2], "widths": [8, 16], "train": train},
        "operator": {"dim": 32, "depth": 1, "heads": 2, "experts": {"hidden": 32}, "train": train},
        "evaluation": {"rollout": 0},
    }
    config = tmp_path / "mixed.yaml"
    config.write_text(yaml.safe_dump(settings))
    for command in (
        ("launch/train_tokenizer.py", "--config", str(config)),
        ("launch/pretrain.py", "--config", str(config)),
        ("launch/evaluate.py", "--run", str(tmp_path / "runs" / "mixed")),
        ("tools/export_fields.py", str(tmp_path / "runs" / "mixed"), "--out", str(tmp_path / "vtk")),
    ):
        done = run_script(*command)
        assert done.code == 0, done.stderr[-2000:]
    regimes = json.loads((tmp_path / "runs" / "mixed" / "report" / "metrics.json").read_text())["regimes"]
    assert set(regimes) == {"cfd", "dpot"}
    for regime in regimes.values():
        assert set(regime["l2re"]) == {"velocity", "density", "pressure"}
        assert all(np.isfinite(v) for field in regime["l2re"].values() for v in field.values())
    names = {path.name for path in (tmp_path / "vtk").iterdir()}
    assert {"mixed_cfd.pvd", "mixed_cfd_00000.vti", "mixed_dpot.pvd", "mixed_dpot_00000.vti"} <= names
    head = (tmp_path / "vtk" / "mixed_cfd_00000.vti").read_bytes().split(b"<AppendedData", 1)[0]
    assert all(f'Name="{n}"'.encode() in head for n in ("velocity", "velocity_truth", "density_error"))
