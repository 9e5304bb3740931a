"""Operators on the fields themselves, without a tokenizer: what is common to all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shodh.config import RunConfig

CONVOLUTIONS: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, type[nn.ConvTranspose2d] | type[nn.ConvTranspose3d]] = {
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}


@dataclass(frozen=True)
class FieldSpace:
    """What an operator on fields is given: ``[B, T, channels, *grid]`` and static ``[B, static, *grid]``."""

    channels: int
    static: int
    grid: tuple[int, ...]
    history: int

    @classmethod
    def of(cls, config: RunConfig) -> FieldSpace:
        """The space of a run; vectors have one component an axis of the grid."""
        grid = config.data.grid
        fields = [f.build() for f in config.data.fields]
        dynamic, static = (sum(f.num_components(len(grid)) for f in fields if f.static == s) for s in (False, True))
        return cls(dynamic, static, grid, config.data.history)

    @property
    def ndim(self) -> int:
        return len(self.grid)


def coordinates(grid: Sequence[int], like: Tensor) -> Tensor:
    """Coordinates of the cells between 0 and 1, the first and the last cell: ``[axes, *grid]``."""
    axes = (torch.linspace(0, 1, n, device=like.device, dtype=like.dtype) for n in grid)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))
