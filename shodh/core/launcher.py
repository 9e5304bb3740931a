"""Who started this process and as which rank: read from the environment of deepspeed, torchrun, srun and mpirun.

The innermost launcher counts. One that is visible but incomplete, contradicts another or is not understood is an error:
taken for none, each of its processes would train a run of its own in the same folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from shodh.core.errors import TopologyError


class LauncherError(TopologyError):
    """The launcher's environment cannot be used; each rank sees that for itself."""


@dataclass(frozen=True)
class Launch:
    """Place of a process among those of its job.

    Attributes
    ----------
    name : str
        ``deepspeed``, ``torchrun``, ``srun``, ``mpirun`` (Open MPI), ``mpiexec`` (PMI: MPICH, Intel, Cray), ``by hand``
        (RANK and WORLD_SIZE alone), or ``none``.
    local_size : int or None
        Ranks of this machine; None where nobody says.
    node : int or None
        Number of this machine; None where nobody says.
    nodes : int or None
        Machines, or instances of the launcher, that form the job together; None where nobody says.
    address, port : str or None, int or None
        Where rank 0 listens; None where nobody says.
    """

    name: str = "none"
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_size: int | None = None
    node: int | None = None
    nodes: int | None = None
    address: str | None = None
    port: int | None = None


#: Launchers of MPI: rank, ranks, rank on the machine, ranks on the machine (of MPICH and Intel, or of Cray).
_MPI = {
    "mpirun": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"), ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE")),
}
#: Variables of launchers that are not understood, where no other one is found.
_FOREIGN = (
    "PMIX_RANK",
    "PALS_RANKID",
    "ALPS_APP_PE",
    "JSM_NAMESPACE_RANK",
    "FLUX_TASK_RANK",
    "MV2_COMM_WORLD_RANK",
    "MPIRUN_RANK",
    "GROUP_RANK",
    "TORCHELASTIC_RUN_ID",
    "LOCAL_RANK",
)
_PREFIXES = ("OMPI_COMM_WORLD_", "PMI_", "PMIX_", "MPI_LOCAL", "SLURM_STEP", "TORCHELASTIC_", "GROUP_", "CROSS_")
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
_BY_HAND = "or set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT for every process"


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """The place of this process; raises `LauncherError`."""
    env = _Reader(environment)
    step = _slurm(env)
    launch = outer = _mpi(env, step) or step
    if env.has("RANK", "WORLD_SIZE"):
        launch = _torch(env)
        if outer is not None and outer.world > 1 and launch.nodes is None:
            _same(launch, outer)
            launch = replace(outer, address=launch.address or outer.address, port=launch.port or outer.port)
    if launch is None:
        # In a shell that srun started for typing, its own PMIX variables stand around.
        visible = [] if env.has("SLURM_STEP_ID") else [name for name in _FOREIGN if name in environment]
        if visible:
            raise LauncherError(
                f"{visible[0]} is set: a launcher started this process, and it is not one of deepspeed, torchrun, srun "
                f"and mpirun, or not all of its variables came; use one of these, {_BY_HAND}"
            )
        return Launch(address=environment.get("MASTER_ADDR"), port=env.maybe("MASTER_PORT"))
    for around in (outer, step):
        _one_job(launch, around)
    return _checked(launch)


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that is alone, whoever started this one."""
    kept = {k: v for k, v in environment.items() if not k.startswith(_PREFIXES)}
    return {k: v for k, v in kept.items() if k not in (*_NAMES, *_FOREIGN, "SLURM_PROCID", "SLURM_LOCALID")}


class _Reader:
    """Whole numbers of an environment."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.all = environment

    def has(self, *names: str) -> bool:
        return any(name in self.all for name in names)

    def text(self, name: str, beside: str) -> str:
        if not self.all.get(name):
            raise LauncherError(
                f"{beside} is set and {name} is not: the launcher's environment came in part; {_pass()}"
            )
        return self.all[name]

    def number(self, name: str, beside: str) -> int:
        text = self.text(name, beside)
        if not re.fullmatch(r"[0-9]+", text):
            raise LauncherError(f"{name}={text}: expected a whole number from the launcher")
        return int(text)

    def maybe(self, *names: str) -> int | None:
        for name in names:
            if self.all.get(name):
                return self.number(name, name)
        return None


def _pass() -> str:
    return f"hand all of it on (srun --export=ALL, containers with the whole environment), {_BY_HAND}"


def _torch(env: _Reader) -> Launch:
    """RANK and WORLD_SIZE, as deepspeed, torchrun and scripts set them."""
    rank, world = env.number("RANK", "WORLD_SIZE"), env.number("WORLD_SIZE", "RANK")
    name, nodes, node = "by hand", None, None
    if env.has("TORCHELASTIC_RUN_ID"):
        name, node, nodes = "torchrun", env.maybe("GROUP_RANK"), env.maybe("GROUP_WORLD_SIZE")
    elif env.has("CROSS_RANK") and env.has("LOCAL_SIZE"):
        name, node, nodes = "deepspeed", env.maybe("CROSS_RANK"), env.maybe("CROSS_SIZE")
    local_rank = env.maybe("LOCAL_RANK")
    if world > 1:
        local_rank = env.number("LOCAL_RANK", "RANK")
        env.text("MASTER_ADDR", "RANK"), env.number("MASTER_PORT", "RANK")
    local_size = env.maybe("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    address, port = env.all.get("MASTER_ADDR"), env.maybe("MASTER_PORT")
    return Launch(name, rank, world, local_rank or 0, local_size, node, nodes, address, port)


def _mpi(env: _Reader, step: Launch | None) -> Launch | None:
    """Ranks of mpirun; it does not say where rank 0 is, unless all are on one machine."""
    for name, (rank, size, local_rank, local_size) in _MPI.items():
        if not env.has(rank, size):
            continue
        if env.has("SLURM_STEP_ID") and not env.has(*local_rank):  # PMI of srun, which says no more
            own = Launch("mpiexec", env.number(rank, size), env.number(size, rank))
            if step is not None:
                _same(own, step)
            return None
        return _mpi_rank(env, name, env.number(rank, size), env.number(size, rank), local_rank, local_size)
    return None


def _mpi_rank(
    env: _Reader, name: str, rank: int, world: int, local_rank: tuple[str, ...], local_size: tuple[str, ...]
) -> Launch:
    own, here = env.maybe(*local_rank), env.maybe(*local_size)
    if world > 1 and (own is None or here is None):
        env.text((local_rank if own is None else local_size)[0], f"the rank of {name}")
    # Started by mpirun itself, and not by a daemon on one of several nodes that srun may have started for it.
    alone = here == world and (name != "mpirun" or ".0;" in env.all.get("PMIX_SERVER_URI2", ".0;"))
    address = env.all.get("MASTER_ADDR")
    if address is None and world > 1 and here != world:
        if not env.has("SLURM_JOB_NODELIST"):
            raise LauncherError(
                f"{name} started {world} ranks, {here} of them here, and does not say where rank 0 is: give all of "
                "them MASTER_ADDR, the name of its machine (mpirun -x MASTER_ADDR=..., mpiexec -genv MASTER_ADDR ...)"
            )
        address = _first_host(env.all["SLURM_JOB_NODELIST"])
    job = re.sub(r"\D", "", env.all.get("OMPI_MCA_ess_base_jobid") or env.all.get("PMIX_NAMESPACE") or "") or "0"
    port = env.maybe("MASTER_PORT") or _port(int(job))
    return Launch(name, rank, world, own or 0, here, None, 1 if alone else None, address or "127.0.0.1", port)


def _in_step(env: _Reader) -> bool:
    """Whether srun started this process, or one around it; not so in a batch script, salloc's shell or a login."""
    step = env.maybe("SLURM_STEP_ID", "SLURM_STEPID")
    if step is None or step >= 0xFFFFFFF0:  # steps of SLURM's own: batch, extern, interactive
        if env.maybe("SLURM_PROCID"):
            raise LauncherError(
                f"SLURM_PROCID is set, SLURM_STEP_ID is not: srun's environment came in part; {_pass()}"
            )
        return False
    # A shell of `srun --pty`: what is typed there is not one of its tasks, but what srun itself started is.
    typed = env.has("SLURM_PTY_PORT") and env.all.get("SLURM_TASK_PID") != str(os.getpid())
    return not typed


def _slurm(env: _Reader) -> Launch | None:
    """Tasks of srun; None in a batch script, in the shell of salloc or ``srun --pty`` and after a login."""
    if not _in_step(env):
        return None
    beside = "SLURM_STEP_ID"
    rank, node = env.number("SLURM_PROCID", beside), env.number("SLURM_NODEID", beside)
    world = env.maybe("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") or env.number("SLURM_NTASKS", beside)
    counts = _repeated(env.text("SLURM_STEP_TASKS_PER_NODE", beside))
    if sum(counts) != world or node >= len(counts):
        raise LauncherError(
            f"srun's variables contradict each other: {world} tasks, SLURM_STEP_TASKS_PER_NODE="
            f"{env.all['SLURM_STEP_TASKS_PER_NODE']}, SLURM_NODEID={node} (an environment of another step?)"
        )
    first = _first_host(env.text("SLURM_STEP_NODELIST", beside)) if len(counts) > 1 else "127.0.0.1"
    step = env.maybe("SLURM_STEP_ID", "SLURM_STEPID") or 0
    port = env.maybe("MASTER_PORT") or _port(env.number("SLURM_JOB_ID", beside) + 97 * step)
    address = env.all.get("MASTER_ADDR") or first
    return Launch(
        "srun", rank, world, env.number("SLURM_LOCALID", beside), counts[node], node, len(counts), address, port
    )


def _port(number: int) -> int:
    """A port that all ranks of a job compute alike, below those that systems give to whoever asks."""
    return 20_000 + number % 12_000


def _repeated(text: str) -> list[int]:
    """``[2, 2, 1]`` from SLURM's ``2(x2),1``."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise LauncherError(f"SLURM_STEP_TASKS_PER_NODE={text}: expected counts such as 8(x2),4")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _first_host(nodes: str) -> str:
    """``node-08`` from SLURM's ``node-[08-11,13],other``."""
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", re.split(r",(?![^[]*\])", nodes)[0])


def _same(launch: Launch, outer: Launch) -> None:
    if (launch.rank, launch.world) != (outer.rank, outer.world):
        raise LauncherError(
            f"RANK={launch.rank} of WORLD_SIZE={launch.world} contradicts {outer.name}, which started rank "
            f"{outer.rank} of {outer.world}: unset RANK and WORLD_SIZE, or do not start it through {outer.name}"
        )


def _one_job(launch: Launch, outer: Launch | None) -> None:
    """Refuse several launchers side by side, each with a job of its own on the same run."""
    if (
        outer is not None
        and outer is not launch
        and outer.world > 1
        and launch.nodes == 1
        and launch.name != outer.name
    ):
        raise LauncherError(
            f"{outer.name} started {outer.world} times {launch.name}, each a job of its own: start {launch.name} once, "
            f"one that spans all nodes (torchrun --nnodes {outer.world}), or python alone with {outer.name}"
        )


def _checked(launch: Launch) -> Launch:
    """Refuse a place that cannot be."""
    local = launch.local_size
    if launch.rank >= launch.world or (local is not None and not launch.local_rank < local <= launch.world):
        raise LauncherError(
            f"{launch.name} says rank {launch.rank} of {launch.world}, on this machine {launch.local_rank} of {local}, "
            "which contradict each other; is a variable left from another launcher?"
        )
    return launch
