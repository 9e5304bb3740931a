"""What this machine computes on: how many cards (CUDA devices) there are, and which ranks and jobs get them.

Command line: ``python -m shodh.core.devices --ranks MOST`` prints the number of ranks to start here.

Environment
-----------
SHODH_CARDS=N
    Plan for N cards, whatever there is: what a machine of another kind would do, tried on this one.
DS_ACCELERATOR=cpu
    Compute on the CPU even where there are cards (DeepSpeed's own variable).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from functools import lru_cache

import torch

from shodh.core.errors import ConfigError, TopologyError
from shodh.core.launcher import read_launch


def uses_cuda() -> bool:
    """Whether this process computes on a card."""
    return os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" and torch.cuda.is_available()


def count_cards() -> int:
    """Number of cards this process may use; 0 on a CPU. The one answer that ranks, jobs and tests go by."""
    if os.environ.get("DS_ACCELERATOR", "cuda") != "cuda":
        return 0
    planned = os.environ.get("SHODH_CARDS")
    if planned is None:
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not planned.isdecimal():
        raise ConfigError(f"SHODH_CARDS={planned}: expected the number of cards to plan for, 0 for none")
    return int(planned)


def pick_device(name: str) -> str:
    """``"cpu"`` or ``"cuda"`` for ``"auto"``, ``"cpu"`` or ``"cuda"``."""
    if name == "cuda" and not uses_cuda():
        raise ConfigError("--device cuda: no CUDA device was found; use --device cpu")
    return "cuda" if name != "cpu" and uses_cuda() else "cpu"


def send(values: Iterable[int], device: torch.device) -> torch.Tensor:
    """A few whole numbers of the host on a device, int64; nothing waits for the copy."""
    held = torch.tensor(list(values), dtype=torch.int64)
    return held.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else held.to(device)


@lru_cache(maxsize=256)
def resident(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A constant table where it is computed with, copied there once: each copy would wait for the device."""
    return table.to(device)


def local_rank() -> int:
    """This rank's number among those of its machine, as the launcher says; 0 without a launcher."""
    return read_launch().local_rank


def local_world_size() -> int | None:
    """Ranks of this machine, as the launcher says; None where none does."""
    return read_launch().local_size


def threads_of_rank(jobs: int = 1) -> int:
    """Threads of this rank, or of each of its ``jobs`` side by side, on a CPU: its share of the CPUs it may use.

    srun and mpirun may have bound each rank to CPUs of its own, which are not shared any further.
    """
    launch, allowed = read_launch(), len(os.sched_getaffinity(0))
    here = (launch.local_size or launch.world) * jobs
    if launch.name not in ("srun", "mpirun", "mpiexec"):
        return max(1, allowed // here)
    given = int(os.environ.get("SLURM_CPUS_ON_NODE") or os.cpu_count() or 1)
    return max(1, min(allowed // jobs, given // here))


class CardsError(TopologyError):
    """More ranks than cards on one machine, of which the ranks of other machines know nothing."""


def check_ranks() -> None:
    """Refuse more ranks on this machine than it has cards; raises `CardsError`. On a CPU any number will do."""
    ranks, cards = local_world_size() or local_rank() + 1, count_cards()
    if cards and ranks > cards:
        raise CardsError(
            f"{ranks} ranks were started on a machine with {cards} CUDA device{'s' * (cards > 1)}, and each needs one "
            f"of its own; start {cards} (deepspeed --num_gpus {cards}, torchrun --nproc_per_node {cards}) with a "
            "parallel.ep_size that fits, or set DS_ACCELERATOR=cpu to use the CPU"
        )


def card_environment(slot: int) -> dict[str, str]:
    """Environment of a job that runs beside others, each on one rank: cards in turn, by the number of its place."""
    cards = count_cards()
    if not cards:
        return {}
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    names = visible[:cards] or [str(number) for number in range(cards)]
    return {"CUDA_VISIBLE_DEVICES": names[slot % len(names)]}


def main(arguments: list[str] | None = None) -> int:
    """Print the number of ranks for this machine: a card each, or as many as wanted on a CPU."""
    parser = argparse.ArgumentParser(prog="python -m shodh.core.devices", description=main.__doc__)
    parser.add_argument("--ranks", type=int, required=True, metavar="MOST", help="the most that are of use")
    most = parser.parse_args(arguments).ranks
    sys.stdout.write(f"{min(most, count_cards() or most)}\n")
    return 0


if __name__ == "__main__":
    from shodh.core.cli import run_main

    run_main(main)
