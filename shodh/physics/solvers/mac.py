"""Incompressible flow between two walls on a staggered (marker-and-cell) grid, second order, energy-conserving.

Equations, with density 1 and a uniform body force ``f`` along axis 1::

    du/dt + div(u u) = -grad p + div(nu (grad u + grad u^T)) + f,      div u = 0

Internal axes are (0 wall-normal, 1 along, 2 across); axes 1 and 2 are periodic. The bed (below axis 0) and the lid are
no-slip or free-slip. Layout and placement: :mod:`shodh.physics.solvers.operators`.

Scheme. Harlow & Welch (1965) placement; momentum fluxes from two-point averages in divergence form, which on a uniform
grid is skew-symmetric for a discretely divergence-free velocity: advection neither makes nor destroys kinetic energy.
Time: the three-stage strong-stability-preserving Runge-Kutta of Shu & Osher (1988), third order, with an exact
projection after every stage. Viscous terms are explicit. Every step obeys the joint limit of advection and diffusion
of the flow and of the scalar that it carries (:mod:`shodh.physics.solvers.stability`).

Convecting frame. The solver may work in a frame that moves with ``frame_velocity`` along axis 1: it advances
``u - frame_velocity``, the bed moves backwards, and the largest advective speed falls by about half, which allows a
larger step and lowers dispersion errors (Bernardini et al., J. Comput. Phys. 232, 2013).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shodh.physics.solvers.operators import divergence_padded, fill_periodic, inner, padded_like, subtract_gradient
from shodh.physics.solvers.poisson import ChannelPoisson
from shodh.physics.solvers.scalar import SSP_RK3, Transported
from shodh.physics.solvers.stability import IMAGINARY_RK3, Clock, advection_rate, central_rate, diffusion_rate

# A Courant number beyond this cannot be asked for: the limit of stability of central fluxes without diffusion.
ADVECTION_LIMIT = IMAGINARY_RK3


class ChannelFlow:
    """State and time step of a batch of ``B`` flows on one grid.

    Parameters
    ----------
    space : (n0, n1, n2)
        Cells along the internal axes, each >= 2.
    lengths : 3 floats
        Box size along the internal axes.
    batch : int
    viscosity : float
        Kinematic viscosity.
    force : float
        Body force per mass along axis 1.
    no_slip_bed, no_slip_lid : bool
        Otherwise free-slip.
    frame_velocity : float
        Speed of the frame along axis 1.
    dtype, device

    Attributes
    ----------
    velocity : Tensor [3, n0+2, n1+2, n2+2, B]
        Padded face velocity in the moving frame; component order is the internal axis order.
    clock : Clock
        The steps taken.
    """

    def __init__(
        self,
        space: Sequence[int],
        lengths: Sequence[float],
        batch: int,
        *,
        viscosity: float,
        force: float = 0.0,
        no_slip_bed: bool = True,
        no_slip_lid: bool = False,
        frame_velocity: float = 0.0,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        self.space = tuple(space)
        self.spacing = tuple(length / n for length, n in zip(lengths, space))
        self.viscosity, self.force = viscosity, force
        self.no_slip_bed, self.no_slip_lid, self.frame_velocity = no_slip_bed, no_slip_lid, frame_velocity
        like = torch.empty(0, dtype=dtype, device=device)
        self.velocity = padded_like(space, batch, components=3, like=like)
        self._tendency = torch.zeros(3, *space, batch, dtype=dtype, device=device)
        self._start = torch.zeros_like(self._tendency)
        largest = max(
            (space[0] + 1) * (space[1] + 1) * space[2],
            (space[0] + 1) * space[1] * (space[2] + 1),
            space[0] * (space[1] + 1) * (space[2] + 1),
        )
        self._scratch = torch.empty(2, largest * batch, dtype=dtype, device=device)
        self._divergence = torch.empty(*space, batch, dtype=dtype, device=device)
        # Batch outermost, as the FFT wants it; a copy of the finished divergence is cheaper than strided differences.
        self._rhs = torch.empty(batch, *space, dtype=dtype, device=device)
        self._pressure = padded_like(space, batch, like=like)
        self._poisson = ChannelPoisson(space, self.spacing, dtype, device)
        self.clock = Clock(batch, device)

    @property
    def interior(self) -> Tensor:
        """View ``[3, n0, n1, n2, B]`` of the velocity without halos, in the moving frame."""
        return inner(self.velocity, first=1)

    def set_velocity(self, velocity: Tensor) -> None:
        """Take a velocity ``[3, n0, n1, n2, B]`` of the frame at rest, make it solenoidal and impermeable."""
        self.interior.copy_(velocity)
        self.interior[1] -= self.frame_velocity
        # A large potential leaves its rounding, times 4 / h^2, as divergence; the second time it is small.
        self.project()
        self.project()

    def get_velocity(self) -> Tensor:
        """Velocity ``[3, n0, n1, n2, B]`` in the frame at rest (on the moving grid); a copy."""
        velocity = self.interior.clone()
        velocity[1] += self.frame_velocity
        return velocity

    def fill_halos(self) -> None:
        """Apply walls and periodicity to the halo entries."""
        velocity, n0 = self.velocity, self.space[0]
        velocity[0, 0] = 0.0
        velocity[0, n0] = 0.0
        for halo, cell, no_slip in ((0, 1, self.no_slip_bed), (n0 + 1, n0, self.no_slip_lid)):
            if no_slip:
                torch.neg(velocity[1:, cell], out=velocity[1:, halo])
                velocity[1, halo] -= 2.0 * self.frame_velocity
            else:
                velocity[1:, halo] = velocity[1:, cell]
        fill_periodic(velocity, 2)
        fill_periodic(velocity, 3)

    def project(self, moving: Tensor | float = 1.0) -> None:
        """Remove the divergence exactly (to rounding) and refresh the halos.

        ``moving``, 0 or 1, ``[B, 1, 1, 1]`` or a number: a flow with 0 stays as it is, its pressure being zero.
        """
        self.fill_halos()
        divergence_padded(self.velocity, self.spacing, out=self._divergence)
        torch.mul(self._divergence.permute(3, 0, 1, 2), moving, out=self._rhs)
        solution = self._poisson.solve(self._rhs)
        pressure, n0 = self._pressure, self.space[0]
        inner(pressure).copy_(solution.permute(1, 2, 3, 0))
        pressure[n0 + 1] = pressure[n0]
        fill_periodic(pressure, 1)
        fill_periodic(pressure, 2)
        subtract_gradient(self.velocity, pressure, self.spacing)
        self.fill_halos()

    def step(self, dt: float | Tensor, scalar: Transported | None = None) -> None:
        """Advance by one step, and ``scalar`` (in the same moving frame) with the flow.

        ``dt`` may differ from flow to flow, ``[B]``; a flow whose ``dt`` is zero is left bitwise as it is.
        """
        dt = torch.as_tensor(dt, dtype=self.velocity.dtype, device=self.velocity.device)
        moving = (dt != 0).to(dt.dtype).view(-1, 1, 1, 1)
        self._start.copy_(self.interior)
        if scalar is not None:
            scalar.begin_step()
        for weight in SSP_RK3:
            if scalar is not None:
                scalar.stage(self.velocity, weight, dt)
            self.interior.addcmul_(self.tendency(), dt)
            if weight:
                self.interior.lerp_(self._start, weight)
            self.project(moving)

    def advance(self, interval: float, courant: float, scalar: Transported | None = None) -> Tensor:
        """Advance all flows by ``interval``, each in steps of its own.

        A step follows from the velocity at its start, and does not depend on the other flows of the batch; those that
        need fewer steps wait.

        Parameters
        ----------
        interval : float
        courant : float
            Upper bound of ``dt sum_i |u_i| / h_i`` for accuracy; the limits of stability of the flow and of ``scalar``
            hold besides.

        Returns
        -------
        Tensor [B]
            bool; False where a flow blew up (no longer finite, or its steps became absurdly small).
        """

        def rates() -> tuple[Tensor, Tensor]:
            speed = self.courant(1.0)
            stability = self.stability_rate(speed)
            if scalar is not None:
                stability = torch.maximum(stability, scalar.stability_rate(speed))
            return stability, speed

        return self.clock.march(interval, rates, lambda dt: self.step(dt, scalar), courant)

    def stability_rate(self, advection: Tensor | None = None) -> Tensor:
        """Steps per time that the momentum equation asks for, ``[B]``; ``advection`` is that of now, where known."""
        advection = self.courant(1.0) if advection is None else advection
        return central_rate(advection, diffusion_rate(self.viscosity, self.spacing))

    def tendency(self) -> Tensor:
        """Right-hand side ``[3, n0, n1, n2, B]`` without the pressure; the buffer is reused by the next call."""
        for axis in range(3):
            self._normal_flux(axis)
        for first, second in ((0, 1), (0, 2), (1, 2)):
            self._shear_flux(first, second)
        self._tendency[0, -1] = 0.0
        if self.force:
            self._tendency[1] += self.force
        return self._tendency

    def _normal_flux(self, axis: int) -> None:
        """``out_i = d_i(2 nu d_i u_i - u_i^2)``, with fluxes at cell centres."""
        component, h = self.velocity[axis], self.spacing[axis]
        n = self.space[axis]
        for other in range(3):
            if other != axis:
                component = component.narrow(other, 1, self.space[other])
        lower, upper = component.narrow(axis, 0, n + 1), component.narrow(axis, 1, n + 1)
        flux = self._buffer(0, lower.shape)
        torch.add(lower, upper, out=flux)
        flux.mul_(flux)
        # flux is 4 u^2; the viscous part is scaled alike and one factor is left to the difference.
        scale = 8.0 * self.viscosity / h
        flux.add_(lower, alpha=scale).sub_(upper, alpha=scale)
        out = self._tendency[axis]
        torch.sub(flux.narrow(axis, 0, n), flux.narrow(axis, 1, n), out=out)
        out.mul_(0.25 / h)

    def _shear_flux(self, i: int, j: int) -> None:
        """Flux ``u_i u_j - nu (d_j u_i + d_i u_j)`` at the edges, which serves both components."""
        (other,) = {0, 1, 2} - {i, j}
        u_i, u_j = (self.velocity[a].narrow(other, 1, self.space[other]) for a in (i, j))
        n_i, n_j = self.space[i], self.space[j]
        low_i, high_i = (u_i.narrow(i, 0, n_i + 1).narrow(j, s, n_j + 1) for s in (0, 1))
        low_j, high_j = (u_j.narrow(j, 0, n_j + 1).narrow(i, s, n_i + 1) for s in (0, 1))
        flux, mean = self._buffer(0, low_i.shape), self._buffer(1, low_i.shape)
        torch.add(low_i, high_i, out=flux)
        torch.add(low_j, high_j, out=mean)
        flux.mul_(mean)
        scale = 4.0 * self.viscosity / self.spacing[j]
        flux.add_(low_i, alpha=scale).sub_(high_i, alpha=scale)
        scale = 4.0 * self.viscosity / self.spacing[i]
        flux.add_(low_j, alpha=scale).sub_(high_j, alpha=scale)
        for axis, along in ((i, j), (j, i)):
            faces = flux.narrow(axis, 1, self.space[axis])
            n, weight = self.space[along], 0.25 / self.spacing[along]
            out = self._tendency[axis]
            out.add_(faces.narrow(along, 0, n), alpha=weight).sub_(faces.narrow(along, 1, n), alpha=weight)

    def _buffer(self, index: int, shape: torch.Size) -> Tensor:
        return self._scratch[index, : shape.numel()].view(shape)

    def courant(self, dt: float) -> Tensor:
        """Largest ``dt sum_i |u_i| / h_i`` of each flow, ``[B]``, in the moving frame (mean of a cell's two faces)."""
        return dt * advection_rate(self.velocity, self.spacing)

    def divergence(self) -> Tensor:
        """Discrete divergence ``[n0, n1, n2, B]``."""
        return divergence_padded(self.velocity, self.spacing)

    def wall_shear(self) -> Tensor:
        """Mean viscous stress on the bed, ``[B]``."""
        gradient = (self.velocity[1, 1] - self.velocity[1, 0]) / self.spacing[0]
        return self.viscosity * inner_plane(gradient).mean((0, 1))


def inner_plane(padded: Tensor) -> Tensor:
    """View of a padded plane ``[n1+2, n2+2, B]`` without its halo."""
    return padded[1:-1, 1:-1]
