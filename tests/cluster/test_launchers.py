"""Each launcher trains one job of two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cluster import Cluster

TRAIN = ("python", "launch/train_tokenizer.py", "--config")
HOSTS = "node-1:1,node-2:1"
LAUNCHERS = {
    "srun": ("srun", "-N", 2, "-n", 2, *TRAIN),
    "mpirun": ("mpirun", "-n", 2, *TRAIN),
    "mpirun on two nodes": (
        "mpirun",
        "--host",
        HOSTS,
        "-x",
        "MASTER_ADDR=node-1",
        "-x",
        "PYTHONPATH",
        "-x",
        "PATH",
        *TRAIN,
    ),
    "torchrun": ("torchrun", "--nproc_per_node", 2, *TRAIN[1:]),
    "deepspeed": ("deepspeed", "--num_gpus", 2, *TRAIN[1:]),
}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_two_ranks_of_one_job(name: str, cluster: Cluster, config: Path, tmp_path: Path) -> None:
    finished = cluster.run(*LAUNCHERS[name], config)
    assert finished.code == 0, finished.text
    assert "2 ranks" in finished.text
    (run,) = (tmp_path / "runs").glob("[!.]*")
    found = json.loads((run / "env.json").read_text())
    assert (found["world_size"], found["launcher"]) == (2, name.split()[0])
