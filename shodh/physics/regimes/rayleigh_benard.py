"""Regime ``rayleigh_benard``: thermal convection between a hot and a cold plate.

Free-fall units: plate distance, temperature difference and free-fall speed ``sqrt(g alpha dT H)`` are 1. The box is
periodic along x and y; no-slip plates at both ends of z have the temperatures 1 (below) and 0 (above). Equations and
scheme: :mod:`shodh.physics.solvers.convection`.

A trajectory starts from conduction with smooth random disturbances of the temperature, runs ``spin_up`` time units,
and is then stored every ``frame_interval``. The Kolmogorov length is ``(Pr^2 / ((Nu - 1) Ra))^(1/4)``: 0.03 at the
default Ra = 3e5 (Nu about 6), which 32 cells in a box of 2 x 2 x 1 resolve (Groetzbach asks for spacings below pi
times it); 1e6 wants 48, 1e7 wants 96.

Every trajectory of a batch has steps of its own that land on the frame times, so it does not depend on its
neighbours. The temperature may leave [0, 1] by some per cent on coarse grids: the central scheme conserves variance,
it does not limit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from shodh.physics.bounds import Bounds, Energy, Range
from shodh.physics.frames import run_frames
from shodh.physics.regime import FIELDS, Progress, Regime, check_healthy, smooth_noise
from shodh.physics.solvers.convection import Convection
from shodh.physics.solvers.mac import ADVECTION_LIMIT
from shodh.schema.fields import Field, Trajectories

# A Courant number that no plume explains: the flow has blown up.
BLOWN_UP = 3.0
# Standard deviation of the Gaussian that smooths the initial disturbance.
NOISE_SCALE = 0.15
# How far the temperature leaves its physical range where fronts are a cell thick, and standard deviations that the
# initial noise may reach.
OVERSHOOT = 0.25
NOISE_REACH = 5.0


def initial_excess(amplitude: float) -> float:
    """Largest ``a sin(pi z) - z`` between the plates: how far conduction with a disturbance ``a`` leaves [0, 1]."""
    if amplitude * math.pi <= 1.0:
        return 0.0
    place = math.acos(1.0 / (amplitude * math.pi)) / math.pi
    return amplitude * math.sin(math.pi * place) - place


@dataclass(frozen=True)
class RayleighBenard(Regime):
    """Rayleigh-Benard convection; the fields are its parameters.

    Parameters
    ----------
    rayleigh : float
        ``g alpha dT H^3 / (nu kappa)``; convection starts at 1708.
    prandtl : float
        ``nu / kappa``.
    length_x, length_y : float
        Box across, in plate distances.
    disturbance : float
        Amplitude of the initial disturbance of the temperature.
    spin_up : float
        Time before the first frame, in free-fall times.
    frame_interval : float
        Time between frames.
    courant : float
        Upper bound of the advective Courant number ``dt sum_i |u_i| / h_i``; stability bounds the step besides.
    double : bool
        Solve in fp64 (fields are stored in fp32 all the same).
    """

    rayleigh: float = 3e5
    prandtl: float = 1.0
    length_x: float = 2.0
    length_y: float = 2.0
    disturbance: float = 0.1
    spin_up: float = 30.0
    frame_interval: float = 0.5
    courant: float = 1.0
    double: bool = False

    name = "rayleigh_benard"
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"rayleigh": (5e3, 1e6), "prandtl": (0.7, 7.0)}
    check: ClassVar[str] = "critical Rayleigh number 1707.762; exact relations of Nusselt number and dissipation"
    fields = (FIELDS[0], Field("temperature"))
    boundary = ("periodic", "periodic", "wall")

    def __post_init__(self) -> None:
        self.require_positive("rayleigh", "prandtl", "length_x", "length_y", "frame_interval", "courant")
        self.require_not_negative("spin_up", "disturbance")
        self.require("courant", self.courant < ADVECTION_LIMIT, f"be below {ADVECTION_LIMIT}, the limit of stability")

    @property
    def bounds(self) -> Bounds:
        """The temperature stays between those of the plates and of the start; buoyancy is the only source of energy.

        The central scheme is not limited: `OVERSHOOT` is what coarse grids add.
        """
        beyond = initial_excess(NOISE_REACH * self.disturbance) + OVERSHOOT
        buoyancy = Energy("kinetic", ("velocity",), growth=1.0 + beyond)
        return Bounds((Range("temperature", -beyond, 1.0 + beyond),), (buoyancy,))

    @property
    def lengths(self) -> tuple[float, float, float]:
        """Box along x, y, z."""
        return (self.length_x, self.length_y, 1.0)

    def _solve(
        self, seeds: Sequence[int], grid: tuple[int, ...], frames: int, device: str, progress: Progress | None
    ) -> Trajectories:
        run = _Run(self, seeds, grid, frames, device)
        spin_up = math.ceil(self.spin_up / self.frame_interval - 1e-9)

        def put(index: int) -> None:
            if index >= spin_up:
                run.store(index - spin_up)

        run_frames(spin_up + frames, put, run.advance_frame, progress)
        return run.trajectories()


class _Run:
    """One batch under way; internal axes are (z, x, y)."""

    def __init__(
        self, regime: RayleighBenard, seeds: Sequence[int], grid: tuple[int, ...], frames: int, device: str
    ) -> None:
        self.regime, self.seeds, self.frames = regime, seeds, frames
        nx, ny, nz = grid
        self.cells = Convection(
            (nz, nx, ny),
            (1.0, regime.length_x, regime.length_y),
            len(seeds),
            rayleigh=regime.rayleigh,
            prandtl=regime.prandtl,
            dtype=torch.float64 if regime.double else torch.float32,
            device=device,
        )
        height = (torch.arange(nz, dtype=torch.float64, device=device) + 0.5) / nz
        envelope = (regime.disturbance * torch.sin(math.pi * height))[:, None, None]
        lengths = (2.0, regime.length_x, regime.length_y)
        for b, seed in enumerate(seeds):
            noise = smooth_noise(seed, "temperature", (2 * nz, nx, ny), lengths, [NOISE_SCALE] * 3, device)[:nz]
            self.cells.temperature.values[..., b] += (envelope * noise).to(self.cells.temperature.values)
        self.nusselt = np.zeros((3, len(seeds)))
        self.relation = np.zeros((2, len(seeds)))
        self.velocity = np.empty((len(seeds), frames, *grid, 3), dtype=np.float32)
        self.temperature = np.empty((len(seeds), frames, *grid), dtype=np.float32)

    def advance_frame(self) -> None:
        """Advance to the next frame time."""
        regime = self.regime
        healthy = self.cells.run(regime.frame_interval, regime.courant)
        advice = (
            f"lower {regime.name}.courant={regime.courant:g} or {regime.name}.rayleigh={regime.rayleigh:g}, "
            "or take a finer grid"
        )
        check_healthy(regime.name, self.seeds, healthy & (self.cells.clock.courant <= BLOWN_UP), advice)

    def store(self, index: int) -> None:
        """Copy frame ``index`` to ``[B, T, x, y, z(, 3)]`` arrays and take its heat flux and dissipation."""
        # Internal components (w, u, v) on (z, x, y, B) to (u, v, w) on (B, x, y, z).
        ordered = self.cells.get_velocity()[[1, 2, 0]].permute(4, 2, 3, 1, 0)
        self.velocity[:, index] = ordered.float().cpu().numpy()
        self.temperature[:, index] = self.cells.temperature.values.permute(3, 1, 2, 0).float().cpu().numpy()
        self.nusselt += torch.stack(self.cells.heat_flux()).double().cpu().numpy() / self.frames
        self.relation += torch.stack(self.cells.dissipation()).double().cpu().numpy() / self.frames

    def trajectories(self) -> Trajectories:
        """Everything stored, with parameters and diagnostics."""
        regime = self.regime
        diffusion = math.sqrt(regime.rayleigh * regime.prandtl)
        divergence = self.cells.divergence().abs().flatten(0, 2).amax(0)
        return regime.trajectories(
            regime.lengths,
            {"velocity": self.velocity, "temperature": self.temperature},
            regime.values_of("rayleigh", "prandtl"),
            {
                "nusselt_bottom": self.nusselt[0],
                "nusselt_top": self.nusselt[1],
                "nusselt_volume": self.nusselt[2],
                "nusselt_dissipation": self.relation[0] * diffusion + 1.0,
                "nusselt_thermal_dissipation": self.relation[1] * diffusion,
                "divergence_max": divergence.double().cpu().numpy(),
                "courant_max": self.cells.clock.courant.cpu().numpy(),
                **self.cells.clock.diagnostics(),
            },
        )
