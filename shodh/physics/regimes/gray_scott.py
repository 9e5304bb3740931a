"""Regime ``gray_scott``: the Gray-Scott reaction in a periodic box, self-replicating spots, waves and labyrinths.

``du/dt = D_u lap u - u v^2 + F (1 - u)`` (substrate) and ``dv/dt = D_v lap v + u v^2 - (F + k) v`` (autocatalyst),
Pearson (Science 261, 1993). Scheme: :mod:`shodh.physics.solvers.reaction_diffusion`. Units: lengths and times are
those of
The Well's data set of the same name, so its ``(F, k)`` give its patterns: gliders (.014, .054), bubbles (.098, .057),
maze (.029, .057), worms (.058, .065), spirals (.018, .051), spots (.030, .062). Its box of length 2 has 128 cells
across; the default box of 0.5 resolves the same fronts with 32 cells.

A trajectory starts from random smooth patches of ``v`` in the state ``u = 1, v = 0`` and is stored after ``spin_up``.
Both concentrations stay non-negative.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from shodh.physics.bounds import Bounds, Range
from shodh.physics.frames import FrameStore, run_frames
from shodh.physics.regime import Progress, Regime, smooth_noise
from shodh.physics.solvers.reaction_diffusion import Reaction, ReactionDiffusion
from shodh.physics.solvers.stability import Clock
from shodh.schema.fields import Boundary, Field, Trajectories

# A bound of the modulus of the Jacobian's eigenvalues without feed and kill: its entries v^2 and 2 u v sum to less than
# (u + v)^2, and u + v stays near or below 1.
REACTION_RADIUS = 2.0
# Noise above this many standard deviations is inside a patch; the rest of the box starts in the trivial state.
PATCH_LEVEL = 1.0


def gray_scott_reaction(feed: float | Tensor, kill: float | Tensor) -> Reaction:
    """Rates ``(-u v^2 + F (1 - u), u v^2 - (F + k) v)`` of a state ``[2, B, *space]``.

    ``feed`` and ``kill`` may be tensors that broadcast with ``[B, *space]``, one value a trajectory.
    """

    def rates(values: Tensor) -> Tensor:
        substrate, autocatalyst = values
        made = substrate * autocatalyst * autocatalyst
        return torch.stack((feed * (1.0 - substrate) - made, made - (feed + kill) * autocatalyst))

    return rates


def random_patches(seed: int, grid: Sequence[int], length: float, size: float) -> Tensor:
    """Initial state ``[2, *grid]`` (fp64): ``u = 1, v = 0``, with patches of ``u = 1/2, v = 1/4`` of about ``size``."""
    lengths = [n * length / max(grid) for n in grid]
    noise = smooth_noise(seed, "patches", grid, lengths, [0.5 * size] * len(grid))
    patch = torch.sigmoid(10.0 * (noise - PATCH_LEVEL))
    return torch.stack((1.0 - 0.5 * patch, 0.25 * patch))


@dataclass(frozen=True)
class GrayScott(Regime):
    """Gray-Scott reaction in three dimensions; the fields are its parameters.

    Parameters
    ----------
    feed, kill : float
        ``F`` and ``k``; the default makes waves. Not every pair in the ranges, nor every seed, keeps a pattern alive:
        look at the diagnostic ``autocatalyst_std``.
    diffusivity_u, diffusivity_v : float
        Of the substrate and of the autocatalyst.
    length : float
        Longest edge of the box.
    patch_size : float
        Size of the initial patches.
    spin_up : float
        Time before the first frame.
    frame_interval : float
        Time between frames.
    time_step : float
        Largest step; The Well's generator used 1.
    double : bool
        Solve in fp64 (fields are stored in fp32 all the same).
    """

    feed: float = 0.018
    kill: float = 0.051
    diffusivity_u: float = 2e-5
    diffusivity_v: float = 1e-5
    length: float = 0.5
    patch_size: float = 0.1
    spin_up: float = 100.0
    frame_interval: float = 10.0
    time_step: float = 1.0
    double: bool = False

    name = "gray_scott"
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"feed": (0.014, 0.058), "kill": (0.051, 0.065)}
    check: ClassVar[str] = "growth rate of a perturbation of the uniform state; second order in space and time"
    fields = (Field("substrate"), Field("autocatalyst"))
    boundary: ClassVar[tuple[Boundary, ...]] = ("periodic", "periodic", "periodic")

    def __post_init__(self) -> None:
        self.require_positive("feed", "kill", "diffusivity_u", "diffusivity_v")
        self.require_positive("length", "patch_size", "frame_interval", "time_step")
        self.require_not_negative("spin_up")

    @property
    def bounds(self) -> Bounds:
        """Concentrations are not negative, and the substrate is fed up to 1.

        With equal diffusivities their sum stays below 1; a substrate that spreads faster lets the autocatalyst pile up.
        """
        most = 1.1 * max(1.0, 0.5 * self.diffusivity_u / self.diffusivity_v)
        return Bounds((Range("substrate", -0.01, 1.01), Range("autocatalyst", -0.01, most)))

    def _solve(
        self, seeds: Sequence[int], grid: tuple[int, ...], frames: int, device: str, progress: Progress | None
    ) -> Trajectories:
        ndim = self.schema.ndim
        spacing = (self.length / max(grid),) * ndim
        system = ReactionDiffusion(
            gray_scott_reaction(self.feed, self.kill),
            (self.diffusivity_u, self.diffusivity_v),
            spacing,
            periodic=(True,) * ndim,
            reaction_radius=REACTION_RADIUS + self.feed + self.kill,
        )
        start = [random_patches(seed, grid, self.length, self.patch_size) for seed in seeds]
        state = torch.stack(start, dim=1).to(device, torch.float64 if self.double else torch.float32)
        clock = Clock(len(seeds))
        state = system.advance(state, self.spin_up, self.time_step, clock) if self.spin_up else state
        store = FrameStore(self.schema, seeds, grid, frames, f"lower {self.name}.time_step={self.time_step:g}")

        def advance() -> None:
            nonlocal state
            state = system.advance(state, self.frame_interval, self.time_step, clock)

        def put(index: int) -> None:
            substrate, autocatalyst = state.movedim(1, -1)
            store.put(index, substrate=substrate, autocatalyst=autocatalyst)

        run_frames(frames, put, advance, progress)
        substrate, autocatalyst = store.values["substrate"], store.values["autocatalyst"]
        sampled = tuple(range(1, ndim + 2))
        return self.trajectories(
            tuple(n * spacing[0] for n in grid),
            store.values,
            self.values_of("feed", "kill", "diffusivity_u", "diffusivity_v"),
            {
                "substrate_min": substrate.min(sampled).astype(np.float64),
                "autocatalyst_min": autocatalyst.min(sampled).astype(np.float64),
                "autocatalyst_std": autocatalyst.std(sampled, dtype=np.float64),
                **clock.diagnostics(),
            },
        )
