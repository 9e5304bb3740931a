"""Conservative transport of a passive scalar on the staggered grid.

``dc/dt + div(u c) = div(D grad c)`` in flux form, so the total is conserved to rounding. The advective face value is
second order: upwind, with a slope limited after van Leer (harmonic mean of the two neighbouring differences, J. Comput.
Phys. 14, 1974). In one dimension that scheme is total-variation diminishing; in three dimensions with a discretely
divergence-free velocity over- and undershoots stay at the per-cent level (the tests bound them). A constant stays
constant as exactly as the velocity is divergence-free. Closed faces (walls, solids) carry no flux: their
velocity is zero and the mask ``open_faces`` removes their diffusion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from shodh.physics.bounds import Range
from shodh.physics.solvers.operators import fill_periodic, inner, padded_like
from shodh.physics.solvers.stability import REAL_RK3, diffusion_rate, upwind_rate

# Weights w of the strong-stability-preserving Runge-Kutta schemes of Shu & Osher (1988), one a stage:
# c <- w c0 + (1 - w) (c + dt L(c)), with c0 the state at the start of the step.
SSP_RK2 = (0.0, 0.5)
SSP_RK3 = (0.0, 0.75, 1.0 / 3.0)
# A tracer that starts between 0 and 1: by how much a limited scheme may leave that in three dimensions.
TRACER_RANGE = Range("tracer", -0.02, 1.02)


class Transported(Protocol):
    """A scalar that a flow can take along, stage by stage of its Runge-Kutta steps."""

    def begin_step(self) -> None:
        """Remember the state at the start of a step."""

    def stage(self, velocity: Tensor, weight: float, dt: float | Tensor) -> None:
        """One Shu-Osher stage in the flow's padded velocity at the start of the stage."""

    def stability_rate(self, advection: Tensor) -> Tensor:
        """Steps per time that the scalar asks for in a flow of that rate of advection; both ``[B]``."""


class ScalarTransport:
    """A batch of scalars and their transport by a given velocity.

    Parameters
    ----------
    space : 3 ints
    spacing : 3 floats
    batch : int
    diffusivity : float or Tensor [B]
    periodic : 3 bools
        An axis that is not periodic is closed at both ends.
    open_faces : Tensor [3, *space, B], optional
        1 where the upper face is open, 0 where it is closed; default: all open (but for walls).

    Attributes
    ----------
    values : Tensor [*space, B]
    """

    def __init__(
        self,
        space: Sequence[int],
        spacing: Sequence[float],
        batch: int,
        diffusivity: float | Tensor,
        *,
        periodic: Sequence[bool] = (True, True, True),
        open_faces: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        self.space, self.spacing, self.periodic = tuple(space), tuple(spacing), tuple(periodic)
        self.diffusivity = diffusivity
        like = torch.empty(0, dtype=dtype, device=device)
        self.values = torch.zeros(*space, batch, dtype=dtype, device=device)
        self._start = torch.zeros_like(self.values)
        self._scalar = padded_like(space, batch, like=like)
        self._slope = padded_like(space, batch, like=like)
        self._open: list[Tensor] | None = None
        if open_faces is not None:
            self._open = [self._with_lower_face(open_faces[axis].to(dtype), axis) for axis in range(3)]

    def begin_step(self) -> None:
        """Remember the values at the start of a Runge-Kutta step."""
        self._start.copy_(self.values)

    def stage(self, velocity: Tensor, weight: float, dt: float | Tensor) -> None:
        """One Shu-Osher stage ``c <- w c0 + (1 - w)(c + dt L(c))``; ``dt`` may be one for each scalar."""
        self.values.add_(self.tendency(self.values, velocity).mul_(dt))
        if weight:
            self.values.lerp_(self._start, weight)

    def stability_rate(self, advection: Tensor, real: float = REAL_RK3) -> Tensor:
        """Steps per time that first-order upwind, the scheme where the limiter is off, asks for; ``[B]``.

        ``real`` is the end of the region of stability of the Runge-Kutta scheme. Closed faces only take from the rates.
        """
        return upwind_rate(advection, diffusion_rate(self.diffusivity, self.spacing), real)

    def _with_lower_face(self, faces: Tensor, axis: int) -> Tensor:
        """Put the lower face of the first cell before the ``n`` upper faces."""
        first = faces.narrow(axis, self.space[axis] - 1, 1)
        return torch.cat((first if self.periodic[axis] else torch.zeros_like(first), faces), dim=axis)

    def tendency(self, scalar: Tensor, velocity: Tensor) -> Tensor:
        """``-div(u c - D grad c)`` of ``scalar [*space, B]`` in a padded face velocity ``[3, *(n+2), B]``."""
        inner(self._scalar).copy_(scalar)
        out = torch.zeros_like(scalar)
        for axis in range(3):
            flux = self._flux(axis, velocity)
            n, weight = self.space[axis], 1.0 / self.spacing[axis]
            out.add_(flux.narrow(axis, 0, n), alpha=weight).sub_(flux.narrow(axis, 1, n), alpha=weight)
        return out

    def _flux(self, axis: int, velocity: Tensor) -> Tensor:
        """Flux through the ``n + 1`` faces of ``axis``, the lower face of the first cell included."""
        n = self.space[axis]
        self._fill(self._scalar, axis)
        scalar, slope, speed = (self._line(f, axis) for f in (self._scalar, self._slope, velocity[axis]))
        lower, upper = scalar.narrow(axis, 0, n + 1), scalar.narrow(axis, 1, n + 1)
        difference = upper - lower
        if self._open is not None:
            difference *= self._open[axis]
        behind, ahead = difference.narrow(axis, 0, n), difference.narrow(axis, 1, n)
        # Half of van Leer's harmonic slope: a b / (a + b) where a b > 0, else 0, also where both are 0 (0 / 0).
        inside = slope.narrow(axis, 1, n)
        torch.div((behind * ahead).clamp_(min=0.0), behind + ahead, out=inside).nan_to_num_(0.0)
        self._fill(self._slope, axis)

        u = speed.narrow(axis, 0, n + 1)
        left, right = lower + slope.narrow(axis, 0, n + 1), upper - slope.narrow(axis, 1, n + 1)
        flux = torch.where(u > 0, left, right).mul_(u)
        diffusivity = self.diffusivity / self.spacing[axis]
        if isinstance(diffusivity, Tensor):
            flux -= difference * diffusivity
        else:
            flux.sub_(difference, alpha=diffusivity)
        return flux

    def _line(self, padded: Tensor, axis: int) -> Tensor:
        """Keep the halo of ``axis`` only."""
        for other in range(3):
            if other != axis:
                padded = padded.narrow(other, 1, self.space[other])
        return padded

    def _fill(self, padded: Tensor, axis: int) -> None:
        if self.periodic[axis]:
            fill_periodic(padded, axis)
        elif padded is self._scalar:
            padded.select(axis, 0).copy_(padded.select(axis, 1))
            padded.select(axis, self.space[axis] + 1).copy_(padded.select(axis, self.space[axis]))
        else:
            padded.select(axis, 0).zero_()
            padded.select(axis, self.space[axis] + 1).zero_()
