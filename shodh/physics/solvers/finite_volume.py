"""Finite volumes for hyperbolic systems of a fluid with a mass, a momentum and, for a gas, an energy.

    dU/dt + sum_i dF_i(U)/dx_i = (viscous terms),      U = (rho, rho u[, E])

Shallow water is the case ``rho = h``, ``p = g h^2 / 2`` without energy. Scheme: MUSCL (van Leer 1979) with monotonised
central slopes of the primitive variables, HLLC fluxes with Davis' wave speeds (Toro, Riemann Solvers, chapter 10), the
two-stage strong-stability-preserving Runge-Kutta of Shu & Osher. Second order where the solution is smooth, first at
shocks; every conserved quantity that no boundary lets out is conserved to rounding. The limited values at a face lie
between those of the cells beside it, so densities and pressures there stay positive.

Stability. Where the limiters are off the scheme is first-order upwind with waves of rate ``C = max sum_i (|u_i| + c) /
h_i``, and two stages are stable for ``2 C + d <= 2``, with ``d = 4 nu sum_i h_i^-2`` for viscous terms of the stages
(:mod:`shodh.physics.solvers.stability`). Steps obey ``C / courant + d / (2 * 0.8) <= 1``, which holds both the limit
and the convex combinations that keep averages positive (``courant <= 1/2``).

Viscous terms that would dictate the step are integrated by the stabilised scheme of
:mod:`shodh.physics.solvers.stabilized` in a Strang splitting; mild ones are part of the stages. Which of the two is
decided for each trajectory by its initial state.

Layout: ``[variables, *space, B]`` with the batch innermost, any number of space axes. Every trajectory has steps of its
own, so it does not depend on its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from shodh.physics.solvers.stability import Clock
from shodh.physics.solvers.stabilized import MOST_STAGES, legendre_stages, legendre_step, stability_limit
from shodh.schema.fields import Boundary

# Viscous terms are split off where the step for them would be this many times shorter than that for the waves.
SPLIT_FROM = 3.0
# Share of the limit of stability of viscous steps that is used where they are not split off.
VISCOUS_SAFETY = 0.8
# By how much the viscous rate may grow in a step, while waves move the density about.
DENSITY_CHANGE = 1.2
# Steps that would be shorter than this part of the interval mean that the solution has blown up.
SMALLEST_STEP = 1e-7


class Fluid(Protocol):
    """Thermodynamics of a fluid with primitive variables ``(rho, u_1 .. u_d[, p])``."""

    has_energy: bool

    def pressure(self, primitive: Tensor) -> Tensor:
        """Pressure of ``[variables, ...]``."""

    def sound_speed(self, primitive: Tensor) -> Tensor:
        """Speed of small disturbances relative to the fluid."""

    def internal_energy(self, pressure: Tensor) -> Tensor:
        """Energy per volume at rest; used where ``has_energy``."""

    def pressure_of_energy(self, internal: Tensor) -> Tensor:
        """Inverse of `internal_energy`."""


class Viscosity(Protocol):
    """Viscous terms of the conserved variables."""

    def diffusivity(self, primitive: Tensor) -> Tensor:
        """Largest diffusivity of each trajectory, ``[B]``."""

    def tendency(self, primitive: Tensor, pad: Callable[[Tensor, int, int], Tensor]) -> Tensor:
        """Change of the conserved variables per time."""


def to_conserved(fluid: Fluid, primitive: Tensor, ndim: int) -> Tensor:
    """``(rho, rho u[, E])`` of ``(rho, u[, p])``."""
    density, velocity = primitive[:1], primitive[1 : 1 + ndim]
    parts = [density, density * velocity]
    if fluid.has_energy:
        kinetic = 0.5 * density[0] * velocity.square().sum(0)
        parts.append((fluid.internal_energy(primitive[1 + ndim]) + kinetic)[None])
    return torch.cat(parts)


def to_primitive(fluid: Fluid, conserved: Tensor, ndim: int) -> Tensor:
    """``(rho, u[, p])`` of ``(rho, rho u[, E])``."""
    density = conserved[:1]
    velocity = conserved[1 : 1 + ndim] / density
    parts = [density, velocity]
    if fluid.has_energy:
        kinetic = 0.5 * density[0] * velocity.square().sum(0)
        parts.append(fluid.pressure_of_energy(conserved[1 + ndim] - kinetic)[None])
    return torch.cat(parts)


def physical_flux(fluid: Fluid, primitive: Tensor, conserved: Tensor, axis: int, ndim: int) -> Tensor:
    """Flux of the conserved variables along ``axis``."""
    speed, pressure = primitive[1 + axis], fluid.pressure(primitive)
    flux = conserved * speed
    flux[1 + axis] += pressure
    if fluid.has_energy:
        flux[1 + ndim] += pressure * speed
    return flux


def hllc_flux(fluid: Fluid, left: Tensor, right: Tensor, axis: int, ndim: int) -> Tensor:
    """Flux between the primitive states ``left`` and ``right`` ``[variables, ...]``: three waves, contact resolved."""
    u_l, u_r = left[1 + axis], right[1 + axis]
    c_l, c_r = fluid.sound_speed(left), fluid.sound_speed(right)
    s_l, s_r = torch.minimum(u_l - c_l, u_r - c_r), torch.maximum(u_l + c_l, u_r + c_r)
    p_l, p_r = fluid.pressure(left), fluid.pressure(right)
    m_l, m_r = left[0] * (s_l - u_l), right[0] * (s_r - u_r)
    contact = (p_r - p_l + m_l * u_l - m_r * u_r) / (m_l - m_r)

    def side(primitive: Tensor, wave: Tensor, mass: Tensor, pressure: Tensor, upwind: Tensor) -> Tensor:
        conserved = to_conserved(fluid, primitive, ndim)
        flux = physical_flux(fluid, primitive, conserved, axis, ndim)
        density = mass / (wave - contact)
        star = density * torch.cat((torch.ones_like(primitive[:1]), primitive[1 : 1 + ndim]))
        star[1 + axis] = density * contact
        if fluid.has_energy:
            gain = (contact - primitive[1 + axis]) * (contact + pressure / mass)
            star = torch.cat((star, (density * (conserved[1 + ndim] / primitive[0] + gain))[None]))
        return torch.where(upwind, flux, flux + wave * (star - conserved))

    from_left = side(left, s_l, m_l, p_l, s_l >= 0)
    from_right = side(right, s_r, m_r, p_r, s_r <= 0)
    return torch.where(contact >= 0, from_left, from_right)


def limited_slope(lower: Tensor, upper: Tensor) -> Tensor:
    """Monotonised central slope per cell of the differences to both neighbours."""
    central = 0.5 * (lower + upper)
    size = torch.minimum(central.abs(), 2.0 * torch.minimum(lower.abs(), upper.abs()))
    return torch.where(lower * upper > 0, torch.copysign(size, central), torch.zeros_like(size))


class FiniteVolume:
    """A batch of solutions on a box and its time step.

    Parameters
    ----------
    fluid : Fluid
    boundary : boundary of each axis
        "wall" reflects (impermeable, free slip), "open" extrapolates the last cell.
    spacing : cell size along each axis
    primitive : Tensor [variables, *space, B]
        Initial state; its dtype and device are those of the computation.
    viscosity : Viscosity, optional
    courant : float
        Target of ``dt max(sum_i (|u_i| + c) / h_i)``; up to 0.5 averages stay positive.

    Attributes
    ----------
    conserved : Tensor [variables, *space, B]
    clock : Clock
        The steps taken.
    """

    def __init__(
        self,
        fluid: Fluid,
        boundary: Sequence[Boundary],
        spacing: Sequence[float],
        primitive: Tensor,
        *,
        viscosity: Viscosity | None = None,
        courant: float = 0.4,
    ) -> None:
        self.fluid, self.boundary, self.spacing = fluid, tuple(boundary), tuple(spacing)
        self.viscosity, self.courant = viscosity, courant
        self.ndim = len(self.boundary)
        self.conserved = to_conserved(fluid, primitive, self.ndim)
        self.clock = Clock(primitive.shape[-1], primitive.device)
        waves, viscous = self.rates()
        self._split = viscous > SPLIT_FROM * VISCOUS_SAFETY * waves
        #: The same on the host, of a fluid that is viscous.
        self._split_members: list[bool] = self._split.tolist() if viscosity is not None else []

    @property
    def primitive(self) -> Tensor:
        """``(rho, u[, p])``, a new tensor."""
        return self._primitive_of(self.conserved)

    def _primitive_of(self, conserved: Tensor) -> Tensor:
        return to_primitive(self.fluid, conserved, self.ndim)

    def pad(self, primitive: Tensor, axis: int, width: int) -> Tensor:
        """Primitive variables with ``width`` layers beyond both ends of ``axis``."""
        dim, n = 1 + axis, primitive.shape[1 + axis]
        if self.boundary[axis] == "periodic":
            return torch.cat((primitive.narrow(dim, n - width, width), primitive, primitive.narrow(dim, 0, width)), dim)
        if self.boundary[axis] == "wall":
            lower, upper = (primitive.narrow(dim, start, width).flip(dim) for start in (0, n - width))
            for ghost in (lower, upper):
                ghost[1 + axis].neg_()
            return torch.cat((lower, primitive, upper), dim)
        repeats = [width if d == dim else 1 for d in range(primitive.dim())]
        lower, upper = (primitive.narrow(dim, index, 1).repeat(repeats) for index in (0, n - 1))
        return torch.cat((lower, primitive, upper), dim)

    def face_fluxes(self, primitive: Tensor, axis: int) -> Tensor:
        """Fluxes through the ``n + 1`` faces of ``axis``."""
        dim, n = 1 + axis, primitive.shape[1 + axis]
        padded = self.pad(primitive, axis, 2)
        difference = torch.diff(padded, dim=dim)
        half = 0.5 * limited_slope(difference.narrow(dim, 0, n + 2), difference.narrow(dim, 1, n + 2))
        cells = padded.narrow(dim, 1, n + 2)
        left = (cells + half).narrow(dim, 0, n + 1)
        right = (cells - half).narrow(dim, 1, n + 1)
        return hllc_flux(self.fluid, left, right, axis, self.ndim)

    def tendency(self, conserved: Tensor) -> Tensor:
        """Change per time of the conserved variables by everything that the stages integrate."""
        primitive = to_primitive(self.fluid, conserved, self.ndim)
        change = torch.zeros_like(conserved)
        for axis in range(self.ndim):
            flux = self.face_fluxes(primitive, axis)
            change -= torch.diff(flux, dim=1 + axis) / self.spacing[axis]
        if self.viscosity is not None and not all(self._split_members):
            change += torch.where(self._split, 0.0, self.viscosity.tendency(primitive, self.pad))
        return change

    def rates(self) -> tuple[Tensor, Tensor]:
        """Steps per time that the waves ask for, and explicit Euler for the viscous terms; both ``[B]``, fp64."""
        primitive = self.primitive
        sound = self.fluid.sound_speed(primitive)
        waves = sum(((primitive[1 + a].abs() + sound) / h for a, h in enumerate(self.spacing)), torch.zeros_like(sound))
        steps = waves.flatten(0, -2).amax(0).double() / self.courant
        if self.viscosity is None:
            return steps, torch.zeros_like(steps)
        return steps, self._viscous_rate(primitive)

    def _viscous_rate(self, primitive: Tensor) -> Tensor:
        assert self.viscosity is not None
        return 2.0 * sum(h**-2 for h in self.spacing) * self.viscosity.diffusivity(primitive).double()

    def advance(self, interval: float) -> Tensor:
        """Advance by ``interval``, each trajectory in steps of its own that land on the end.

        Returns
        -------
        Tensor [B]
            bool; False where the solution blew up (no longer finite, or its steps became absurdly small).
        """
        viscous = torch.zeros_like(self.clock.steps)

        def rates() -> tuple[Tensor, Tensor]:
            nonlocal viscous
            waves, viscous = self.rates()
            fewest = viscous * DENSITY_CHANGE / stability_limit(MOST_STAGES)
            wanted = torch.where(self._split, torch.maximum(waves, fewest), waves + viscous / VISCOUS_SAFETY)
            return self.courant * waves + torch.where(self._split, 0.0, viscous), wanted

        return self.clock.march(
            interval, rates, lambda dt: self.step(dt.to(viscous), viscous), most=1.0 / SMALLEST_STEP
        )

    def step(self, dt: Tensor, viscous_rate: Tensor) -> None:
        """One step of ``dt [B]``; a trajectory whose ``dt`` is zero keeps its state. ``viscous_rate``: see `rates`."""
        start, interval = self.conserved, dt.to(self.conserved.dtype)
        before = self._diffuse(start, 0.5 * dt, viscous_rate)
        first = before + interval * self.tendency(before)
        after = 0.5 * (before + first + interval * self.tendency(first))
        if any(self._split_members):
            # The waves have moved the density: the stages must suffice for the state that is there now.
            viscous_rate = torch.maximum(DENSITY_CHANGE * viscous_rate, self._viscous_rate(self._primitive_of(after)))
        self.conserved = torch.where(dt > 0, self._diffuse(after, 0.5 * dt, viscous_rate), start)

    def _diffuse(self, conserved: Tensor, dt: Tensor, rate: Tensor) -> Tensor:
        """Split viscous terms for ``dt [B]``, with as many stages as each trajectory needs."""
        if self.viscosity is None or not any(self._split_members):
            return conserved
        viscosity, fluid, ndim = self.viscosity, self.fluid, self.ndim
        # Where the solution has blown up (no rate, or a negative one) any number of stages does.
        needs, moving = torch.stack((rate * dt, dt)).tolist()  # the one wait of a step, for each of its halves
        stages = [legendre_stages(max(0.0, 2.0 * need) if need < math.inf else 0.0) for need in needs]
        result = conserved.clone()
        for count in sorted(set(stages)):
            split = zip(self._split_members, stages, moving, strict=True)
            members = [
                b for b, (is_split, needed, size) in enumerate(split) if is_split and needed == count and size > 0
            ]
            if not members:
                continue
            start, interval = conserved[..., members], dt[members].to(conserved.dtype)

            def slope(change: Tensor, _: float, start: Tensor = start, interval: Tensor = interval) -> Tensor:
                return interval * viscosity.tendency(to_primitive(fluid, start + change, ndim), self.pad)

            # In terms of the change, so that rounding neither makes nor destroys mass.
            result[..., members] += legendre_step(slope, torch.zeros_like(start), 0.0, 1.0, count)
        return result
