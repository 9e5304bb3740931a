"""Starting and ending a distributed run: ranks, one error line, no rank left hanging."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist

from shodh.core.cli import EXIT_USAGE, error_line
from shodh.core.devices import CardsError, check_ranks, count_cards, local_rank, local_world_size, uses_cuda
from shodh.core.distributed import SharedError, rank, world_size

log = logging.getLogger("shodh")


def _free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def _skip_cpu_op_build() -> None:
    """Keep DeepSpeed from compiling its shared-memory all-reduce just in time on a CPU.

    The op serves inference only. Its build takes 20 s, needs ninja, and a process killed during it leaves a lock file
    that hangs every later run. The list is set whole: to ask for it has DeepSpeed try every op with the compiler, 1 s.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}


def start_distributed() -> torch.device:
    """Join the process group (gloo on a CPU, NCCL on cards), also without a launcher; returns this rank's device.

    Raises
    ------
    CardsError
        This machine has fewer cards than ranks.
    """
    check_ranks()
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = _free_port()
    import deepspeed
    from deepspeed.constants import default_pg_timeout

    _skip_cpu_op_build()
    if uses_cuda():
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // (local_world_size() or world_size())))
    if not dist.is_initialized():
        if device.type == "cuda":
            # DeepSpeed joins what is there; alone it names no device for a single rank, and NCCL warns of its guess.
            dist.init_process_group("nccl", timeout=default_pg_timeout, device_id=device)
        deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)
    return device


def quiet_logs(verbose: bool = False) -> None:
    """Our own log on rank 0, DeepSpeed's only from warnings up."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    log.setLevel(logging.DEBUG if verbose else logging.INFO if rank() == 0 else logging.ERROR)
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    # DeepSpeed calls collectives under names that torch is about to drop; it is not for our users to mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.WARNING)


def run_ranks(main: Callable[[], int]) -> None:
    """`shodh.core.cli.run_main` for a program that may run on many ranks.

    Bad input ends every rank with exit code 2, and one rank prints the line. Before the ranks are connected they all
    meet the same error, and rank 0 speaks (of too few cards, the first rank of a machine that has none); afterwards a
    `SharedError` is spoken by rank 0, and an error of one rank alone by that rank. The launcher ends the other ranks.
    """
    code = 1
    try:
        code = main()
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        line = error_line(error)
        if line is None:
            traceback.print_exc()
        else:
            _speak(line, error)
            code = EXIT_USAGE
    sys.stdout.flush()
    sys.stderr.flush()
    if dist.is_initialized():
        if code != 0:
            os._exit(code)  # A pending collective of another rank must not keep this one alive.
        dist.destroy_process_group()
    sys.exit(code)


def _speak(line: str, error: Exception) -> None:
    """Print the error line on the rank whose business it is."""
    common = isinstance(error, SharedError) or not dist.is_initialized()
    first = local_rank() == count_cards() if isinstance(error, CardsError) else rank() == 0
    if first or not common:
        where = f"[rank {rank()}] " if world_size() > 1 and not common else ""
        sys.stderr.write(f"{where}error: {line}\n")
    else:
        time.sleep(2.0)  # The launcher ends all ranks at the first that fails: let the one that speaks be first.
