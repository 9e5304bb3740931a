"""Real checkpoints of tiny runs on two ranks, as this project and as DeepSpeed alone would leave them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from laboratory import Laboratory, Run

SHORT = ("operator.train.steps=2", "operator.train.checkpoint_every=0", "operator.train.valid_every=0")


@pytest.fixture(scope="session")
def runs(laboratory: Laboratory) -> Callable[..., Run]:
    """``runs(stage, precision="fp32")``: two steps on two ranks with the experts spread over both."""
    return lambda stage, precision="fp32": laboratory.run(2, 2, stage, *SHORT, f"operator.train.precision={precision}")


@pytest.fixture
def raw(laboratory: Laboratory, runs: Callable[..., Run], tmp_path: Path) -> Callable[..., Path]:
    """``raw(stage, precision)``: a copy of a checkpoint as ``engine.save_checkpoint`` alone leaves it."""

    def make(stage: int, precision: str = "fp32") -> Path:
        run = runs(stage, precision)
        folder = tmp_path / "foreign"
        shutil.copytree(laboratory.raw(run).parent, folder)
        return folder / "global_step2"

    return make
