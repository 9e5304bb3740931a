"""Padding of periodic grids: torch's values, and its gradient with fewer copies."""

from __future__ import annotations

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional as F

from shodh.models.circular import CIRCULAR, circular_pad


@pytest.mark.parametrize("grid", [(1, 1), (1, 3), (5, 2), (1, 2, 3), (3, 1, 4), (4, 5, 7)])
@pytest.mark.parametrize("strided", [False, True])
def test_values_and_gradients_are_those_of_torch(grid: tuple[int, ...], strided: bool) -> None:
    x = torch.randn(2, 3, *grid, dtype=torch.float64)
    x = (x.transpose(2, 3) if strided else x).requires_grad_()
    ours, theirs = circular_pad(x), F.pad(x, (1, 1) * len(grid), mode="circular")
    assert torch.equal(ours, theirs)
    weights = torch.randn_like(theirs)
    weights = weights.transpose(0, 1).contiguous().transpose(0, 1) if strided else weights
    gradients = [torch.autograd.grad((padded * weights).sum(), x)[0] for padded in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-13, atol=1e-13)


def test_the_gradient_that_came_in_stays_as_it_was() -> None:
    x = torch.randn(1, 1, 3, 3, 3, requires_grad=True)
    gradient = torch.randn(1, 1, 5, 5, 5)
    before = gradient.clone()
    circular_pad(x).backward(gradient)
    assert torch.equal(gradient, before)


@pytest.mark.parametrize("ndim", [2, 3])
def test_convolution_is_torchs_and_moves_with_the_field(ndim: int) -> None:
    ours = CIRCULAR[ndim](2, 3).double()
    theirs = {2: nn.Conv2d, 3: nn.Conv3d}[ndim](2, 3, 3, padding=1, padding_mode="circular").double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 2, *(4, 6, 5)[:ndim], dtype=torch.float64)
    assert torch.equal(ours(x), theirs(x))
    axes, shifts = tuple(range(2, 2 + ndim)), (1, 2, 3)[:ndim]
    torch.testing.assert_close(ours(x.roll(shifts, axes)), ours(x).roll(shifts, axes))


def written(graph: torch.fx.GraphModule, inputs: object) -> object:
    """A backend that compiles nothing: what the graph writes piece by piece is kept in `PIECES`."""
    PIECES.extend(
        str(node.target) for node in graph.graph.nodes if "scatter" in str(node.target) or "copy" in node.name
    )
    return make_boxed_func(graph.forward)


PIECES: list[str] = []


@pytest.mark.parametrize(
    "grid", [(2, 3, 5), *(pytest.param(grid, marks=pytest.mark.exhaustive) for grid in [(4, 7), (1, 2, 3), (4, 5, 7)])]
)
def test_compiled_it_only_reads_and_has_the_same_bits(grid: tuple[int, ...]) -> None:
    PIECES.clear()
    torch._dynamo.reset()
    compiled = torch.compile(circular_pad, fullgraph=True, dynamic=False, backend=aot_autograd(fw_compiler=written))
    x = torch.randn(2, 3, *grid, requires_grad=True)
    ours, expected = compiled(x), circular_pad(x)
    gradient = torch.randn_like(expected)
    assert torch.equal(ours, expected)
    assert torch.equal(*(torch.autograd.grad(padded, x, gradient)[0] for padded in (ours, expected)))
    # What is written in pieces is no part of the kernel beside it; one cell has two images on an axis.
    assert bool(PIECES) == (1 in grid)
