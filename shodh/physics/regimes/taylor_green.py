"""Regime ``taylor_green``: breakdown of the Taylor-Green vortex (Taylor and Green 1937), the transition to turbulence.

Units: the box has edge ``2 pi``, the vortex the wavenumber 1 and the speed 1; the Reynolds number is ``1 / nu``.
Equations and scheme are those of :mod:`shodh.physics.solvers.spectral_flow`. The initial velocity is a member of the
family

``u = (2 / sqrt 3) (sin(a + 2 pi / 3) sin x cos y cos z, sin(a - 2 pi / 3) cos x sin y cos z, sin a cos x cos y sin z)``

with kinetic energy 1/8 and enstrophy 3/8 whatever the angle ``a``. The seed draws the angle and moves the vortex by a
random vector; ``classical`` keeps ``a = 0`` and the place, and every seed then gives the same flow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from shodh.core.seeding import generator
from shodh.physics.bounds import Bounds
from shodh.physics.solvers.spectral import SpectralGrid
from shodh.physics.solvers.spectral_flow import IncompressibleFlow, enstrophy, flow_statistics
from shodh.physics.solvers.spectral_regime import KINETIC_ENERGY, PRESSURE, VELOCITY, SpectralRegime
from shodh.schema.fields import Field


@dataclass(frozen=True)
class TaylorGreen(SpectralRegime):
    """The Taylor-Green vortex; the fields are its parameters.

    Parameters
    ----------
    frame_interval, spin_up, courant, double
        See :class:`shodh.physics.solvers.spectral_regime.SpectralRegime`.
    reynolds : float
        ``U / (k nu)``.
    classical : bool
        Every trajectory starts from the vortex of the literature.
    """

    frame_interval: float = 0.8
    spin_up: float = 1.0
    reynolds: float = 100.0
    classical: bool = False

    name: ClassVar[str] = "taylor_green"
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"reynolds": (50.0, 400.0)}
    check: ClassVar[str] = "energy 1/8, enstrophy 3/8, early decay exp(-6 nu t); dE/dt = -2 nu enstrophy"
    fields: ClassVar[tuple[Field, ...]] = (VELOCITY, PRESSURE)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("reynolds")

    @property
    def viscosity(self) -> float:
        return 1.0 / self.reynolds

    @property
    def bounds(self) -> Bounds:
        """The energy only falls."""
        return Bounds(energies=(KINETIC_ENERGY,))

    @property
    def constants(self) -> dict[str, float]:
        return self.values_of("reynolds", "viscosity")

    def equations(self, space: SpectralGrid) -> IncompressibleFlow:
        return IncompressibleFlow(space, self.viscosity)

    def initial(self, space: SpectralGrid, seed: int) -> Tensor:
        draws = torch.rand(4, generator=generator(seed, "initial velocity"), dtype=torch.float64)
        angle, *offsets = (2.0 * math.pi * draws * (not self.classical)).tolist()
        sines, cosines = zip(*((torch.sin(c - o), torch.cos(c - o)) for c, o in zip(space.centers(), offsets)))
        parts = []
        for axis, lead in enumerate((2.0 * math.pi / 3.0, -2.0 * math.pi / 3.0, 0.0)):
            x, y, z = (sines[a] if a == axis else cosines[a] for a in range(3))
            parts.append(2.0 / math.sqrt(3.0) * math.sin(angle + lead) * x * y * z)
        return torch.fft.rfftn(torch.stack(parts), dim=space.axes, norm="forward")

    def stored(self, equations: IncompressibleFlow, state: Tensor) -> dict[str, Tensor]:
        space = equations.space
        return {
            "velocity": space.to_faces(state, solenoidal=True),
            "pressure": space.inverse(equations.pressure(state)),
        }

    def diagnose(self, equations: IncompressibleFlow, state: Tensor) -> dict[str, Tensor]:
        space = equations.space
        return {
            **flow_statistics(space, state, self.viscosity),
            "enstrophy_max": enstrophy(space, state),
            "spectral_tail_max": space.outer_share(state),
        }
