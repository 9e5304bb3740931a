"""Incompressible flow through a plane channel with obstacles, on a staggered (marker-and-cell) grid, second order.

    du/dt + div(u u) = -grad p + nu lap u,      div u = 0

Axes are (0 along, 1 across). Fluid enters through axis 0 with a given profile, leaves through its other end by a
convective outflow condition with the bulk speed (its total is set to the inflow), and does not slip on the two walls
and on solid cells. Momentum fluxes are two-point averages; time: the three-stage scheme of Shu & Osher with an exact
projection (cosine transforms) after every stage and the pressure of the last step in the tendency.

Solids. Every face that touches a solid cell is set to zero before each projection (direct forcing, Fadlun et al., J.
Comput. Phys. 161, 2000). The projection does not know the solids: the divergence is zero to rounding in *every* cell,
and what slips through a closed face falls with the change of the pressure in a step; it vanishes in steady flow.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shodh.physics.solvers.poisson import neumann_modes
from shodh.physics.solvers.scalar import SSP_RK3
from shodh.physics.solvers.stability import Clock, central_rate, diffusion_rate


class ThroughFlow:
    """A batch of channel flows past solids and its time step.

    Parameters
    ----------
    solid : Tensor [X, Y, B]
        bool.
    lengths : (along, across)
    viscosity : float
    inflow : Tensor [Y]
        Speed along the channel at the inlet; its mean is the speed at which structures leave.
    dtype : torch.dtype

    Attributes
    ----------
    along : Tensor [X + 1, Y, B]
        Velocity through the faces of axis 0; the first is the inlet.
    across : Tensor [X, Y + 1, B]
        Velocity through the faces of axis 1; the first and the last are walls.
    pressure : Tensor [X, Y, B]
        Over density, zero mean.
    force : Tensor [2, B]
        Force of the fluid on the solids in the last step, per density and depth.
    clock : Clock
        The steps taken.
    """

    def __init__(
        self, solid: Tensor, lengths: Sequence[float], viscosity: float, inflow: Tensor, dtype: torch.dtype
    ) -> None:
        self.viscosity = viscosity
        nx, ny, batch = solid.shape
        device = solid.device
        self.spacing = (lengths[0] / nx, lengths[1] / ny)
        self.inflow = inflow.to(device, dtype)[:, None]
        self.bulk = float(inflow.mean())
        pad_x, pad_y = solid.new_zeros(1, ny, batch), solid.new_zeros(nx, 1, batch)
        wall = torch.ones_like(pad_y)
        self._closed_along = torch.cat((pad_x, solid)) | torch.cat((solid, pad_x))
        self._closed_across = torch.cat((wall, solid), 1) | torch.cat((solid, wall), 1)
        self.along = self.inflow.expand(nx + 1, ny, batch).clone()
        self.across = torch.zeros(nx, ny + 1, batch, dtype=dtype, device=device)
        self.pressure = torch.zeros(nx, ny, batch, dtype=dtype, device=device)
        self.force = torch.zeros(2, batch, dtype=dtype, device=device)
        (modes_x, symbol_x), (modes_y, symbol_y) = (
            neumann_modes(n, h, device=device) for n, h in zip((nx, ny), self.spacing)
        )
        symbol = symbol_x[:, None] + symbol_y
        self._inverse = torch.where(symbol > 0, -1.0 / symbol.clamp(min=1e-300), 0.0).to(dtype)
        self._modes = modes_x.to(dtype), modes_y.to(dtype)
        self.clock = Clock(batch, device)
        self._enforce()
        self._project()

    def divergence(self) -> Tensor:
        """Discrete divergence ``[X, Y, B]``."""
        hx, hy = self.spacing
        return torch.diff(self.along, dim=0) / hx + torch.diff(self.across, dim=1) / hy

    def speed_in_solid(self) -> Tensor:
        """Largest speed through closed faces, ``[B]``."""
        along, across = self.along.abs() * self._closed_along, self.across.abs() * self._closed_across
        return torch.maximum(along.flatten(0, 1).amax(0), across.flatten(0, 1).amax(0))

    def rate(self) -> Tensor:
        """Largest ``sum_i |u_i| / h_i`` of each flow, ``[B]``: of a cell, the mean of its two faces.

        The outlet, upwind with the bulk speed, counts as a cell that moves with it.
        """
        (hx, hy), along, across = self.spacing, self.along.abs(), self.across.abs()
        cells = 0.5 * ((along[1:] + along[:-1]) / hx + (across[:, 1:] + across[:, :-1]) / hy)
        return cells.flatten(0, 1).amax(0).clamp(min=abs(self.bulk) / hx)

    def stability_rate(self, advection: Tensor | None = None) -> Tensor:
        """Steps per time that the momentum equation asks for, ``[B]``; ``advection`` is that of now, where known."""
        advection = self.rate() if advection is None else advection
        return central_rate(advection, diffusion_rate(self.viscosity, self.spacing))

    def advance(self, interval: float, courant: float) -> Tensor:
        """Advance all flows by ``interval``, each in steps of its own.

        Returns
        -------
        Tensor [B]
            bool; False where a flow blew up (no longer finite, or its steps became absurdly small).
        """

        def rates() -> tuple[Tensor, Tensor]:
            speed = self.rate()
            return self.stability_rate(speed), speed

        return self.clock.march(interval, rates, lambda dt: self.step(dt.to(self.along)), courant)

    def step(self, dt: Tensor) -> None:
        """One step of ``dt [B]``; a flow whose ``dt`` is zero is left as it is."""
        start = self.along, self.across, self.pressure, self.force
        for weight in SSP_RK3:
            du, dv = self._tendency()
            self.along, self.across = (
                torch.lerp(now + dt * change, before, weight)
                for now, change, before in zip((self.along, self.across), (du, dv), start)
            )
            pushed = self._enforce()
            potential = self._project()
        # The last stage makes the share 1 - weight of a step.
        size = torch.where(dt > 0, (1.0 - weight) * dt, 1.0)
        self.pressure = self.pressure + potential / size
        self.force = pushed / size
        moving = dt > 0
        self.along, self.across, self.pressure, self.force = (
            torch.where(moving, now, before)
            for now, before in zip((self.along, self.across, self.pressure, self.force), start)
        )

    def _tendency(self) -> tuple[Tensor, Tensor]:
        """Rates of change of both components, zero on faces that boundary conditions fix."""
        (hx, hy), u, v, nu = self.spacing, self.along, self.across, self.viscosity
        du, dv = torch.zeros_like(u), torch.zeros_like(v)
        # Ghost values: no slip on the walls and no cross flow at the inlet; no gradient at the outlet.
        u_padded = torch.cat((-u[:, :1], u, -u[:, -1:]), 1)
        v_padded = torch.cat((-v[:1], v, v[-1:]), 0)
        u_edge, v_edge = 0.5 * (u_padded[:, 1:] + u_padded[:, :-1]), 0.5 * (v_padded[1:] + v_padded[:-1])
        advected = u_edge * v_edge
        flux = (0.5 * (u[1:] + u[:-1])).square() - nu / hx * torch.diff(u, dim=0)
        side = (advected - nu / hy * torch.diff(u_padded, dim=1))[1:-1]
        du[1:-1] = -torch.diff(flux, dim=0) / hx - torch.diff(side, dim=1) / hy
        du[1:-1] -= torch.diff(self.pressure, dim=0) / hx
        du[-1] = -self.bulk * (u[-1] - u[-2]) / hx
        flux = (0.5 * (v[:, 1:] + v[:, :-1])).square() - nu / hy * torch.diff(v, dim=1)
        side = (advected - nu / hx * torch.diff(v_padded, dim=0))[:, 1:-1]
        dv[:, 1:-1] = -torch.diff(flux, dim=1) / hy - torch.diff(side, dim=0) / hx
        dv[:, 1:-1] -= torch.diff(self.pressure, dim=1) / hy
        return du, dv

    def _enforce(self) -> Tensor:
        """Stop the fluid on closed faces; returns the momentum taken from it there, ``[2, B]``."""
        area = self.spacing[0] * self.spacing[1]
        pushed = []
        for faces, closed in ((self.along, self._closed_along), (self.across, self._closed_across)):
            pushed.append(area * (faces * closed).sum((0, 1)))
            faces.masked_fill_(closed, 0.0)
        self.along[0] = self.inflow
        # What enters leaves: a uniform correction of the outlet.
        self.along[-1] += self.inflow.mean() - self.along[-1].mean(0)
        return torch.stack(pushed)

    def _project(self) -> Tensor:
        """Remove the divergence by the gradient of the returned potential ``[X, Y, B]``."""
        (hx, hy), (modes_x, modes_y) = self.spacing, self._modes
        rhs = self.divergence().permute(2, 0, 1)
        spectrum = modes_x.T @ rhs @ modes_y * self._inverse
        potential = (modes_x @ spectrum @ modes_y.T).permute(1, 2, 0)
        self.along[1:-1] -= torch.diff(potential, dim=0) / hx
        self.across[:, 1:-1] -= torch.diff(potential, dim=1) / hy
        return potential
