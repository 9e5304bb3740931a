"""Regime ``magnetohydrodynamics``: incompressible resistive MHD turbulence in a periodic box.

Units: the box has edge ``2 pi``, the initial root-mean-square velocity component is 1, and the magnetic field is in
Alfven units (``b / sqrt(mu_0 rho)``, a velocity). Equations::

    du/dt = u x curl u + (curl b) x b - grad P + nu lap u,   div u = 0
    db/dt = curl (u x b) + eta lap b,                        div b = 0

with the scheme of :mod:`shodh.physics.solvers.spectral`. The curl keeps ``div b = 0``, and the mean of ``b`` is
constant: the parameter ``mean_field``, along z. Both fields start from independent random solenoidal fields with
``E(k) ~ k^4 exp(-2 (k / k_0)^2)`` and equal energy, run ``spin_up``, and decay. Both are stored on faces and are
discretely divergence-free. A frozen-in passive tracer would add nothing, so there is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from shodh.physics.bounds import Bounds, Energy
from shodh.physics.regimes.isotropic_turbulence import random_velocity
from shodh.physics.solvers.spectral import SpectralGrid, courant_rate
from shodh.physics.solvers.spectral_flow import enstrophy, kinetic_energy
from shodh.physics.solvers.spectral_regime import VELOCITY, SpectralRegime
from shodh.schema.fields import Field

MAGNETIC_FIELD = Field("magnetic_field", kind="vector", placement="face", solenoidal=True)


class InductionFlow:
    """Tendencies of velocity and magnetic field, the six fields of a state; either diffusion may be zero."""

    def __init__(self, space: SpectralGrid, viscosity: float, resistivity: float) -> None:
        self.space, self.viscosity, self.resistivity = space, viscosity, resistivity
        self.decay = torch.stack([rate * space.square for rate in [viscosity] * 3 + [resistivity] * 3])

    def tendency(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`shodh.physics.solvers.spectral.Equations`; the Alfven speed counts in the rate."""
        space = self.space
        velocity, field = space.inverse(state[:, :3]), space.inverse(state[:, 3:])
        vorticity, current = space.inverse(space.curl(state[:, :3])), space.inverse(space.curl(state[:, 3:]))
        force = torch.linalg.cross(velocity, vorticity, dim=1) + torch.linalg.cross(current, field, dim=1)
        induction = space.curl(space.forward(torch.linalg.cross(velocity, field, dim=1)))
        rate = courant_rate(velocity.abs() + field.abs(), space.spacing)
        return torch.cat((space.project(space.forward(force)), induction), dim=1), rate

    def invariants(self, state: Tensor) -> dict[str, Tensor]:
        """Energy, cross helicity ``<u . b>`` and magnetic helicity ``<a . b>`` (of ``b`` less its mean); ``[B]``."""
        space, velocity, field = self.space, state[:, :3], state[:, 3:]
        potential = space.curl(field) * space.inverse_square
        return {
            "energy": kinetic_energy(space, state),
            "cross_helicity": space.mean_product(velocity, field).sum(1),
            "magnetic_helicity": space.mean_product(potential, field).sum(1),
        }


@dataclass(frozen=True)
class Magnetohydrodynamics(SpectralRegime):
    """Decaying MHD turbulence; the fields are its parameters.

    Parameters
    ----------
    frame_interval, spin_up, courant, double
        See :class:`shodh.physics.solvers.spectral_regime.SpectralRegime`.
    viscosity : float
        Kinematic.
    magnetic_prandtl : float
        Viscosity over resistivity.
    mean_field : float
        Uniform magnetic field along z, in Alfven units.
    peak_wavenumber : float
        ``k_0`` of the initial spectra.
    """

    frame_interval: float = 0.15
    spin_up: float = 0.6
    viscosity: float = 0.05
    magnetic_prandtl: float = 1.0
    mean_field: float = 0.5
    peak_wavenumber: float = 2.5

    name: ClassVar[str] = "magnetohydrodynamics"
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        "viscosity": (0.02, 0.1),
        "magnetic_prandtl": (0.5, 2.0),
        "mean_field": (0.0, 2.0),
    }
    check: ClassVar[str] = "Alfven waves, frequency k B_0 and damping; ideal invariants at fourth order; div b = 0"
    fields: ClassVar[tuple[Field, ...]] = (VELOCITY, MAGNETIC_FIELD)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("viscosity", "magnetic_prandtl", "peak_wavenumber")
        self.require_not_negative("mean_field")

    @property
    def resistivity(self) -> float:
        return self.viscosity / self.magnetic_prandtl

    @property
    def bounds(self) -> Bounds:
        """Kinetic and magnetic energy together only fall."""
        return Bounds(energies=(Energy("total", ("velocity", "magnetic_field")),))

    @property
    def constants(self) -> dict[str, float]:
        return self.values_of("viscosity", "resistivity", "mean_field")

    def equations(self, space: SpectralGrid) -> InductionFlow:
        return InductionFlow(space, self.viscosity, self.resistivity)

    def initial(self, space: SpectralGrid, seed: int) -> Tensor:
        velocity = random_velocity(space, seed, self.peak_wavenumber)
        field = random_velocity(space, seed, self.peak_wavenumber, "initial magnetic field")
        field[2, 0, 0, 0] = self.mean_field
        return torch.cat((velocity, field))

    def stored(self, equations: InductionFlow, state: Tensor) -> dict[str, Tensor]:
        space = equations.space
        return {
            "velocity": space.to_faces(state[:, :3], solenoidal=True),
            "magnetic_field": space.to_faces(state[:, 3:], solenoidal=True),
        }

    def diagnose(self, equations: InductionFlow, state: Tensor) -> dict[str, Tensor]:
        space, velocity, field = equations.space, state[:, :3], state[:, 3:]
        losses = self.viscosity * enstrophy(space, velocity) + self.resistivity * enstrophy(space, field)
        dissipation = (2.0 * losses).clamp(min=1e-300)
        smaller = min(self.viscosity, self.resistivity)
        return {
            **{f"{name}_mean": value for name, value in equations.invariants(state).items()},
            "dissipation_mean": dissipation,
            # The smaller of the viscous and the resistive length.
            "k_max_eta_min": space.largest_wavenumber * (smaller**3 / dissipation).pow(0.25),
            "spectral_tail_max": space.outer_share(state),
        }
