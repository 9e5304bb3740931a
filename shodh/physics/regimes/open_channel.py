"""Regime ``open_channel``: turbulent flow over a no-slip bed under a rigid free-slip lid.

Units: depth ``h = 1`` and friction velocity ``u_tau = 1``; so the body force along x is 1, the viscosity ``1 / re_tau``
and a statistically steady flow has a mean bed shear of 1. The box is ``lengths`` (x along, y across, z up), periodic in
x and y. The free surface is a rigid lid without shear, the usual model of an open channel at small Froude number; a
deforming surface is not modelled.

Equations and scheme are those of :mod:`shodh.physics.solvers.mac` (momentum) and :mod:`shodh.physics.solvers.scalar`
(tracer).
A trajectory starts from Reichardt's mean profile with strong smooth noise and streamwise rolls, runs ``spin_up``
time units, and is then stored every ``frame_interval``. The tracer is set to patches of dye at the first frame.

Every trajectory of a batch has steps of its own that land on the frame times, so it does not depend on its neighbours.

At 32^3 the default Re_tau = 180 is resolved like a coarse large-eddy simulation without a model (spacing in wall units
35 x 18 x 5.6); from 128^3 on (9 x 4.4 x 1.4) it is a direct simulation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from shodh.physics.bounds import Bounds, Energy
from shodh.physics.regime import FIELDS, Progress, Regime, check_healthy, smooth_noise, tracer_blobs
from shodh.physics.solvers.mac import ADVECTION_LIMIT, ChannelFlow
from shodh.physics.solvers.scalar import TRACER_RANGE, ScalarTransport
from shodh.schema.fields import Trajectories

# A Courant number that no turbulent fluctuation explains: the flow has blown up.
BLOWN_UP = 3.0
# Standard deviations (z, x, y) of the initial noise: long along the flow, so that it starts with rolls and streaks.
NOISE_SCALES = (0.08, 0.3, 0.1)
# A little less than the mean profile of a resolved flow: the coarse grids of small runs carry less.
INITIAL_BULK = 0.97


def reichardt(height: Tensor, re_tau: float) -> Tensor:
    """Mean velocity in wall units at ``height`` (0..1) above the bed (Reichardt 1951)."""
    plus = height * re_tau
    return torch.log1p(0.41 * plus) / 0.41 + 7.8 * (
        1.0 - torch.exp(-plus / 11.0) - plus / 11.0 * torch.exp(-0.33 * plus)
    )


@dataclass(frozen=True)
class OpenChannel(Regime):
    """Open-channel turbulence; the fields are its parameters.

    Parameters
    ----------
    re_tau : float
        Friction Reynolds number ``u_tau h / nu``. Below about 100 the flow may become laminar.
    length_x, length_y : float
        Box along and across the flow, in depths.
    spin_up : float
        Time before the first frame, in ``h / u_tau``.
    frame_interval : float
        Time between frames; in the default 0.04 the bulk moves 0.6 depths (3 cells of a 32^3 grid).
    schmidt : float
        Viscosity over tracer diffusivity.
    perturbation : float
        Amplitude of the initial noise and rolls, in ``u_tau``.
    tracer_scale : float
        Size of the patches of dye across and upward, in depths; they are twice as long along the flow.
    courant : float
        Upper bound of the advective Courant number ``dt sum_i |u_i| / h_i``; stability bounds the step besides.
    double : bool
        Solve in fp64 (fields are stored in fp32 all the same).
    """

    re_tau: float = 180.0
    length_x: float = 2.0 * math.pi
    length_y: float = math.pi
    spin_up: float = 3.0
    frame_interval: float = 0.04
    schmidt: float = 1.0
    perturbation: float = 1.5
    tracer_scale: float = 0.25
    courant: float = 1.2
    double: bool = False

    name = "open_channel"
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"re_tau": (100.0, 400.0)}
    check: ClassVar[str] = "half-Poiseuille profile at second order; law of the wall of Re_tau = 180"
    fields = FIELDS
    boundary = ("periodic", "periodic", "wall")

    def __post_init__(self) -> None:
        self.require_positive("re_tau", "length_x", "length_y", "frame_interval", "schmidt", "tracer_scale", "courant")
        self.require_not_negative("spin_up")
        self.require("perturbation", 0 <= self.perturbation <= 10, "be between 0 and 10")
        self.require("courant", self.courant < ADVECTION_LIMIT, f"be below {ADVECTION_LIMIT}, the limit of stability")

    @property
    def bounds(self) -> Bounds:
        """The tracer keeps its initial range; the force, 1 everywhere, is the only source of energy."""
        return Bounds((TRACER_RANGE,), (Energy("kinetic", ("velocity",), growth=1.0),))

    @property
    def lengths(self) -> tuple[float, float, float]:
        """Box along x, y, z."""
        return (self.length_x, self.length_y, 1.0)

    @property
    def viscosity(self) -> float:
        return 1.0 / self.re_tau

    def frame_shift(self, cells_x: int) -> int:
        """Cells that the convecting frame moves in one frame interval: about half the speed at the lid."""
        lid = float(reichardt(torch.tensor(1.0), self.re_tau))
        return round(0.5 * lid * self.frame_interval * cells_x / self.length_x)

    def _solve(
        self, seeds: Sequence[int], grid: tuple[int, ...], frames: int, device: str, progress: Progress | None
    ) -> Trajectories:
        run = _Run(self, seeds, grid, device)
        spin_up = math.ceil(self.spin_up / self.frame_interval - 1e-9)
        total = spin_up + frames - 1
        for index in range(spin_up):
            run.advance_frame()
            if progress is not None:
                progress((index + 1) / (total + 1))
        run.start_tracer()
        for index in range(frames):
            if index:
                run.advance_frame()
            run.store(index, frames)
            if progress is not None:
                progress((spin_up + index + 1) / (total + 1))
        return run.trajectories(frames)


class _Run:
    """One batch under way; internal axes are (z, x, y)."""

    def __init__(self, regime: OpenChannel, seeds: Sequence[int], grid: tuple[int, ...], device: str) -> None:
        self.regime, self.seeds, self.grid = regime, seeds, grid
        self.space = (grid[2], grid[0], grid[1])
        self.lengths = (1.0, regime.length_x, regime.length_y)
        self.dtype = torch.float64 if regime.double else torch.float32
        self.device = device
        self.shift = regime.frame_shift(grid[0])
        batch = len(seeds)
        self.flow = ChannelFlow(
            self.space,
            self.lengths,
            batch,
            viscosity=regime.viscosity,
            force=1.0,
            frame_velocity=self.shift * regime.length_x / grid[0] / regime.frame_interval,
            dtype=self.dtype,
            device=device,
        )
        self.flow.set_velocity(self._initial_velocity().to(self.dtype))
        self.tracer: ScalarTransport | None = None
        self.shear = np.zeros(batch)
        self.values: dict[str, np.ndarray] = {}

    def _initial_velocity(self) -> Tensor:
        """Mean profile, streamwise rolls and smooth noise, ``[3, z, x, y, B]``; made solenoidal by the caller."""
        regime, (nz, nx, ny) = self.regime, self.space
        z = (torch.arange(nz, dtype=torch.float64, device=self.device) + 0.5) / nz
        profile = reichardt(z, regime.re_tau)
        # No perturbation at the bed, where the viscous layer would only dissipate it.
        envelope = (torch.tanh(z * regime.re_tau / 15.0) * regime.perturbation)[:, None, None]
        velocity = torch.zeros(3, nz, nx, ny, len(self.seeds), dtype=torch.float64, device=self.device)
        shape, lengths = (2 * nz, nx, ny), (2.0, *self.lengths[1:])
        for b, seed in enumerate(self.seeds):
            for axis, name in enumerate(("w", "u", "v")):
                noise = smooth_noise(seed, f"initial {name}", shape, lengths, NOISE_SCALES, self.device)
                velocity[axis, ..., b] = envelope * noise[:nz]
            velocity[1, ..., b] += INITIAL_BULK * profile[:, None, None]
        return velocity

    def advance_frame(self) -> None:
        """Advance to the next frame time."""
        healthy = self.flow.advance(self.regime.frame_interval, self.regime.courant, self.tracer)
        advice = f"lower open_channel.courant (now {self.regime.courant}) or open_channel.perturbation"
        check_healthy(self.regime.name, self.seeds, healthy & (self.flow.clock.courant <= BLOWN_UP), advice)

    def start_tracer(self) -> None:
        """Put patches of dye into the flow."""
        regime, (nz, nx, ny) = self.regime, self.space
        self.tracer = ScalarTransport(
            self.space,
            self.flow.spacing,
            len(self.seeds),
            regime.viscosity / regime.schmidt,
            periodic=(False, True, True),
            dtype=self.dtype,
            device=self.device,
        )
        scales = tuple(regime.tracer_scale * stretch for stretch in (1.0, 2.0, 1.0))
        lengths = (2.0, regime.length_x, regime.length_y)
        for b, seed in enumerate(self.seeds):
            blobs = tracer_blobs(seed, (2 * nz, nx, ny), lengths, scales, self.device)
            self.tracer.values[..., b] = blobs[:nz].to(self.dtype)

    def store(self, index: int, frames: int) -> None:
        """Copy frame ``index``, moved back to the frame at rest, to ``[B, T, x, y, z(, 3)]`` arrays."""
        batch = len(self.seeds)
        if not self.values:
            self.values = {
                "velocity": np.empty((batch, frames, *self.grid, 3), dtype=np.float32),
                "tracer": np.empty((batch, frames, *self.grid), dtype=np.float32),
                "solid": np.zeros((batch, *self.grid), dtype=np.uint8),
            }
        assert self.tracer is not None
        velocity = torch.roll(self.flow.get_velocity(), self.shift * index, dims=2)
        tracer = torch.roll(self.tracer.values, self.shift * index, dims=1)
        # Internal components (w, u, v) on (z, x, y, B) to (u, v, w) on (B, x, y, z).
        ordered = velocity[[1, 2, 0]].permute(4, 2, 3, 1, 0)
        self.values["velocity"][:, index] = ordered.float().cpu().numpy()
        self.values["tracer"][:, index] = tracer.permute(3, 1, 2, 0).float().cpu().numpy()
        self.shear += self.flow.wall_shear().double().cpu().numpy() / frames

    def trajectories(self, frames: int) -> Trajectories:
        """Everything stored, with parameters and diagnostics."""
        regime = self.regime
        velocity = self.values["velocity"]
        mean = velocity.mean((1, 2, 3), dtype=np.float64, keepdims=True)
        fluctuation = np.sqrt(((velocity - mean) ** 2).mean((1, 2, 3, 4)).sum(-1))
        divergence = self.flow.divergence().abs().flatten(0, 2).amax(0).double().cpu().numpy()
        return regime.trajectories(
            regime.lengths,
            self.values,
            regime.values_of("re_tau", "schmidt", "viscosity"),
            {
                "friction_velocity": np.sqrt(np.maximum(self.shear, 0.0)),
                "bulk_velocity": mean[..., 0].reshape(len(mean), -1).mean(1),
                "fluctuation_rms": fluctuation,
                "divergence_max": divergence,
                "courant_max": self.flow.clock.courant.cpu().numpy(),
                **self.flow.clock.diagnostics(),
            },
        )
