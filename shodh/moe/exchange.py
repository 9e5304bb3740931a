"""Rows to the ranks that hold their experts, and back: an all-to-all of uneven splits.

Each rank of the expert-parallel group holds as many experts, in the order of the ranks; rows are sorted by expert, so
those for one rank are one piece. What comes is by rank and of each rank by expert, and is put in the order of experts.
Rows set out at one call and are waited for at another, so that what does not need them is computed meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from shodh.moe.grouped import ends_of


class Local:
    """The way of rows whose experts are all on this rank: nothing travels."""

    travels = False

    def __init__(self, counts: Tensor) -> None:
        self.ends = ends_of(counts)
        self._sent: Sequence[Tensor] = ()

    def to_owners(self, *rows: Tensor) -> None:
        """Begin ``[N, ...] -> [M, ...]``: rows sorted by expert, to those ranks, sorted by expert there."""
        self._sent = rows

    def back(self, *rows: Tensor) -> None:
        """Begin ``[M, ...] -> [N, ...]``: the inverse of `to_owners`."""
        self._sent = rows

    def arrive(self) -> Sequence[Tensor]:
        """Wait for what set out last."""
        arrived, self._sent = self._sent, ()
        return arrived


class Exchange(Local):
    """The way of rows over a group of ranks. Collective: all ranks of the group make one, and the same calls.

    The device is waited for once, at the first call of `to_owners`, for the number of rows that go and come.

    Parameters
    ----------
    counts : Tensor [E], int32
        This rank's rows of each expert, of all ranks.
    """

    travels = True

    def __init__(self, counts: Tensor, group: dist.ProcessGroup) -> None:
        self._group = group
        sent = counts.view(group.size(), -1).contiguous()
        self._came = torch.empty_like(sent)
        dist.all_to_all_single(self._came, sent, group=group)
        super().__init__(self._came.sum(0))
        self._totals, self._ready = _to_host(torch.stack((sent.sum(1), self._came.sum(1))))
        self._splits: list[list[int]] | None = None
        self._works: Sequence[dist.Work] = ()
        self._outward = False

    def to_owners(self, *rows: Tensor) -> None:
        self._wait()
        self._send(rows, outward=True)

    def back(self, *rows: Tensor) -> None:
        self._send([part.index_select(0, self._place) for part in rows], outward=False)

    def arrive(self) -> Sequence[Tensor]:
        for work in self._works:  # It keeps what it sends and receives until then.
            work.wait()
        self._works, arrived = (), super().arrive()
        return [rows.index_select(0, self._order) for rows in arrived] if self._outward else arrived

    def _send(self, rows: Sequence[Tensor], outward: bool) -> None:
        assert self._splits is not None
        go, come = self._splits if outward else self._splits[::-1]
        self._outward, self._sent = outward, [part.new_empty(sum(come), *part.shape[1:]) for part in rows]
        self._works = [
            dist.all_to_all_single(out, part.contiguous(), come, go, group=self._group, async_op=True)
            for out, part in zip(self._sent, rows, strict=True)
        ]

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
