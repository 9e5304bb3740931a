"""Incompressible flow in a periodic box, with tracers and a force that injects energy at a constant rate.

``du/dt = u x curl u - grad P + nu lap u + f``, ``div u = 0``, with ``P = p + |u|^2 / 2`` (rotational form, which
conserves the energy of the truncated system exactly in continuous time), and ``dc/dt = -div(u c) + D lap c``.

The force is ``f = injection * u_f / <|u_f|^2>`` with ``u_f`` the modes ``0 < |k| <= forced_wavenumber``: it is
deterministic and adds energy at the rate ``injection`` at every instant (linear forcing of a band, as in Machiels,
Phys. Rev. Lett. 79, 1997), so ``dE/dt = injection - dissipation`` holds exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shodh.physics.solvers.spectral import SpectralGrid, courant_rate


class IncompressibleFlow:
    """Tendencies of velocity (first three fields of a state) and any tracers behind it.

    Parameters
    ----------
    space : SpectralGrid
        Three-dimensional.
    viscosity : float
        May be zero.
    diffusivity : float, optional
        Of the tracers; default: the viscosity.
    injection : float
        Energy added per unit mass and time.
    forced_wavenumber : float
        Radius of the forced band.
    """

    def __init__(
        self,
        space: SpectralGrid,
        viscosity: float,
        *,
        diffusivity: float | None = None,
        injection: float = 0.0,
        forced_wavenumber: float = 0.0,
    ) -> None:
        self.space, self.viscosity, self.injection = space, viscosity, injection
        rates = [viscosity] * 3 + [viscosity if diffusivity is None else diffusivity]
        self.decay = torch.stack([rate * space.square for rate in rates])
        band = (space.square > 0) & (space.square <= forced_wavenumber**2 * (1.0 + 1e-6))
        self._band = band.to(space.dtype)

    def tendency(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`shodh.physics.solvers.spectral.Equations`."""
        space = self.space
        spectrum = state[:, :3]
        velocity = space.inverse(spectrum)
        vorticity = space.inverse(space.curl(spectrum))
        result = space.project(space.forward(torch.linalg.cross(velocity, vorticity, dim=1)))
        rate = courant_rate(velocity, space.spacing)
        if self.injection:
            driven = spectrum * self._band
            square = space.mean_product(driven, driven).sum(1).clamp(min=1e-30)
            growth = (self.injection / square).to(space.dtype)
            result += driven * growth.view(-1, 1, 1, 1, 1)
            rate = rate + growth
        if state.shape[1] > 3:
            fluxes = velocity[:, None] * space.inverse(state[:, 3:])[:, :, None]
            result = torch.cat((result, -space.divergence(space.forward(fluxes))), dim=1)
        return result, rate

    def pressure(self, state: Tensor) -> Tensor:
        """Pressure per density with zero mean, ``[B, *modes]``; truncated like everything else."""
        space = self.space
        velocity = space.inverse(state[:, :3])
        vorticity = space.inverse(space.curl(state[:, :3]))
        source = space.divergence(space.forward(torch.linalg.cross(velocity, vorticity, dim=1)))
        head = source * -space.inverse_square
        pressure = head - space.forward(0.5 * velocity.square().sum(1))
        pressure[space.mean] = 0.0
        return pressure


def kinetic_energy(space: SpectralGrid, vector: Tensor) -> Tensor:
    """``<|u|^2> / 2`` of ``[B, 3, *modes]``; fp64 ``[B]``."""
    return 0.5 * space.mean_product(vector, vector).sum(1)


def overshoot(values: Tensor) -> Tensor:
    """How far a tracer ``[B, *grid]`` that should stay between 0 and 1 goes beyond; ``[B]``."""
    flat = values.flatten(1)
    return torch.maximum(-flat.amin(1), flat.amax(1) - 1.0).clamp(min=0.0)


def enstrophy(space: SpectralGrid, vector: Tensor) -> Tensor:
    """``<|curl u|^2> / 2`` of a divergence-free ``[B, 3, *modes]``; fp64 ``[B]``."""
    return 0.5 * space.mean_product(vector, vector * space.square).sum(1)


def derivative_skewness(space: SpectralGrid, vector: Tensor) -> Tensor:
    """Skewness of the longitudinal derivatives ``du_i/dx_i``, mean over the three axes; fp64 ``[B]``."""
    slopes = [space.inverse(vector[:, a] * (1j * space.wavenumbers[a])).double().flatten(1) for a in range(3)]
    skewness = [s.pow(3).mean(1) / s.square().mean(1).clamp(min=1e-300).pow(1.5) for s in slopes]
    return torch.stack(skewness).mean(0)


def flow_statistics(space: SpectralGrid, vector: Tensor, viscosity: float) -> dict[str, Tensor]:
    """Energy, dissipation, Taylor Reynolds number and resolution of ``[B, 3, *modes]``; each ``[B]``.

    ``k_max_eta`` is the largest wavenumber kept times the Kolmogorov length; direct simulations want 1.5 or more.
    """
    energy = kinetic_energy(space, vector)
    dissipation = (2.0 * viscosity * enstrophy(space, vector)).clamp(min=1e-300)
    return {
        "energy_mean": energy,
        "dissipation_mean": dissipation,
        "taylor_reynolds_mean": energy * (20.0 / (3.0 * viscosity * dissipation)).sqrt(),
        "k_max_eta_min": space.largest_wavenumber * (viscosity**3 / dissipation).pow(0.25),
    }
