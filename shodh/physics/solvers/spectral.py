"""Fourier pseudo-spectral core of the regimes in periodic boxes.

A state is a batch of Fourier coefficients ``[B, C, *modes]`` (real FFT, ``norm="forward"``: coefficient zero is the
mean), of fields sampled at cell centres. Products are formed on the grid and truncated by the 2/3 rule (Orszag 1971),
so that quadratic terms carry no aliasing error. Diffusion is integrated exactly by an integrating factor, everything
else by the classical fourth-order Runge-Kutta scheme; so diffusion never limits the step.

A spectral solution is stored at the places of :mod:`shodh.schema.fields` by :meth:`SpectralGrid.to_faces`. The
divergence of
the staggered grid has the symbol ``i kappa``, ``kappa_i = 2 sin(k_i h_i / 2) / h_i``, instead of ``i k``; a field with
``k . u = 0`` is therefore projected on ``kappa . u = 0``, a change of second order in ``h``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from shodh.core.seeding import generator
from shodh.physics.solvers.stability import Clock, steps_to_look

#: Fourth-order Runge-Kutta is stable up to ``2 sqrt(2)`` on the imaginary axis; truncation leaves ``k h <= 2 pi / 3``.
COURANT_LIMIT = 2.0 * math.sqrt(2.0) / (2.0 * math.pi / 3.0)
# More steps than this between two frames: the velocity has run away.
MAX_STEPS = 20_000
# Random fields are drawn on a lattice of this many points an axis whatever the grid, so that they do not depend on it.
NOISE_POINTS = 32


class BlowUp(Exception):
    """Trajectory ``index`` of the batch has no finite solution, or needs endlessly many steps."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


class SpectralGrid:
    """Transforms and derivatives on a periodic box of any dimension.

    Parameters
    ----------
    grid : ints
        Cells along each axis.
    lengths : floats
        Box along each axis.
    dtype : torch.dtype
        Of values; coefficients are complex of that precision.
    device : str or torch.device
    """

    def __init__(
        self,
        grid: Sequence[int],
        lengths: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        self.grid, self.lengths = tuple(grid), tuple(lengths)
        self.dtype, self.device = dtype, device
        self.ndim = len(self.grid)
        self.axes = tuple(range(-self.ndim, 0))
        #: Index of the mean among coefficients ``[..., *modes]``.
        self.mean: tuple[Any, ...] = (..., *([0] * self.ndim))
        self.spacing = tuple(length / n for length, n in zip(self.lengths, self.grid))
        #: Highest mode number kept along each axis: the largest below ``n / 3``.
        self.cutoff = tuple((n - 1) // 3 for n in self.grid)
        exact = self._wavenumbers()
        square = self.radius().square()
        numbers = [(k * length / (2.0 * math.pi)).abs() for k, length in zip(exact, self.lengths)]
        kept = torch.ones_like(square, dtype=torch.bool)
        outer = torch.zeros_like(kept)
        for number, cutoff in zip(numbers, self.cutoff):
            kept &= number < cutoff + 0.5
            outer |= number > 0.8 * cutoff
        self.exact_wavenumbers = [k.to(device) for k in exact]
        self.wavenumbers = [k.to(dtype) for k in self.exact_wavenumbers]
        self.square = square.to(device, dtype)
        self.inverse_square = torch.where(square > 0, 1.0 / square.clamp(min=1e-300), 0.0).to(device, dtype)
        self.kept = kept.to(device, dtype)
        self._outer = (outer & kept).to(device, torch.float64)
        # Modes of a real FFT stand for themselves and their conjugates, but for the plane of mode zero.
        self._weights = torch.full((self.grid[-1] // 2 + 1,), 2.0, dtype=torch.float64, device=device)
        self._weights[0] = 1.0

    def _wavenumbers(self) -> list[Tensor]:
        """One wavenumber array for each axis in fp64, shaped to broadcast over the modes."""
        found = []
        for axis, (n, length) in enumerate(zip(self.grid, self.lengths)):
            number = torch.fft.rfftfreq(n) if axis == self.ndim - 1 else torch.fft.fftfreq(n)
            shape = [1] * self.ndim
            shape[axis] = -1
            found.append((number.double() * n).round().mul(2.0 * math.pi / length).view(shape))
        return found

    @property
    def modes(self) -> tuple[int, ...]:
        """Shape of the coefficients of one scalar."""
        return (*self.grid[:-1], self.grid[-1] // 2 + 1)

    @property
    def largest_wavenumber(self) -> float:
        """Radius of the largest ball of wavenumbers that is kept whole."""
        return min(2.0 * math.pi * c / length for c, length in zip(self.cutoff, self.lengths))

    def centers(self) -> list[Tensor]:
        """Coordinates of the cell centres along each axis in fp64 on the CPU, shaped to broadcast over the grid."""
        found = []
        for axis, (n, h) in enumerate(zip(self.grid, self.spacing)):
            shape = [1] * self.ndim
            shape[axis] = -1
            found.append(((torch.arange(n, dtype=torch.float64) + 0.5) * h).view(shape))
        return found

    def forward(self, values: Tensor) -> Tensor:
        """Truncated coefficients ``[..., *modes]`` of ``values [..., *grid]``."""
        return torch.fft.rfftn(values, dim=self.axes, norm="forward").mul_(self.kept)

    def inverse(self, spectrum: Tensor) -> Tensor:
        """Values at the cell centres ``[..., *grid]`` of ``spectrum [..., *modes]``."""
        return torch.fft.irfftn(spectrum, s=self.grid, dim=self.axes, norm="forward")

    def gradient(self, scalar: Tensor) -> Tensor:
        """``i k s``: ``[..., ndim, *modes]`` of ``[..., *modes]``."""
        return torch.stack([scalar * (1j * k) for k in self.wavenumbers], dim=-self.ndim - 1)

    def divergence(self, vector: Tensor) -> Tensor:
        """``i k . v``: ``[..., *modes]`` of ``[..., ndim, *modes]``."""
        parts = vector.unbind(-self.ndim - 1)
        total = parts[0] * (1j * self.wavenumbers[0])
        for part, k in zip(parts[1:], self.wavenumbers[1:]):
            total += part * (1j * k)
        return total

    def curl(self, vector: Tensor) -> Tensor:
        """``i k x v`` of ``[..., 3, *modes]``, three space dimensions."""
        a, (x, y, z) = vector.unbind(-4), (1j * k for k in self.wavenumbers)
        return torch.stack((a[2] * y - a[1] * z, a[0] * z - a[2] * x, a[1] * x - a[0] * y), dim=-4)

    def project(self, vector: Tensor) -> Tensor:
        """Part of ``vector [..., ndim, *modes]`` without divergence: ``v - k (k . v) / k^2``."""
        return vector + self.gradient(self.divergence(vector) * self.inverse_square)

    def mean_product(self, first: Tensor, second: Tensor) -> Tensor:
        """Box mean of the product of two real fields, from their coefficients ``[..., *modes]``; fp64 ``[...]``."""
        product = (torch.view_as_real(first).double() * torch.view_as_real(second).double()).sum(-1)
        return (product * self._weights.to(product.device)).sum(self.axes)

    def outer_share(self, vector: Tensor) -> Tensor:
        """Share ``[B]`` of the variance of ``[B, C, *modes]`` in the outermost fifth of the kept modes (fp64)."""
        square = torch.view_as_real(vector).double().square().sum((-1, 1)) * self._weights
        square[self.mean] = 0.0
        return (square * self._outer).sum(self.axes) / square.sum(self.axes).clamp(min=1e-300)

    def to_faces(self, vector: Tensor, *, solenoidal: bool) -> Tensor:
        """Values ``[B, ndim, *grid]`` (fp64) on the upper faces of the cells.

        With ``solenoidal`` the nearest field whose discrete divergence is zero (see the module's docstring). In fp64
        whatever the solver's precision, so that only the final rounding of the caller disturbs the divergence.
        """
        spectrum = vector.to(torch.complex128)
        half = [0.5 * k * h for k, h in zip(self.exact_wavenumbers, self.spacing)]
        if solenoidal:
            kappa = [2.0 * torch.sin(a) / h for a, h in zip(half, self.spacing)]
            square = sum((s.square() for s in kappa), start=torch.zeros((), dtype=torch.float64, device=self.device))
            along = sum((s * v for s, v in zip(kappa, spectrum.unbind(1))), start=torch.zeros_like(spectrum[:, 0]))
            along /= square.clamp(min=1e-300)
            spectrum = spectrum - torch.stack([s * along for s in kappa], dim=1)
        shifted = [v * torch.exp(1j * a) for v, a in zip(spectrum.unbind(1), half)]
        return self.inverse(torch.stack(shifted, dim=1))

    def noise(self, seed: int, purpose: str, components: int) -> Tensor:
        """White noise ``[components, *modes]`` (complex128, CPU): the same waves on every grid that holds them."""
        shape = [NOISE_POINTS] * self.ndim
        values = torch.randn(components, *shape, generator=generator(seed, purpose), dtype=torch.float64)
        source = torch.fft.rfftn(values, dim=self.axes, norm="forward")
        target = torch.zeros(components, *self.modes, dtype=torch.complex128)
        limits = [min(cutoff, NOISE_POINTS // 2 - 1) for cutoff in self.cutoff]
        numbers = [torch.arange(-limit, limit + 1) for limit in limits[:-1]] + [torch.arange(limits[-1] + 1)]
        index = torch.meshgrid(*numbers, indexing="ij")
        wrapped: Any = tuple(m % n for m, n in zip(index, self.grid))
        origin: Any = tuple(m % NOISE_POINTS for m in index)
        target[:, *wrapped] = source[:, *origin]
        target[self.mean] = 0.0
        # Coefficients belong to samples at cell centres; the noise has its phases at the corner of the box.
        for k, h in zip(self._wavenumbers(), self.spacing):
            target *= torch.exp(0.5j * h * k)
        return target

    def radius(self) -> Tensor:
        """Magnitude of the wavenumber ``[*modes]``, fp64 on the CPU."""
        return torch.stack([k.square().expand(self.modes) for k in self._wavenumbers()]).sum(0).sqrt()


class Equations(Protocol):
    """``d state / dt = tendency(state) - decay * state``."""

    #: Decay rates of the modes, broadcasting over ``[C, *modes]``; its first ``C`` rows belong to a state of C fields.
    decay: Tensor

    def tendency(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """What is integrated explicitly ``[B, C, *modes]``, and the rate ``max sum_i |speed_i| / h_i`` ``[B]``.

        A source counts in the rate too, as the inverse of the time in which it changes the state by itself.
        """


def step(equations: Equations, state: Tensor, dt: Tensor, slope: Tensor | None = None) -> Tensor:
    """One step of length ``dt [B]`` (fp64): fourth-order Runge-Kutta with the integrating factor ``exp(-decay t)``.

    ``slope`` is the tendency of ``state`` if the caller has it already.
    """

    def tendency(of: Tensor) -> Tensor:
        return equations.tendency(of)[0]

    decay = equations.decay[: state.shape[1]]
    size = dt.to(decay.device, decay.dtype).view(-1, *[1] * decay.ndim)
    half = torch.exp(-0.5 * size * decay)
    first = tendency(state) if slope is None else slope
    drifted = half * state
    second = tendency(half * (state + 0.5 * size * first))
    third = tendency(drifted + 0.5 * size * second)
    fourth = tendency(half * (drifted + size * third))
    middle = (second + third).mul_(2.0).add_(half * first)
    return half * (drifted + (size / 6.0) * middle) + (size / 6.0) * fourth


def advance(equations: Equations, state: Tensor, interval: float, courant: float, clock: Clock | None = None) -> Tensor:
    """State after ``interval``, each trajectory with steps of its own: ``dt * rate <= courant``; ``clock`` counts them.

    The modes ``|k_i h_i| <= 2 pi / 3`` that are kept have eigenvalues ``-i k . u`` of modulus ``2 pi / 3 * rate`` at
    most; diffusion is in the integrating factor and does not limit. So the limit of stability is `COURANT_LIMIT`.

    Raises
    ------
    BlowUp
        If a trajectory is not finite, or would need more than `MAX_STEPS` steps.
    """
    remaining = torch.full((len(state),), interval, dtype=torch.float64, device=state.device)
    steps, runaway = torch.zeros_like(remaining), torch.zeros_like(remaining, dtype=torch.bool)
    ahead = 0
    while ahead or bool((runaway | (remaining > 0)).any()):
        slope, rate = equations.tendency(state)
        count = torch.ceil(remaining * rate.double() / courant).clamp(min=1.0)
        runaway |= ~(steps + count <= MAX_STEPS)
        if not ahead:
            if bool(runaway.any()):
                raise BlowUp(int(runaway.nonzero()[0]))
            ahead = steps_to_look(torch.where(remaining > 0, count, 0.0))
        ahead -= 1
        # A trajectory that has arrived takes steps of length zero, which leave it as it is.
        dt = remaining / count
        if clock is not None:
            clock.record(dt, rate.double() / COURANT_LIMIT)
        state = step(equations, state, dt, slope)
        steps += remaining > 0
        remaining = torch.where(count > 1, remaining - dt, 0.0)
    return state


def courant_rate(values: Tensor, spacing: Sequence[float]) -> Tensor:
    """Largest ``sum_i |u_i| / h_i`` of each velocity ``[B, ndim, *grid]``; ``[B]``."""
    total = values[:, 0].abs() / spacing[0]
    for axis in range(1, values.shape[1]):
        total.add_(values[:, axis].abs(), alpha=1.0 / spacing[axis])
    return total.flatten(1).amax(1)


def random_vector(
    space: SpectralGrid, seed: int, purpose: str, amplitude: Callable[[Tensor], Tensor], *, solenoidal: bool = True
) -> Tensor:
    """Random isotropic vector field with unit mean square component, ``[ndim, *modes]`` (complex128, CPU).

    Gaussian modes weighted by ``amplitude(k)``; the energy spectrum in three dimensions is ``k^2 amplitude^2``. Either
    without divergence, or the gradient of a potential.
    """
    k = [k.cpu() for k in space.exact_wavenumbers]
    noise = space.noise(seed, purpose, space.ndim)
    radius = space.radius()
    along = sum((a * v for a, v in zip(k, noise)), start=torch.zeros_like(noise[0])) / radius.square().clamp(min=1e-300)
    potential = torch.stack([a * along for a in k])
    field = (noise - potential if solenoidal else potential) * amplitude(radius)
    return field / space.mean_product(field, field).mean().sqrt().clamp(min=1e-300)


def random_scalar(space: SpectralGrid, seed: int, purpose: str, amplitude: Callable[[Tensor], Tensor]) -> Tensor:
    """Gaussian random field of unit variance at the cell centres, ``[*grid]`` (fp64, CPU)."""
    spectrum = space.noise(seed, purpose, 1)[0] * amplitude(space.radius())
    values = torch.fft.irfftn(spectrum, s=space.grid, dim=space.axes, norm="forward")
    return values / values.std().clamp(min=1e-300)
