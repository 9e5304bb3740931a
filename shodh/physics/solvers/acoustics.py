"""Linear sound in a medium of varying speed, on the staggered grid: second order, energy-conserving.

``dp/dt = -rho c^2 div v`` and ``rho dv/dt = -grad p`` with density 1; pressure at the cell centres, velocity at the
faces (Yee's placement). Leapfrog, written so that both are known at the same time: half a kick of the velocity, a
full step of the pressure, half a kick. Two half kicks in a row are one, which is the staggered leapfrog in time. An
axis is periodic or ends in rigid walls. The scheme is stable for ``dt c sqrt(sum h_i^-2) <= 1`` and conserves
`SoundField.energy` exactly.

A plane wave obeys ``sin^2(w dt / 2) = sum_i C_i^2 sin^2(k_i h_i / 2)`` with ``C_i = c dt / h_i``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from shodh.physics.solvers.operators import divergence, gradient


class SoundField:
    """State and time steps of a batch of sound fields.

    Parameters
    ----------
    speed : Tensor [B, X, Y, Z]
        Speed of sound at the cell centres; its dtype and device are those of the solver.
    spacing : 3 floats
    periodic : 3 bools
        An axis that is not periodic ends in rigid walls.

    Attributes
    ----------
    pressure : Tensor [B, X, Y, Z]
    velocity : list of 3 Tensors [B, X, Y, Z]
        At the upper faces; zero at walls.
    """

    def __init__(self, speed: Tensor, spacing: Sequence[float], periodic: Sequence[bool]) -> None:
        self.spacing, self.periodic = tuple(spacing), tuple(periodic)
        self.stiffness = speed.square()
        self.pressure = torch.zeros_like(speed)
        self.velocity = [torch.zeros_like(speed) for _ in range(3)]

    def slope(self, values: Tensor) -> list[Tensor]:
        """Gradient of cell values at the faces."""
        return gradient(values, self.spacing, self.periodic, first=1)

    def advance(self, interval: float, steps: int) -> None:
        """Advance by ``interval`` in ``steps`` equal steps."""
        dt = interval / steps
        self._kick(0.5 * dt)
        for step in range(steps):
            compression = divergence(self.velocity, self.spacing, first=1).mul_(self.stiffness)
            self.pressure.sub_(compression, alpha=dt)
            self._kick(dt if step + 1 < steps else 0.5 * dt)

    def energy(self, dt: float) -> Tensor:
        """Mean of ``(p^2 / c^2 + v^2 - (dt grad p)^2 / 4) / 2``, ``[B]``: an energy that steps of ``dt`` conserve."""
        total = (self.pressure.square() / self.stiffness).flatten(1).mean(1)
        for component, slope in zip(self.velocity, self.slope(self.pressure)):
            total += (component.square() - 0.25 * dt**2 * slope.square()).flatten(1).mean(1)
        return 0.5 * total

    def _kick(self, dt: float) -> None:
        for component, slope in zip(self.velocity, self.slope(self.pressure)):
            component.sub_(slope, alpha=dt)


def wave_rate(fastest: float, spacing: Sequence[float]) -> float:
    """Steps per time that the leapfrog asks for.

    ``c^2 div grad`` is similar to the symmetric ``c div grad c``, whose spectral radius is at most ``4 max(c)^2 sum
    h^-2``, also beside rigid walls; the leapfrog is stable up to ``dt^2 radius = 4``.
    """
    return fastest * math.sqrt(sum(h**-2 for h in spacing))


def stable_steps(interval: float, fastest: float, spacing: Sequence[float], courant: float) -> int:
    """Steps of equal size that keep ``dt fastest sqrt(sum h^-2)`` at or below ``courant``."""
    return max(1, math.ceil(interval * wave_rate(fastest, spacing) / courant - 1e-9))
