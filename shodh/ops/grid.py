"""The box a decode runs on, and the checks that every back end shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DEFAULT_SPACING = (1.0, 1.0, 1.0)
DEFAULT_BOUNDARY = ("periodic", "periodic", "periodic")


class Grid(NamedTuple):
    """Spacing, boundary and stencil of a 2-D or 3-D box, already checked.

    Attributes
    ----------
    spacing : tuple of float
        Cell size along each axis.
    walls : tuple of bool
        Whether an axis ends at walls instead of wrapping.
    central : bool
        Collocated central differences instead of staggered one-sided ones.
    """

    spacing: tuple[float, ...]
    walls: tuple[bool, ...]
    central: bool

    @property
    def ndim(self) -> int:
        return len(self.spacing)

    @property
    def reference_spacing(self) -> float:
        """The largest spacing: the length that makes face areas dimensionless."""
        return max(self.spacing)

    @property
    def areas(self) -> tuple[float, ...]:
        """Face area across each axis over the smallest one; 1 for cubic cells, never below 1."""
        return tuple(self.reference_spacing / h for h in self.spacing)

    @property
    def periodic_axes(self) -> tuple[int, ...]:
        """Axes that wrap, in order: one harmonic constant each."""
        return tuple(axis for axis, wall in enumerate(self.walls) if not wall)


def make_grid(ndim: int, spacing: Sequence[float], boundary: Sequence[str], stencil: str) -> Grid:
    """Check spacing, boundary and stencil against the number of space dimensions.

    In two dimensions the three-entry defaults stand for two-entry ones.

    Raises
    ------
    ValueError
        Wrong length, a spacing that is not positive and finite, an unknown boundary or stencil, or the central
        stencil with a wall.
    """
    spacing, boundary = tuple(spacing), tuple(boundary)
    if ndim == 2 and spacing == DEFAULT_SPACING:
        spacing = spacing[:2]
    if ndim == 2 and boundary == DEFAULT_BOUNDARY:
        boundary = boundary[:2]
    if len(spacing) != ndim or not all(0.0 < h < math.inf for h in spacing):
        raise ValueError(f"expected spacing to be {ndim} positive finite numbers, given {spacing}")
    if len(boundary) != ndim or any(b != "periodic" and b != "wall" for b in boundary):
        raise ValueError(f'expected boundary to be {ndim} of "periodic" or "wall", given {boundary}')
    if stencil != "staggered" and stencil != "central":
        raise ValueError(f'expected stencil "staggered" or "central", given {stencil!r}')
    if stencil == "central" and "wall" in boundary:
        raise ValueError(
            f'stencil "central" needs periodic axes, given {boundary}; use stencil "staggered" with a wall'
        )
    return Grid(tuple(float(h) for h in spacing), tuple(b == "wall" for b in boundary), stencil == "central")


def check_field(name: str, field: Tensor, channels: dict[int, int]) -> int:
    """Check a field ``[B, C, *grid]`` and return its number of space dimensions.

    Parameters
    ----------
    name : str
        What to call it in messages.
    channels : dict
        Channels expected for each number of space dimensions.

    Raises
    ------
    TypeError
        Not a tensor, or not of a real floating-point dtype.
    ValueError
        Wrong rank, wrong number of channels, or an empty axis.
    """
    if not isinstance(field, Tensor):
        raise TypeError(f"expected {name} to be a tensor, given {type(field).__name__}")
    if not field.is_floating_point():
        raise TypeError(f"expected {name} of a floating-point dtype, given {field.dtype}")
    ndim = field.dim() - 2
    if ndim not in channels or field.shape[1] != channels[ndim]:
        shapes = " or ".join(f"[B, {channels[n]}, {', '.join('XYZ'[:n])}]" for n in sorted(channels, reverse=True))
        raise ValueError(f"expected {name} {shapes}, given {list(field.shape)}")
    if any(size == 0 for size in field.shape[2:]):
        raise ValueError(f"expected {name} with at least one cell along every axis, given {list(field.shape)}")
    return ndim


def check_harmonic(harmonic: Tensor | None, potential: Tensor, grid: Grid) -> None:
    """Check the harmonic part ``[B, P]`` against the potential it joins.

    Raises
    ------
    TypeError
        Not a tensor, or of another dtype than the potential.
    ValueError
        Another shape than ``[B, number of periodic axes]``, or another device.
    """
    if harmonic is None:
        return
    if not isinstance(harmonic, Tensor):
        raise TypeError(f"expected harmonic to be a tensor or None, given {type(harmonic).__name__}")
    if harmonic.dtype != potential.dtype:
        raise TypeError(f"expected harmonic of the potential's dtype {potential.dtype}, given {harmonic.dtype}")
    if harmonic.device != potential.device:
        raise ValueError(f"expected harmonic on the potential's device {potential.device}, given {harmonic.device}")
    expected = (potential.shape[0], len(grid.periodic_axes))
    if tuple(harmonic.shape) != expected:
        axes = ", ".join("xyz"[axis] for axis in grid.periodic_axes) or "none"
        raise ValueError(
            f"expected harmonic {list(expected)}, one constant per periodic axis ({axes}) and none for a walled one, "
            f"given {list(harmonic.shape)}"
        )


def check_exact_dtype(dtype: torch.dtype) -> None:
    """Refuse exact mode in a storage dtype too coarse to be of use."""
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"exact=True stores float32 or float64, given {dtype}; cast the potential and harmonic first")
