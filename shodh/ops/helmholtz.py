"""The inverse of the decode: potential and harmonic part of the divergence-free part of any face field.

A network that emits a potential directly is badly conditioned: a curl damps the large scales of its error and
amplifies the small ones. Emitting any face field ``w`` and decoding its potential gives ``u = P w``, the orthogonal
projection onto discretely divergence-free fields: as well conditioned as emitting a velocity, as exact as the decode.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor

from shodh.ops.grid import DEFAULT_BOUNDARY, DEFAULT_SPACING, Grid, check_field, make_grid
from shodh.ops.reference import compute_dtype, curl_components, difference, inverse_spacing, pinned_components

VECTOR_CHANNELS = {3: 3, 2: 2}


@lru_cache(maxsize=256)
def _basis(cells: int, kind: str, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Orthonormal eigenvectors (columns) and eigenvalues of the undivided second difference along one axis.

    ``periodic``: real Fourier. ``tangential``: of the entries between walls, zero on both (sine), the pinned last entry
    apart. ``normal``: of the component across the walls (cosine).
    """
    i = torch.arange(cells, dtype=torch.float64).view(-1, 1)
    k = torch.arange(cells, dtype=torch.float64).view(1, -1)
    if kind == "periodic":
        wave = torch.div(k + 1, 2, rounding_mode="floor")
        angle = 2 * math.pi * i * wave / cells
        vectors = torch.where(k % 2 == 1, torch.cos(angle), torch.sin(angle))
        vectors[:, 0] = 1.0
        values = 2 - 2 * torch.cos(2 * math.pi * wave / cells)
    elif kind == "tangential":
        vectors = torch.sin(math.pi * (i + 1) * (k + 1) / cells)
        vectors[-1], vectors[:, -1] = 0.0, 0.0
        vectors[-1, -1] = 1.0
        values = 2 - 2 * torch.cos(math.pi * (k + 1) / cells)
    else:
        vectors = torch.cos(math.pi * (i + 0.5) * k / cells)
        values = 2 - 2 * torch.cos(math.pi * k / cells)
    vectors = vectors / vectors.norm(dim=0, keepdim=True)
    return vectors.to(device, dtype), values.flatten().to(device, dtype)


def _along(x: Tensor, matrix: Tensor, dim: int) -> Tensor:
    return (x.movedim(dim, -1) @ matrix).movedim(-1, dim)


def _inverse_laplacian(rhs: Tensor, component: int, grid: Grid) -> Tensor:
    """Solve ``L A = rhs [B, *grid]`` for one component of the potential; the constant mode, if any, is zero."""
    bases = []
    total = rhs.new_zeros(())
    for axis, (wall, h) in enumerate(zip(grid.walls, grid.spacing, strict=True)):
        kind = "periodic" if not wall else "normal" if axis == component else "tangential"
        vectors, values = _basis(rhs.shape[axis + 1], kind, rhs.dtype, rhs.device)
        bases.append(vectors)
        total = total + (values / h**2).view([-1 if d == axis else 1 for d in range(grid.ndim)])
    inverse = torch.where(total > 1e-9 * total.amax(), 1 / total, 0.0)
    for axis, vectors in enumerate(bases):
        rhs = _along(rhs, vectors, axis + 1)
    rhs = rhs * inverse
    for axis, vectors in enumerate(bases):
        rhs = _along(rhs, vectors.T, axis + 1)
    return rhs


def helmholtz_potential(
    field: Tensor, *, spacing: Sequence[float] = DEFAULT_SPACING, boundary: Sequence[str] = DEFAULT_BOUNDARY
) -> tuple[Tensor, Tensor | None]:
    """Potential and harmonic part whose staggered decode is the divergence-free part of a face field.

    Parameters
    ----------
    field : Tensor [B, 3, X, Y, Z], or [B, 2, X, Y]
        Component ``i`` on the upper face of its cell along axis ``i``. What it holds on wall faces is not used.
    spacing, boundary
        As for `decode_velocity`.

    Returns
    -------
    potential : Tensor [B, 3, X, Y, Z], or [B, 1, X, Y]
        In the dtype of the computation (float32 for 16-bit fields), in the gauge of zero divergence.
    harmonic : Tensor [B, P] or None
        Means along the periodic axes; None where there is none.

    Raises
    ------
    TypeError, ValueError
        As `decode_velocity` does.

    Notes
    -----
    ``A = L^-1 C^T w`` with ``C`` the staggered curl and ``L`` the vector Laplacian, diagonal by component in real
    Fourier, sine and cosine bases; then ``C A + h`` is the orthogonal projection of ``w``: the nearest divergence-free
    field in the mean square. Dense transforms, any size, O(cells x (X + Y + Z)), deterministic, differentiable.
    """
    ndim = check_field("field", field, VECTOR_CHANNELS)
    grid = make_grid(ndim, spacing, boundary, "staggered")
    w = list(field.to(compute_dtype(field.dtype)).unbind(1))
    inverse = inverse_spacing(grid)
    with _without_autocast(field.device.type):
        if ndim == 2:
            rhs = [difference(w[1], 0, grid, True) * inverse[0] - difference(w[0], 1, grid, True) * inverse[1]]
        else:
            rhs = curl_components(w, inverse, grid, mirror=True)
        rhs = pinned_components(torch.stack(rhs, 1), grid)
        names = range(3) if ndim == 3 else (2,)
        solved = [_inverse_laplacian(r, component, grid) for r, component in zip(rhs, names, strict=True)]
        potential = torch.stack(solved, 1)
    if not grid.periodic_axes:
        return potential, None
    space = tuple(range(1, ndim + 1))
    return potential, torch.stack([w[axis].mean(space) for axis in grid.periodic_axes], 1)


def _without_autocast(device: str) -> AbstractContextManager[object]:
    """Autocast off; the meta device has none."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
