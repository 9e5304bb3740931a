"""Fourier neural operator on fields in two or three dimensions (arXiv 2010.08895).

Own code: neuraloperator 2.0.0 keeps complex parameters, which ZeRO cannot flatten, and needs wandb and telemetry to be
installed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shodh.config import OperatorConfig
from shodh.models.conditioning import condition, make_conditioning
from shodh.models.field_space import FieldSpace, coordinates
from shodh.models.fourier import SpectralConvolution
from shodh.models.operator import OperatorOutput

PROJECTION = 4  # width of the last hidden layer over that of the blocks


class FnoBlock(nn.Module):
    """Spectral convolution plus a linear map of the channels: ``[B, *grid, D] -> [B, *grid, D]``."""

    def __init__(self, dim: int, grid: tuple[int, ...], modes: int) -> None:
        super().__init__()
        self.spectral = SpectralConvolution(dim, grid, modes)
        self.local = nn.Linear(dim, dim)
        # Two branches of equal size together have that of one.
        self.initial_gain = {"spectral.weight": 0.5**0.5, "local.weight": 0.5**0.5}

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.spectral(x) + self.local(x)
        return out


class FnoOperator(nn.Module):
    """History, static fields and coordinates -> next frame; ``forward`` as `PotOperator`, without routing."""

    def __init__(self, config: OperatorConfig, space: FieldSpace) -> None:
        super().__init__()
        assert config.modes is not None
        dim = config.dim
        self.config = config
        self.token_grid = space.grid
        self.lift = nn.Linear(space.history * space.channels + space.static + space.ndim, dim)
        self.blocks = nn.ModuleList(FnoBlock(dim, space.grid, config.modes) for _ in range(config.depth))
        self.hidden = nn.Linear(dim, PROJECTION * dim)
        self.head = nn.Linear(PROJECTION * dim, space.channels)
        self.conditioning = make_conditioning(config)

    def forward(self, history: Tensor, static: Tensor, conditions: Tensor | None = None) -> OperatorOutput:
        x = self.lift(with_coordinates(history, static).movedim(1, -1).to(self.lift.weight.dtype))
        x = condition(self.conditioning, x, conditions)
        for number, block in enumerate(self.blocks, 1):
            x = block(x)
            if number < len(self.blocks):
                x = F.gelu(x)
        frame = self.head(F.gelu(self.hidden(x))).movedim(-1, 1).to(history.dtype)
        return OperatorOutput(history[:, -1] + frame if self.config.field.residual else frame, [])


def with_coordinates(history: Tensor, static: Tensor) -> Tensor:
    """Frames as channels, static fields and coordinates: ``[B, T * C + S + axes, *grid]``."""
    grid = history.shape[3:]
    where = coordinates(grid, history).expand(len(history), -1, *grid)
    return torch.cat((history.flatten(1, 2), static, where), 1)
