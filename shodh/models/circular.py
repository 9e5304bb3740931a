"""Convolutions on periodic grids: one copy of the field forward, one backward.

torch pads with ``padding_mode="circular"`` too; its derivative copies the whole gradient once for each of the seven
slices that the padding is written with, a sixth of the tokenizer's training step on a CPU. A compiler cannot join
slices that are written one after the other with the norm and activation beside them, and copies the field for each
axis. Compiled, every padded cell therefore *reads* its cell, and every cell its images: one kernel, the same sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _fold(padded: Tensor, axes: Sequence[int]) -> Tensor:
    """Add the values of all images of a cell: the transpose of padding by one cell."""
    if not axes:
        return padded.clone(memory_format=torch.contiguous_format)
    axis, *others = axes
    last = padded.shape[axis] - 1
    folded = _fold(padded.narrow(axis, 1, last - 1), others)
    folded.select(axis, 0).add_(_fold(padded.narrow(axis, last, 1), others).select(axis, 0))
    folded.select(axis, last - 2).add_(_fold(padded.narrow(axis, 0, 1), others).select(axis, 0))
    return folded


def _read_cells(x: Tensor) -> Tensor:
    """`F.pad` as one element-wise expression: the cell that each padded cell is an image of."""
    ahead = x.ndim - 3  # axes of the grid after the first
    index: list[Any] = [slice(None), slice(None)]
    index += (
        ((torch.arange(n + 2, device=x.device) - 1) % n).view(-1, *[1] * (ahead - axis))
        for axis, n in enumerate(x.shape[2:])
    )
    return x[tuple(index)]


def _read_images(padded: Tensor, axes: Sequence[int]) -> Tensor:
    """`_fold` as one element-wise expression, of axes of two cells or more: a cell has one image at most on each."""
    if not axes:
        return padded
    axis, *others = axes
    n = padded.shape[axis] - 2
    folded, cell = _read_images(padded, others), torch.arange(n, device=padded.device)
    image = folded.index_select(axis, torch.where(cell == 0, n + 1, 0))
    at_end = ((cell == 0) | (cell == n - 1)).view(-1, *[1] * (padded.ndim - 1 - axis))
    return folded.narrow(axis, 1, n) + torch.where(at_end, image, 0.0)


class _Pad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _read_cells(x) if torch.compiler.is_compiling() else F.pad(x, (1, 1) * (x.ndim - 2), mode="circular")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        compiled = torch.compiler.is_compiling() and min(gradient.shape[2:]) > 3
        return (_read_images if compiled else _fold)(gradient, range(2, gradient.ndim))


def circular_pad(x: Tensor) -> Tensor:
    """Repeat a periodic field by one cell beyond every side: ``[B, C, X, ...] -> [B, C, X + 2, ...]``."""
    padded: Tensor = _Pad.apply(x)
    return padded


class CircularConv2d(nn.Conv2d):
    """3x3 convolution that wraps around: ``[B, I, X, Y] -> [B, O, X, Y]``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(circular_pad(input))


class CircularConv3d(nn.Conv3d):
    """3x3x3 convolution that wraps around: ``[B, I, X, Y, Z] -> [B, O, X, Y, Z]``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(circular_pad(input))


CIRCULAR: dict[int, type[CircularConv2d | CircularConv3d]] = {2: CircularConv2d, 3: CircularConv3d}
