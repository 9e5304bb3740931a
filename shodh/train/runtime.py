"""Starting and ending a distributed run: ranks, one error line, no rank left hanging."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from shodh.core import signals
from shodh.core.cli import EXIT_FAULT, EXIT_USAGE, error_line
from shodh.core.devices import CardsError, check_ranks, count_cards, local_rank, threads_of_rank, uses_cuda
from shodh.core.distributed import SharedError, rank, where_am_i, world_size
from shodh.core.errors import ConfigError, TopologyError
from shodh.core.launcher import Launch, LauncherError, read_launch
from shodh.train.rank_logs import file_log
from shodh.train.watchdog import Watchdog

log = logging.getLogger("shodh")


#: What collectives raise on a rank whose neighbours have ended, or stand still.
_LOST = re.compile(r"Connection (closed|reset) by peer|Timed out waiting|Application timeout caused|NCCL.*remote", re.I)
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"  # who started the ranks listens on the port, and they must not
ATTEMPT = "TORCHELASTIC_RESTART_COUNT"  # torchrun keeps its store when it starts the ranks again
JOIN = "SHODH_JOIN_SECONDS"  # how long to wait for ranks that do not come


class JoinError(TopologyError):
    """Ranks that were started do not find each other."""


def join_seconds() -> float:
    """Seconds in which all ranks must have come: 300, or ``SHODH_JOIN_SECONDS``; raises `ConfigError`."""
    text = os.environ.get(JOIN, "300")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise ConfigError(f"{JOIN}={text}: expected seconds to wait for ranks that do not come")
    return seconds


def meet(timeout: timedelta) -> dist.Store:
    """The store through which the ranks of a job find each other; one rank alone listens on any port that is free.

    Where another job has the port, its ranks are not disturbed: what is stored is kept apart by command line, and by
    attempt where torchrun starts the ranks again.

    Raises
    ------
    DistNetworkError
        The port that the launcher or the user chose is in use.
    JoinError
        Rank 0, or another rank, did not come in time (`join_seconds`).
    """
    launch = read_launch()
    if launch.world == 1:
        return dist.TCPStore("127.0.0.1", 0, None, True, timeout, wait_for_workers=False)
    assert launch.address is not None and launch.port is not None  # read_launch saw to it
    listens = launch.rank == 0 and os.environ.get(AGENT_STORE) != "True"
    seconds = join_seconds()
    within, place = timedelta(seconds=seconds), f"{launch.address}:{launch.port}"
    try:
        store = dist.TCPStore(launch.address, launch.port, None, listens, within, wait_for_workers=False)
    except dist.DistError as error:
        if listens:
            raise
        raise JoinError(
            f"{socket.gethostname()} did not reach rank 0 at {place} in {seconds:g} s: is it at work, is the address "
            f"right as seen from here, is the port free and open? Wait longer with {JOIN}"
        ) from error
    command = [part for part in sys.argv[1:] if not part.startswith("--local_rank")]
    identity = "\0".join([*command, os.environ.get(ATTEMPT, "0")])
    shared = dist.PrefixStore(hashlib.sha256(identity.encode()).hexdigest(), store)
    _wait_for_all(shared, launch, seconds)
    shared.set_timeout(timeout)
    return shared


def _wait_for_all(store: dist.Store, launch: Launch, seconds: float) -> None:
    """Raise `JoinError` on every rank that came, if another did not."""
    store.set(f"here/{launch.rank}", socket.gethostname())
    names = [f"here/{rank}" for rank in range(launch.world)]
    try:
        store.wait(names, timedelta(seconds=seconds))
    except dist.DistError as error:
        came = {rank: store.get(name).decode() for rank, name in enumerate(names) if store.check([name])}
        missing = [str(rank) for rank in range(launch.world) if rank not in came]
        hosts = ", ".join(sorted(set(came.values())))
        shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        raise JoinError(
            f"{len(missing)} of {launch.world} ranks did not come in {seconds:g} s: rank {shown}; those that did are "
            f"on {hosts}. Look at the other machines and at their logs (was the same command started there?), or wait "
            f"longer with {JOIN}"
        ) from error


def _skip_cpu_op_build() -> None:
    """Keep DeepSpeed from compiling its shared-memory all-reduce just in time on a CPU.

    The op serves inference only. Its build takes 20 s, needs ninja, and a process killed during it leaves a lock file
    that hangs every later run. The list is set whole: to ask for it has DeepSpeed try every op with the compiler, 1 s.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}


def _tell_deepspeed(launch: Launch) -> None:
    """Set what DeepSpeed and torch read, and srun and mpirun do not give; it says the same, so it may stay."""
    told: dict[str, object] = {"RANK": launch.rank, "WORLD_SIZE": launch.world, "LOCAL_RANK": launch.local_rank}
    told |= {"MASTER_ADDR": launch.address or "127.0.0.1", "MASTER_PORT": launch.port}
    for name, value in told.items():
        if value is not None:
            os.environ.setdefault(name, str(value))


def start_distributed() -> torch.device:
    """Join the process group (gloo on a CPU, NCCL on cards), also without a launcher; returns this rank's device.

    Raises
    ------
    CardsError
        This machine has fewer cards than ranks.
    DistNetworkError, JoinError
        See `meet`.
    """
    check_ranks()
    _tell_deepspeed(read_launch())
    import deepspeed
    from deepspeed.constants import default_pg_timeout

    _skip_cpu_op_build()
    if uses_cuda():
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(threads_of_rank())
    if not dist.is_initialized():
        # DeepSpeed joins what is there; alone it would listen on a port that was free some seconds ago, and name no
        # device for a single rank, so that NCCL warns of its guess.
        backend, card = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        store, timeout = meet(default_pg_timeout), default_pg_timeout
        dist.init_process_group(
            backend, store=store, rank=rank(), world_size=world_size(), timeout=timeout, device_id=card
        )
        deepspeed.init_distributed(backend, verbose=False)
    return device


def quiet_logs(verbose: bool = False) -> None:
    """On the screen our own log on rank 0, DeepSpeed's only from warnings up; files of ranks also have the others'."""
    screen = logging.StreamHandler()
    if rank() != 0 and not verbose:
        screen.addFilter(lambda record: record.name != log.name or record.levelno >= logging.ERROR)
    logging.basicConfig(format="%(message)s", level=logging.WARNING, handlers=[screen])
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    # DeepSpeed calls collectives under names that torch is about to drop; it is not for our users to mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.WARNING)


def run_ranks(main: Callable[[], int]) -> None:
    """`shodh.core.cli.run_main` for a program that may run on many ranks.

    Bad input ends every rank with exit code 2, and one rank prints the line. Before the ranks are connected most errors
    are those of all, and rank 0 speaks first (of too few cards, the first rank of a machine that has none); afterwards
    a `SharedError` is spoken by rank 0, and an error of one rank alone by that rank. The launcher ends the other ranks.
    """
    code = 1
    try:
        code = main()
    except KeyboardInterrupt:
        signals.say_interrupted()  # The thread that watches may be slower than the end of the process.
        code = signals.INTERRUPTED
    except Exception as error:
        line = error_line(error)
        file_log.error(line or traceback.format_exc())
        if _LOST.search(str(error)) and dist.is_initialized():
            _speak_of_lost(error)
            code = EXIT_FAULT
        elif line is None:
            traceback.print_exc()
        else:
            _speak(line, error)
            code = EXIT_USAGE
    sys.stdout.flush()
    sys.stderr.flush()
    signals.leave_code(code)
    if dist.is_initialized():
        if code != 0:
            os._exit(code)  # A pending collective of another rank must not keep this one alive.
        dist.destroy_process_group()
    sys.exit(code)


def _speak_of_lost(error: Exception) -> None:
    """Name the ranks that are gone; whoever was lost has said why, if it could, and who was killed cannot."""
    signals.hold()  # A launcher that ends the others is not to end this before.
    if Watchdog.last is None:
        sys.stderr.write(f"[rank {rank()}] lost contact with another rank ({str(error)[:300]!r})\n")
        time.sleep(2.0)
    elif (what := Watchdog.last.name_lost()) is not None:
        sys.stderr.write(f"{what}; --resume auto goes on from the last checkpoint\n")
        sys.stderr.flush()
        time.sleep(1.0)  # It may hold the store that the others ask.


def _speak(line: str, error: Exception) -> None:
    """Print the error line, with the rank and host whose it is.

    The launcher ends all ranks at the first that fails. So where all may have met the same error, rank 0 speaks at
    once, then the first of each host, then the others: none that failed alone is silent.
    """
    if isinstance(error, LauncherError):  # A rank that does not know its number.
        sys.stderr.write(f"error: {line}\n")
        return
    common = isinstance(error, SharedError) or not dist.is_initialized()
    first = local_rank() == count_cards() if isinstance(error, CardsError) else rank() == 0
    first = local_rank() == 0 if isinstance(error, JoinError) else first  # a line a machine
    if common and not first:
        time.sleep(2.0 if local_rank() == 0 else 4.0)
    if first or not isinstance(error, SharedError | CardsError | JoinError):
        where = f"[{where_am_i()}] " if world_size() > 1 and not (first and common) else ""
        sys.stderr.write(f"{where}error: {line}\n")
