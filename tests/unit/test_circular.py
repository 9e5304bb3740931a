"""Padding of periodic grids: torch's values, and its gradient with fewer copies."""

from __future__ import annotations

import pytest
import torch
from torch import nn
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


@pytest.mark.exhaustive
def test_it_is_compiled_without_a_break() -> None:
    compiled = torch.compile(circular_pad, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 2, 3, 4, 5, requires_grad=True)
    compiled(x).square().sum().backward()
    (expected,) = torch.autograd.grad(circular_pad(x).square().sum(), x)
    torch.testing.assert_close(x.grad, expected)
