"""Boxes and what the models see of them: boundary, spacing, solids, walls and absent fields as input channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shodh.schema.fields import Boundary, Field, field_slices

NUM_WALL_CHANNELS = 3


@dataclass(frozen=True)
class Domain:
    """A box and what exists in it: given with a sample, never its regime's name.

    Parameters
    ----------
    boundary, lengths
        Of each axis; lengths in the units of the file.
    presence : tuple of (str, bool)
        Whether each of the fields that some regime of the run lacks exists here, in the order of the vocabulary.
    floors : tuple of (str, float)
        Normalised value that stands for zero, of each positive field.
    flat : bool
        Fields of two dimensions, as equal layers along z; vectors have no third component.
    time_step : float, optional
        From frame to frame of the files, in their units; None where it varies.
    units : tuple of (str, tuple of float)
        Of each field that changes, the standard deviation of its components in model units over the training data: what
        an error of a component is relative to, and what a tokenizer sees it in. One where nothing is said.
    """

    boundary: tuple[Boundary, Boundary, Boundary]
    lengths: tuple[float, float, float]
    presence: tuple[tuple[str, bool], ...] = ()
    floors: tuple[tuple[str, float], ...] = ()
    flat: bool = False
    time_step: float | None = None
    units: tuple[tuple[str, tuple[float, ...]], ...] = ()

    @property
    def absent(self) -> tuple[str, ...]:
        """Names of the fields that do not exist here."""
        return tuple(name for name, there in self.presence if not there)

    def spacing(self, grid: Sequence[int]) -> tuple[float, float, float]:
        """Cell sizes on a grid, in the units of the file."""
        x, y, z = (length / cells for length, cells in zip(self.lengths, grid, strict=True))
        return x, y, z

    def to_dict(self) -> dict[str, Any]:
        units = {"units": {name: list(values) for name, values in self.units}} if self.units else {}
        return {
            "boundary": list(self.boundary),
            "lengths": list(self.lengths),
            "presence": dict(self.presence),
            "floors": dict(self.floors),
            "flat": self.flat,
            "time_step": self.time_step,
            **units,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Domain:
        presence, floors = (tuple(values.get(key, {}).items()) for key in ("presence", "floors"))
        flat, time_step = bool(values.get("flat", False)), values.get("time_step")
        units = tuple((name, tuple(map(float, given))) for name, given in values.get("units", {}).items())
        return cls(tuple(values["boundary"]), tuple(values["lengths"]), presence, floors, flat, time_step, units)


def existing_channels(fields: Sequence[Field], domain: Domain, ndim: int = 3) -> dict[str, slice]:
    """`field_slices` of the fields that exist in a domain; without the third component of vectors in a flat one."""
    slices = {
        f.name: s
        for f, s in zip(fields, field_slices(fields, ndim).values(), strict=True)
        if f.name not in domain.absent
    }
    kinds = {f.name: f.kind for f in fields}
    if domain.flat and ndim == 3:
        slices = {n: slice(s.start, s.stop - (kinds[n] == "vector")) for n, s in slices.items()}
    return slices


def channel_units(fields: Sequence[Field], domains: Sequence[Domain]) -> Tensor:
    """`Domain.units` of the channels of three-dimensional fields in each domain, ``[R, C]``."""
    slices = field_slices(fields)
    units = torch.ones(len(domains), sum(f.num_components(3) for f in fields))
    for row, domain in zip(units, domains, strict=True):
        for name, values in domain.units:
            if name in slices:
                row[slices[name]] = torch.tensor(values)
    return units


def add_walls(static: Tensor, domain: Domain) -> Tensor:
    """Static fields with what a domain says: ``[B, S, X, Y, Z] -> [B, S + 3 + P, X, Y, Z]``.

    One channel an axis is 1 in the cells next to a wall and -1 in those next to an open end: convolutions wrap around
    on every axis, and learn through these where nothing wraps. One constant channel a field of `Domain.presence` is 1
    where the field exists: absent is not zero.
    """
    described = describe_domain(static, domain)
    return torch.cat((static, described.expand(len(static), *described.shape)), 1)


def describe_domain(static: Tensor, domain: Domain) -> Tensor:
    """The channels that `add_walls` adds for a sample, ``[3 + P, X, Y, Z]``, of the grid and type of ``static``."""
    grid = static.shape[2:]
    walls = static.new_zeros(NUM_WALL_CHANNELS, *grid)
    for axis, boundary in enumerate(domain.boundary):
        if boundary != "periodic":
            for end in (0, grid[axis] - 1):
                walls[axis].narrow(axis, end, 1).fill_(1.0 if boundary == "wall" else -1.0)
    flags = [static.new_full((1, *grid), float(there)) for _, there in domain.presence]
    return torch.cat((walls, *flags))


def static_features(geometry: Tensor) -> Tensor:
    """Geometry on the latent grid, eight means over 4^3 cells each: ``[B, G, X, Y, Z] -> [B, 8 G, x, y, z]``."""
    pooled = F.avg_pool3d(geometry, 4)
    cells = pooled.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return cells.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def num_static_features(num_static_fields: int, num_optional: int = 0) -> int:
    """Channels of `static_features` for this many static fields, and fields that may be absent."""
    return 8 * (num_static_fields + NUM_WALL_CHANNELS + num_optional)


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
