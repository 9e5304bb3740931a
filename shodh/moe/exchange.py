"""Rows to the ranks that hold their experts, and back: an all-to-all of uneven splits.

Each rank of the expert-parallel group holds as many experts, in the order of the ranks; rows are sorted by expert, so
those for one rank are one piece. What comes is by rank and of each rank by expert, and is put in the order of experts.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from shodh.moe.grouped import ends_of


class Local:
    """The way of rows whose experts are all on this rank."""

    def __init__(self, counts: Tensor) -> None:
        self.ends = ends_of(counts)

    def to_owners(self, rows: Tensor) -> Tensor:
        """``[N, ...] -> [M, ...]``: rows sorted by expert, to those ranks, sorted by expert there."""
        return rows

    def back(self, rows: Tensor) -> Tensor:
        """``[M, ...] -> [N, ...]``: the inverse of `to_owners`."""
        return rows


class Exchange(Local):
    """The way of rows over a group of ranks. Collective: all ranks of the group make one, and the same calls.

    The device is waited for once, at the first call of `to_owners`, for the number of rows that go and come.

    Parameters
    ----------
    counts : Tensor [E], int32
        This rank's rows of each expert, of all ranks.
    """

    def __init__(self, counts: Tensor, group: dist.ProcessGroup) -> None:
        self._group = group
        sent = counts.view(group.size(), -1).contiguous()
        self._came = torch.empty_like(sent)
        dist.all_to_all_single(self._came, sent, group=group)
        self.ends = ends_of(self._came.sum(0))
        self._totals, self._ready = _to_host(torch.stack((sent.sum(1), self._came.sum(1))))
        self._splits: list[list[int]] | None = None

    def to_owners(self, rows: Tensor) -> Tensor:
        self._wait()
        return self._send(rows, 0).index_select(0, self._order)

    def back(self, rows: Tensor) -> Tensor:
        return self._send(rows.index_select(0, self._place), 1)

    def _send(self, rows: Tensor, way: int) -> Tensor:
        assert self._splits is not None
        go, come = self._splits[way], self._splits[1 - way]
        out = rows.new_empty(sum(come), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), come, go, group=self._group)
        return out

    def _wait(self) -> None:
        if self._splits is not None:
            return
        if self._ready is not None:
            self._ready.synchronize()
        self._splits = self._totals.tolist()
        # Rows of rank r for expert e come as one piece: from where it starts to where it belongs.
        pieces, number = self._came.flatten(), sum(self._splits[1])
        by_expert = self._came.t().flatten()
        belongs = (by_expert.cumsum(0) - by_expert).view(-1, len(self._came)).t().flatten()
        shift = belongs - (pieces.cumsum(0) - pieces)
        come = torch.arange(number, device=pieces.device)
        self._place = come + shift.repeat_interleave(pieces, output_size=number)
        self._order = torch.empty_like(come).scatter_(0, self._place, come)


def _to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy in host memory, and on CUDA what to wait for before it is read."""
    if not values.is_cuda:
        return values, None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return host, ready
