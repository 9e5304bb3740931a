"""The public operators: divergence-free decode, curl, divergence and face fluxes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from shodh.errors import ExtensionError
from shodh.ops import reference
from shodh.ops.grid import (
    DEFAULT_BOUNDARY,
    DEFAULT_SPACING,
    check_exact_dtype,
    check_field,
    check_harmonic,
    make_grid,
)

POTENTIAL_CHANNELS = {3: 3, 2: 1}
VELOCITY_CHANNELS = {3: 3, 2: 2}


def decode_velocity(
    potential: Tensor,
    harmonic: Tensor | None,
    *,
    spacing: Sequence[float] = DEFAULT_SPACING,
    boundary: Sequence[str] = DEFAULT_BOUNDARY,
    stencil: str = "staggered",
    exact: bool = False,
    implementation: str | None = None,
) -> Tensor:
    """Decode a vector potential into a discretely divergence-free velocity, ``u = curl A + h``."""
    ndim = check_field("potential", potential, POTENTIAL_CHANNELS)
    grid = make_grid(ndim, spacing, boundary, stencil)
    check_harmonic(harmonic, potential, grid)
    if implementation not in (None, "reference"):
        raise ExtensionError(f"implementation {implementation!r} is not built")
    if not exact:
        return reference.decode_reference(potential, harmonic, grid)
    check_exact_dtype(potential.dtype)
    return reference.decode_exact_differentiable(potential, harmonic, grid)[0]


def curl(
    potential: Tensor,
    *,
    spacing: Sequence[float] = DEFAULT_SPACING,
    boundary: Sequence[str] = DEFAULT_BOUNDARY,
    stencil: str = "staggered",
    implementation: str | None = None,
) -> Tensor:
    """Discrete curl of a vector potential: `decode_velocity` without a harmonic part."""
    return decode_velocity(
        potential, None, spacing=spacing, boundary=boundary, stencil=stencil, implementation=implementation
    )


def divergence(
    velocity: Tensor,
    *,
    spacing: Sequence[float] = DEFAULT_SPACING,
    boundary: Sequence[str] = DEFAULT_BOUNDARY,
    stencil: str = "staggered",
) -> Tensor:
    """Discrete divergence ``[B, X, Y, Z]`` of a velocity ``[B, 3, X, Y, Z]``, or ``[B, X, Y]`` of ``[B, 2, X, Y]``.

    ``sum_i (u_i[c] - u_i[c - e_i]) / h_i`` (staggered) or ``sum_i (u_i[c + e_i] - u_i[c - e_i]) / (2 h_i)``
    (central): the operator whose product with `curl` vanishes identically. A periodic axis wraps; on a walled one
    the face below the first cell carries zero. Units: velocity over length.
    """
    ndim = check_field("velocity", velocity, VELOCITY_CHANNELS)
    return reference.divergence_reference(velocity, make_grid(ndim, spacing, boundary, stencil))


def face_flux(velocity: Tensor, *, spacing: Sequence[float] = DEFAULT_SPACING) -> Tensor:
    """Volume flux through each face, over the smallest face area, of an exactly decoded velocity.

    ``F_i = u_i max(h) / h_i``, put back on the lattice of the exact decode (per sample), so that
    ``divergence(face_flux(u, spacing=s), boundary=...)`` is bitwise zero for every spacing ``s``. Meaningful only
    for the result of ``decode_velocity(..., exact=True)`` with the same spacing. Not differentiable.
    """
    ndim = check_field("velocity", velocity, VELOCITY_CHANNELS)
    check_exact_dtype(velocity.dtype)
    boundary = DEFAULT_BOUNDARY[:ndim]
    return reference.face_flux_reference(velocity, make_grid(ndim, spacing, boundary, "staggered"))
