"""Studies of composition that all tests of the folder may read."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from known_family import MOE_POT, build_known

from shodh.experiments.composition.bench import Bench
from shodh.experiments.composition.members import Case, open_members, read_case
from shodh.experiments.composition.runs import make
from shodh.experiments.composition.settings import CCMConfig
from shodh.experiments.harness.worker import write_result

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def known(tmp_path_factory: pytest.TempPathFactory) -> CCMConfig:
    """A dense family with models and data; read it, never change it."""
    return build_known(tmp_path_factory.mktemp("known"))


@pytest.fixture(scope="session")
def known_sparse(tmp_path_factory: pytest.TempPathFactory) -> CCMConfig:
    """The same with routed experts, at the values of the experts alone, and some of the methods."""
    family = {"interpolation": (), "extrapolation": (), "validation": (0.01,), "valid": 1, "test": 2}
    methods = ("anchor", "scale", "gradient_by_expert")
    short = {"prefix": 1, "rollout": 1, "maps": ("linear",)}
    return build_known(tmp_path_factory.mktemp("sparse"), MOE_POT, family=family, methods=methods, **short)


@pytest.fixture(scope="session")
def evaluated(known: CCMConfig) -> dict[str, Any]:
    """What the evaluation of seed 0 leaves behind."""
    write_result(make(known, 0, None), CPU)
    found: dict[str, Any] = json.loads(known.results_file(0).read_text())
    return found


@pytest.fixture(scope="module")
def bench(known: CCMConfig) -> Bench:
    return Bench(open_members(known, 0, CPU), known.prefix, known.rollout)


@pytest.fixture(scope="module")
def case(known: CCMConfig, bench: Bench) -> Case:
    """Test trajectories outside the support."""
    return read_case(known, bench.family, 0.0325, "test")
