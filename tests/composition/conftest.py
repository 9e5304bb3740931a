"""Studies of composition that all tests of the folder may read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helper import made_once
from known_family import MOE_POT, build_known

from shodh.experiments.composition.bench import Bench
from shodh.experiments.composition.members import Case, open_members, read_case
from shodh.experiments.composition.runs import make
from shodh.experiments.composition.settings import CCMConfig
from shodh.experiments.harness.worker import write_result

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def known(shared: Path) -> CCMConfig:
    """A dense family with models and data; read it, never change it."""
    return made_once(shared / "known" / "study.pickle", lambda: build_known(shared / "known"))


@pytest.fixture(scope="session")
def known_sparse(shared: Path) -> CCMConfig:
    """The same with routed experts, at the values of the experts alone, and some of the methods."""
    family = {"interpolation": (), "extrapolation": (), "validation": (0.01,), "valid": 1, "test": 2}
    methods = ("anchor", "scale", "gradient_by_expert")
    short = {"prefix": 1, "rollout": 1, "maps": ("linear",)}
    changes: dict[str, Any] = {"family": family, "methods": methods, **short}
    return made_once(shared / "sparse" / "study.pickle", lambda: build_known(shared / "sparse", MOE_POT, **changes))


@pytest.fixture(scope="session")
def evaluated(known: CCMConfig, shared: Path) -> dict[str, Any]:
    """What the evaluation of seed 0 leaves behind."""

    def evaluate() -> dict[str, Any]:
        write_result(make(known, 0, None), CPU)
        found: dict[str, Any] = json.loads(known.results_file(0).read_text())
        return found

    return made_once(shared / "known" / "evaluated.pickle", evaluate)


@pytest.fixture(scope="module")
def bench(known: CCMConfig) -> Bench:
    return Bench(open_members(known, 0, CPU), known.prefix, known.rollout)


@pytest.fixture(scope="module")
def case(known: CCMConfig, bench: Bench) -> Case:
    """Test trajectories outside the support."""
    return read_case(known, bench.family, 0.0325, "test")
