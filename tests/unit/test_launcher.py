"""Who started this process, as which rank: environments as the launchers were seen to give them."""

from __future__ import annotations

import os
from typing import Any

import pytest

from shodh.core.launcher import Launch, LauncherError, _first_host, read_launch, without_launcher

MASTER = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none", **MASTER,
}  # fmt: skip
DEEPSPEED = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "2", **MASTER
}  # fmt: skip
ALLOCATION = {  # salloc's shell
    "SLURM_JOB_ID": "12007", "SLURM_JOB_NODELIST": "node-[08-10]", "SLURM_NTASKS": "5", "SLURM_NNODES": "3",
}  # fmt: skip
BATCH = {**ALLOCATION, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_TASK_PID": "9"}
SRUN = {
    **ALLOCATION, "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_ID": "1",
    "SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_STEP_NODELIST": "node-[08-10]",
    "SLURM_TASK_PID": "9",
}  # fmt: skip
ONE_TASK = {
    **SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_STEP_NODELIST": "node-08",
}  # fmt: skip
TYPED = {**SRUN, "SLURM_PTY_PORT": "4000", "PMIX_RANK": "0", "PMI_RANK": "0", "PMI_SIZE": "5"}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "PMIX_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_MCA_ess_base_jobid": "24007", "PMIX_SERVER_URI2": "24006.0;tcp4://h:1",
}  # fmt: skip
HYDRA = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2", **MASTER}
CRAY = {"PMI_RANK": "1", "PMI_SIZE": "2", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launch()),
        (TORCHRUN, Launch("torchrun", 5, 8, 1, 4, 1, 2, "10.0.0.1", 29500)),
        (DEEPSPEED, Launch("deepspeed", 3, 4, 1, 2, 1, 2, "10.0.0.1", 29500)),
        (SRUN, Launch("srun", 3, 5, 1, 2, 1, 3, "node-08", 20000 + 7 + 97)),
        (ONE_TASK, Launch("srun", 0, 1, 0, 1, 0, 1, "127.0.0.1", 20104)),
        ({**SRUN, **MASTER}, Launch("srun", 3, 5, 1, 2, 1, 3, "10.0.0.1", 29500)),
        (MPIRUN, Launch("mpirun", 1, 2, 1, 2, None, 1, "127.0.0.1", 20007)),
        (HYDRA, Launch("mpiexec", 2, 4, 0, 2, None, None, "10.0.0.1", 29500)),
        (CRAY, Launch("mpiexec", 1, 2, 1, 2, None, 1, "127.0.0.1", 20000)),
        # No launcher: the shell of salloc, a batch script, a shell of srun --pty, an interactive step.
        (ALLOCATION, Launch()),
        (BATCH, Launch()),
        (TYPED, Launch()),
        ({**ONE_TASK, "SLURM_STEP_ID": "4294967290"}, Launch()),
        # Tasks of srun itself behind a terminal, and with PMI of its own.
        ({**TYPED, "SLURM_TASK_PID": str(os.getpid()), "PMI_RANK": "3"}, "srun 3 5"),
        ({**SRUN, "PMI_RANK": "3", "PMI_SIZE": "5", "PMIX_RANK": "3"}, "srun 3 5"),
        # The innermost counts.
        ({**BATCH, **DEEPSPEED}, "deepspeed 3 4"),
        ({**ONE_TASK, **DEEPSPEED, "CROSS_SIZE": "1"}, "deepspeed 3 4"),
        ({**SRUN, **TORCHRUN, "GROUP_WORLD_SIZE": "5"}, "torchrun 5 8"),
        ({**TYPED, **TORCHRUN}, "torchrun 5 8"),
        ({**BATCH, **MPIRUN}, "mpirun 1 2"),
        ({**SRUN, **MPIRUN, "PMIX_SERVER_URI2": "24006.1;tcp4://h:1"}, "mpirun 1 2"),  # in srun's daemon of mpirun
        ({**SRUN, "RANK": "3", "WORLD_SIZE": "5", "LOCAL_RANK": "1", **MASTER}, "srun 3 5"),  # a script's own lines
        ({**MPIRUN, "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0", **ALLOCATION}, "mpirun 1 2"),
    ],
)  # fmt: skip
def test_place(environment: dict[str, str], expected: Any) -> None:
    launch = read_launch(environment)
    assert (f"{launch.name} {launch.rank} {launch.world}" if isinstance(expected, str) else launch) == expected
    assert read_launch(without_launcher(environment)).world == 1


def without(environment: dict[str, str], *names: str) -> dict[str, str]:
    return {k: v for k, v in environment.items() if k not in names}


LEFT = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", **MASTER}  # of another shell


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        # Incomplete.
        *((without(TORCHRUN, name), name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", *MASTER)),
        *((without(MPIRUN, name), name) for name in MPIRUN if name.startswith("OMPI_COMM")),
        *((without(SRUN, name), name) for name in SRUN if name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")),
        *((without(SRUN, name), name) for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST")),
        (without(SRUN, "SLURM_STEP_ID"), "SLURM_STEP_ID"),
        (without(HYDRA, "PMI_SIZE"), "PMI_SIZE"),
        (without(HYDRA, "MPI_LOCALRANKID"), "MPI_LOCALRANKID"),
        (without(HYDRA, "MASTER_ADDR"), "MASTER_ADDR"),
        ({**MPIRUN, "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}, "MASTER_ADDR"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK"),
        # Not understood.
        ({"PMIX_RANK": "0"}, "PMIX_RANK"),
        ({"FLUX_TASK_RANK": "0"}, "FLUX_TASK_RANK"),
        ({"JSM_NAMESPACE_RANK": "0"}, "JSM_NAMESPACE_RANK"),
        # No numbers.
        ({**TORCHRUN, "RANK": "-1"}, "RANK=-1"),
        ({**TORCHRUN, "WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2(2),1"}, "SLURM_STEP_TASKS_PER_NODE"),
        # Contradicting.
        ({**TORCHRUN, "RANK": "8"}, "rank 8 of 8"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, "4 of 4"),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "6"}, "SLURM_STEP_TASKS_PER_NODE"),
        ({**SRUN, **LEFT}, "RANK=0 of WORLD_SIZE=1"),
        ({**MPIRUN, **LEFT}, "RANK=0 of WORLD_SIZE=1"),
        ({**SRUN, "PMI_RANK": "0", "PMI_SIZE": "1"}, "contradicts"),
        # Several launchers side by side, each with a job of its own.
        ({**SRUN, **TORCHRUN, "GROUP_WORLD_SIZE": "1"}, "srun started 5 times torchrun"),
        ({**SRUN, **DEEPSPEED, "CROSS_SIZE": "1"}, "srun started 5 times deepspeed"),
        ({**MPIRUN, **TORCHRUN, "GROUP_WORLD_SIZE": "1"}, "mpirun started 2 times torchrun"),
        ({**SRUN, **MPIRUN}, "srun started 5 times mpirun"),
    ],
)  # fmt: skip
def test_launcher_that_cannot_be_used_is_an_error(environment: dict[str, str], named: str) -> None:
    with pytest.raises(LauncherError, match=named.replace("(", r"\(")):
        read_launch(environment)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node-[08-10,13],other", "node-08"), ("a,b", "a"), ("gpu7", "gpu7"), ("rack[1-2]n[3,5],x", "rack1n3"),
        ("n[5,1-2].site", "n5.site"),
    ],
)  # fmt: skip
def test_first_of_a_list_of_hosts(nodes: str, first: str) -> None:
    assert _first_host(nodes) == first
