"""Regime ``darcy``: flow through a layered porous reservoir with wells whose rates change.

``div q = s(x, t)``, ``q = -k(x) grad p``: seepage of an incompressible fluid of viscosity 1; storage is neglected, so
pressure and flux follow the wells at once. The box is periodic along x and y and closed above and below (z). Units:
the longest edge is 1, the median permeability is 1.

The permeability is log-normal, correlated over ``correlation`` along x and y and a quarter of it upward, and spans
decades: it is stored as it is, take its logarithm as an input. Each trajectory has ``wells`` at random places, small
Gaussians whose rates wander smoothly about zero and sum to zero at every time. The flux is not solenoidal, ``div q``
is the source; hence its name is ``flux``. The pressure has zero mean.

The potential of each well is solved once (:mod:`shodh.physics.solvers.conduction`); frames combine them, since
Darcy's law is linear.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from shodh.core.errors import NonFiniteError
from shodh.core.seeding import generator
from shodh.physics.bounds import Bounds, Limit, Range
from shodh.physics.regime import Progress, Regime, smooth_noise
from shodh.physics.solvers.conduction import HeterogeneousDiffusion
from shodh.physics.solvers.operators import divergence
from shodh.schema.fields import Field, Trajectories

CLOSED_AXIS = 2
# Harmonics of a well's rate.
HARMONICS = 3


class WellRates:
    """Rates of the wells of each seed: sums of sines with random phases and nearby frequencies, zero over all wells."""

    def __init__(self, seeds: Sequence[int], wells: int, rate: float) -> None:
        draws = [torch.rand(3, wells, HARMONICS, generator=generator(s, "rates"), dtype=torch.float64) for s in seeds]
        amplitude, frequency, self._phase = torch.stack(draws, dim=1)
        self._amplitude = (0.5 + amplitude) / torch.arange(1, HARMONICS + 1)
        self._frequency = rate * (0.5 + frequency) * torch.arange(1, HARMONICS + 1)

    def __call__(self, time: float) -> Tensor:
        """Rates ``[B, wells]`` (fp64) at ``time``."""
        angle = self._frequency * time + 2.0 * math.pi * self._phase
        rates = (self._amplitude * torch.sin(angle)).sum(-1)
        return rates - rates.mean(1, keepdim=True)


@dataclass(frozen=True)
class Darcy(Regime):
    """Darcy flow between wells; the fields are its parameters.

    Parameters
    ----------
    log_std : float
        Standard deviation of the logarithm of the permeability; 1.5 spans four to five decades on a grid.
    correlation : float
        Size of the permeable lenses along x and y, in longest edges.
    wells : int
        At least 2.
    well_radius : float
        Standard deviation of the Gaussian of a well.
    rate : float
        Angular frequency at which rates change.
    frame_interval : float
        Time between frames.
    tolerance : float
        Relative residual of the solver, which works in fp64: contrasts of 1e5 leave fp32 no digit of the balance.
    max_iterations : int
    """

    log_std: float = 1.5
    correlation: float = 0.3
    wells: int = 8
    well_radius: float = 0.05
    rate: float = 1.0
    frame_interval: float = 0.2
    tolerance: float = 1e-6
    max_iterations: int = 2000

    name = "darcy"
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"log_std": (0.1, 1.5), "correlation": (0.15, 1.0)}
    check: ClassVar[str] = "layered media exact; square checkerboard sqrt(k1 k2) (Dykhne 1971); mass balance"
    fields = (Field("pressure"), Field("flux", kind="vector", placement="face"), Field("permeability", static=True))
    boundary = ("periodic", "periodic", "wall")

    def __post_init__(self) -> None:
        self.require_positive("log_std", "correlation", "well_radius", "rate")
        self.require_positive("frame_interval", "tolerance", "max_iterations")
        self.require("wells", self.wells >= 2, "be at least 2: what one injects another takes out")

    @property
    def bounds(self) -> Bounds:
        """What flows out of a cell is what wells inject there; the permeability is positive."""
        return Bounds((Range("permeability", 0.0),), limits=(Limit("mass_imbalance", 100.0 * self.tolerance),))

    def make_permeability(self, seed: int, grid: Sequence[int], lengths: Sequence[float]) -> Tensor:
        """Permeability ``[X, Y, Z]`` (fp64) of median about 1."""
        nx, ny, nz = grid
        scales = [0.35 * self.correlation] * 2 + [0.35 * self.correlation / 4.0]
        noise = smooth_noise(seed, "permeability", (nx, ny, 2 * nz), (*lengths[:2], 2 * lengths[2]), scales)
        return torch.exp(self.log_std * noise[..., :nz])

    def make_wells(self, seed: int, grid: Sequence[int], lengths: Sequence[float]) -> Tensor:
        """Source ``[wells, X, Y, Z]`` (fp64) of each well at unit rate: its sum times the cell volume is 1."""
        centre = torch.rand(self.wells, 3, generator=generator(seed, "wells"), dtype=torch.float64)
        density = torch.ones(self.wells, 1, 1, 1, dtype=torch.float64)
        for axis, (n, length) in enumerate(zip(grid, lengths)):
            x = (torch.arange(n, dtype=torch.float64) + 0.5) * length / n
            distance = x - centre[:, axis, None] * length
            if axis != CLOSED_AXIS:
                distance = distance - length * torch.round(distance / length)
            profile = torch.exp(-0.5 * (distance / self.well_radius) ** 2)
            profile = profile / (profile.sum(1, keepdim=True) * length / n)
            density = density * profile.view(self.wells, *[n if a == axis else 1 for a in range(3)])
        return density

    def _solve(
        self, seeds: Sequence[int], grid: tuple[int, ...], frames: int, device: str, progress: Progress | None
    ) -> Trajectories:
        run = _Run(self, seeds, grid, frames, device)
        share = 1.0 / (len(seeds) * self.wells + frames)
        for index in range(len(seeds) * self.wells):
            run.solve_well(*divmod(index, self.wells))
            if progress is not None:
                progress((index + 1) * share)
        for index in range(frames):
            run.store(index)
            if progress is not None:
                progress(1.0 - (frames - 1 - index) * share)
        return run.trajectories()


class _Run:
    """One batch under way."""

    def __init__(self, regime: Darcy, seeds: Sequence[int], grid: tuple[int, ...], frames: int, device: str) -> None:
        self.regime, self.seeds = regime, seeds
        self.spacing = (1.0 / max(grid),) * 3
        self.lengths = tuple(n * self.spacing[0] for n in grid)
        media = [regime.make_permeability(seed, grid, self.lengths) for seed in seeds]
        self.permeability = torch.stack(media).to(device)
        self.media = [
            HeterogeneousDiffusion(self.permeability[b : b + 1], self.spacing, closed_axis=CLOSED_AXIS)
            for b in range(len(seeds))
        ]
        self.wells = torch.stack([regime.make_wells(seed, grid, self.lengths) for seed in seeds]).to(device)
        self.potential = torch.empty_like(self.wells)
        self.rates = WellRates(seeds, regime.wells, regime.rate)
        self.pressure = np.empty((len(seeds), frames, *grid), dtype=np.float32)
        self.flux = np.empty((len(seeds), frames, *grid, 3), dtype=np.float32)
        self.residual, self.imbalance = np.zeros(len(seeds)), np.zeros(len(seeds))

    def solve_well(self, b: int, well: int) -> None:
        """Potential of one well at unit rate, its fluid taken out evenly over the box."""
        regime = self.regime
        result = self.media[b].solve(
            self.wells[b, well : well + 1], tolerance=regime.tolerance, max_iterations=regime.max_iterations
        )
        residual = float(result.residual)
        if not residual <= 10.0 * regime.tolerance:
            raise NonFiniteError(
                f"darcy: the solver stopped at a residual of {residual:.1e} (tolerance {regime.tolerance:.1e}) "
                f"for seed {self.seeds[b]}; raise darcy.max_iterations or lower darcy.log_std"
            )
        self.potential[b, well] = result.solution[0]
        self.residual[b] = max(self.residual[b], residual)

    def store(self, index: int) -> None:
        """Pressure and flux at frame ``index``: the wells' potentials weighed with their rates."""
        rates = self.rates(index * self.regime.frame_interval).to(self.potential)
        pressure = torch.einsum("bw,bwxyz->bxyz", rates, self.potential)
        source = torch.einsum("bw,bwxyz->bxyz", rates, self.wells)
        self.pressure[:, index] = pressure.float().cpu().numpy()
        for b, medium in enumerate(self.media):
            flux = medium.flux(pressure[b : b + 1])
            rest = divergence(flux, self.spacing, first=1)[0] - source[b]
            self.imbalance[b] = max(self.imbalance[b], float(rest.norm() / source[b].norm()))
            self.flux[b, index] = torch.stack(flux, dim=-1)[0].float().cpu().numpy()

    def trajectories(self) -> Trajectories:
        """Everything stored, with parameters and diagnostics."""
        regime = self.regime
        permeability = self.permeability.float().cpu().numpy()
        logarithm = np.log10(permeability).reshape(len(permeability), -1).astype(np.float64)
        return regime.trajectories(
            self.lengths,
            {"pressure": self.pressure, "flux": self.flux, "permeability": permeability},
            regime.values_of("log_std", "rate"),
            {
                "solver_residual": self.residual,
                "mass_imbalance": self.imbalance,
                "permeability_decades": logarithm.max(1) - logarithm.min(1),
            },
        )
