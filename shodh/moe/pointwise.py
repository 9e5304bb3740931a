"""What experts do number by number, forward and backward: one function a pass over the rows, in float32 at least.
In place where they can: on a CPU much of the time goes into new memory.

Each is one kernel on CUDA, where it is compiled when it is first called, and plain torch elsewhere.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

log = logging.getLogger("shodh")

P = ParamSpec("P")
R = TypeVar("R")


def fused_on_cuda(function: Callable[P, R]) -> Callable[P, R]:
    """Compile ``function`` when it first meets tensors on CUDA; where that fails, say so once and go on without."""
    compiled: Callable[P, R] | None = None

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal compiled
        on_cuda = isinstance(args[0], Tensor) and args[0].is_cuda
        if not on_cuda or compiled is function or torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if compiled is None:
            compiled = torch.compile(function)
        try:
            return compiled(*args, **kwargs)
        except Exception as error:  # No compiler, no Triton, a release of either that fails: anything at all.
            log.warning("torch.compile of %s failed; it runs unfused: %s", function.__name__, str(error).split("\n")[0])
            compiled = function
            return function(*args, **kwargs)

    return call


def wide(values: Tensor) -> Tensor:
    """In float32, or float64 if they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


class Gradients(NamedTuple):
    """``first``, ``second`` of what went into an activation, ``hidden`` times the scale, and the ``scale``'s own."""

    first: Tensor
    second: Tensor
    hidden: Tensor
    scale: Tensor


def _gradients(first: Tensor, second: Tensor, hidden: Tensor, scale: Tensor, dtype: torch.dtype) -> Gradients:
    return Gradients(first.to(dtype), second.to(dtype), hidden.to(dtype), scale)


@fused_on_cuda
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``"""
    return F.silu(wide(gate)).mul_(up).to(gate.dtype)


@fused_on_cuda
def swiglu_backward(gate: Tensor, up: Tensor, gradient: Tensor, scale: Tensor) -> Gradients:
    """Backward of ``scale [N] * swiglu(gate, up)``, all others ``[N, H]``; in float32 it overwrites ``gradient``."""
    g, u, d = wide(gate), wide(up), wide(gradient)
    silu, by_row = F.silu(g), scale.unsqueeze(-1)
    hidden = silu * u
    of_scale = (d * hidden).sum(-1)
    d.mul_(by_row)
    silu.mul_(d)
    return _gradients(torch.ops.aten.silu_backward(d.mul_(u), g), silu, hidden.mul_(by_row), of_scale, gate.dtype)


@fused_on_cuda
def bilinear(gate: Tensor, up: Tensor) -> Tensor:
    """``gate * up``, without a non-linearity: the expert is a quadratic form, so similarity is exact (2605.15183)."""
    return (wide(gate) * wide(up)).to(gate.dtype)


@fused_on_cuda
def bilinear_backward(gate: Tensor, up: Tensor, gradient: Tensor, scale: Tensor) -> Gradients:
    """As `swiglu_backward`."""
    g, u, d = wide(gate), wide(up), wide(gradient)
    hidden, by_row = g * u, scale.unsqueeze(-1)
    of_scale = (d * hidden).sum(-1)
    of_up = d.mul_(by_row) * g
    return _gradients(d.mul_(u), of_up, hidden.mul_(by_row), of_scale, gate.dtype)


@fused_on_cuda
def gelu(first: Tensor, second: Tensor) -> Tensor:
    """GELU of a hidden layer that comes in two halves ``[N, H / 2]``: ``[N, H]``."""
    return torch.cat((F.gelu(wide(first)), F.gelu(wide(second))), -1).to(first.dtype)


@fused_on_cuda
def gelu_backward(first: Tensor, second: Tensor, gradient: Tensor, scale: Tensor) -> Gradients:
    """As `swiglu_backward`, with a gradient ``[N, H]`` of two halves."""
    a, b, d = wide(first), wide(second), wide(gradient)
    hidden = torch.cat((F.gelu(a), F.gelu(b)), -1)
    of_scale = (d * hidden).sum(-1)
    by_row = scale.unsqueeze(-1)
    of_a, of_b = d.mul_(by_row).chunk(2, -1)
    of_a, of_b = (torch.ops.aten.gelu_backward(part, x) for part, x in ((of_a, a), (of_b, b)))
    return _gradients(of_a, of_b, hidden.mul_(by_row), of_scale, first.dtype)


class Activation(NamedTuple):
    """What stands between two products, and its backward."""

    forward: Callable[[Tensor, Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor], Gradients]


FUSED = {
    "swiglu": Activation(swiglu, swiglu_backward),
    "bilinear": Activation(bilinear, bilinear_backward),
    "gelu": Activation(gelu, gelu_backward),
}


@fused_on_cuda
def combine(outputs: Tensor, place: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of the ``K`` rows of each token: ``[N, O], place [T * K], weights [T, K] -> [T, O]``."""
    picked = wide(outputs.index_select(0, place)).view(*weights.shape, outputs.shape[1])
    return _sum(picked.mul_(weights.unsqueeze(-1))).to(outputs.dtype)


@fused_on_cuda
def collect(place: Tensor, top_k: int, *parts: Tensor) -> Tensor:
    """Sum of what all parts ``[N, D]`` have at the ``K`` places of each token: ``place [T * K] -> [T, D]``."""
    total = sum((wide(part) for part in parts[1:]), wide(parts[0]))
    picked = total.index_select(0, place).view(len(place) // top_k, top_k, total.shape[1])
    return _sum(picked).to(parts[0].dtype)


@fused_on_cuda
def add(first: Tensor, second: Tensor) -> Tensor:
    """Their sum, rounded once."""
    return (wide(first) + wide(second)).to(first.dtype)


def _sum(values: Tensor) -> Tensor:
    """Over the second axis, ``[T, K, D] -> [T, D]``."""
    return values.squeeze(1) if values.shape[1] == 1 else values.sum(1)
