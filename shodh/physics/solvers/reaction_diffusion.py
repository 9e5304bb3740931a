"""Reaction and diffusion of several species on a box of any dimension, second order in space and time.

``du_s/dt = D_s lap u_s + R_s(u)`` with second differences between cell centres. An axis is periodic, or closed: no flux
through its ends. Time: the stabilised scheme of :mod:`shodh.physics.solvers.stabilized`, whose number of stages grows
like the square root of the diffusion number, so that fine grids do not dictate the step; the reaction does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shodh.physics.solvers.stability import Clock, diffusion_rate
from shodh.physics.solvers.stabilized import legendre_step, legendre_steps, stability_limit

Reaction = Callable[[Tensor], Tensor]


def laplacian(values: Tensor, spacing: Sequence[float], periodic: Sequence[bool]) -> Tensor:
    """Second differences of ``values [..., *space]`` over the last ``len(spacing)`` dimensions.

    A periodic axis wraps around; through the ends of another there is no flux.
    """
    ndim = len(spacing)
    out = values * (-2.0 * sum(h**-2 for h in spacing))
    for axis, (h, wraps) in enumerate(zip(spacing, periodic, strict=True)):
        dim, weight = values.dim() - ndim + axis, h**-2
        n = values.shape[dim]
        out.narrow(dim, 1, n - 1).add_(values.narrow(dim, 0, n - 1), alpha=weight)
        out.narrow(dim, 0, n - 1).add_(values.narrow(dim, 1, n - 1), alpha=weight)
        first, last = values.select(dim, 0), values.select(dim, n - 1)
        out.select(dim, 0).add_(last if wraps else first, alpha=weight)
        out.select(dim, n - 1).add_(first if wraps else last, alpha=weight)
    return out


class ReactionDiffusion:
    """Right-hand side and time steps of a reaction-diffusion system.

    Parameters
    ----------
    reaction : callable
        Maps ``[species, B, *space]`` to the rates of change, of that shape.
    diffusivity : floats, one a species
    spacing : floats, one an axis
        Their number is the number of dimensions.
    periodic : bools, one an axis
        An axis that is not periodic is closed (no flux).
    reaction_radius : float
        A bound of the modulus of the eigenvalues of the reaction's Jacobian; it widens the range of stability.
    """

    def __init__(
        self,
        reaction: Reaction,
        diffusivity: Sequence[float],
        spacing: Sequence[float],
        *,
        periodic: Sequence[bool],
        reaction_radius: float = 0.0,
    ) -> None:
        self.reaction, self.diffusivity = reaction, tuple(diffusivity)
        self.spacing, self.periodic = tuple(spacing), tuple(periodic)
        self._radius = float(diffusion_rate(max(diffusivity), spacing)) + reaction_radius

    def tendency(self, values: Tensor) -> Tensor:
        """``du/dt [species, B, *space]``."""
        rates = self.reaction(values)
        for rate, species, diffusivity in zip(rates, values, self.diffusivity, strict=True):
            rate.add_(laplacian(species, self.spacing, self.periodic), alpha=diffusivity)
        return rates

    def advance(self, values: Tensor, interval: float, max_step: float, clock: Clock | None = None) -> Tensor:
        """State ``[species, B, *space]`` after ``interval``, in equal steps of at most ``max_step``.

        Diffusion and reaction limit the step together: by Gershgorin's circles the spectral radius is at most the sum
        of the fastest decay by diffusion and of ``reaction_radius``, which the stages are chosen for.
        """
        steps, stages = legendre_steps(interval, self._radius, max_step)
        if clock is not None:
            clock.record_equal(steps, interval / steps, self._radius / stability_limit(stages))
        for _ in range(steps):
            values = legendre_step(lambda state, _: self.tendency(state), values, 0.0, interval / steps, stages)
        return values

    def growth_rate(self, jacobian: Tensor, wavenumber: Sequence[int], space: Sequence[int]) -> float:
        """Growth rate of the periodic mode ``wavenumber`` about a uniform state: ``max Re eig(J - D k_d^2)``.

        ``k_d`` is the wavenumber that the second differences see, ``2 sin(k h / 2) / h``; all axes must be periodic.
        """
        squared = sum(
            (2.0 * math.sin(math.pi * m / n) / h) ** 2 for m, n, h in zip(wavenumber, space, self.spacing, strict=True)
        )
        matrix = jacobian.double() - squared * torch.diag(torch.tensor(self.diffusivity, dtype=torch.float64))
        return float(torch.linalg.eigvals(matrix).real.max())
