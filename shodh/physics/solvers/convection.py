"""Thermal convection between two plates of fixed temperature: Boussinesq flow on the staggered grid, second order.

Free-fall units (plate distance, temperature difference and free-fall speed are 1)::

    du/dt + div(u u) = -grad p + sqrt(Pr/Ra) lap u + T e_0,      dT/dt + div(u T) = 1/sqrt(Ra Pr) lap T

Axis 0 is up; both plates are no-slip, the lower has temperature 1, the upper 0. The flow is that of
:mod:`shodh.physics.solvers.mac`; the temperature has central fluxes in flux form and half-cell distances to the plates.

With two-point averages for buoyancy and heat flux the discrete budgets close exactly: buoyancy does the work that the
convective heat flux carries up, and advection neither makes nor destroys temperature variance. So the exact relations
``eps = (Nu - 1) / sqrt(Ra Pr)`` and ``eps_T = Nu / sqrt(Ra Pr)`` hold for the sums over cells, at any resolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from shodh.physics.solvers.mac import ChannelFlow
from shodh.physics.solvers.operators import fill_periodic, inner, padded_like, shifted
from shodh.physics.solvers.stability import central_rate, diffusion_rate

BOTTOM, TOP = 1.0, 0.0


class PlateTemperature:
    """A batch of temperatures between plates, taken along by a flow (`shodh.physics.solvers.scalar.Transported`).

    Attributes
    ----------
    padded : Tensor [n0+2, n1+2, n2+2, B]
        Temperature with halos, at the start of the current stage.
    """

    def __init__(
        self,
        space: Sequence[int],
        spacing: Sequence[float],
        batch: int,
        diffusivity: float,
        dtype: torch.dtype,
        device: str | torch.device,
    ) -> None:
        self.space, self.spacing, self.diffusivity = tuple(space), tuple(spacing), diffusivity
        self.padded = padded_like(space, batch, like=torch.empty(0, dtype=dtype, device=device))
        self.values = torch.zeros(*space, batch, dtype=dtype, device=device)
        self._start = torch.zeros_like(self.values)

    def begin_step(self) -> None:
        """Remember the values at the start of a Runge-Kutta step."""
        self._start.copy_(self.values)

    def stage(self, velocity: Tensor, weight: float, dt: float | Tensor) -> None:
        """One Shu-Osher stage; afterwards `padded` still holds the temperature before it, for the buoyancy."""
        self.values.add_(self.tendency(velocity).mul_(dt))
        if weight:
            self.values.lerp_(self._start, weight)

    def stability_rate(self, advection: Tensor) -> Tensor:
        """Steps per time that central fluxes of heat ask for, ``[B]``."""
        return central_rate(advection, diffusion_rate(self.diffusivity, self.spacing))

    def fill(self) -> None:
        """Copy the values into `padded` and apply plates and periodicity."""
        inner(self.padded).copy_(self.values)
        torch.sub(2.0 * BOTTOM, self.padded[1], out=self.padded[0])
        torch.sub(2.0 * TOP, self.padded[-2], out=self.padded[-1])
        fill_periodic(self.padded, 1)
        fill_periodic(self.padded, 2)

    def flux(self, axis: int, velocity: Tensor) -> Tensor:
        """Heat flux ``u T - D dT/dx`` through the ``n + 1`` faces of ``axis``; needs `fill`."""
        n = self.space[axis]
        temperature, speed = self.padded, velocity[axis]
        for other in range(3):
            if other != axis:
                temperature = temperature.narrow(other, 1, self.space[other])
                speed = speed.narrow(other, 1, self.space[other])
        lower, upper = temperature.narrow(axis, 0, n + 1), temperature.narrow(axis, 1, n + 1)
        flux = (lower + upper).mul_(speed.narrow(axis, 0, n + 1)).mul_(0.5)
        conductance = self.diffusivity / self.spacing[axis]
        return flux.add_(lower, alpha=conductance).sub_(upper, alpha=conductance)

    def tendency(self, velocity: Tensor) -> Tensor:
        """``-div(u T) + D lap T``, ``[*space, B]``, in a padded face velocity."""
        self.fill()
        out = torch.zeros_like(self.values)
        for axis in range(3):
            flux = self.flux(axis, velocity)
            n, weight = self.space[axis], 1.0 / self.spacing[axis]
            out.add_(flux.narrow(axis, 0, n), alpha=weight).sub_(flux.narrow(axis, 1, n), alpha=weight)
        return out


class Convection(ChannelFlow):
    """Flow and temperature of a batch of convection cells.

    Parameters
    ----------
    space : (n0, n1, n2)
        Cells along the internal axes (up, x, y).
    lengths : 3 floats
        The first is the plate distance, 1.
    rayleigh, prandtl : float
    """

    def __init__(
        self,
        space: Sequence[int],
        lengths: Sequence[float],
        batch: int,
        *,
        rayleigh: float,
        prandtl: float,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        viscosity = math.sqrt(prandtl / rayleigh)
        super().__init__(space, lengths, batch, viscosity=viscosity, no_slip_lid=True, dtype=dtype, device=device)
        self.temperature = PlateTemperature(space, self.spacing, batch, viscosity / prandtl, dtype, device)
        up = (torch.arange(space[0], dtype=torch.float64) + 0.5) / space[0]
        self.conduction = (BOTTOM + (TOP - BOTTOM) * up).to(device, dtype)[:, None, None, None]
        self.temperature.values += self.conduction

    def tendency(self) -> Tensor:
        """Right-hand side without the pressure, with the buoyancy of `temperature.padded`.

        The uniform stratification ``conduction`` is left out: a pressure balances it exactly.
        """
        out = super().tendency()
        deviation = inner(self.temperature.padded) - self.conduction
        # The lid is the upper face of the last cell: nothing moves there.
        out[0, :-1].add_(deviation[:-1], alpha=0.5).add_(deviation[1:], alpha=0.5)
        return out

    def stability_rate(self, advection: Tensor | None = None) -> Tensor:
        """Steps per time that flow and temperature ask for together, ``[B]``.

        Buoyancy couples them: an eigenvalue of the flow alone moves by the frequency ``N`` of internal waves along the
        imaginary axis, ``N^2 = max |dT/dz|``, and fluid at rest crosses a cell within ``sqrt(2 h / |T'|)``. Both are
        bounded by the rate ``sqrt(2 max |T'| / h)``, with ``T'`` the deviation from conduction.
        """
        deviation = (self.temperature.values - self.conduction).abs().flatten(0, 2).amax(0)
        waves = torch.sqrt(2.0 * deviation / self.spacing[0])
        diffusion = diffusion_rate(max(self.viscosity, self.temperature.diffusivity), self.spacing)
        return central_rate((self.courant(1.0) if advection is None else advection) + waves, diffusion)

    def run(self, interval: float, courant: float) -> Tensor:
        """Advance by ``interval``; see `ChannelFlow.advance`."""
        return self.advance(interval, courant, self.temperature)

    def heat_flux(self) -> tuple[Tensor, Tensor, Tensor]:
        """Nusselt numbers ``[B]`` at the lower plate, the upper plate, and of the whole volume."""
        self.temperature.fill()
        flux = self.temperature.flux(0, self.velocity).mean((1, 2)) / self.temperature.diffusivity
        # The trapezoidal rule gives conduction its exact share, the temperature difference.
        return flux[0], flux[-1], (flux.sum(0) - 0.5 * (flux[0] + flux[-1])) / self.space[0]

    def dissipation(self) -> tuple[Tensor, Tensor]:
        """Mean dissipation of kinetic energy, ``-nu <u lap u>``, and of temperature variance, ``[B]``."""
        kinetic = torch.zeros_like(self.velocity[0, 0, 0, 0])
        for component in self.velocity:
            here = inner(component)
            for axis, h in enumerate(self.spacing):
                second = shifted(component, axis, 1) + shifted(component, axis, -1) - 2.0 * here
                kinetic -= (here * second).mean((0, 1, 2)) / h**2
        self.temperature.fill()
        padded, thermal = self.temperature.padded, torch.zeros_like(kinetic)
        for axis, h in enumerate(self.spacing):
            slope = (shifted(padded, axis, 1) - inner(padded)) / h
            thermal += slope.square().mean((0, 1, 2))
        # At a plate the gradient fills half a cell: add the lower plate's half, and halve the upper plate's.
        h, n = self.spacing[0], self.space[0]
        low = (padded[1] - padded[0])[1:-1, 1:-1] / h
        high = (padded[n + 1] - padded[n])[1:-1, 1:-1] / h
        thermal += 0.5 * (low.square().mean((0, 1)) - high.square().mean((0, 1))) / n
        return self.viscosity * kinetic, self.temperature.diffusivity * thermal
