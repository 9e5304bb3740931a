"""Regimes ``forced_turbulence`` and ``decaying_turbulence``: homogeneous isotropic turbulence in a periodic box.

Units: the box has edge ``2 pi``. Forced turbulence takes its time unit from the rate of energy injection (default
0.1, much like the forced set of the Johns Hopkins database), decaying turbulence from an initial root-mean-square
velocity component of 1.

Equations and scheme are those of :mod:`shodh.physics.solvers.spectral_flow`. Both start from a random solenoidal
field with the
energy spectrum ``E(k) ~ k^4 exp(-2 (k / k_0)^2)``, run ``spin_up`` time units to develop, and are then stored; the
tracer is set to patches of dye at the first frame, the pressure has zero mean. The initial modes do not depend on the
grid. ``k_max_eta_min`` among the diagnostics tells how well a run is resolved: 1.5 and more is a direct simulation.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from shodh.physics.bounds import Bounds
from shodh.physics.solvers.spectral import SpectralGrid, random_scalar, random_vector
from shodh.physics.solvers.spectral_flow import IncompressibleFlow, derivative_skewness, flow_statistics, overshoot
from shodh.physics.solvers.spectral_regime import (
    KINETIC_ENERGY,
    PRESSURE,
    TRACER,
    TRACER_ENERGY,
    TRACER_RANGE,
    VELOCITY,
    SpectralRegime,
)
from shodh.schema.fields import Field


def random_velocity(space: SpectralGrid, seed: int, peak: float, purpose: str = "initial velocity") -> Tensor:
    """Solenoidal field of unit rms component with ``E(k) ~ k^4 exp(-2 (k / peak)^2)``, ``[3, *modes]``."""
    return random_vector(space, seed, purpose, lambda k: k * torch.exp(-((k / peak) ** 2)))


def dye(space: SpectralGrid, seed: int, scale: float) -> Tensor:
    """Patches of dye between 0 and 1 of size ``scale``, a logistic function of smooth noise, ``[1, *modes]``."""
    smooth = random_scalar(space, seed, "tracer", lambda k: torch.exp(-0.5 * (scale * k) ** 2))
    return torch.fft.rfftn(torch.sigmoid(3.0 * smooth), dim=space.axes, norm="forward")[None]


@dataclass(frozen=True)
class _IsotropicTurbulence(SpectralRegime):
    """What both regimes share."""

    viscosity: float = 0.02
    schmidt: float = 1.0
    peak_wavenumber: float = 2.5
    tracer_scale: float = 0.5

    fields: ClassVar[tuple[Field, ...]] = (VELOCITY, PRESSURE, TRACER)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("viscosity", "schmidt", "peak_wavenumber", "tracer_scale")

    @property
    @abstractmethod
    def initial_speed(self) -> float:
        """Root-mean-square velocity component before the spin-up."""

    @property
    def bounds(self) -> Bounds:
        """Range and variance of the tracer, and the energy, which only a force raises."""
        return Bounds((TRACER_RANGE,), (TRACER_ENERGY, KINETIC_ENERGY))

    @property
    def constants(self) -> dict[str, float]:
        return self.values_of("viscosity", "schmidt")

    def equations(self, space: SpectralGrid) -> IncompressibleFlow:
        return IncompressibleFlow(space, self.viscosity, diffusivity=self.viscosity / self.schmidt)

    def initial(self, space: SpectralGrid, seed: int) -> Tensor:
        return self.initial_speed * random_velocity(space, seed, self.peak_wavenumber)

    def release(self, space: SpectralGrid, seed: int) -> Tensor:
        return dye(space, seed, self.tracer_scale)

    def stored(self, equations: IncompressibleFlow, state: Tensor) -> dict[str, Tensor]:
        space = equations.space
        return {
            "velocity": space.to_faces(state[:, :3], solenoidal=True),
            "pressure": space.inverse(equations.pressure(state)),
            "tracer": space.inverse(state[:, 3]),
        }

    def diagnose(self, equations: IncompressibleFlow, state: Tensor) -> dict[str, Tensor]:
        space, velocity = equations.space, state[:, :3]
        return {
            **flow_statistics(space, velocity, self.viscosity),
            "derivative_skewness_mean": derivative_skewness(space, velocity),
            "spectral_tail_max": space.outer_share(velocity),
            "tracer_overshoot_max": overshoot(space.inverse(state[:, 3])),
        }


@dataclass(frozen=True)
class ForcedTurbulence(_IsotropicTurbulence):
    """Statistically steady isotropic turbulence; the fields are its parameters.

    Parameters
    ----------
    frame_interval, spin_up, courant, double
        See :class:`shodh.physics.solvers.spectral_regime.SpectralRegime`. A turnover takes about 2.5 time units by
        default.
    viscosity : float
        Kinematic; the Kolmogorov length is ``(viscosity^3 / injection)^(1/4)``.
    schmidt : float
        Viscosity over tracer diffusivity.
    peak_wavenumber : float
        ``k_0`` of the initial spectrum.
    tracer_scale : float
        Size of the patches of dye.
    injection : float
        Energy added per unit mass and time, at every instant.
    forced_wavenumber : float
        The modes ``0 < |k| <= forced_wavenumber`` are driven.
    """

    frame_interval: float = 0.4
    spin_up: float = 8.0
    injection: float = 0.1
    forced_wavenumber: float = 2.0

    name: ClassVar[str] = "forced_turbulence"
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"viscosity": (0.01, 0.04), "injection": (0.05, 0.2)}
    check: ClassVar[str] = "energy budget dE/dt = injection - dissipation at fourth order; steady mean dissipation"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("injection")
        self.require("forced_wavenumber", self.forced_wavenumber >= 1.0, "be at least 1, the smallest mode")

    @property
    def initial_speed(self) -> float:
        """The rms component that a dissipation of ``injection`` goes with, if the large eddies have size 1."""
        return float(self.injection ** (1.0 / 3.0))

    @property
    def bounds(self) -> Bounds:
        return Bounds((TRACER_RANGE,), (TRACER_ENERGY, replace(KINETIC_ENERGY, power=self.injection)))

    @property
    def constants(self) -> dict[str, float]:
        return {**super().constants, "injection": self.injection}

    def equations(self, space: SpectralGrid) -> IncompressibleFlow:
        return IncompressibleFlow(
            space,
            self.viscosity,
            diffusivity=self.viscosity / self.schmidt,
            injection=self.injection,
            forced_wavenumber=self.forced_wavenumber,
        )


@dataclass(frozen=True)
class DecayingTurbulence(_IsotropicTurbulence):
    """Freely decaying isotropic turbulence; the fields are its parameters.

    Parameters
    ----------
    frame_interval, spin_up, courant, double
        See :class:`shodh.physics.solvers.spectral_regime.SpectralRegime`. The first turnover takes about 0.5 time
        units.
    viscosity : float
        Kinematic; the initial Taylor Reynolds number is ``2 / (peak_wavenumber * viscosity)``.
    schmidt : float
        Viscosity over tracer diffusivity.
    peak_wavenumber : float
        ``k_0`` of the initial spectrum.
    tracer_scale : float
        Size of the patches of dye.
    """

    frame_interval: float = 0.2
    spin_up: float = 1.0
    viscosity: float = 0.03

    name: ClassVar[str] = "decaying_turbulence"
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        "viscosity": (0.015, 0.06),
        "peak_wavenumber": (2.0, 4.0),
    }
    check: ClassVar[str] = "dE/dt = -dissipation at fourth order; derivative skewness of -0.4 to -0.55"

    @property
    def initial_speed(self) -> float:
        return 1.0
