"""Regime ``compressible_2d``: compressible Navier-Stokes on a periodic unit square, as in PDEBench.

    d rho/dt + div(rho u) = 0
    d(rho u)/dt + div(rho u u) + grad p = div s,     s = eta (grad u + grad u^T - 2/3 div u) + zeta div u
    dE/dt + div((E + p) u) = div(s u),               E = p / (gamma - 1) + rho |u|^2 / 2

without heat conduction, gamma = 5/3. PDEBench names its sets by (M, eta, zeta): Mach number, shear and bulk viscosity:
(0.1, 0.01, 0.01), (0.1, 0.1, 0.1), (1, 0.01, 0.01), (1, 0.1, 0.1), and 1e-8 for nearly inviscid flow; 21 frames in
unit time. Initial fields follow its generator ("rand"): sums of plane waves up to ``modes`` per axis with amplitude
``k^-1/2`` and random phases; velocity scaled to mean speed ``M c``; density and pressure ``rho0 (1 + d_rho ...)`` and
``p0 (1 + d_p ...)`` with rho0 and T0 = p0 / rho0 from U(0.1, 10), relative amplitudes from U(0.01, 0.2); and in every
second trajectory (at random) a smooth window, outside of which the gas is at rest and uniform. Where a wave sum would
undershoot it, density and pressure start from ``FLOOR`` of their means; PDEBench drops such solutions.

Scheme: :mod:`shodh.physics.solvers.finite_volume`. Density and pressure stay positive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from shodh.core.seeding import generator
from shodh.physics.bounds import Bounds, Limit, Range
from shodh.physics.frames import FrameStore, run_frames
from shodh.physics.regime import Progress, Regime
from shodh.physics.solvers.finite_volume import FiniteVolume
from shodh.schema.fields import Field, Trajectories

DENSITY = TEMPERATURE = (0.1, 10.0)
AMPLITUDE = (0.01, 0.2)
WINDOW_WIDTH = 0.01
FLOOR = 0.05
TINY = 1e-30


@dataclass(frozen=True)
class IdealGas:
    """``p = (gamma - 1) e``."""

    gamma: float
    has_energy = True

    def pressure(self, primitive: Tensor) -> Tensor:
        return primitive[-1]

    def sound_speed(self, primitive: Tensor) -> Tensor:
        return torch.sqrt(self.gamma * primitive[-1] / primitive[0])

    def internal_energy(self, pressure: Tensor) -> Tensor:
        return pressure / (self.gamma - 1.0)

    def pressure_of_energy(self, internal: Tensor) -> Tensor:
        return internal * (self.gamma - 1.0)


class NewtonianStress:
    """Viscous stress with constant shear and bulk viscosity, second-order differences in flux form."""

    def __init__(self, shear: float, bulk: float, spacing: Sequence[float]) -> None:
        self.shear, self.bulk, self.spacing = shear, bulk, tuple(spacing)

    def diffusivity(self, primitive: Tensor) -> Tensor:
        return (4.0 / 3.0 * self.shear + self.bulk) / primitive[0].flatten(0, -2).amin(0)

    def tendency(self, primitive: Tensor, pad: Callable[[Tensor, int, int], Tensor]) -> Tensor:
        ndim = len(self.spacing)
        change = torch.zeros_like(primitive)
        padded = primitive
        for axis in range(ndim):
            padded = pad(padded, axis, 1)
        velocity = padded[1 : 1 + ndim]
        for axis in range(ndim):
            faces = self._at_faces(velocity, axis)
            gradient = torch.stack([self._gradient(velocity, axis, along) for along in range(ndim)])
            dilatation = sum((gradient[i, i] for i in range(ndim)), torch.zeros_like(faces[0]))
            stress = self.shear * (gradient[axis] + gradient[:, axis])
            stress[axis] += (self.bulk - 2.0 / 3.0 * self.shear) * dilatation
            flux = torch.cat((stress, (stress * faces).sum(0, keepdim=True)))
            change[1:] += torch.diff(flux, dim=1 + axis) / self.spacing[axis]
        return change

    def _at_faces(self, padded: Tensor, axis: int) -> Tensor:
        """Mean of the cells beside the faces of ``axis``."""
        values = self._inside(padded, keep=axis)
        n = values.shape[1 + axis] - 1
        return 0.5 * (values.narrow(1 + axis, 0, n) + values.narrow(1 + axis, 1, n))

    def _gradient(self, padded: Tensor, axis: int, along: int) -> Tensor:
        """Derivative along ``along`` of all components at the faces of ``axis``."""
        if along == axis:
            return torch.diff(self._inside(padded, keep=axis), dim=1 + axis) / self.spacing[axis]
        n = padded.shape[1 + along] - 2
        central = padded.narrow(1 + along, 2, n) - padded.narrow(1 + along, 0, n)
        n = central.shape[1 + axis] - 1
        return (central.narrow(1 + axis, 0, n) + central.narrow(1 + axis, 1, n)) / (4.0 * self.spacing[along])

    def _inside(self, padded: Tensor, keep: int) -> Tensor:
        for axis in range(len(self.spacing)):
            if axis != keep:
                padded = padded.narrow(1 + axis, 1, padded.shape[1 + axis] - 2)
        return padded


@dataclass(frozen=True)
class Compressible2d(Regime):
    """Compressible flow from random fields; the fields are its parameters.

    Parameters
    ----------
    mach : float
        Initial mean speed over the speed of sound of the mean state.
    shear_viscosity, bulk_viscosity : float
        Dynamic viscosities eta and zeta; 0 for the Euler equations.
    gamma : float
        Ratio of specific heats.
    modes : int
        Largest wave number of the initial fields along each axis.
    frame_interval : float
        Time between frames.
    courant : float
        Target of ``dt max(sum_i (|u_i| + c) / h_i)``, at most 0.5.
    double : bool
        Solve in fp64 (fields are stored in fp32 all the same).
    """

    mach: float = 0.1
    shear_viscosity: float = 0.01
    bulk_viscosity: float = 0.01
    gamma: float = 5.0 / 3.0
    modes: int = 4
    frame_interval: float = 0.05
    courant: float = 0.4
    double: bool = False

    name = "compressible_2d"
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        "mach": (0.1, 1.0),
        "shear_viscosity": (1e-8, 0.1),
        "bulk_viscosity": (1e-8, 0.1),
    }
    check: ClassVar[str] = "Sod's shock tube, isentropic vortex at second order, viscous decay of a shear wave"
    fields = (Field("density"), Field("compressible_velocity", kind="vector"), Field("pressure"))
    boundary = ("periodic", "periodic")

    def __post_init__(self) -> None:
        self.require_positive("mach", "modes", "frame_interval", "courant")
        self.require_not_negative("shear_viscosity", "bulk_viscosity")
        self.require("gamma", 1.0 < self.gamma < math.inf, "be a number above 1")
        self.require("courant", self.courant <= 0.5, "not exceed 0.5: the density could turn negative")

    @property
    def bounds(self) -> Bounds:
        """Density and pressure are positive; mass and energy are conserved."""
        positive = (Range("density", TINY), Range("pressure", TINY))
        return Bounds(positive, limits=(Limit("mass_drift", 1e-3), Limit("energy_drift", 1e-3)))

    def initial_state(self, seed: int, grid: Sequence[int]) -> Tensor:
        """``(rho, u, v, p)`` ``[4, X, Y]``, fp64; the same function of space on every grid."""
        draw = generator(seed, "initial fields")

        def uniform(low: float, high: float, count: int = 1) -> Tensor:
            return low + (high - low) * torch.rand(count, generator=draw, dtype=torch.float64)

        density, temperature = uniform(*DENSITY), uniform(*TEMPERATURE)
        relative = uniform(*AMPLITUDE, count=2)
        windowed, edges = bool(uniform(0.0, 1.0) < 0.5), uniform(0.0, 1.0, count=4)
        x, y = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in grid)
        waves = torch.zeros(4, *grid, dtype=torch.float64)
        for i in range(-self.modes, self.modes + 1):
            for j in range(-self.modes, self.modes + 1):
                if i * j == 0:
                    continue
                phase = uniform(0.0, 2.0 * math.pi, count=4).view(4, 1, 1)
                angle = 2.0 * math.pi * (i * x[:, None] + j * y)
                waves += (2.0 * math.pi * math.hypot(i, j)) ** -0.5 * torch.sin(angle + phase)
        speed = self.mach * torch.sqrt(self.gamma * temperature)
        velocity = waves[:2] * speed / waves[:2].norm(dim=0).mean()
        scalars = 1.0 + relative.view(2, 1, 1) * waves[2:] / waves[2:].abs().mean((1, 2), keepdim=True)
        state = torch.cat((scalars[:1], velocity, scalars[1:]))
        if windowed:
            rest = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64).view(4, 1, 1)
            inside = _window(x, edges[0], edges[1])[:, None] * _window(y, edges[2], edges[3])
            state = rest + (state - rest) * inside
        state[[0, 3]] = state[[0, 3]].clamp(min=FLOOR)
        state[0] *= density
        state[3] *= density * temperature
        return state

    def _solve(
        self, seeds: Sequence[int], grid: tuple[int, ...], frames: int, device: str, progress: Progress | None
    ) -> Trajectories:
        initial = torch.stack([self.initial_state(seed, grid) for seed in seeds], dim=-1)
        solver = self.solver(initial.to(device, torch.float64 if self.double else torch.float32))
        store = FrameStore(self.schema, seeds, grid, frames, f"lower {self.name}.courant (now {self.courant})")
        totals = solver.conserved.double().sum((1, 2))

        def advance() -> None:
            store.check(solver.advance(self.frame_interval))

        def put(index: int) -> None:
            state = solver.primitive
            store.put(index, density=state[0], compressible_velocity=state[1:3], pressure=state[3])

        run_frames(frames, put, advance, progress)
        drift = (solver.conserved.double().sum((1, 2)) / totals - 1.0).abs()
        return self.trajectories(
            (1.0, 1.0),
            store.values,
            self.values_of("mach", "shear_viscosity", "bulk_viscosity", "gamma"),
            {
                "mass_drift": drift[0].cpu().numpy(),
                "energy_drift": drift[3].cpu().numpy(),
                **solver.clock.diagnostics(),
            },
        )

    def solver(self, initial: Tensor) -> FiniteVolume:
        """Solver on the periodic unit square for the primitive state ``initial [4, X, Y, B]``."""
        spacing = [1.0 / n for n in initial.shape[1:3]]
        viscosity = None
        if self.shear_viscosity or self.bulk_viscosity:
            viscosity = NewtonianStress(self.shear_viscosity, self.bulk_viscosity, spacing)
        return FiniteVolume(
            IdealGas(self.gamma),
            ("periodic", "periodic"),
            spacing,
            initial,
            viscosity=viscosity,
            courant=self.courant,
        )


def _window(coordinate: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """1 between ``0.1 .. 0.45`` and ``0.55 .. 0.9`` (places ``low`` and ``high`` in them), 0 outside, smooth."""
    left, right = 0.1 + 0.35 * low, 0.55 + 0.35 * high
    return 0.5 * (torch.tanh((coordinate - left) / WINDOW_WIDTH) - torch.tanh((coordinate - right) / WINDOW_WIDTH))
