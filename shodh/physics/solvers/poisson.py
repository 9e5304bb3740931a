"""Direct Poisson solvers of the discrete Laplacian ``div grad`` of :mod:`shodh.physics.solvers.operators`.

Both diagonalise exactly the matrix that the staggered divergence and gradient form, so a projection leaves a
divergence at rounding level whatever the grid. A periodic axis uses the FFT with the symbol of the second difference,
``-(2 sin(pi k / n) / h)^2``; the walled axis (Neumann) its cosine eigenvectors, as two dense matrix products per
solve, which suits a GPU better than a tridiagonal sweep.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from shodh.physics.solvers.krylov import conjugate_gradients
from shodh.physics.solvers.operators import divergence


def periodic_symbol(cells: int, spacing: float, *, half: bool = False, device: str | torch.device = "cpu") -> Tensor:
    """Eigenvalues (>= 0, fp64) of minus the periodic second difference; ``half`` gives the modes of an rfft."""
    count = cells // 2 + 1 if half else cells
    k = torch.arange(count, dtype=torch.float64, device=device)
    return (2.0 * torch.sin(math.pi * k / cells) / spacing) ** 2


def neumann_modes(cells: int, spacing: float, *, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
    """Orthonormal eigenvectors (columns) and eigenvalues (>= 0) of minus the Neumann second difference, fp64."""
    k = torch.arange(cells, dtype=torch.float64, device=device)
    centres = (k + 0.5) / cells
    modes = torch.cos(math.pi * torch.outer(centres, k)) * math.sqrt(2.0 / cells)
    modes[:, 0] = math.sqrt(1.0 / cells)
    return modes, (2.0 * torch.sin(0.5 * math.pi * k / cells) / spacing) ** 2


def _inverse(eigenvalues: Tensor) -> Tensor:
    """``-1 / eigenvalue``, and zero for the constant mode."""
    return torch.where(eigenvalues > 0, -1.0 / eigenvalues.clamp(min=1e-300), torch.zeros_like(eigenvalues))


class ChannelPoisson:
    """Solves ``div grad p = r`` with Neumann walls on the first axis and periodic second and third axes.

    Parameters
    ----------
    space : (n0, n1, n2)
        Cells; any numbers.
    spacing : 3 floats
    dtype, device
        Of the right-hand sides.
    """

    def __init__(
        self, space: Sequence[int], spacing: Sequence[float], dtype: torch.dtype, device: str | torch.device
    ) -> None:
        self.space = tuple(space)
        modes, wall = neumann_modes(space[0], spacing[0], device=device)
        self._modes = modes.to(dtype)
        self._modes_t = modes.T.contiguous().to(dtype)
        along = periodic_symbol(space[1], spacing[1], device=device)
        across = periodic_symbol(space[2], spacing[2], half=True, device=device)
        self._inverse = _inverse(wall[:, None, None] + along[:, None] + across).to(dtype)

    def solve(self, rhs: Tensor) -> Tensor:
        """Solution ``[B, n0, n1, n2]`` with zero mean for ``rhs`` of that shape (its mean is ignored)."""
        n0, n1, n2 = self.space
        spectrum = torch.fft.rfft2(rhs).contiguous()
        flat = torch.view_as_real(spectrum).view(len(rhs), n0, -1)
        coefficients = torch.matmul(self._modes_t, flat).view(*spectrum.shape, 2)
        coefficients *= self._inverse[..., None]
        torch.matmul(self._modes, coefficients.view(len(rhs), n0, -1), out=flat)
        return torch.fft.irfft2(spectrum, s=(n1, n2))


class PeriodicPoisson:
    """Solves ``div grad p = r`` on a box that is periodic along all three axes; arguments as `ChannelPoisson`."""

    def __init__(
        self, space: Sequence[int], spacing: Sequence[float], dtype: torch.dtype, device: str | torch.device
    ) -> None:
        self.space = tuple(space)
        first, second = (periodic_symbol(space[a], spacing[a], device=device) for a in (0, 1))
        third = periodic_symbol(space[2], spacing[2], half=True, device=device)
        self._inverse = _inverse(first[:, None, None] + second[:, None] + third).to(dtype)

    def solve(self, rhs: Tensor) -> Tensor:
        """Solution ``[..., n0, n1, n2]`` with zero mean for ``rhs`` of that shape (its mean is ignored)."""
        spectrum = torch.fft.rfftn(rhs, dim=(-3, -2, -1))
        spectrum *= self._inverse
        return torch.fft.irfftn(spectrum, s=self.space, dim=(-3, -2, -1))


def closed_faces(solid: Tensor) -> Tensor:
    """Upper faces ``[B, 3, X, Y, Z]`` (bool) with solid on either side, for a periodic mask ``solid [B, X, Y, Z]``."""
    return torch.stack([solid | torch.roll(solid, -1, dims=axis) for axis in (1, 2, 3)], dim=1)


def project_around_solids(
    velocity: Tensor,
    solid: Tensor,
    spacing: Sequence[float],
    *,
    tolerance: float = 1e-9,
    max_iterations: int = 1000,
) -> tuple[Tensor, Tensor]:
    """The nearest face velocity without divergence and without flow through or inside solids.

    Minimises the distance to ``velocity`` subject to ``div u = 0`` in every cell and ``u = 0`` on closed faces, by
    conjugate gradients in fp64 on the Laplacian of the open faces, with the periodic FFT solver as preconditioner.

    Parameters
    ----------
    velocity : Tensor [B, 3, X, Y, Z]
        Upper-face components on a periodic box.
    solid : Tensor [B, X, Y, Z]
        bool.
    tolerance : float
        For the largest divergence, relative to ``max |u| / h``.

    Returns
    -------
    projected : Tensor [B, 3, X, Y, Z]
        fp64; exactly zero on closed faces.
    divergence : Tensor [B]
        Largest remaining ``|div u|``.
    """
    open_faces = (~closed_faces(solid)).double()
    fluid = (~solid).double()
    cells = fluid.flatten(1).sum(1).clamp(min=1.0).view(-1, 1, 1, 1)
    result = velocity.double() * open_faces
    poisson = PeriodicPoisson(solid.shape[1:], spacing, torch.float64, velocity.device)

    def divergence_of(u: Tensor) -> Tensor:
        return divergence(u.unbind(1), spacing, first=1)

    def gradient_of(p: Tensor) -> Tensor:
        return open_faces * torch.stack([(torch.roll(p, -1, dims=a + 1) - p) / spacing[a] for a in range(3)], dim=1)

    def without_mean(p: Tensor) -> Tensor:
        return (p - (p * fluid).flatten(1).sum(1).view(-1, 1, 1, 1) / cells) * fluid

    speed = result.abs().flatten(1).amax(1)
    # The 2-norm bounds the largest entry, so the stated tolerance for the latter holds.
    rhs = divergence_of(result)
    size = rhs.flatten(1).norm(dim=1).clamp(min=1e-300)
    solve = conjugate_gradients(
        lambda p: -divergence_of(gradient_of(p)),
        without_mean(rhs),
        precondition=lambda r: -without_mean(poisson.solve(r)),
        tolerance=(tolerance * speed / min(spacing) / size).clamp(max=1.0),
        max_iterations=max_iterations,
    )
    result += gradient_of(solve.solution)
    return result, divergence_of(result).abs().flatten(1).amax(1)
