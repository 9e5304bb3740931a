"""Static features of the domain: its walls, and masks on a coarser grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d, adaptive_avg_pool2d, adaptive_avg_pool3d

from shodh.fields import Boundary


def wall_indicator(grid: Sequence[int], boundary: Sequence[Boundary]) -> Tensor:
    """1 in cells that touch a wall of the box, else 0; float32 ``[*grid]``."""
    indicator = torch.zeros(tuple(grid))
    for axis, kind in enumerate(boundary):
        if kind == "wall":
            indicator.select(axis, 0).fill_(1.0)
            indicator.select(axis, -1).fill_(1.0)
    return indicator


def pool_static(static: Tensor, boundary: Sequence[Boundary], grid: Sequence[int]) -> Tensor:
    """Static fields and the wall indicator, averaged onto a coarser grid.

    Parameters
    ----------
    static : Tensor
        ``[N, S, *fine grid]``.
    boundary : sequence of {"periodic", "wall"}
    grid : sequence of int
        The coarser (latent) grid.

    Returns
    -------
    Tensor
        ``[N, S + 1, *grid]``: parts of the volume, the wall indicator last.
    """
    walls = wall_indicator(static.shape[2:], boundary).to(static).expand(len(static), 1, *static.shape[2:])
    pools: tuple[Callable[..., Tensor], ...] = (adaptive_avg_pool1d, adaptive_avg_pool2d, adaptive_avg_pool3d)
    return pools[len(boundary) - 1](torch.cat([static, walls], dim=1), tuple(grid))
