"""Ranks of one job by srun and mpirun; deepspeed, torchrun and sbatch train in the tests of faults and of sbatch."""

from __future__ import annotations

from pathlib import Path

import pytest
from cluster import ROOT, Cluster, launched

TWO_NODES = ("--host", "node-1:1,node-2:1", "-x", "MASTER_ADDR=node-1", "-x", "PYTHONPATH", "-x", "PATH")


@pytest.mark.parametrize("options", [("-n", 2), TWO_NODES], ids=["one node", "two nodes"])
def test_mpirun_trains(options: tuple[object, ...], cluster: Cluster, config: Path, tmp_path: Path) -> None:
    finished = cluster.run("mpirun", *options, "python", "launch/train_tokenizer.py", "--config", config)
    assert finished.code == 0 and "2 ranks" in finished.text, finished.text
    assert launched(tmp_path / "runs") == (2, "mpirun")


def test_srun_without_a_batch_script(cluster: Cluster) -> None:
    acting = ROOT / "tests" / "cluster" / "acting.py"
    finished = cluster.run("srun", "-N", 2, "-n", 2, acting, "-m", "shodh", "evaluate")
    assert finished.code == 0 and "evaluate of 2 " in finished.text and "by srun at node-1" in finished.text
