"""Regime ``shallow_water_2d``: the radial dam break of PDEBench.

    dh/dt + div(h u) = 0,      d(h u)/dt + div(h u u) + grad(g h^2 / 2) = 0

on a flat bottom in a square of edge ``length``, whose ends let waves out (the last cell is extrapolated). A column of
water of depth ``depth_inside`` and random radius stands in the middle of water of depth ``depth_outside``.
Defaults are PDEBench's: g = 1, 2 over 1, R ~ U(0.3, 0.7), edge 5, and 101 frames in unit time. PDEBench keeps the
height alone; here the discharge ``h u`` is stored with it. Cells that the rim of the column cuts start with their mean
depth. Scheme: :mod:`shodh.physics.solvers.finite_volume`. The height stays positive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from shodh.core.errors import ConfigError
from shodh.core.seeding import generator
from shodh.physics.bounds import Bounds, Limit, Range
from shodh.physics.frames import FrameStore, run_frames
from shodh.physics.regime import Progress, Regime
from shodh.physics.solvers.finite_volume import FiniteVolume
from shodh.schema.fields import Field, Trajectories

# Points along each edge of a cell that give the mean depth of cells on the rim.
SUBCELLS = 8
TINY = 1e-30


@dataclass(frozen=True)
class ShallowFluid:
    """Shallow water as a fluid of density ``h`` and pressure ``g h^2 / 2``."""

    gravity: float
    has_energy = False

    def pressure(self, primitive: Tensor) -> Tensor:
        return 0.5 * self.gravity * primitive[0].square()

    def sound_speed(self, primitive: Tensor) -> Tensor:
        return torch.sqrt(self.gravity * primitive[0])

    def internal_energy(self, pressure: Tensor) -> Tensor:
        raise NotImplementedError("shallow water has no energy equation")

    pressure_of_energy = internal_energy


@dataclass(frozen=True)
class ShallowWater2d(Regime):
    """Radial dam break; the fields are its parameters.

    Parameters
    ----------
    gravity : float
    depth_inside, depth_outside : float
    radius_min, radius_max : float
        Interval of the radius of the column.
    length : float
        Edge of the square.
    frame_interval : float
        Time between frames.
    courant : float
        Target of ``dt max(sum_i (|u_i| + c) / h_i)``, at most 0.5.
    double : bool
        Solve in fp64 (fields are stored in fp32 all the same).
    """

    gravity: float = 1.0
    depth_inside: float = 2.0
    depth_outside: float = 1.0
    radius_min: float = 0.3
    radius_max: float = 0.7
    length: float = 5.0
    frame_interval: float = 0.01
    courant: float = 0.4
    double: bool = False

    name = "shallow_water_2d"
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"depth_inside": (1.1, 10.0), "gravity": (0.5, 10.0)}
    check: ClassVar[str] = "Stoker's dam break; a fine one-dimensional solution in the radius; exact mass"
    fields = (Field("height"), Field("discharge", kind="vector"))
    boundary = ("open", "open")

    def __post_init__(self) -> None:
        self.require_positive("gravity", "depth_inside", "depth_outside", "radius_min", "radius_max")
        self.require_positive("length", "frame_interval", "courant")
        if not self.radius_min <= self.radius_max < 0.5 * self.length:
            raise ConfigError(
                f"{self.name}: need radius_min <= radius_max < length / 2, "
                f"not {self.radius_min}, {self.radius_max}, {self.length}"
            )
        self.require("courant", self.courant <= 0.5, "not exceed 0.5: the height could turn negative")

    @property
    def bounds(self) -> Bounds:
        """The height is positive; energy only leaves, through the ends and in shocks."""
        return Bounds((Range("height", TINY),), limits=(Limit("energy_growth", 1e-3),))

    def radius(self, seed: int) -> float:
        """Radius of the column of water of trajectory ``seed``."""
        draw = float(torch.rand(1, generator=generator(seed, "radius"), dtype=torch.float64))
        return self.radius_min + draw * (self.radius_max - self.radius_min)

    def initial_height(self, radius: float, grid: Sequence[int]) -> Tensor:
        """Mean depth of each cell ``[X, Y]``, fp64."""
        x, y = (
            ((torch.arange(n * SUBCELLS, dtype=torch.float64) + 0.5) / (n * SUBCELLS) - 0.5) * self.length for n in grid
        )
        inside = (x[:, None] ** 2 + y**2 < radius**2).double()
        share = inside.view(grid[0], SUBCELLS, grid[1], SUBCELLS).mean((1, 3))
        return self.depth_outside + (self.depth_inside - self.depth_outside) * share

    def _solve(
        self, seeds: Sequence[int], grid: tuple[int, ...], frames: int, device: str, progress: Progress | None
    ) -> Trajectories:
        radii = [self.radius(seed) for seed in seeds]
        height = torch.stack([self.initial_height(radius, grid) for radius in radii], dim=-1)
        initial = torch.stack((height, torch.zeros_like(height), torch.zeros_like(height)))
        solver = FiniteVolume(
            ShallowFluid(self.gravity),
            self.schema.boundary,
            [self.length / n for n in grid],
            initial.to(device, torch.float64 if self.double else torch.float32),
            courant=self.courant,
        )
        store = FrameStore(self.schema, seeds, grid, frames, f"lower {self.name}.courant (now {self.courant})")

        def advance() -> None:
            store.check(solver.advance(self.frame_interval))

        energy: list[Tensor] = []

        def put(index: int) -> None:
            state = solver.primitive.double()
            kinetic = 0.5 * state[0] * state[1:].square().sum(0)
            energy.append((kinetic + 0.5 * self.gravity * state[0].square()).sum((0, 1)).cpu())
            store.put(index, height=solver.conserved[0], discharge=solver.conserved[1:])

        run_frames(frames, put, advance, progress)
        return self.trajectories(
            (self.length, self.length),
            store.values,
            {**self.values_of("gravity", "depth_inside", "depth_outside"), "radius": np.array(radii)},
            {
                **solver.clock.diagnostics(),
                "energy_growth": (torch.stack(energy) / energy[0] - 1.0).amax(0).numpy(),
            },
        )
