"""Which channels exist in a regime, and in which cells."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shodh.schema.domain import Domain
from shodh.schema.fields import Field


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
