"""The mixture of routed experts as a differentiable function, and the slow and obvious version of it.

The one arithmetic of routed experts: training and evaluation, every expert-parallel degree and every device call
`mix_experts`. Kept for backward are the rows as they came, what the activation was given, and the weights of experts:
hidden activations are computed again, the score of an expert gets its gradient from them, so that the experts' outputs
need not be kept, and gathers in both directions take the place of scattered sums, so every result is deterministic.

The halves ``w1`` and ``w3`` are multiplied apart: one product would want them in one matrix, and a copy of all weights
a step, which costs the more the more experts there are. Two read the gathered rows twice.

Autograd knows two functions: rows to their experts and through them, and the sum by weights. Where experts are on other
ranks, what stands between the two is computed while rows travel, in both directions: shared experts while outputs come
back, their gradients while those of the outputs go out. The gradients of rows come back behind those of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from shodh.moe.exchange import Exchange, Local
from shodh.moe.grouped import ALIGNMENT, grouped_gradient, grouped_product, slots
from shodh.moe.pointwise import FUSED, Gradients, add, collect, combine, wide

Matrices = tuple[Tensor, Tensor, Tensor]


def mix_experts(
    rows: Tensor,
    selected: Tensor,
    weights: Tensor,
    counts: Tensor,
    matrices: Matrices,
    activation: str,
    group: dist.ProcessGroup | None = None,
    beside: Iterable[Callable[[], Tensor]] = (),
) -> Tensor:
    """Sum of the chosen experts' outputs by their weights, in float32 at least, and others': ``[T, D] -> [T, O]``.

    Parameters
    ----------
    rows : Tensor [T, D]
    selected, weights : Tensor [T, K]
        The experts of each row, int64, and what their outputs are multiplied with.
    counts : Tensor [E], int32
        How often each expert is selected.
    matrices : tuple of Tensor
        ``w1, w2, w3`` of the experts on this rank, as `shodh.moe.experts` has them; cast to the dtype of the rows.
    activation : str
        One of `FUSED`, or "linear".
    group : ProcessGroup, optional
        Ranks that share one set of experts, in equal parts; all call this together.
    beside : iterable of callables
        What else is added, ``T * O`` numbers each: computed while the outputs come back.
    """
    way = Local(counts) if group is None else Exchange(counts, group)
    place, order = slots(selected.flatten(), len(counts))
    top_k = selected.shape[1]
    token = order if top_k == 1 else order.div(top_k, rounding_mode="floor")
    cast = (w.to(rows.dtype).contiguous() for w in matrices)
    sent = _Experts.apply(rows, weights, *cast, place, token, activation, way)
    others: Iterable[Tensor] = (other() for other in beside)
    if way.travels:
        others = list(others)
    out: Tensor = _Combine.apply(sent, weights.detach(), place, order, token, way)
    for other in others:
        out = out + other.reshape(out.shape)
    return out


class _Experts(torch.autograd.Function):
    """Rows to their experts, through them, and on their way to `_Combine`.

    It gets an empty tensor for them: autograd, or what watches it, may read whatever passes between two functions.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weights: Tensor,
        w1: Tensor,
        w2: Tensor,
        w3: Tensor,
        place: Tensor,
        token: Tensor,
        activation: str,
        way: Local,
    ) -> Tensor:
        way.to_owners(rows.index_select(0, token))
        (inner,) = way.arrive()
        first, second = (grouped_product(inner, w.transpose(1, 2), way.ends) for w in (w1, w3))
        if activation == "linear":
            _add_bias(first, second, w2, way.ends)
            outputs = FUSED["gelu"].forward(first, second)
        else:
            hidden = FUSED[activation].forward(first, second)
            outputs = grouped_product(hidden, w2.transpose(1, 2), way.ends)
        way.back(outputs)
        # On one rank rows are gathered again: then nothing but what the activation was given grows with top_k.
        ctx.save_for_backward(inner if way.travels else rows, weights, place, token, first, second, w1, w2, w3)
        ctx.way, ctx.activation = way, activation
        return rows.new_empty(0)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        kept, weights, place, token, first, second, w1, w2, w3 = ctx.saved_tensors
        way, ends, linear = ctx.way, ctx.way.ends, ctx.activation == "linear"
        of_rows, of_weights, of_w1, of_w2, of_w3, *_ = ctx.needs_input_grad
        outer, scale = way.arrive()
        activation = FUSED["gelu" if linear else ctx.activation]
        found = activation.backward(first, second, outer if linear else grouped_product(outer, w2, ends), scale)
        returned: list[Tensor] = []
        if of_rows:
            halves = grouped_product(found.first, w1, ends), grouped_product(found.second, w3, ends)
            returned += [add(*halves)] if way.travels else halves
        if of_weights:
            returned.append(found.scale)
        way.back(*returned)
        d_rows = d_weights = d_w1 = d_w2 = d_w3 = None
        if of_w2:
            d_w2 = _bias_gradient(found, ends) if linear else grouped_gradient(outer, found.hidden, ends)
        if of_w1 or of_w3:
            inner = kept if way.travels else kept.index_select(0, token)
            d_w1 = grouped_gradient(found.first, inner, ends) if of_w1 else None
            d_w3 = grouped_gradient(found.second, inner, ends) if of_w3 else None
        returned = list(way.arrive())
        if of_weights:
            d_weights = returned.pop().index_select(0, place).view_as(weights).to(weights.dtype)
        if of_rows:
            d_rows = collect(place, weights.shape[1], *returned)
        return d_rows, d_weights, d_w1, d_w2, d_w3, None, None, None, None


class _Combine(torch.autograd.Function):
    """What comes back from `_Experts`, summed by the weights, whose gradient is computed there."""

    @staticmethod
    def forward(
        ctx: Any, sent: Tensor, weights: Tensor, place: Tensor, order: Tensor, token: Tensor, way: Local
    ) -> Tensor:
        (outputs,) = way.arrive()
        ctx.save_for_backward(weights, order, token)
        ctx.way = way
        return combine(outputs, place, weights)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weights, order, token = ctx.saved_tensors
        ctx.way.to_owners(gradient.index_select(0, token), weights.flatten().index_select(0, order))
        return gradient.new_empty(0), None, None, None, None, None


def _add_bias(first: Tensor, second: Tensor, bias: Tensor, ends: Tensor) -> None:
    """Add to both halves of each row, in place, those of its expert's bias ``[E, O, 1]``."""
    row = torch.arange(len(first), dtype=ends.dtype, device=ends.device)
    by_row = bias[..., 0].index_select(0, torch.searchsorted(ends, row, right=True))
    for half, part in zip((first, second), by_row.chunk(2, -1), strict=True):
        half += part


def _bias_gradient(found: Gradients, ends: Tensor) -> Tensor:
    """``[E, O, 1]``. A sum by expert as a product with ones: deterministic, unlike a scattered one."""
    ones = found.first.new_ones(len(found.first), ALIGNMENT // found.first.element_size())
    return torch.cat([grouped_gradient(half, ones, ends)[..., :1] for half in (found.first, found.second)], 1)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def bilinear(gate: Tensor, up: Tensor) -> Tensor:
    """Gated without a non-linearity: the expert is a quadratic form, so expert similarity is exact (2605.15183)."""
    return gate * up


def gelu(first: Tensor, second: Tensor) -> Tensor:
    """Without a gate: GELU of a hidden layer that comes in two halves."""
    return F.gelu(torch.cat((first, second), -1))


ACTIVATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"swiglu": swiglu, "bilinear": bilinear, "gelu": gelu}


def expert_reference(rows: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, activation: str) -> Tensor:
    """One expert on rows ``[N, D]``, in plain torch: ``w1, w3 [H, D]``, ``w2 [D, H]`` or ``[O, 1]``."""
    first, second = F.linear(rows, w1), F.linear(rows, w3)
    if activation == "linear":
        return F.gelu(torch.cat((first, second), -1) + w2[:, 0])
    return F.linear(ACTIVATIONS[activation](first, second), w2)


def mix_experts_reference(
    rows: Tensor, selected: Tensor, weights: Tensor, matrices: Matrices, activation: str
) -> Tensor:
    """`mix_experts` row by row and choice by choice."""
    out = []
    for row, experts, scores in zip(rows, selected.tolist(), weights, strict=True):
        every = [expert_reference(row, matrices[0][e], matrices[1][e], matrices[2][e], activation) for e in experts]
        out.append(sum(wide(one) * score for one, score in zip(every, scores, strict=True)))
    return torch.stack(out).to(rows.dtype)
