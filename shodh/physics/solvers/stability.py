"""Limits of stability of explicit steps: what the spectrum of a scheme allows, and marching within it.

A step of a Runge-Kutta scheme multiplies an eigenvector by ``R(dt lambda)`` and is stable where ``|R| <= 1``. So every
scheme states the *rate* of steps that its own spectrum asks for, the reciprocal of its longest stable step, and whoever
chooses a step takes the largest rate of all schemes. Two quantities bound the spectra: the rate of advection
``C = max_cells sum_i |u_i| / h_i`` (of both faces of a cell the mean, see `advection_rate`) and the fastest decay by
diffusion, ``d = 4 D sum_i h_i^-2``. The latter holds at walls too: with a ghost value of opposite sign half a cell
beyond the wall, the row of the first cell is ``-3, 1`` over ``h^2`` instead of ``1, -2, 1``, and Gershgorin's circle
ends at 4 again; a wall without flux has ``-1, 1`` and ends at 2. With cells of different shapes each axis has its own
``h_i``, and with a varying diffusivity ``D`` is the largest at a face.

*Central differences.* Two-point averages in flux form are skew-symmetric for a solenoidal velocity, and the sum of the
moduli of a row is at most ``C``: the numerical range, and so all eigenvalues, lie in the rectangle ``[-d, 0] x i[-C,
C]``. The region of the third-order scheme holds every rectangle whose corner obeys ``(C / 1.732)^2 + (d / 2.513)^2 <=
1``; this is sharp where either rate dominates. The rate is `central_rate`.

*First-order upwind*, which a limited scheme is where its limiter is off. A row has ``-C`` on the diagonal and moduli of
sum ``C`` beside it; with diffusion the eigenvalues lie in the discs of radius ``C`` about ``-C - s``, ``0 <= s <= d``.
The worst is ``-(2 C + d)``, a mode of alternating signs, and the regions of the second- and third-order schemes hold
all of these discs once they hold that point: ``2 C + d <= 2`` and ``<= 2.513``. Up to 2 a step is a convex combination
of old values, which gives a maximum principle. The rate is `upwind_rate`. Where the limiter is on, a smooth solution
sees Fromm's scheme, whose spectrum has the same leftmost point; with three stages it is stable up to ``2 C = 2.35``
without diffusion, which is more than the `SAFETY` share of 2.513.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from shodh.physics.solvers.operators import shifted

# Ends of the regions of stability of two- and three-stage Runge-Kutta schemes of order two and three.
REAL_RK2 = 2.0
REAL_RK3 = 2.5127
IMAGINARY_RK3 = 3.0**0.5
# Share of the limit that is used, since a velocity changes within a step. 0.79 * REAL_RK3 keeps upwind schemes below 2,
# where they have a maximum principle.
SAFETY = 0.79
# More steps than this within one interval mean that the solution has run away, or that its parameters are absurd.
MOST_STEPS = 200_000


def diffusion_rate(diffusivity: float | Tensor, spacing: Sequence[float]) -> float | Tensor:
    """``d``: the fastest decay that second differences give."""
    return 4.0 * diffusivity * sum(h**-2 for h in spacing)


def advection_rate(velocity: Tensor, spacing: Sequence[float]) -> Tensor:
    """``C`` of a padded face velocity ``[D, *(n+2), B]``; ``[B]``.

    Half the sum of ``|u| / h`` over the faces of a cell: what flows out of it (and in), and the modulus of a row of the
    central scheme. The row of a staggered velocity component is the mean of those of its two cells.
    """
    total: Tensor | None = None
    for axis, h in enumerate(spacing):
        upper, lower = (shifted(velocity[axis], axis, offset) for offset in (0, -1))
        faces = (upper.abs() + lower.abs()).mul_(0.5 / h)
        total = faces if total is None else total.add_(faces)
    assert total is not None
    return total.flatten(0, -2).amax(0)


def central_rate(advection: Tensor, diffusion: float | Tensor) -> Tensor:
    """Steps per time that central differences ask of the third-order scheme."""
    decay = diffusion / REAL_RK3
    # A number is not copied to the device, which would be waited for.
    decay = decay.to(advection) if isinstance(decay, Tensor) else torch.full_like(advection, decay)
    return torch.hypot(advection / IMAGINARY_RK3, decay)


def upwind_rate(advection: Tensor, diffusion: float | Tensor, real: float = REAL_RK3) -> Tensor:
    """Steps per time that first-order upwind asks of a scheme that is stable up to ``-real``."""
    return (2.0 * advection + diffusion) / real


def waits(device: torch.device) -> bool:
    """Whether reading a number waits for what the device was given to do."""
    return device.type != "cpu"


def steps_to_look(count: Tensor) -> int:
    """Steps to take before the host reads again how many are left of ``count [B]``, those wanted now; 0: none.

    Where reading waits, three quarters of them: some reads for a whole interval. Rates that fall by more than a quarter
    meanwhile cost steps of no length, which change nothing.
    """
    wanted = int(count.max())
    return -(-3 * wanted // 4) if waits(count.device) else min(wanted, 1)


class Clock:
    """The steps that each trajectory of a batch takes; kept on the device, so that no step waits for it.

    Attributes
    ----------
    steps, longest, share, courant : Tensor [B]
        Number of steps, the longest one, the largest share of its limit of stability that one took, and the largest
        Courant number at the start or the end of one; fp64.
    """

    def __init__(self, batch: int, device: str | torch.device = "cpu") -> None:
        self.steps, self.longest, self.share, self.courant = torch.zeros(4, batch, dtype=torch.float64, device=device)

    def record(self, dt: Tensor, rate: Tensor) -> None:
        """Count a step of ``dt [B]`` (zero: none) where the limit of stability is ``1 / rate [B]``."""
        self.steps += dt > 0
        self.longest = torch.maximum(self.longest, dt)
        self.share = torch.maximum(self.share, torch.where(dt > 0, dt * rate, 0.0))

    def march(
        self,
        interval: float,
        rates: Callable[[], tuple[Tensor, Tensor]],
        step: Callable[[Tensor], None],
        courant: float = 1.0,
        most: float = MOST_STEPS,
    ) -> Tensor:
        """Advance by ``interval``, each trajectory in steps of its own that land on the end.

        Parameters
        ----------
        interval : float
        rates : callable
            Of the current state: steps per time that stability asks for, and the rate whose Courant number is
            bounded for accuracy; ``[B]``.
        step : callable
            Takes ``dt [B]``, fp64 on the device of the rates; zero leaves a trajectory as it is.
        courant : float
            Bound of the Courant number.
        most : float
            Steps beyond which a trajectory is given up.

        Returns
        -------
        Tensor [B]
            bool; False where the solution is no longer finite or would need more than ``most`` steps.
        """
        remaining = torch.full_like(self.share, interval)
        healthy = torch.ones_like(remaining, dtype=torch.bool)
        dt, taken = torch.zeros_like(remaining), torch.zeros_like(remaining)
        ahead = 0
        while True:
            stability, speed = (rate.double() for rate in rates())
            self.courant = torch.maximum(self.courant, torch.where(dt > 0, dt * speed, 0.0))
            rate = torch.maximum(stability / SAFETY, speed / courant)
            count = torch.ceil(remaining * rate * (1.0 - 1e-12)).clamp(min=1.0)
            healthy &= taken + count <= most
            remaining = torch.where(healthy, remaining, 0.0)
            active = remaining > 0
            if not ahead:
                ahead = steps_to_look(torch.where(active, count, 0.0))
                if not ahead:
                    return healthy
            ahead -= 1
            # Equal steps to the end, so that no sliver of a step is left over.
            dt = torch.where(active, remaining / count, 0.0)
            self.courant = torch.maximum(self.courant, torch.where(active, dt * speed, 0.0))
            self.record(dt, stability)
            step(dt)
            taken += active
            remaining = torch.where(count <= 1.0, 0.0, remaining - dt)

    def record_equal(self, steps: int, dt: float, rate: float) -> None:
        """Count ``steps`` steps of ``dt``, the same for the whole batch."""
        self.record(torch.full_like(self.steps, dt), torch.full_like(self.steps, rate))
        self.steps += steps - 1

    def diagnostics(self) -> dict[str, np.ndarray]:
        """``steps``, ``step_max`` and ``limit_share``, ``[B]`` each."""
        found = {"steps": self.steps, "step_max": self.longest, "limit_share": self.share}
        return {name: values.cpu().numpy() for name, values in found.items()}
