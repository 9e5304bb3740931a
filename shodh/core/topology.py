"""World size = data-parallel x expert-parallel degrees; checked once, early, with the numbers in the message."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shodh.core.errors import TopologyError


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@dataclass(frozen=True)
class Topology:
    """How ranks, experts and the global batch are laid out.

    Attributes
    ----------
    world_size : int
        All ranks; every rank sees its own samples, so this is also the data-parallel degree.
    ep_size : int
        Ranks that share one set of experts; consecutive ranks form a group.
    micro_batch, accumulation : int
        ``world_size * micro_batch * accumulation`` is the global batch.
    """

    world_size: int
    ep_size: int
    micro_batch: int
    accumulation: int

    @property
    def expert_replicas(self) -> int:
        """Copies of each expert, over which its gradient is averaged."""
        return self.world_size // self.ep_size

    @property
    def global_batch(self) -> int:
        return self.world_size * self.micro_batch * self.accumulation


def fitting_ep_size(world_size: int, wanted: int, num_experts: int) -> int:
    """The largest degree that divides the wanted one, the ranks and the experts; 1 for a dense model."""
    return math.gcd(world_size, wanted, num_experts) if num_experts else 1


def plan_topology(
    world_size: int, ep_size: int, num_experts: int, global_batch: int, micro_batch: int | None = None
) -> Topology:
    """Check that ranks, experts and batch fit together.

    Raises
    ------
    TopologyError
        With the offending numbers and the values that would work.
    """
    if num_experts == 0 and ep_size != 1:
        raise TopologyError(f"parallel.ep_size={ep_size} with a dense feed-forward (num_experts=0); use ep_size=1")
    fitting = [d for d in _divisors(world_size) if num_experts % d == 0]
    if ep_size > world_size:
        raise TopologyError(
            f"parallel.ep_size={ep_size} needs at least {ep_size} ranks, and there are {world_size}; start them with "
            f"'deepspeed --num_gpus {ep_size} ...' (on a CPU too), or use --set parallel.ep_size={fitting[-1]}"
        )
    if world_size % ep_size:
        raise TopologyError(
            f"world size {world_size} is not divisible by ep_size={ep_size}; use parallel.ep_size in {fitting}"
        )
    if num_experts % ep_size:
        raise TopologyError(
            f"num_experts={num_experts} is not divisible by ep_size={ep_size}; use parallel.ep_size in {fitting}"
        )
    _check_batch(world_size, global_batch)
    per_rank = global_batch // world_size
    micro = per_rank if micro_batch is None else micro_batch
    if per_rank % micro:
        raise TopologyError(
            f"global_batch={global_batch} leaves {per_rank} samples a rank, not divisible by micro_batch={micro}; "
            f"use micro_batch in {_divisors(per_rank)}"
        )
    return Topology(world_size, ep_size, micro, per_rank // micro)


def refit_topology(
    world_size: int, ep_size: int, num_experts: int, global_batch: int, micro_batch: int | None, most: int | None = None
) -> Topology:
    """The layout of a run that goes on, at any number of ranks that divides its global batch.

    The expert degree is the nearest one that fits. A micro-batch that does not divide a rank's samples becomes the next
    smaller one that does; without one, it is all samples of a rank, but not more than ``most``.

    Raises
    ------
    TopologyError
        The ranks do not divide the global batch: names the nearest numbers that do.
    """
    _check_batch(world_size, global_batch)
    per_rank = global_batch // world_size
    fitting = [d for d in _divisors(world_size) if num_experts % d == 0] if num_experts else [1]
    near = min(fitting, key=lambda d: (max(d, ep_size) / min(d, ep_size), -d))
    wanted = micro_batch or most or per_rank
    return plan_topology(
        world_size, near, num_experts, global_batch, max(d for d in _divisors(per_rank) if d <= wanted)
    )


def _check_batch(world_size: int, global_batch: int) -> None:
    if global_batch % world_size == 0:
        return
    divisors = _divisors(global_batch)
    near = [*[d for d in divisors if d < world_size][-1:], *[d for d in divisors if d > world_size][:1]]
    raise TopologyError(
        f"global_batch={global_batch} is not divisible by {world_size} ranks; start {' or '.join(map(str, near))} "
        f"ranks, or a new run whose global_batch is a multiple of {world_size}"
    )
