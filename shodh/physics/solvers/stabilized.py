"""Explicit time steps for diffusion on fine grids: the Runge-Kutta-Legendre scheme of second order (RKL2).

A step of ``s`` stages is stable for real negative eigenvalues up to ``(s^2 + s - 2) / 2`` times ``1 / dt``, so the work
for a time grows only with the square root of the stiffness; no linear system is solved. Meyer, Balsara & Aslam, J.
Comput. Phys. 257 (2014), equations 16-19.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Tendency = Callable[[Tensor, float], Tensor]

# Beyond this number of stages rounding of the recurrence in fp32 becomes visible: take more steps instead.
MOST_STAGES = 31


def legendre_stages(stiffness: float) -> int:
    """Smallest odd number of stages >= 3 that is stable for ``stiffness = dt * spectral radius`` (5 % to spare)."""
    stages = max(3, math.ceil(0.5 * (math.sqrt(9.0 + 8.0 * 1.05 * stiffness) - 1.0)))
    return stages + 1 - stages % 2


def legendre_steps(interval: float, radius: float, max_step: float = math.inf) -> tuple[int, int]:
    """Steps of at most ``max_step`` and ``MOST_STAGES`` stages that cover ``interval``, and their stages."""
    longest = min(max_step, stability_limit(MOST_STAGES) / (1.05 * radius) if radius > 0 else math.inf)
    steps = max(1, math.ceil(interval / longest - 1e-9))
    return steps, legendre_stages(interval / steps * radius)


def stability_limit(stages: int) -> float:
    """Largest ``dt * |eigenvalue|`` on the negative real axis for which a step is stable."""
    return 0.5 * (stages**2 + stages - 2)


def legendre_step(tendency: Tendency, values: Tensor, time: float, dt: float, stages: int) -> Tensor:
    """State after one step of ``dt`` from ``values`` at ``time``.

    Parameters
    ----------
    tendency : callable
        ``(values, time) -> d(values)/dt``, a new tensor each time.
    stages : int
        Odd and >= 3; see `legendre_stages`.
    """
    weight = 2.0 / stability_limit(stages)

    def b(j: int) -> float:
        return 1.0 / 3.0 if j < 3 else (j * j + j - 2.0) / (2.0 * j * (j + 1.0))

    start = tendency(values, time)
    before, current = values, torch.add(values, start, alpha=weight / 3.0 * dt)
    # Times of the stages, in steps: the scheme applied to dt/dt = 1.
    clock_before, clock = 0.0, weight / 3.0
    for j in range(2, stages + 1):
        mu = (2.0 * j - 1.0) / j * b(j) / b(j - 1)
        nu = -(j - 1.0) / j * b(j) / b(j - 2)
        slope = mu * weight
        initial_slope = -(1.0 - b(j - 1)) * slope
        following = tendency(current, time + clock * dt).mul_(slope * dt)
        following.add_(current, alpha=mu).add_(before, alpha=nu)
        following.add_(values, alpha=1.0 - mu - nu).add_(start, alpha=initial_slope * dt)
        before, current = current, following
        clock_before, clock = clock, mu * clock + nu * clock_before + slope + initial_slope
    return current
