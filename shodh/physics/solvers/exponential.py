"""Exponential time differencing on a periodic square, batched, with parameters of each sample.

``du/dt = L u + N(u)`` in Fourier space: the linear part is exact, the rest is advanced by ETDRK4 (Cox and Matthews,
2002, https://doi.org/10.1006/jcph.2002.6995). Its coefficients are entire functions of ``L dt``, here by their series
near zero and in closed form elsewhere, in float64 whatever the precision of the state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Nonlinear = Callable[[Tensor], Tensor]
TERMS = 18  # of the series, whose last is below 1e-16 for |z| <= 1


class Waves:
    """Wave numbers of a periodic square of side ``2 pi``, and the modes that are kept: ``|k| < n / 3`` an axis.

    Attributes
    ----------
    x, y : Tensor [n, 1], [1, n / 2 + 1]
        Whole numbers, float64.
    squared : Tensor [n, n / 2 + 1]
    kept : Tensor [n, n / 2 + 1]
        1 where a mode is kept, so that products of two fields have no aliases there; 0 elsewhere.
    """

    def __init__(self, n: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.n, self.dtype, self.device = n, dtype, torch.device(device)
        self.x = (torch.fft.fftfreq(n, dtype=torch.float64) * n)[:, None].to(device)
        self.y = (torch.fft.rfftfreq(n, dtype=torch.float64) * n)[None].to(device)
        self.squared = self.x.square() + self.y.square()
        limit = n / 3
        self.kept = ((self.x.abs() < limit) & (self.y < limit)).to(dtype)
        self.ix, self.iy = ((1j * k).to(dtype.to_complex()) for k in (self.x, self.y))

    def spectrum(self, field: Tensor) -> Tensor:
        """``[..., n, n] -> [..., n, n / 2 + 1]``, the kept modes."""
        return torch.fft.rfft2(field) * self.kept

    def field(self, spectrum: Tensor) -> Tensor:
        """The inverse of `spectrum`."""
        return torch.fft.irfft2(spectrum, s=(self.n, self.n))


def phi(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``phi_1 = (e^z - 1) / z, phi_2 = (e^z - 1 - z) / z^2, phi_3 = (e^z - 1 - z - z^2 / 2) / z^3``, complex128."""
    near = z.abs() <= 1
    small, large = torch.where(near, z, 0.0), torch.where(near, 1.0, z)
    three = torch.full_like(z, 1 / math.factorial(TERMS + 3))
    for term in reversed(range(TERMS)):
        three = three * small + 1 / math.factorial(term + 3)
    two = 0.5 + small * three
    one = 1.0 + small * two
    far = (large.exp() - 1) / large
    further = (far - 1) / large
    found = ((one, far), (two, further), (three, (further - 0.5) / large))
    first, second, third = (torch.where(near, *pair) for pair in found)
    return first, second, third


class Etdrk4(NamedTuple):
    """Coefficients of one step, complex, in the shape of ``L``."""

    whole: Tensor
    half: Tensor
    inner: Tensor
    first: Tensor
    middle: Tensor
    last: Tensor

    @classmethod
    def of(cls, linear: Tensor, dt: float, dtype: torch.dtype) -> Etdrk4:
        """Of rates ``L`` (complex128) and a step, rounded to the precision of the state."""
        z = linear * dt
        one, two, three = phi(z)
        parts = (
            z.exp(),
            (z / 2).exp(),
            phi(z / 2)[0] * (dt / 2),
            dt * (one - 3 * two + 4 * three),
            dt * 2 * (two - 2 * three),
            dt * (4 * three - two),
        )
        return cls(*(part.to(dtype.to_complex()) for part in parts))

    def step(self, state: Tensor, nonlinear: Nonlinear) -> Tensor:
        """The spectrum after one step."""
        now = nonlinear(state)
        a = self.half * state + self.inner * now
        of_a = nonlinear(a)
        b = self.half * state + self.inner * of_a
        of_b = nonlinear(b)
        c = self.half * a + self.inner * (2 * of_b - now)
        return self.whole * state + self.first * now + self.middle * (of_a + of_b) + self.last * nonlinear(c)


class Flow:
    """The way from a state to the next one, with its coefficients computed once.

    Parameters
    ----------
    linear : Tensor [B, *modes], complex128
    nonlinear : callable, optional
        Without one the equation is linear, and each interval is one exact step.
    interval : float
        Time between two states.
    steps : int
        Of the scheme in an interval.
    """

    def __init__(
        self, linear: Tensor, nonlinear: Nonlinear | None, interval: float, steps: int, dtype: torch.dtype
    ) -> None:
        self.nonlinear, self.steps = nonlinear, steps
        self.exact = (linear * interval).exp().to(dtype.to_complex())
        self.scheme = None if nonlinear is None else Etdrk4.of(linear, interval / steps, dtype)

    def advance(self, state: Tensor) -> Tensor:
        """Spectra ``[B, *modes]`` after one interval."""
        if self.nonlinear is None or self.scheme is None:
            return state * self.exact
        for _ in range(self.steps):
            state = self.scheme.step(state, self.nonlinear)
        return state
