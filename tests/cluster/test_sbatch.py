"""launch/slurm/shodh.sbatch: exit codes, requeue and its bound, arrays, environments; and a training through it all."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from cluster import ROOT, Cluster, host, parent, processes, wait_for

SCRIPT = ROOT / "launch" / "slurm" / "shodh.sbatch"
TWO = ("-N", 2, "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=2")
ACTING = {"SHODH_PYTHON": ROOT / "tests" / "cluster" / "acting.py"}


def finish(cluster: Cluster, job: str, seconds: float = 120.0) -> tuple[str, str, int]:
    """State, exit code and restarts of a job that has ended; one put back starts without SLURM's delay."""

    def ended() -> bool:
        shown = cluster.show(job)
        waits = (shown["JobState"], shown["Reason"]) == ("PENDING", "BeginTime")
        if waits and "comp" not in cluster.run("sinfo", "--noheader", "--format=%T").text:
            time.sleep(2)  # A node that still ends the attempt before would end the next one, too.
            cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")
        return cluster.ended(job)

    wait_for(ended, seconds)
    shown = cluster.show(job)
    return shown["JobState"], shown["ExitCode"].split(":")[0], int(shown["Restarts"])


@pytest.mark.parametrize(
    ("act", "options", "expected"),
    [
        ("show", [], ("COMPLETED", "0", 0)),
        ("error of one", [], ("FAILED", "2", 0)),
        ("stop", [], ("FAILED", "3", 3)),
        ("stop and go on", [], ("COMPLETED", "0", 5)),
        ("stop", ["--no-requeue"], ("FAILED", "3", 0)),
    ],
)
def test_end_of_a_job(
    act: str, options: list[str], expected: tuple[str, str, int], cluster: Cluster, tmp_path: Path
) -> None:
    job = cluster.submit(*TWO, *options, SCRIPT, "pretrain", "--config", "demo", cwd=tmp_path, ACT=act, **ACTING)
    found = finish(cluster, job)
    log = (tmp_path / f"shodh-{job}.log").read_text()
    assert found == expected, log
    assert f"{tmp_path} pretrain --config demo --resume auto of 2 1" in log
    assert ("\nerror: " in log) is (expected[1] == "3")
    assert not list(tmp_path.glob(".shodh-*.code")) or expected[1] == "3"


def test_signal_to_ranks_that_load(cluster: Cluster, tmp_path: Path) -> None:
    environment = {"ACT": "wait", "READY": f"{tmp_path}/ready", **ACTING}
    job = cluster.submit(*TWO, SCRIPT, "evaluate", "--run", "runs/a", cwd=tmp_path, **environment)
    wait_for(lambda: len(list(tmp_path.glob("ready*"))) == 2)
    cluster.run("scancel", "--signal=USR1", job)
    wait_for(lambda: cluster.show(job)["Restarts"] == "1")
    cluster.run("scancel", job)
    assert "back in the queue" in (tmp_path / f"shodh-{job}.log").read_text()


def test_array_without_the_environment_of_the_shell(cluster: Cluster, tmp_path: Path) -> None:
    export = f"--export=PATH={cluster.environment['PATH']},SLURM_CONF={cluster.environment['SLURM_CONF']}"
    python = f"SHODH_PYTHON={ACTING['SHODH_PYTHON']}"
    options = (*TWO[2:], "--array=4-5", f"{export},{python}")
    job = cluster.submit(*options, SCRIPT, "pretrain", "--set", "seed=%a", "name=x-%a", cwd=tmp_path)
    for task in (4, 5):
        assert finish(cluster, f"{job}_{task}")[:2] == ("COMPLETED", "0")
    text = "".join(path.read_text() for path in tmp_path.glob("shodh-*.log"))
    for task in (4, 5):
        assert f" pretrain --set seed={task} name=x-{task} --resume auto of 1 2" in text


@pytest.mark.parametrize("fault", ["rank stands still", "node dies"])
def test_training_goes_on_after_a_fault(fault: str, cluster: Cluster, config: Path, tmp_path: Path) -> None:
    """SLURM would notice a node that is gone after its SlurmdTimeout, srun would wait as long."""
    settings = ("tokenizer.train.steps=150", "watchdog.least=20", "watchdog.steps=3")
    arguments = (SCRIPT, "tokenizer", "--config", config, "--set", *settings)
    job = cluster.submit(*TWO, *arguments, cwd=tmp_path, SHODH_PYTHON="python")
    wait_for(lambda: bool(list((tmp_path / "runs").glob("*/checkpoints/step_*"))), 200)
    (rank,) = [p for p, words in processes(str(config), "shodh").items() if words[0] != "srun" and host(p) == "node-2"]
    if fault == "rank stands still":
        os.kill(rank, signal.SIGSTOP)
    else:
        (daemon,) = processes("slurmd", "node-2")
        for process in (daemon, parent(rank), rank):
            os.kill(process, signal.SIGKILL)
    wait_for(lambda: cluster.show(job)["Restarts"] == "1", 200)
    log = tmp_path / f"shodh-{job}.log"
    (line,) = [line for line in log.read_text().splitlines() if f"rank 1 (process {rank} on node-2)" in line]
    assert "--resume auto goes on" in line
    if fault == "node dies":
        cluster.start_slurmd("node-2")
    assert finish(cluster, job, 300)[:2] == ("COMPLETED", "0"), log.read_text()
    assert "resumed from" in log.read_text()


def test_training_is_stopped_put_back_and_goes_on(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    config.write_text(config.read_text().replace("steps: 4", "steps: 100000").replace("checkpoint_every: 2", "x: 0"))
    config.write_text(config.read_text().replace("x: 0", "checkpoint_every: 0"))
    job = cluster.submit(*TWO, SCRIPT, "tokenizer", "--config", config, cwd=tmp_path, SHODH_PYTHON="python")
    runs, log = tmp_path / "runs", tmp_path / f"shodh-{job}.log"
    wait_for(lambda: any(path.stat().st_size for path in runs.glob("*/metrics.jsonl")), 200)
    cluster.run("scancel", "--signal=USR1", job)
    wait_for(lambda: cluster.show(job)["Restarts"] == "1", 60)
    (checkpoint,) = runs.glob("*/checkpoints/step_*")
    time.sleep(2)
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")
    wait_for(lambda: f"resumed from {checkpoint} at step" in log.read_text(), 200)
    cluster.run("scancel", job)
    wait_for(lambda: cluster.ended(job))
