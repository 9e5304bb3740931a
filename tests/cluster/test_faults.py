"""What a cluster does every day: ssh, nodes that do not come, ranks and launchers that die, jobs side by side."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import Cluster, host, parent, processes, wait_for

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


def trains(config: Path) -> bool:
    return any(path.stat().st_size for path in config.parent.glob("runs/*/metrics.jsonl"))


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


def test_one_job_is_stopped_and_the_other_goes_on(cluster: Cluster, long: Path, hostfile: Path, tmp_path: Path) -> None:
    second = tmp_path / "b" / "long.yaml"
    second.parent.mkdir()
    second.write_text(long.read_text().replace("/runs", "/b/runs"))
    jobs = []
    for config in (long, second):
        options = ("--hostfile", hostfile, "--master_addr", "127.0.0.2", "tokenizer", "--config", config)
        jobs.append(cluster.start(*LAUNCH, *options, log=config.with_suffix(".log")))
    wait_for(lambda: trains(long) and trains(second), 250)
    jobs[0].send_signal(signal.SIGTERM)
    wait_for(lambda: not ranks(long), 60)
    assert len(ranks(second)) == 2 and jobs[1].poll() is None
    assert list(tmp_path.glob("runs/*/checkpoints/step_*"))
    os.killpg(jobs[1].pid, signal.SIGTERM)
    wait_for(lambda: not ranks(second), 60)


def test_ranks_end_with_a_launcher_that_is_killed(cluster: Cluster, long: Path) -> None:
    log = long.with_suffix(".log")
    cluster.start("deepspeed", "--num_gpus", 2, "launch/train_tokenizer.py", "--config", long, log=log)
    wait_for(lambda: trains(long), 150)
    found = ranks(long)
    assert len(found) == 2
    os.kill(parent(found[0]), signal.SIGKILL)
    wait_for(lambda: not ranks(long), 60)
    assert list(long.parent.glob("runs/*/checkpoints/step_*"))


def test_session_of_a_node_is_killed(cluster: Cluster, long: Path, hostfile: Path) -> None:
    """All ranks save, the command ends, and the node is named."""
    log, options = long.with_suffix(".log"), ("--hostfile", hostfile, "--master_addr", "127.0.0.2")
    job = cluster.start(*LAUNCH, *options, "tokenizer", "--config", long, log=log)
    wait_for(lambda: trains(long), 150)
    (rank,) = [process for process in ranks(long) if host(process) == "node-2"]
    os.kill(parent(parent(rank)), signal.SIGKILL)
    wait_for(lambda: not ranks(long), 60)
    assert list(long.parent.glob("runs/*/checkpoints/step_*"))
    assert job.wait(60) == 255 and "node-2: ssh exited" in log.read_text()


@pytest.mark.parametrize(("number", "group"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_command_of_one_node_is_ended(number: int, group: bool, cluster: Cluster, long: Path) -> None:
    """Ctrl-C goes to all processes, saves nothing and says what to type; after SIGTERM to the command all save."""
    log = long.with_suffix(".log")
    job = cluster.start("deepspeed", "--num_gpus", 2, "launch/train_tokenizer.py", "--config", long, log=log)
    wait_for(lambda: trains(long), 150)
    (os.killpg if group else os.kill)(job.pid, number)
    assert job.wait(60) != 0  # Its code is the launcher's.
    wait_for(lambda: not processes(str(long)), 60)
    said = [line for line in log.read_text().splitlines() if "--resume auto" in line]
    assert len(said) == 1
    assert bool(list(long.parent.glob("runs/*/checkpoints/step_*"))) is not group


def test_torchrun_starts_the_ranks_again(cluster: Cluster, long: Path) -> None:
    log = long.with_suffix(".log")
    options = ("--nproc_per_node", 2, "--max_restarts", 1, "launch/train_tokenizer.py", "--config", long)
    settings = ("--resume", "auto", "--set", "tokenizer.train.checkpoint_every=1")
    job = cluster.start("torchrun", *options, *settings, log=log)
    wait_for(lambda: bool(list(long.parent.glob("runs/*/checkpoints/step_*"))), 150)
    children = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    wait_for(lambda: "resumed from" in log.read_text(), 150)
    os.killpg(job.pid, signal.SIGKILL)


def test_a_node_that_does_not_come(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    place = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "node-1", "MASTER_PORT": 23456}
    finished = cluster.run("python", "launch/train_tokenizer.py", "--config", config, **place, SHODH_JOIN_SECONDS=3)
    (line,) = finished.errors()
    assert finished.code == 2 and "1 of 2 ranks" in line and "rank 1" in line
    assert not (tmp_path / "runs").exists()
