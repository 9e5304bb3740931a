"""U-Net on fields in two or three dimensions, a small convolutional baseline (arXiv 1505.04597)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shodh.config import OperatorConfig
from shodh.models.circular import CIRCULAR
from shodh.models.conditioning import condition, make_conditioning
from shodh.models.field_space import CONVOLUTIONS, TRANSPOSED, FieldSpace
from shodh.models.fno import with_coordinates
from shodh.models.operator import OperatorOutput

GROUPS = 8


class ConvolutionPair(nn.Module):
    """Twice: a convolution of 3 cells an axis, group norm, GELU. It wraps around; coordinates tell where walls are."""

    def __init__(self, inputs: int, outputs: int, ndim: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = CIRCULAR[ndim](inputs, outputs), CIRCULAR[ndim](outputs, outputs)
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, outputs), nn.GroupNorm(GROUPS, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(self.conv1(x)))
        return F.gelu(self.norm2(self.conv2(x)))


class UnetOperator(nn.Module):
    """``depth`` levels, each half as fine and twice as wide as the one before; ``forward`` as `FnoOperator`."""

    def __init__(self, config: OperatorConfig, space: FieldSpace) -> None:
        super().__init__()
        self.config = config
        self.token_grid = space.grid
        ndim, widths = space.ndim, [config.dim * 2**level for level in range(config.depth)]
        inputs = space.history * space.channels + space.static + ndim
        pairs = zip([inputs, *widths], widths, strict=False)
        self.down = nn.ModuleList(ConvolutionPair(a, b, ndim) for a, b in pairs)
        finer = list(zip(widths[1:], widths, strict=False))[::-1]
        self.rise = nn.ModuleList(TRANSPOSED[ndim](a, b, 2, stride=2) for a, b in finer)
        self.up = nn.ModuleList(ConvolutionPair(2 * b, b, ndim) for _, b in finer)
        self.head = CONVOLUTIONS[ndim](widths[0], space.channels, 1)
        self.conditioning = make_conditioning(config)

    def forward(self, history: Tensor, static: Tensor, conditions: Tensor | None = None) -> OperatorOutput:
        x = with_coordinates(history, static).to(self.head.weight.dtype)
        passed: list[Tensor] = []
        for level, pair in enumerate(self.down):
            if level:
                passed.append(x)
                x = F.max_pool2d(x, 2) if x.ndim == 4 else F.max_pool3d(x, 2)
            x = pair(x)
            if level == 0 and self.conditioning is not None:
                x = condition(self.conditioning, x.movedim(1, -1), conditions).movedim(-1, 1)
        for rise, pair in zip(self.rise, self.up, strict=True):
            x = pair(torch.cat((passed.pop(), rise(x)), 1))
        frame = self.head(x).to(history.dtype)
        return OperatorOutput(history[:, -1] + frame if self.config.field.residual else frame, [])
