"""Regime ``burgers``: the three-dimensional Burgers equation, steepening into sheets, filaments and knots.

``du/dt + (u . grad) u = nu lap u`` in a periodic box of edge ``2 pi``, without pressure; the initial root-mean-square
velocity component is 1. The advective term is ``grad |u|^2 / 2 - u x curl u``; scheme of
:mod:`shodh.physics.solvers.spectral`.
A flow that starts as the gradient of a potential stays one, and has the exact solution of Cole and Hopf
``u = -2 nu grad log theta`` with ``theta`` obeying the heat equation; ``rotational`` is the share of the initial energy
in a solenoidal part beside the gradient.

The field is called ``burgers_velocity``: it is compressible and lives at cell centres, so models must not decode it
like the solenoidal ``velocity`` of a flow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from shodh.physics.bounds import Bounds, Range
from shodh.physics.solvers.spectral import SpectralGrid, courant_rate, random_vector
from shodh.physics.solvers.spectral_flow import kinetic_energy
from shodh.physics.solvers.spectral_regime import SpectralRegime
from shodh.schema.fields import Field

BURGERS_VELOCITY = Field("burgers_velocity", kind="vector")
# Standard deviations that the initial velocity may reach, with what unresolved shocks overshoot.
FASTEST = 10.0


class BurgersFlow:
    """Tendency of the velocity, the three fields of a state."""

    def __init__(self, space: SpectralGrid, viscosity: float) -> None:
        self.space = space
        self.decay = (viscosity * space.square)[None]

    def tendency(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`shodh.physics.solvers.spectral.Equations`."""
        space = self.space
        velocity, vorticity = space.inverse(state), space.inverse(space.curl(state))
        result = space.forward(torch.linalg.cross(velocity, vorticity, dim=1))
        result -= space.gradient(space.forward(0.5 * velocity.square().sum(1)))
        return result, courant_rate(velocity, space.spacing)


@dataclass(frozen=True)
class Burgers(SpectralRegime):
    """The Burgers equation; the fields are its parameters.

    Parameters
    ----------
    frame_interval, spin_up, courant, double
        See :class:`shodh.physics.solvers.spectral_regime.SpectralRegime`.
    viscosity : float
        Shocks are about ``4 viscosity`` over their jump thick.
    rotational : float
        Share of the initial energy in the solenoidal part, 0 to 1.
    peak_wavenumber : float
        ``k_0`` of the initial spectrum ``E(k) ~ k^4 exp(-2 (k / k_0)^2)``.
    """

    frame_interval: float = 0.2
    viscosity: float = 0.1
    rotational: float = 0.25
    peak_wavenumber: float = 2.0

    name: ClassVar[str] = "burgers"
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"viscosity": (0.05, 0.2), "rotational": (0.0, 1.0)}
    check: ClassVar[str] = "solution of Cole and Hopf for a three-dimensional potential flow"
    fields: ClassVar[tuple[Field, ...]] = (BURGERS_VELOCITY,)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("viscosity", "peak_wavenumber")
        self.require("rotational", 0 <= self.rotational <= 1, "be between 0 and 1")

    @property
    def bounds(self) -> Bounds:
        """Each component is carried and diffused: none leaves the range of the start, Gaussian with unit variance."""
        return Bounds((Range("burgers_velocity", -FASTEST, FASTEST),))

    @property
    def constants(self) -> dict[str, float]:
        return self.values_of("viscosity", "rotational")

    def equations(self, space: SpectralGrid) -> BurgersFlow:
        return BurgersFlow(space, self.viscosity)

    def initial(self, space: SpectralGrid, seed: int) -> Tensor:
        def amplitude(k: Tensor) -> Tensor:
            return k * torch.exp(-((k / self.peak_wavenumber) ** 2))

        gradient = random_vector(space, seed, "initial potential", amplitude, solenoidal=False)
        vortices = random_vector(space, seed, "initial velocity", amplitude)
        return math.sqrt(1.0 - self.rotational) * gradient + math.sqrt(self.rotational) * vortices

    def stored(self, equations: BurgersFlow, state: Tensor) -> dict[str, Tensor]:
        return {"burgers_velocity": equations.space.inverse(state)}

    def diagnose(self, equations: BurgersFlow, state: Tensor) -> dict[str, Tensor]:
        space = equations.space
        return {
            "energy_mean": kinetic_energy(space, state),
            "convergence_max": -space.inverse(space.divergence(state)).flatten(1).amin(1),
            "spectral_tail_max": space.outer_share(state),
        }
