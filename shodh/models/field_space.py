"""Operators on the fields themselves, without a tokenizer: what is common to all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shodh.config import RunConfig
from shodh.schema.domain import Domain
from shodh.schema.fields import Field

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


def channel_mask(fields: Sequence[Field], domain: Domain, ndim: int) -> Tensor:
    """Which channels of ``fields`` exist in a domain: ``[C]``, bool."""
    exists = [f.name not in domain.absent for f in fields for _ in range(f.num_components(ndim))]
    return torch.tensor(exists, dtype=torch.bool)  # also of no fields at all


def existing_cells(static: Tensor, exists: Tensor, masked: Sequence[tuple[int, int]], channels: int) -> Tensor | None:
    """In which cells each channel exists, ``[B, channels, *grid]``, bool; None where nothing is masked.

    Parameters
    ----------
    static : Tensor [B, S, *grid]
        With the masks as they are stored.
    exists : Tensor [B, S], bool
        Which static channels a sample's regime has: a mask that it lacks masks nothing.
    masked : sequence of (int, int)
        `FieldNormalizer.masked`.
    """
    if not masked:
        return None
    cells = torch.ones(len(static), channels, *static.shape[2:], dtype=torch.bool, device=static.device)
    for channel, mask in masked:
        there = exists[:, mask].view(-1, *(1,) * (static.ndim - 2))
        cells[:, channel] = (static[:, mask] == 0) | ~there
    return cells


def pad_absent(values: Tensor, exists: Tensor) -> Tensor:
    """Channels that a sample's regime lacks become ones, as DPOT and MoE-POT are given them.

    Parameters
    ----------
    values : Tensor [B, C, *grid]
    exists : Tensor [B, C], bool
    """
    mask = exists.view(*exists.shape, *(1,) * (values.ndim - 2))
    return torch.where(mask, values, torch.ones((), dtype=values.dtype, device=values.device))
