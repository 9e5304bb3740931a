"""What a cluster does every day: ssh, nodes that do not come, ranks and launchers that die, jobs side by side."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import Cluster, host, launched, newest, parent, processes, trains, wait_for

LAUNCH = ("python", "-m", "shodh", "launch")


@pytest.fixture
def long(write_config: Callable[..., Path], tmp_path: Path) -> Path:
    """A training that does not end by itself."""
    return write_config(tmp_path / "long.yaml", tokenizer={"train": {"steps": 10**6, "valid_every": 0}})


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    path = tmp_path / "hostfile"
    path.write_text("# nodes\nnode-1 slots=1\nnode-2 slots=1\n")
    return path


def ranks(config: Path) -> list[int]:
    """Processes of ranks that deepspeed started on this configuration, on all nodes."""
    return list(processes(str(config), "--local_rank="))


def test_node_that_ssh_does_not_reach(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    lost = tmp_path / "lost"
    lost.write_text("node-1 slots=1\nnode-9 slots=1\n")
    finished = cluster.run(*LAUNCH, "--hostfile", lost, "tokenizer", "--config", config)
    (line,) = finished.errors()
    assert finished.code == 2 and "node-9 (1 of 2 nodes)" in line
    assert not (tmp_path / "runs").exists()


def test_two_nodes_over_ssh_get_the_variables(cluster: Cluster, config: Path, hostfile: Path, tmp_path: Path) -> None:
    """A comment in .deepspeed_env; NCCL_* from a machine without a GPU."""
    (tmp_path / ".deepspeed_env").write_text("# ours\n\nOMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\n")
    options = ("--hostfile", hostfile, "--master_addr", "127.0.0.2")
    finished = cluster.run(*LAUNCH, *options, "tokenizer", "--config", config, cwd=tmp_path, NCCL_BED="seen")
    assert finished.code == 0 and "2 ranks" in finished.text, finished.text
    told = re.findall(r"^(node-\d): .*NCCL_BED=seen", finished.text, re.MULTILINE)  # by DeepSpeed, of each node
    assert sorted(told) == ["node-1", "node-2"]
    assert launched(tmp_path / "runs") == (2, "deepspeed")


def test_jobs_side_by_side(cluster: Cluster, long: Path, hostfile: Path, tmp_path: Path) -> None:
    """One is stopped, and the other goes on; its session on a node is killed: all save, it ends and names the node."""
    second = tmp_path / "b" / "long.yaml"
    second.parent.mkdir()
    second.write_text(long.read_text().replace("/runs", "/b/runs"))
    jobs = []
    for config in (long, second):
        options = ("--hostfile", hostfile, "--master_addr", "127.0.0.2", "tokenizer", "--config", config)
        jobs.append(cluster.start(*LAUNCH, *options, log=config.with_suffix(".log")))
    wait_for(lambda: trains(tmp_path / "runs") and trains(tmp_path / "b" / "runs"), 250)
    jobs[0].send_signal(signal.SIGTERM)
    wait_for(lambda: not ranks(long), 60)
    assert newest(tmp_path / "runs")
    found = {host(rank): rank for rank in ranks(second)}
    assert sorted(found) == ["node-1", "node-2"] and jobs[1].poll() is None
    assert not newest(tmp_path / "b" / "runs")
    os.kill(parent(parent(found["node-2"])), signal.SIGKILL)
    wait_for(lambda: not ranks(second), 60)
    assert newest(tmp_path / "b" / "runs")
    assert jobs[1].wait(60) == 255 and "node-2: ssh exited" in second.with_suffix(".log").read_text()


def test_ranks_end_with_a_launcher_that_is_killed(cluster: Cluster, long: Path, tmp_path: Path) -> None:
    log = long.with_suffix(".log")
    cluster.start("deepspeed", "--num_gpus", 2, "launch/train_tokenizer.py", "--config", long, log=log)
    wait_for(lambda: trains(tmp_path / "runs"), 150)
    found = ranks(long)
    assert len(found) == 2
    os.kill(parent(found[0]), signal.SIGKILL)
    wait_for(lambda: not ranks(long), 60)
    assert newest(tmp_path / "runs")


@pytest.mark.parametrize(("number", "group"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_command_of_one_node_is_ended(number: int, group: bool, cluster: Cluster, long: Path, tmp_path: Path) -> None:
    """Ctrl-C goes to all processes, saves nothing and says what to type; after SIGTERM to the command all save."""
    log = long.with_suffix(".log")
    job = cluster.start("deepspeed", "--num_gpus", 2, "launch/train_tokenizer.py", "--config", long, log=log)
    wait_for(lambda: trains(tmp_path / "runs"), 150)
    (os.killpg if group else os.kill)(job.pid, number)
    assert job.wait(60) != 0  # Its code is the launcher's.
    wait_for(lambda: not processes(str(long)), 60)
    said = [line for line in log.read_text().splitlines() if "--resume auto" in line]
    assert len(said) == 1
    assert bool(newest(tmp_path / "runs")) is not group
    assert launched(tmp_path / "runs") == (2, "deepspeed")


def test_torchrun_starts_the_ranks_again(
    cluster: Cluster, long: Path, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    """A rank is killed; both go on from the checkpoint to the last step, and torchrun ends with 0."""
    log, runs = long.with_suffix(".log"), tmp_path / "runs"
    options = ("--nproc_per_node", 2, "--max_restarts", 1, "launch/train_tokenizer.py", "--config", long)
    settings = ("--resume", "auto", "--set", "tokenizer.train.checkpoint_every=1")
    job = cluster.start("torchrun", *options, *settings, log=log)
    wait_for(lambda: newest(runs) > 0, 150)
    children = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    write_config(long, tokenizer={"train": {"steps": newest(runs) + 2, "valid_every": 0}})
    assert job.wait(150) == 0, log.read_text()
    assert "resumed from" in log.read_text() and launched(runs) == (2, "torchrun")


def test_a_node_that_does_not_come(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    place = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "node-1", "MASTER_PORT": 23456}
    finished = cluster.run("python", "launch/train_tokenizer.py", "--config", config, **place, SHODH_JOIN_SECONDS=3)
    (line,) = finished.errors()
    assert finished.code == 2 and "1 of 2 ranks" in line and "rank 1" in line
    assert not (tmp_path / "runs").exists()
