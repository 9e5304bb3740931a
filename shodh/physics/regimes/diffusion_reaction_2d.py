"""Regime ``diffusion_reaction_2d``: FitzHugh-Nagumo patterns from noise, as in PDEBench.

    du/dt = D_u lap u + u - u^3 - k - v   (activator),      dv/dt = D_v lap v + u - v   (inhibitor)

on the square [-1, 1]^2 without flux through its ends. Defaults are PDEBench's: D_u = 1e-3, D_v = 5e-3, k = 5e-3, both
fields start from independent N(0, 1) in every cell (so the initial state belongs to a grid), 101 frames in 5 units of
time. The uniform state u = v = -k^(1/3) is unstable for wavenumbers between 5.1 and 26.2, most at 13.9. Both fields
take both signs. Scheme: :mod:`shodh.physics.solvers.reaction_diffusion`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from shodh.core.seeding import generator
from shodh.physics.bounds import Bounds, Range
from shodh.physics.frames import FrameStore, run_frames
from shodh.physics.regime import Progress, Regime
from shodh.physics.solvers.reaction_diffusion import Reaction, ReactionDiffusion
from shodh.physics.solvers.stability import Clock
from shodh.schema.fields import Field, Trajectories

EDGE = 2.0
# Standard deviations that the initial noise may reach in a cell: one in 5e6 cells goes beyond.
NOISE_REACH = 5.1


def fitzhugh_nagumo(k: float) -> Reaction:
    """Rates ``(u - u^3 - k - v, u - v)`` of a state ``[2, B, *space]``."""

    def rates(values: Tensor) -> Tensor:
        activator, inhibitor = values
        difference = activator - inhibitor
        return torch.stack((difference - activator**3 - k, difference))

    return rates


@dataclass(frozen=True)
class DiffusionReaction2d(Regime):
    """FitzHugh-Nagumo reaction and diffusion; the fields are its parameters.

    Parameters
    ----------
    diffusivity_u, diffusivity_v : float
        Of the activator and of the inhibitor.
    k : float
        Threshold of the reaction.
    noise : float
        Standard deviation of the initial fields.
    frame_interval : float
        Time between frames.
    time_step : float
        Largest step.
    double : bool
        Solve in fp64 (fields are stored in fp32 all the same).
    """

    diffusivity_u: float = 1e-3
    diffusivity_v: float = 5e-3
    k: float = 5e-3
    noise: float = 1.0
    frame_interval: float = 0.05
    time_step: float = 0.0125
    double: bool = False

    name = "diffusion_reaction_2d"
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        "diffusivity_u": (5e-4, 2e-3),
        "diffusivity_v": (2e-3, 1e-2),
        "k": (1e-3, 1e-2),
    }
    check: ClassVar[str] = "growth rate of perturbations of the uniform state (largest .27231 at k = 13.9)"
    fields = (Field("activator"), Field("inhibitor"))
    boundary = ("wall", "wall")

    def __post_init__(self) -> None:
        self.require_positive("diffusivity_u", "diffusivity_v", "frame_interval", "time_step")
        self.require("k", math.isfinite(self.k), "be a number")
        self.require("noise", 0 <= self.noise <= 1, "be between 0 and 1")

    @property
    def bounds(self) -> Bounds:
        """An invariant square of the reaction; a tail of the initial noise may lie beyond `largest`."""
        most = 1.3 * self.largest
        return Bounds((Range("activator", -most, most), Range("inhibitor", -most, most)))

    @property
    def largest(self) -> float:
        """A bound of both fields: what the noise reaches, or an invariant square of the reaction.

        On the edge ``|u| = M`` the reaction points inwards where ``M^3 >= 2 M + |k|``, which ``2 + |k|^(1/3)`` obeys.
        """
        return max(NOISE_REACH * self.noise, 2.0 + abs(self.k) ** (1.0 / 3.0))

    def system(self, grid: Sequence[int]) -> ReactionDiffusion:
        """Right-hand side and time steps on ``grid``."""
        return ReactionDiffusion(
            fitzhugh_nagumo(self.k),
            (self.diffusivity_u, self.diffusivity_v),
            [EDGE / n for n in grid],
            periodic=(False, False),
            # The largest entry of the Jacobian is 1 - 3 u^2, and the other entries are 1.
            reaction_radius=2.0 + 3.0 * self.largest**2,
        )

    def _solve(
        self, seeds: Sequence[int], grid: tuple[int, ...], frames: int, device: str, progress: Progress | None
    ) -> Trajectories:
        system = self.system(grid)
        draws = [torch.randn(2, *grid, generator=generator(seed, "noise"), dtype=torch.float64) for seed in seeds]
        dtype = torch.float64 if self.double else torch.float32
        state = (self.noise * torch.stack(draws, dim=1)).to(device, dtype)
        store = FrameStore(self.schema, seeds, grid, frames, f"lower {self.name}.time_step (now {self.time_step})")

        clock = Clock(len(seeds))

        def advance() -> None:
            nonlocal state
            state = system.advance(state, self.frame_interval, self.time_step, clock)

        def put(index: int) -> None:
            activator, inhibitor = torch.movedim(state, 1, -1)
            store.put(index, activator=activator, inhibitor=inhibitor)

        run_frames(frames, put, advance, progress)
        return self.trajectories(
            (EDGE, EDGE),
            store.values,
            self.values_of("diffusivity_u", "diffusivity_v", "k"),
            {
                "activator_std": store.values["activator"][:, -1].std((1, 2), dtype=np.float64),
                **clock.diagnostics(),
            },
        )
