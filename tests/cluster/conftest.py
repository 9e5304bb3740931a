"""The cluster of a session, and a run folder a test."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import Cluster, build


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    if os.getpid() != 1:
        pytest.skip("starts daemons: run it with make test-cluster, in namespaces of its own")
    return build(tmp_path_factory.mktemp("cluster"))


@pytest.fixture
def config(write_config: Callable[..., Path], tmp_path: Path) -> Path:
    """The tiny configuration, with a short training of a tokenizer; its runs go to ``tmp_path / "runs"``."""
    train = {"steps": 4, "checkpoint_every": 2, "valid_every": 0}
    return write_config(tmp_path / "tiny.yaml", tokenizer={"train": train})
