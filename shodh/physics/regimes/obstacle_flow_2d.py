"""Regime ``obstacle_flow_2d``: flow through a plane channel past random cylinders and rectangles.

Units: the height of the channel and the mean inflow speed are 1. The inflow is the developed (parabolic) profile; the
outflow is open. The Reynolds number is that of the mean speed and the nominal size of an obstacle. In the range given
the flow past one obstacle goes from steady to periodic shedding. Obstacles lie in the first half of the channel, away
from its walls and from each other; a trajectory starts at rest behind them and is stored after ``spin_up``.

Scheme: :mod:`shodh.physics.solvers.through_flow`. The discrete divergence is zero in every cell, but what flows
through the
open ends makes the velocity one that no potential with zero flux at the ends represents; so the field is called
``flow_velocity`` and is not declared solenoidal. Obstacles are staircases of cells: for accurate forces resolve one
with 10 cells or more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from shodh.core.errors import ConfigError
from shodh.core.seeding import generator
from shodh.physics.bounds import Bounds, Limit, Range
from shodh.physics.frames import FrameStore, run_frames
from shodh.physics.regime import Progress, Regime
from shodh.physics.solvers.through_flow import ThroughFlow
from shodh.schema.fields import Field, Trajectories

KINDS = ("cylinder", "rectangle")
ATTEMPTS = 1000
# A Courant number that no flow past obstacles explains: it has blown up.
BLOWN_UP = 3.0
# Speed over the mean inflow that no gap between obstacles and walls explains.
FASTEST = 12.0


@dataclass(frozen=True)
class Obstacle:
    """An obstacle: centre, and half its extent along and across; a cylinder has both equal."""

    kind: str
    x: float
    y: float
    half_x: float
    half_y: float

    def contains(self, x: Tensor, y: Tensor) -> Tensor:
        """Whether points are inside, bool."""
        dx, dy = (x - self.x).abs() / self.half_x, (y - self.y).abs() / self.half_y
        return dx**2 + dy**2 < 1.0 if self.kind == "cylinder" else torch.maximum(dx, dy) < 1.0

    @property
    def radius(self) -> float:
        """Of the circle around it."""
        return self.half_x if self.kind == "cylinder" else math.hypot(self.half_x, self.half_y)


@dataclass(frozen=True)
class ObstacleFlow2d(Regime):
    """Channel flow past obstacles; the fields are its parameters.

    Parameters
    ----------
    reynolds : float
        Mean inflow speed times ``size`` over viscosity.
    obstacles : int
        Number of obstacles.
    kind : {"mixed", "cylinder", "rectangle"}
        ``"mixed"`` draws one for each obstacle.
    size : float
        Nominal extent of an obstacle across the channel; each is drawn between 3/4 and 5/4 of it.
    length : float
        Of the channel.
    spin_up : float
        Time before the first frame.
    frame_interval : float
        Time between frames.
    courant : float
        Upper bound of ``dt max(sum_i |u_i| / h_i)``; stability bounds the step besides.
    double : bool
        Solve in fp64 (fields are stored in fp32 all the same).
    """

    reynolds: float = 100.0
    obstacles: int = 1
    kind: str = "mixed"
    size: float = 0.2
    length: float = 2.0
    spin_up: float = 5.0
    frame_interval: float = 0.1
    courant: float = 0.8
    double: bool = False

    name = "obstacle_flow_2d"
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"reynolds": (20.0, 200.0), "size": (0.1, 0.3)}
    check: ClassVar[str] = "drag and shedding frequency of a cylinder (Schaefer and Turek 1996, cases 2D-1 and 2D-2)"
    fields = (
        Field("flow_velocity", kind="vector", placement="face"),
        Field("pressure"),
        Field("solid", static=True),
    )
    boundary = ("open", "wall")

    def __post_init__(self) -> None:
        self.require_positive("reynolds", "obstacles", "size", "length", "frame_interval", "courant")
        if self.kind not in ("mixed", *KINDS):
            raise ConfigError(f"{self.name}.kind={self.kind!r} is not one of mixed, {', '.join(KINDS)}")
        self.require_not_negative("spin_up")
        self.require("size", self.size <= 0.4, "not exceed 0.4: the channel would be blocked")
        self.require("courant", self.courant <= 1.5, "not exceed 1.5, the limit of stability")

    @property
    def bounds(self) -> Bounds:
        """Mass goes through: the bulk speed is 1, that of a gap a few times more; no cell has a source."""
        return Bounds((Range("flow_velocity", -FASTEST, FASTEST),), limits=(Limit("divergence_max", 1e-2),))

    @property
    def viscosity(self) -> float:
        return self.size / self.reynolds

    def place(self, seed: int) -> list[Obstacle]:
        """Obstacles of trajectory ``seed``, apart from each other and from the walls."""
        draw = generator(seed, "obstacles")
        placed: list[Obstacle] = []
        for _ in range(ATTEMPTS):
            choice, across, along, x, y = torch.rand(5, generator=draw, dtype=torch.float64).tolist()
            kind = KINDS[int(2 * choice)] if self.kind == "mixed" else self.kind
            half = 0.5 * self.size * (0.75 + 0.5 * across)
            half_x = half if kind == "cylinder" else 0.5 * self.size * (0.75 + 0.5 * along)
            new = Obstacle(kind, (0.15 + 0.35 * x) * self.length, 0.25 + 0.5 * y, half_x, half)
            gap = 0.5 * self.size
            apart = all(math.hypot(new.x - o.x, new.y - o.y) > new.radius + o.radius + gap for o in placed)
            if apart and half + 0.25 * gap < min(new.y, 1.0 - new.y) and half_x + gap < new.x:
                placed.append(new)
            if len(placed) == self.obstacles:
                return placed
        raise ConfigError(
            f"{self.name}: {self.obstacles} obstacles of size {self.size} find no room in a channel of length "
            f"{self.length}; lower {self.name}.obstacles or raise {self.name}.length"
        )

    def solid(self, seed: int, grid: Sequence[int]) -> Tensor:
        """Cells ``[X, Y]`` whose centre is inside an obstacle, bool."""
        x = (torch.arange(grid[0], dtype=torch.float64)[:, None] + 0.5) * self.length / grid[0]
        y = (torch.arange(grid[1], dtype=torch.float64) + 0.5) / grid[1]
        mask = torch.zeros(*grid, dtype=torch.bool)
        for obstacle in self.place(seed):
            mask |= obstacle.contains(x, y)
        return mask

    def _solve(
        self, seeds: Sequence[int], grid: tuple[int, ...], frames: int, device: str, progress: Progress | None
    ) -> Trajectories:
        solid = torch.stack([self.solid(seed, grid) for seed in seeds], dim=-1)
        y = (torch.arange(grid[1], dtype=torch.float64) + 0.5) / grid[1]
        inflow = y * (1.0 - y)
        flow = ThroughFlow(
            solid.to(device),
            (self.length, 1.0),
            self.viscosity,
            inflow / inflow.mean(),
            torch.float64 if self.double else torch.float32,
        )
        store = FrameStore(self.schema, seeds, grid, frames, f"lower {self.name}.courant (now {self.courant})")
        store.put(0, solid=solid)
        spin_up = math.ceil(self.spin_up / self.frame_interval - 1e-9)
        forces: list[Tensor] = []
        leak = torch.zeros(len(seeds), dtype=torch.float64)

        def advance() -> None:
            store.check(flow.advance(self.frame_interval, self.courant) & (flow.clock.courant < BLOWN_UP))

        def put(index: int) -> None:
            nonlocal leak
            if index < spin_up:
                return
            forces.append(flow.force.double().cpu())
            leak = torch.maximum(leak, flow.speed_in_solid().double().cpu())
            velocity = torch.stack((flow.along[1:], flow.across[:, 1:]))
            store.put(index - spin_up, flow_velocity=velocity, pressure=flow.pressure)

        run_frames(spin_up + frames, put, advance, progress)
        coefficient = torch.stack(forces) * (2.0 / self.size)
        return self.trajectories(
            (self.length, 1.0),
            store.values,
            self.values_of("reynolds", "viscosity", "size"),
            {
                "drag_coefficient": coefficient[:, 0].mean(0).numpy(),
                "lift_coefficient_rms": coefficient[:, 1].square().mean(0).sqrt().numpy(),
                "divergence_max": flow.divergence().abs().flatten(0, 1).amax(0).double().cpu().numpy(),
                "speed_in_solid": leak.numpy(),
                **flow.clock.diagnostics(),
            },
        )
