"""Rows sorted by expert: to and from that order, and products of each segment with the matrix of its expert.

The only arithmetic of routed experts: the expert-parallel layer of a training run and its plain-torch twin, in training
and in evaluation, at every expert-parallel degree and on every device, call `mix_experts` and `grouped_linear`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shodh.moe.routing import Routing

ALIGNMENT = 16  # bytes: the grouped GEMM wants rows of whole multiples

Experts = Callable[[Tensor, Tensor], Tensor]


def _fits_grouped_gemm(rows: Tensor, weight: Tensor) -> bool:
    """Whether ``torch._grouped_mm`` takes these: it has no float64, and no rows of odd sizes."""
    widths = (size * rows.element_size() for size in weight.shape[1:])
    known = rows.dtype in (torch.float32, torch.bfloat16, torch.float16) and hasattr(torch, "_grouped_mm")
    return known and len(rows) > 0 and not any(width % ALIGNMENT for width in widths)


class _GroupedProduct(torch.autograd.Function):
    """Grouped GEMM forward and backward; torch's own derivative refuses a gradient that is an expanded number."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, ends)
        out: Tensor = torch._grouped_mm(rows, weight.transpose(-2, -1), offs=ends)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weight, ends = ctx.saved_tensors
        gradient = gradient.contiguous()
        of_rows, of_weight = ctx.needs_input_grad[:2]
        return (
            torch._grouped_mm(gradient, weight, offs=ends) if of_rows else None,
            torch._grouped_mm(gradient.t(), rows, offs=ends) if of_weight else None,
            None,
        )


def grouped_linear(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Multiply each row with the matrix of its expert: a grouped GEMM, or a loop over segments where it has no kernel.

    Parameters
    ----------
    rows : Tensor [N, D]
        Sorted by expert.
    weight : Tensor [E, O, D]
        Cast to the dtype of the rows.
    counts : Tensor [E], int
        Rows of each expert; they sum to ``N``.

    Returns
    -------
    Tensor [N, O]
    """
    weight = weight.to(rows.dtype)
    if not _fits_grouped_gemm(rows, weight):
        return grouped_linear_reference(rows, weight, counts)
    ends = torch.cumsum(counts, 0, dtype=torch.int32)
    out: Tensor = _GroupedProduct.apply(rows.contiguous(), weight.contiguous(), ends)
    return out


def grouped_linear_reference(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """`grouped_linear` expert by expert: any floating-point dtype and any sizes."""
    segments = rows.split(counts.tolist())
    return torch.cat([F.linear(segment, matrix) for segment, matrix in zip(segments, weight.unbind(0), strict=True)])


class _Reorder(torch.autograd.Function):
    """Gather rows in both directions: deterministic and without the atomics of a scattered gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, take: Tensor, give: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(give)
        ctx.copies = copies
        return rows.index_select(0, take)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (give,) = ctx.saved_tensors
        rows = gradient.index_select(0, give)
        return rows if ctx.copies == 1 else rows.unflatten(0, (-1, ctx.copies)).sum(1), None, None, None


class Order:
    """A stable order of slots by key, and its inverse; ``copies`` slots belong to each row.

    Parameters
    ----------
    keys : Tensor [N], int
        Key of each slot: the expert that serves it.
    """

    def __init__(self, keys: Tensor, copies: int = 1) -> None:
        self.copies = copies
        self._order = keys.argsort(stable=True)
        self._inverse = torch.empty_like(self._order)
        self._inverse[self._order] = torch.arange(len(keys), device=keys.device)

    def sort(self, rows: Tensor) -> Tensor:
        """``[N / copies, D] -> [N, D]``: each row at the places of its slots."""
        take = self._order if self.copies == 1 else self._order // self.copies
        out: Tensor = _Reorder.apply(rows, take, self._inverse, self.copies)
        return out

    def restore(self, rows: Tensor) -> Tensor:
        """``[N, O] -> [N, O]``: sorted rows back in the order of the slots."""
        out: Tensor = _Reorder.apply(rows, self._inverse, self._order, 1)
        return out


def mix_experts(rows: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """Sum of the chosen experts' outputs by their weights, in float32 at least: ``[T, D] -> [T, O]``.

    Parameters
    ----------
    experts : callable
        ``(rows [N, D] sorted by expert, counts [E]) -> [N, O]``.
    """
    top_k = routing.selected.shape[1]
    order = Order(routing.selected.flatten(), top_k)
    slots = order.restore(experts(order.sort(rows), routing.counts)).unflatten(0, (-1, top_k))
    weighted = slots.to(torch.promote_types(slots.dtype, torch.float32)) * routing.weights.unsqueeze(-1)
    return weighted.sum(1).to(rows.dtype)
