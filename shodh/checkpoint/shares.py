"""Which numbers of the model a rank's optimiser keeps. Contact with the internals of DeepSpeed's ZeRO is in this file.

A parameter of the whole model is a flat tensor, the experts of all ranks stacked by global id. ZeRO 1 and 2 give each
rank a range of a flat float32 tensor a group (``_hp_mapping``), ZeRO 3 a share of each parameter (``grad_position``);
a `Share` says both by the parameter's name and the place in it, so that nothing that is written knows about ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shodh.core.distributed import SharedError
from shodh.core.errors import CheckpointError


@dataclass(frozen=True)
class Place:
    """A parameter of this rank and its place in the whole model.

    Attributes
    ----------
    shape : tuple of int
        Of the whole model's parameter, experts stacked.
    first : int
        Where this rank's parameter begins in the flat one.
    """

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    first: int

    @property
    def sharded(self) -> bool:
        """Whether ZeRO 3 keeps the parameter in shares."""
        return hasattr(self.parameter, "ds_id")


def places(model: nn.Module) -> list[Place]:
    """Every parameter, in the order that all ranks have."""
    return [_place(name, parameter) for name, parameter in model.named_parameters()]


def _place(name: str, parameter: nn.Parameter) -> Place:
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    if getattr(parameter, "allreduce", True):
        return Place(name, parameter, shape, 0)
    from deepspeed.utils import groups

    group = groups._get_expert_parallel_group(parameter.group_name)  # type: ignore[attr-defined]
    first = dist.get_rank(group) * math.prod(shape)
    return Place(name, parameter, (shape[0] * dist.get_world_size(group), *shape[1:]), first)


@dataclass(frozen=True)
class Share:
    """Numbers ``start .. start + numel - 1`` of a flat parameter of the whole model, which this rank writes.

    Attributes
    ----------
    model : Tensor [numel]
        The model's own copy of them.
    flat : Tensor, optional
        What the optimiser steps, float32; the numbers begin at ``offset``. None for a frozen parameter.
    """

    name: str
    start: int
    numel: int
    model: Tensor
    flat: Tensor | None = None
    offset: int = 0

    @property
    def own(self) -> slice:
        return slice(self.offset, self.offset + self.numel)

    @property
    def master(self) -> Tensor:
        """The float32 numbers; of a frozen parameter the model's."""
        return self.model.float() if self.flat is None else self.flat.detach()[self.own].float()


def shares(engine: Any) -> Iterator[Share]:
    """What this rank keeps; the shares of all ranks are every parameter of the whole model, each number once."""
    for number, place in enumerate(places(engine.module)):
        share = _shard(engine.optimizer, place) if place.sharded else _range(engine.optimizer, place, number)
        if share is not None and share.numel:
            yield share


def _shard(zero: Any, place: Place) -> Share:
    """ZeRO 3; the last share is padded, and a small parameter may have none on this rank."""
    p: Any = place.parameter
    flat, offset = None, 0
    if p.requires_grad:
        group, offset, _ = zero.grad_position[zero.get_param_id(p)]
        flat = zero.fp32_partitioned_groups_flat[group]
    start, numel = shard_range(zero, p)
    return Share(place.name, place.first + start, numel, p.ds_tensor.detach()[:numel], flat, offset)


def shard_range(zero: Any, p: Any) -> tuple[int, int]:
    """First number, and count, of a parameter's flat numbers that this rank has under ZeRO 3; the rest is padding."""
    size = p.ds_tensor.numel()
    start = zero._get_param_partition_rank(p) * size
    return start, max(0, min(size, p.ds_numel - start))


def _range(zero: Any, place: Place, number: int) -> Share | None:
    """ZeRO 1 and 2, and their bf16 optimiser; None where other ranks keep all of the parameter."""
    p: Any = place.parameter
    numbers = p.detach().flatten()
    if not p.requires_grad:
        # No optimiser has it: the ranks that hold it take turns.
        rank, size = _place_among_holders(p)
        return Share(place.name, place.first, len(numbers), numbers) if number % size == rank else None
    mapping = p._hp_mapping
    if mapping is None:
        return None
    start, numel = mapping.lp_fragment_address.start, mapping.hp_fragment_address.numel
    flat = zero.param_groups[mapping.param_group_index]["params"][0]
    own = numbers[start : start + numel]
    return Share(place.name, place.first + start, numel, own, flat, mapping.hp_fragment_address.start)


def _place_among_holders(parameter: Any) -> tuple[int, int]:
    """This rank's place among those that hold the same numbers, and their count."""
    if getattr(parameter, "allreduce", True):
        return dist.get_rank(), dist.get_world_size()
    from deepspeed.utils import groups

    group = groups._get_expert_data_parallel_group(parameter.group_name)
    return dist.get_rank(group), dist.get_world_size(group)


def flat_tensors(engine: Any) -> list[Tensor]:
    """What the optimiser steps on this rank, padding and all."""
    zero = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        return list(zero.fp32_partitioned_groups_flat)
    return [group["params"][0] for group in zero.param_groups]


@torch.no_grad()
def write_model(engine: Any, numbers: Callable[[Share], Tensor]) -> None:
    """Give the model of all ranks other numbers, float32 by share, as a step of the optimiser does. Collective."""
    zero, sharded = engine.optimizer, engine.zero_optimization_stage() == 3
    if sharded:
        zero.checkpoint_event_prologue()  # Only shares are kept ...
    for share in shares(engine):
        if share.flat is not None:
            share.model.copy_(numbers(share))
    if sharded:
        zero.checkpoint_event_epilogue()  # ... and small parameters are gathered again.
        return
    from deepspeed.runtime.utils import all_gather_dp_groups

    all_gather_dp_groups(
        groups_flat=zero.bit16_groups_flat,
        partitioned_param_groups=zero.parallel_partitioned_bit16_groups,
        dp_process_group=zero.real_dp_process_group,
        start_alignment_factor=zero.nccl_start_alignment_factor,
        allgather_bucket_size=zero.allgather_bucket_size,
    )


def check_masters(engine: Any) -> None:
    """Compare the optimiser's numbers, rounded to the model's precision, with the model's, bit by bit.

    Raises
    ------
    CheckpointError
        They differ: a setting of DeepSpeed moved them to where this file does not look, or an update was lost.
    """
    wrong = {s.name for s in shares(engine) if not _equal(s.master.to(s.model.dtype), s.model.to(s.master.device))}
    if wrong:
        raise CheckpointError(
            f"the optimiser's float32 weights are not the model's in {', '.join(sorted(wrong)[:3])}; nothing was saved "
            "or loaded; take unusual settings out of the DeepSpeed JSON"
        )


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


def check_cover(engine: Any) -> None:
    """Prove that the shares of all ranks are the whole model. Collective; raises `SharedError`."""
    where = places(engine.module)
    number = {place.name: i for i, place in enumerate(where)}
    counts = torch.zeros(len(where), dtype=torch.int64)
    for share in shares(engine):
        counts[number[share.name]] += share.numel
    counts = counts.to(engine.device)
    dist.all_reduce(counts)
    wrong = [place.name for place, n in zip(where, counts.tolist(), strict=True) if n != math.prod(place.shape)]
    if wrong:
        raise SharedError(f"the ranks do not keep each number of {', '.join(wrong[:3])} once; nothing was saved")
