"""launch/slurm/shodh.sbatch: exit codes, requeue and its bound, arrays, environments; and a training through it all."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import ROOT, Cluster, host, launched, newest, parent, processes, trains, wait_for

SCRIPT = ROOT / "launch" / "slurm" / "shodh.sbatch"
TWO = ("-N", 2, "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=2")
ACTING = {"SHODH_PYTHON": ROOT / "tests" / "cluster" / "acting.py"}


# Options, what the ranks do, and how the job ends: state, exit code, restarts.
ENDS: dict[str, tuple[list[str], str, tuple[str, str, int]]] = {
    "all is well": ([], "show", ("COMPLETED", "0", 0)),
    "error of one": ([], "error of one", ("FAILED", "2", 0)),
    "no requeue": (["--no-requeue"], "stop", ("FAILED", "3", 0)),
    "no progress": ([], "stop", ("FAILED", "3", 3)),
    "progress": ([], "stop and go on", ("COMPLETED", "0", 5)),
}


def finish(cluster: Cluster, job: str, seconds: float = 120.0) -> tuple[str, str, int]:
    """State, exit code and restarts of a job, after its end."""
    wait_for(lambda: not cluster.hurry() and cluster.ended(job), seconds)
    shown = cluster.show(job)
    return shown["JobState"], shown["ExitCode"].split(":")[0], int(shown["Restarts"])


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Path]]:
    """Number and folder of a job of each kind of `ENDS`, side by side: most of their time they wait for SLURM."""
    found = {}
    for name, (options, act, _) in ENDS.items():
        folder, arguments = tmp_path_factory.mktemp("job"), ("pretrain", "--config", "demo")
        found[name] = cluster.submit(*TWO, *options, SCRIPT, *arguments, cwd=folder, ACT=act, **ACTING), folder
    return found


@pytest.mark.usefixtures("jobs")  # They run meanwhile.
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


@pytest.mark.parametrize("name", ENDS)
def test_end_of_a_job(name: str, cluster: Cluster, jobs: dict[str, tuple[str, Path]]) -> None:
    (job, folder), expected = jobs[name], ENDS[name][2]
    found = finish(cluster, job)
    log = (folder / f"shodh-{job}.log").read_text()
    assert found == expected, log
    assert f"{folder} pretrain --config demo --resume auto of 2 1" in log
    assert ("\nerror: " in log) is (expected[1] == "3")
    assert not list(folder.glob(".shodh-*.code")) or expected[1] == "3"


def test_training_goes_on_after_every_fault(
    cluster: Cluster, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    """A signal, a rank that stands still, a node that dies: each puts the job back, and it goes on to its last step.

    SLURM would notice a node that is gone after its SlurmdTimeout, srun would wait as long.
    """
    config, runs = tmp_path / "long.yaml", tmp_path / "runs"

    def write(**train: int) -> None:
        """What the next attempt reads."""
        train = {"steps": 10**6, "valid_every": 0, "checkpoint_every": 5, **train}
        write_config(config, tokenizer={"train": train}, watchdog={"least": 10.0, "steps": 3.0})

    write(checkpoint_every=0)
    job = cluster.submit(*TWO, SCRIPT, "tokenizer", "--config", config, cwd=tmp_path, SHODH_PYTHON="python")
    log = tmp_path / f"shodh-{job}.log"
    wait_for(lambda: trains(runs), 200)
    write()
    cluster.run("scancel", "--signal=USR1", job)
    wait_for(lambda: cluster.show(job)["Restarts"] == "1")
    (checkpoint,) = runs.glob("*/checkpoints/step_*")
    wait_for(cluster.hurry)
    for restarts, dies in ((2, False), (3, True)):
        begun = newest(runs)
        wait_for(lambda begun=begun: newest(runs) >= begun + 10, 200)
        found = [p for p, words in processes(str(config), "shodh").items() if words[0] != "srun"]
        node, rank = max((host(process), process) for process in found)
        if dies:
            (daemon,) = processes("slurmd", node)
            for process in (daemon, parent(rank), rank):
                os.kill(process, signal.SIGKILL)
            write(steps=newest(runs) + 6)  # after every checkpoint there can be
        else:
            os.kill(rank, signal.SIGSTOP)
        wait_for(lambda restarts=restarts: cluster.show(job)["Restarts"] == str(restarts), 200)
        (line,) = [line for line in log.read_text().splitlines() if f"rank 1 (process {rank} on {node})" in line]
        assert "--resume auto goes on" in line
        if dies:
            cluster.start_slurmd(node)
        wait_for(cluster.hurry)
    assert finish(cluster, job, 200) == ("COMPLETED", "0", 3), log.read_text()
    assert f"resumed from {checkpoint} at step" in log.read_text()
    assert launched(runs) == (2, "srun")
