"""Regime ``shear_layer``: roll-up, pairing and three-dimensional breakdown of free shear layers, with a tracer.

Units: the layer has the profile ``U(z) = tanh z``, so half the velocity difference and half the vorticity thickness
are 1; ``reynolds`` is ``1 / nu``. A periodic box needs two layers, of opposite sense, half a box apart:
``tanh(z - z_1) - tanh(z - z_2) - 1`` and its periodic images. The default box is one wavelength of the most amplified
wave (``k = 0.4446``, Michalke 1964) along x and y, so that each layer rolls up into one vortex; with twice the
``length_x``, and twice the cells along x, two vortices form and pair.

Equations and scheme are those of :mod:`shodh.physics.solvers.spectral_flow`. The seed draws a solenoidal disturbance
that lives
in the layers and, by up to half a box, where along z they lie. The tracer is 1 in one stream and 0 in the other.
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
from shodh.physics.solvers.spectral import SpectralGrid, random_vector
from shodh.physics.solvers.spectral_flow import IncompressibleFlow, flow_statistics, overshoot
from shodh.physics.solvers.spectral_regime import (
    KINETIC_ENERGY,
    TRACER,
    TRACER_ENERGY,
    TRACER_RANGE,
    VELOCITY,
    SpectralRegime,
)
from shodh.schema.fields import Field

#: The most amplified wavenumber of the tanh layer (Michalke 1964).
AMPLIFIED = 0.4446
# Periodic images of the layers on either side that still count: the next one is flat to fp64.
_IMAGES = 3


def mean_profile(height: Tensor, length: float) -> Tensor:
    """Two opposite tanh layers at 1/4 and 3/4 of a periodic box of that length; between -1 and 1."""
    total = torch.full_like(height, -1.0)
    for image in range(-_IMAGES, _IMAGES + 1):
        low, high = (0.25 + image) * length, (0.75 + image) * length
        total += torch.tanh(height - low) - torch.tanh(height - high)
    return total


@dataclass(frozen=True)
class ShearLayer(SpectralRegime):
    """Free shear layers; the fields are its parameters.

    Parameters
    ----------
    frame_interval, spin_up, courant, double
        See :class:`shodh.physics.solvers.spectral_regime.SpectralRegime`. The layers roll up after about 15 time units.
    reynolds : float
        ``U delta / nu``, with half the velocity difference and half the vorticity thickness.
    schmidt : float
        Viscosity over tracer diffusivity.
    perturbation : float
        Root-mean-square component of the initial disturbance in the middle of a layer.
    length_x, length_y, length_z : float
        Box along the streams, along the axes of the vortices, and across the layers.
    """

    frame_interval: float = 3.0
    spin_up: float = 15.0
    reynolds: float = 50.0
    schmidt: float = 0.5
    perturbation: float = 0.1
    length_x: float = 2.0 * math.pi / AMPLIFIED
    length_y: float = 2.0 * math.pi / AMPLIFIED
    length_z: float = 16.0

    name: ClassVar[str] = "shear_layer"
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"reynolds": (25.0, 200.0), "perturbation": (0.02, 0.2)}
    check: ClassVar[str] = "growth rate 0.1897 of the tanh layer at k = 0.4446 (Michalke 1964), less viscosity"
    fields: ClassVar[tuple[Field, ...]] = (VELOCITY, TRACER)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("reynolds", "schmidt", "length_x", "length_y")
        self.require("length_z", 12.0 <= self.length_z < math.inf, "be at least 12, or the two layers merge")
        self.require("perturbation", 0 <= self.perturbation <= 1, "be between 0 and 1")

    @property
    def viscosity(self) -> float:
        return 1.0 / self.reynolds

    @property
    def lengths(self) -> tuple[float, float, float]:
        return (self.length_x, self.length_y, self.length_z)

    @property
    def bounds(self) -> Bounds:
        """Range and variance of the tracer, and the energy; nothing drives the layers."""
        return Bounds((TRACER_RANGE,), (TRACER_ENERGY, KINETIC_ENERGY))

    @property
    def constants(self) -> dict[str, float]:
        return self.values_of("reynolds", "schmidt", "viscosity", "perturbation")

    def equations(self, space: SpectralGrid) -> IncompressibleFlow:
        return IncompressibleFlow(space, self.viscosity, diffusivity=self.viscosity / self.schmidt)

    def _profile(self, space: SpectralGrid, seed: int) -> Tensor:
        """Mean velocity of this seed along z, ``[1, 1, Z]``."""
        shift = torch.rand((), generator=generator(seed, "place of the layers"), dtype=torch.float64)
        return mean_profile((space.centers()[2] + shift * self.length_z) % self.length_z, self.length_z)

    def initial(self, space: SpectralGrid, seed: int) -> Tensor:
        profile = self._profile(space, seed)
        # Eddies of about the thickness of a layer, and their larger relatives up to the box.
        eddies = random_vector(space, seed, "initial velocity", lambda k: torch.exp(-0.5 * k**2))
        values = torch.fft.irfftn(eddies, s=space.grid, dim=space.axes, norm="forward")
        # 1 - U^2 is sech^2 in each layer and zero in the streams.
        velocity = self.perturbation * (1.0 - profile.square()) * values
        velocity[0] += profile
        return torch.fft.rfftn(velocity, dim=space.axes, norm="forward")

    def release(self, space: SpectralGrid, seed: int) -> Tensor:
        tracer = 0.5 * (1.0 + self._profile(space, seed)).expand(1, *space.grid)
        return torch.fft.rfftn(tracer, dim=space.axes, norm="forward")

    def stored(self, equations: IncompressibleFlow, state: Tensor) -> dict[str, Tensor]:
        space = equations.space
        return {"velocity": space.to_faces(state[:, :3], solenoidal=True), "tracer": space.inverse(state[:, 3])}

    def diagnose(self, equations: IncompressibleFlow, state: Tensor) -> dict[str, Tensor]:
        space, velocity = equations.space, state[:, :3]
        statistics = flow_statistics(space, velocity, self.viscosity)
        across = space.mean_product(velocity, velocity)[:, 2].sqrt()
        return {
            "energy_mean": statistics["energy_mean"],
            "k_max_eta_min": statistics["k_max_eta_min"],
            "cross_stream_rms_max": across,
            "spectral_tail_max": space.outer_share(velocity),
            "tracer_overshoot_max": overshoot(space.inverse(state[:, 3])),
        }
