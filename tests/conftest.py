"""Tiny data, a tiny configuration and the laboratory of tiny runs, for tests of every room."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import yaml

from shodh.data import write_trajectories
from shodh.schema.fields import Boundary, Field, RegimeSchema, Trajectories

if TYPE_CHECKING:
    from laboratory import Laboratory

TINY_GRID = (16, 16, 16)
TINY_FIELDS = (
    Field("velocity", "vector", placement="face", solenoidal=True),
    Field("tracer"),
    Field("solid", static=True),
)
TINY_BOUNDARIES: dict[str, tuple[Boundary, Boundary, Boundary]] = {
    "open_channel": ("periodic", "periodic", "wall"),
    "porous_media": ("periodic", "periodic", "periodic"),
}


def pytest_configure() -> None:
    """One thread here and in every process of a test: on tiny tensors, threads that wait cost more than they give."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: workers that take one file after the other then end together."""
    long = {item.path for item in items for mark in ("slow", "distributed") if item.get_closest_marker(mark)}
    items.sort(key=lambda item: item.path not in long)


def pytest_collection_finish() -> None:
    """What is imported by now stays: neither the collector nor a fork is to look at, or copy, it again."""
    gc.freeze()


def _walk(rng: np.random.Generator, batch: int, frames: int, *shape: int) -> np.ndarray:
    """Random fields that change by steps, so that consecutive frames resemble each other."""
    first = rng.standard_normal((batch, 1, *shape))
    steps = 0.3 * rng.standard_normal((batch, frames, *shape))
    return (first + steps.cumsum(1)).astype(np.float32)


def tiny_trajectories(name: str, seed: int, batch: int, frames: int = 6) -> Trajectories:
    """Trajectories of one of the two tiny regimes: noise with the right shapes, walls and solids."""
    rng = np.random.default_rng(seed)
    porous = name == "porous_media"
    velocity = (0.3 if porous else 1.0) * _walk(rng, batch, frames, *TINY_GRID, 3)
    solid = rng.random((batch, *TINY_GRID)) < 0.3 if porous else np.zeros((batch, *TINY_GRID), dtype=bool)
    values = {"velocity": velocity, "tracer": 2.0 + _walk(rng, batch, frames, *TINY_GRID), "solid": solid}
    schema = RegimeSchema(name, TINY_FIELDS, TINY_BOUNDARIES[name])
    return Trajectories(schema, (2.0, 1.0, 1.0), 0.1 * np.arange(frames), values)


def write_tiny_data(root: Path) -> None:
    """Two regimes with 3 training, 2 validation and 1 test trajectories of 6 frames of 16^3 cells."""
    for number, name in enumerate(TINY_BOUNDARIES):
        for part, (split, batch) in enumerate((("train", 3), ("valid", 2), ("test", 1))):
            path = root / name / "data" / split / f"{name}_{part:05d}.hdf5"
            write_trajectories(path, tiny_trajectories(name, 10 * number + part, batch))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the tiny data of both regimes; read it, never change it."""
    root = tmp_path_factory.mktemp("tiny") / "data"
    write_tiny_data(root)
    return root


def merge(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``changes`` put over ``tree``, nested mappings key by key."""
    merged = dict(tree)
    for key, value in changes.items():
        merged[key] = merge(tree.get(key, {}), value) if isinstance(value, dict) else value
    return merged


@pytest.fixture(scope="session")
def tiny_tree(tiny_data: Path) -> dict[str, Any]:
    """A configuration of the tiny data as a plain mapping: 8 tokens a sample, four experts of 32."""
    return {
        "name": "tiny",
        "seed": 3,
        "data": {
            "grid": list(TINY_GRID),
            "history": 2,
            "regimes": [{"name": name, "path": str(tiny_data / name)} for name in TINY_BOUNDARIES],
        },
        "tokenizer": {
            "latent_channels": 8,
            "widths": [8, 8, 16],
            "train": {"steps": 2, "global_batch": 8, "warmup": 1, "log_every": 1, "valid_batches": 1},
        },
        "operator": {
            "dim": 32,
            "depth": 2,
            "heads": 2,
            "experts": {"num_experts": 4, "hidden": 32, "router": {"kind": "two_level", "semantic_dim": 8}},
            "train": {
                "steps": 10,
                "global_batch": 8,
                "warmup": 2,
                "lr": 1.0e-3,
                "clip": 0.01,
                "log_every": 1,
                "valid_batches": 1,
            },
        },
    }


@pytest.fixture(scope="session")
def write_config(tiny_tree: dict[str, Any]) -> Callable[..., Path]:
    """``write_config(path, **changes)`` writes the tiny configuration with changes as YAML."""

    def write(path: Path, **changes: Any) -> Path:
        tree = merge({**tiny_tree, "out": str(path.parent / "runs")}, changes)
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this session, which all workers have; `helper.made_once` makes what lies there."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def laboratory(shared: Path, write_config: Callable[..., Path]) -> Laboratory:
    """A tiny trained tokenizer, and runs of the tiny configuration on ranks; all workers of a session share them."""
    from helper import made_once
    from laboratory import make_laboratory

    folder = shared / "laboratory"
    return made_once(folder / "laboratory.pickle", lambda: make_laboratory(folder, write_config))
