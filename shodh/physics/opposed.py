"""Equations of one scalar on the same periodic square, several of them opposed to one another.

For the question whether learning one operator harms another: the field, the grid and the spread of initial states are
the same, so nothing but the change from frame to frame tells them apart. Parameters are drawn for each sample. The side
is ``2 pi``; intervals, steps and ranges are such that a 32^2 grid resolves all of them. Sixteen stand apart from one
another (`OPPOSED`); two are families without gaps, whose direction is drawn as well; eight came when all that tells
equations apart had been made (`HELD_OUT`), for a test of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shodh.physics.solvers.exponential import Flow, Nonlinear, Waves

Parameters = Mapping[str, Tensor]


@dataclass(frozen=True)
class Equation:
    """``du/dt = L u + N(u)`` for one scalar.

    Attributes
    ----------
    ranges : dict
        Parameters, drawn uniformly for each sample.
    linear : callable
        (waves, parameters ``[B, 1, 1]``) -> rates of the modes.
    nonlinear : callable, optional
        (waves, parameters) -> function of the spectrum ``[B, *modes]``.
    interval : float
        Time between frames.
    steps : int
        Of the solver between two frames.
    spin_up : int
        Frames before the first one that is given.
    start : callable
        Initial field of a Gaussian one of unit variance.
    conserves_mean : bool
    """

    linear: Callable[[Waves, Parameters], Tensor]
    ranges: Mapping[str, tuple[float, float]]
    nonlinear: Callable[[Waves, Parameters], Nonlinear] | None = None
    interval: float = 1.0
    steps: int = 1
    spin_up: int = 0
    start: Callable[[Tensor], Tensor] = field(default=lambda u: u)
    conserves_mean: bool = True

    def draw(self, uniform: Tensor) -> dict[str, Tensor]:
        """Parameters ``[B, 1, 1]`` (float64) of numbers between 0 and 1, ``[B, at least as many as ranges]``."""
        columns = uniform.double().unbind(1)
        pairs = zip(self.ranges.items(), columns, strict=False)
        return {name: (low + (high - low) * u).view(-1, 1, 1) for (name, (low, high)), u in pairs}

    def solve(self, waves: Waves, noise: Tensor, parameters: Parameters, frames: int) -> Tensor:
        """Frames ``[B, frames, n, n]`` that follow from Gaussian fields of unit variance ``[B, n, n]``."""
        linear = self.linear(waves, parameters).to(torch.complex128).expand(len(noise), -1, -1)
        narrow = {name: value.to(waves.dtype) for name, value in parameters.items()}
        nonlinear = None if self.nonlinear is None else self.nonlinear(waves, narrow)
        flow = Flow(linear, nonlinear, self.interval, self.steps, waves.dtype)
        state = waves.spectrum(self.start(noise))
        for _ in range(self.spin_up):
            state = flow.advance(state)
        found = [waves.field(state)]
        for _ in range(frames - 1):
            state = flow.advance(state)
            found.append(waves.field(state))
        return torch.stack(found, 1)


def initial_spectrum(waves: Waves) -> Tensor:
    """Amplitudes ``(1 + k^2)^(-5/4)`` of all initial states, ``[n, n / 2 + 1]``."""
    return ((1 + waves.squared) ** -1.25).to(waves.dtype) * waves.kept


def coloured(waves: Waves, noise: Tensor) -> Tensor:
    """Gaussian fields with `initial_spectrum`, of zero mean and unit variance, of white noise ``[B, n, n]``."""
    values = waves.field(torch.fft.rfft2(noise.to(waves.dtype)) * initial_spectrum(waves))
    values = values - values.mean((1, 2), keepdim=True)
    return values / values.square().mean((1, 2), keepdim=True).sqrt()


def _drift(x: int, y: int) -> Callable[[Waves, Parameters], Tensor]:
    return lambda w, p: -1j * p["speed"] * (x * w.x + y * w.y)


def _disperse(x: int, y: int) -> Callable[[Waves, Parameters], Tensor]:
    return lambda w, p: 1j * p["dispersion"] * (x * w.x**3 + y * w.y**3)


def _turned(rate: Callable[[Tensor, Parameters], Tensor]) -> Callable[[Waves, Parameters], Tensor]:
    """``i (cos(angle) r(kx) + sin(angle) r(ky))``"""
    return lambda w, p: 1j * (torch.cos(p["angle"]) * rate(w.x, p) + torch.sin(p["angle"]) * rate(w.y, p))


def _diffuse(w: Waves, p: Parameters) -> Tensor:
    return -p["diffusivity"] * w.squared


def _diffuse_along(x: int, y: int) -> Callable[[Waves, Parameters], Tensor]:
    return lambda w, p: -p["diffusivity"] * (x * w.x**2 + y * w.y**2)


def _pointwise(rate: Callable[[Tensor, Parameters], Tensor]) -> Callable[[Waves, Parameters], Nonlinear]:
    return lambda w, p: lambda state: w.spectrum(rate(w.field(state), p))


def _flux(x: int, y: int) -> Callable[[Waves, Parameters], Nonlinear]:
    """``-(x d/dx + y d/dy) u^2 / 2``"""

    def of(w: Waves, p: Parameters) -> Nonlinear:
        along = -0.5 * (x * w.ix + y * w.iy)
        return lambda state: along * w.spectrum(w.field(state).square())

    return of


def _cahn_hilliard(w: Waves, p: Parameters) -> Nonlinear:
    """``mobility * laplacian(u^3)``"""
    rate = (-p["mobility"] * w.squared).to(w.dtype)
    return lambda state: rate * w.spectrum(w.field(state) ** 3)


def _korteweg(along: Callable[[Waves], Tensor]) -> Callable[[Waves, Parameters], Tensor]:
    """Dispersion along one axis; the rest damps what the grid does not resolve."""
    return lambda w, p: 1j * p["dispersion"] * along(w) ** 3 - 2e-4 * w.squared**2


SPREAD = 0.2  # of Kuramoto-Sivashinsky: box of 2 pi / 0.2, so that modes below 5 grow
RIPPLE = 0.25  # of Swift-Hohenberg: its wave has the number 4
WALL = 0.04  # of Cahn-Hilliard: walls of a fifth of a unit


def _kuramoto(w: Waves, p: Parameters) -> Nonlinear:
    """``-|grad u|^2 / 2`` without its mean, by which the field would fall for ever."""
    moving = (w.squared > 0).to(w.dtype)

    def rate(state: Tensor) -> Tensor:
        squares = w.field(w.ix * state).square() + w.field(w.iy * state).square()
        return -0.5 * SPREAD**2 * w.spectrum(squares) * moving

    return rate


def _vortices(forced: bool) -> Callable[[Waves, Parameters], Nonlinear]:
    """``-div(velocity u)`` of the vorticity ``u``; forced: and Kolmogorov's ``cos(4 y)``."""

    def of(w: Waves, p: Parameters) -> Nonlinear:
        inverse = (1 / w.squared.clamp(min=1)).to(w.dtype) * (w.squared > 0)
        cells = torch.arange(w.n, device=w.device, dtype=w.dtype) * (2 * math.pi / w.n)
        force = w.spectrum(p["force"] * torch.cos(4 * cells).expand(1, w.n, w.n)) if forced else None

        def rate(state: Tensor) -> Tensor:
            stream = state * inverse
            vorticity = w.field(state)
            x, y = (w.spectrum(w.field(k * stream) * vorticity) for k in (w.iy, -w.ix))
            out = -(w.ix * x + w.iy * y)
            return out if force is None else out + force

        return rate

    return of


_SPEED = {"speed": (2 * 2 * math.pi / 32, 4 * 2 * math.pi / 32)}  # 2 to 4 cells of a 32^2 grid in a frame
_DISPERSION = {"dispersion": (0.015, 0.025)}
_ANGLE = {"angle": (0.0, 2 * math.pi)}

#: In the order in which mixes grow: the first two are opposed, the first eight are those of the toy; families last.
EQUATIONS: dict[str, Equation] = {
    "advection_right": Equation(_drift(1, 0), _SPEED),
    "advection_left": Equation(_drift(-1, 0), _SPEED),
    "diffusion": Equation(_diffuse, {"diffusivity": (0.015, 0.03)}),
    "fisher": Equation(
        _diffuse,
        {"diffusivity": (0.002, 0.006), "rate": (0.4, 0.8)},
        _pointwise(lambda u, p: p["rate"] * u * (1 - u)),
        steps=2,
        start=lambda u: torch.sigmoid(2 * u),
        conserves_mean=False,
    ),
    "advection_up": Equation(_drift(0, 1), _SPEED),
    "dispersion_x": Equation(_disperse(1, 0), _DISPERSION),
    "advection_down": Equation(_drift(0, -1), _SPEED),
    "dispersion_y": Equation(_disperse(0, -1), _DISPERSION),
    "hyperdiffusion": Equation(lambda w, p: -p["rate"] * w.squared**2, {"rate": (4e-4, 1e-3)}),
    "burgers": Equation(_diffuse, {"diffusivity": (0.08, 0.15)}, _flux(1, 1), interval=0.2, steps=6),
    "burgers_back": Equation(_diffuse, {"diffusivity": (0.08, 0.15)}, _flux(-1, -1), interval=0.2, steps=6),
    "allen_cahn": Equation(
        _diffuse,
        {"diffusivity": (0.002, 0.006), "rate": (0.4, 0.8)},
        _pointwise(lambda u, p: p["rate"] * (u - u**3)),
        steps=3,
        start=lambda u: torch.tanh(u),
        conserves_mean=False,
    ),
    "kuramoto": Equation(
        lambda w, p: p["growth"] * SPREAD**2 * w.squared - SPREAD**4 * w.squared**2,
        {"growth": (0.9, 1.1)},
        _kuramoto,
        interval=1.0,
        steps=3,
        spin_up=3,
        start=lambda u: 3 * u,
    ),
    "swift": Equation(
        lambda w, p: p["rate"] - (1 - RIPPLE**2 * w.squared).square(),
        {"rate": (0.4, 0.8)},
        _pointwise(lambda u, p: -(u**3)),
        steps=3,
        spin_up=2,
        start=lambda u: 0.7 * torch.tanh(u),
        conserves_mean=False,
    ),
    "korteweg": Equation(_korteweg(lambda w: w.x), {"dispersion": (0.03, 0.05)}, _flux(1, 0), interval=0.25, steps=5),
    "kolmogorov": Equation(
        _diffuse, {"diffusivity": (0.01, 0.02), "force": (0.6, 1.0)}, _vortices(True), interval=0.4, steps=5
    ),
    "advection_any": Equation(_turned(lambda k, p: -p["speed"] * k), {**_SPEED, **_ANGLE}),
    "dispersion_any": Equation(_turned(lambda k, p: p["dispersion"] * k**3), {**_DISPERSION, **_ANGLE}),
    "advection_diagonal": Equation(_drift(1, 1), _SPEED),
    "advection_antidiagonal": Equation(_drift(1, -1), _SPEED),
    "diffusion_x": Equation(_diffuse_along(1, 0), {"diffusivity": (0.03, 0.06)}),
    "diffusion_y": Equation(_diffuse_along(0, 1), {"diffusivity": (0.03, 0.06)}),
    "burgers_y": Equation(_diffuse, {"diffusivity": (0.08, 0.15)}, _flux(0, 1), interval=0.2, steps=6),
    "korteweg_y": Equation(_korteweg(lambda w: w.y), {"dispersion": (0.03, 0.05)}, _flux(0, 1), interval=0.25, steps=5),
    "vortices": Equation(_diffuse, {"diffusivity": (0.01, 0.02)}, _vortices(False), interval=0.4, steps=5),
    "cahn_hilliard": Equation(
        lambda w, p: p["mobility"] * (w.squared - WALL * w.squared**2),
        {"mobility": (0.01, 0.02)},
        _cahn_hilliard,
        steps=4,
        spin_up=2,
        start=lambda u: torch.tanh(u),
    ),
}
OPPOSED = tuple(EQUATIONS)[:16]
HELD_OUT = tuple(EQUATIONS)[18:]
