"""Convolutions on periodic grids: one copy of the field forward, one backward.

torch pads with ``padding_mode="circular"`` too; its derivative copies the whole gradient once for each of the seven
slices that the padding is written with, a sixth of the tokenizer's training step on a CPU.
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


class _Pad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return F.pad(x, (1, 1) * (x.ndim - 2), mode="circular")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _fold(gradient, range(2, gradient.ndim))


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
