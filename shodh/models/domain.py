"""Boxes and what the models see of them: boundary, spacing, solids and walls as input channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shodh.fields import Boundary

NUM_WALL_CHANNELS = 3


@dataclass(frozen=True)
class Domain:
    """A box: boundary and length of each axis. The geometry of a sample, given with it, never its regime's name."""

    boundary: tuple[Boundary, Boundary, Boundary]
    lengths: tuple[float, float, float]

    def spacing(self, grid: Sequence[int]) -> tuple[float, float, float]:
        """Cell sizes on a grid, in the units of the file."""
        x, y, z = (length / cells for length, cells in zip(self.lengths, grid, strict=True))
        return x, y, z

    def to_dict(self) -> dict[str, Any]:
        return {"boundary": list(self.boundary), "lengths": list(self.lengths)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Domain:
        return cls(tuple(values["boundary"]), tuple(values["lengths"]))


def add_walls(static: Tensor, domain: Domain) -> Tensor:
    """Append one channel an axis that is 1 in the cells next to a wall: ``[B, S, X, Y, Z] -> [B, S + 3, X, Y, Z]``.

    Convolutions wrap around on every axis; through these channels they learn where nothing wraps.
    """
    walls = static.new_zeros(static.shape[0], NUM_WALL_CHANNELS, *static.shape[2:])
    for axis, boundary in enumerate(domain.boundary):
        if boundary == "wall":
            channel = walls[:, axis]
            channel.narrow(axis + 1, 0, 1).fill_(1.0)
            channel.narrow(axis + 1, channel.shape[axis + 1] - 1, 1).fill_(1.0)
    return torch.cat((static, walls), 1)


def static_features(geometry: Tensor) -> Tensor:
    """Geometry on the latent grid, eight means over 4^3 cells each: ``[B, G, X, Y, Z] -> [B, 8 G, x, y, z]``."""
    pooled = F.avg_pool3d(geometry, 4)
    cells = pooled.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return cells.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def num_static_features(num_static_fields: int) -> int:
    """Channels of `static_features` for this many static fields."""
    return 8 * (num_static_fields + NUM_WALL_CHANNELS)


def extend_into_solids(scalar: Tensor, solid: Tensor, reach: int = 7) -> Tensor:
    """Replace a scalar where it does not exist by means of its neighbours: smooth fields have compact latents.

    ``scalar`` and ``solid`` are ``[B, 1, X, Y, Z]``; cells without fluid within ``reach`` cells about twice stay zero.
    """
    values, weight = scalar * (1 - solid), 1 - solid
    for _ in range(2):
        near, fluid = values, weight
        for axis in range(3):
            size = min(reach, 2 * ((near.shape[2 + axis] - 1) // 2) + 1)
            kernel = [1, 1, 1]
            kernel[axis] = size
            pad = [0] * 6
            pad[2 * (2 - axis)] = pad[2 * (2 - axis) + 1] = size // 2
            near, fluid = (F.avg_pool3d(F.pad(x, pad, mode="circular"), kernel, stride=1) for x in (near, fluid))
        filled = (fluid > 1e-6).to(values.dtype)
        values = weight * values + (1 - weight) * filled * near / fluid.clamp(min=1e-6)
        weight = torch.maximum(weight, filled)
    return values
