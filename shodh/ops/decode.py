"""The public operators: divergence-free decode, curl, divergence and face fluxes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from shodh.core.errors import NonFiniteError
from shodh.ops import reference
from shodh.ops.extension import choose_implementation, require_implementation
from shodh.ops.grid import (
    DEFAULT_BOUNDARY,
    DEFAULT_SPACING,
    Grid,
    check_exact_dtype,
    check_field,
    check_harmonic,
    make_grid,
)

POTENTIAL_CHANNELS = {3: 3, 2: 1}
VELOCITY_CHANNELS = {3: 3, 2: 2}

_checking = os.environ.get("SHODH_CHECKED") == "1"


@contextmanager
def checked(enabled: bool = True) -> Iterator[None]:
    """Within this context `decode_velocity` raises `NonFiniteError` for NaN, infinity or overflow.

    Costs one synchronisation with a CUDA device a call. ``SHODH_CHECKED=1`` switches it on for a whole process.
    Calls that are being compiled or exported are not checked; NaN marks their result all the same.
    """
    global _checking
    before, _checking = _checking, enabled
    try:
        yield
    finally:
        _checking = before


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
    """Decode a vector potential into a discretely divergence-free velocity, ``u = curl A + h``.

    Parameters
    ----------
    potential : Tensor [B, 3, X, Y, Z], or [B, 1, X, Y]
        Vector potential, or stream function in two dimensions, in units of velocity times length. Any strides.
    harmonic : Tensor [B, P] or None
        Mean flow along each of the ``P`` periodic axes, in their order, in units of velocity: a curl has zero mean,
        so through-flow needs it. A walled axis has none: with ``P < 3`` a ``[B, 3]`` is refused.
    spacing : sequence of float
        Cell size along each axis.
    boundary : sequence of {"periodic", "wall"}
        One an axis.
    stencil : {"staggered", "central"}
        One-sided differences on a staggered grid, or collocated central differences (periodic axes only).
    exact : bool
        Round to a lattice, so that the stored velocity is divergence-free to the last bit (see Notes).
    implementation : {None, "reference", "cpp", "cuda"}
        None takes the fastest that is built, and warns once where that is the reference alone. A name is never
        replaced by another.

    Returns
    -------
    Tensor [B, 3, X, Y, Z], or [B, 2, X, Y]
        Velocity, contiguous, in the dtype of the potential. 16-bit storage is computed in float32. Under autocast
        16-bit inputs are raised to float32, and so is the result.

    Raises
    ------
    ValueError
        Wrong rank, shape, device, spacing, boundary, stencil or name of an implementation.
    TypeError
        Not a floating-point tensor, two dtypes, or ``exact`` in a 16-bit dtype.
    ExtensionError
        The implementation asked for is not built.
    NonFiniteError
        In the `checked` mode, a result that is not finite.

    Notes
    -----
    *Operator.* ``u_i = D_j A_k - D_k A_j + h_i`` for cyclic ``(i, j, k)``, in two dimensions ``u_x = D_y psi``,
    ``u_y = -D_x psi``. Staggered: ``(D f)[i] = (f[i] - f[i-1]) / spacing``. Central:
    ``(D f)[i] = (f[i+1] - f[i-1]) / (2 spacing)``. `divergence` uses the same differences; they commute, so
    ``divergence(curl(A)) = 0`` identically.

    *Placement.* Staggered: ``u_i`` on the upper face of its cell along axis ``i``; ``A_i`` on the edge along ``i``
    where the upper faces across the other two axes meet; ``psi`` on the upper corner; divergence at the centre.
    Central: everything at the centre.

    *Walls.* Tangential components of the potential, and ``psi``, are zero on both wall faces: below the first cell,
    and in the last stored entry, which is never read. The normal velocity is then exactly zero on both faces, and
    ``u[i] - u[i-1]`` telescopes with ``u[-1] = 0``. Every discretely divergence-free field without flux through the
    walls can be written this way: mean flow along a periodic axis, such as a channel profile ``U(z)``, is
    ``harmonic`` plus a potential for the departure from the mean.

    *Exact mode* (Shodh design; float32 and float64). Edge integrals of the potential and fluxes of the harmonic part
    are rounded to multiples of a power of two before they are differenced. The step is chosen for each sample from
    its largest face flux, ``F_i = u_i max(spacing) / spacing_i``: ``max |F| < 2^23 step`` in float32 (2^50 in float64),
    so all sums in the divergence are exact, and the rounding moves a velocity by about 1e-7 of the largest one.
    The face fluxes balance exactly whatever the spacing: ``divergence(face_flux(u, spacing=s), boundary=b) == 0.0``
    bitwise. Where the ratios of spacings are powers of two, and so for cubic cells, ``divergence(u) == 0.0`` holds as
    well; for other ratios no stored floating-point velocity can have it. The step is coarser where a potential
    exceeds 2^27 times the largest flux (float64: the flux itself), and where velocities fall below 1e-23. A sample that
    holds NaN or infinity, or whose fluxes overflow, is NaN throughout: never a wrong zero. Gradients pass straight
    through the rounding.
    """
    ndim = check_field("potential", potential, POTENTIAL_CHANNELS)
    grid = make_grid(ndim, spacing, boundary, stencil)
    potential, harmonic = _raise_for_autocast(potential, harmonic)
    check_harmonic(harmonic, potential, grid)
    if not grid.periodic_axes:
        harmonic = None
    if exact:
        check_exact_dtype(potential.dtype)
    device_type = potential.device.type
    if implementation is None:
        implementation = choose_implementation(device_type, potential.dtype)
    else:
        require_implementation(implementation, device_type, potential.dtype)
    return _decode(potential, harmonic, grid, exact, implementation)


def _decode(potential: Tensor, harmonic: Tensor | None, grid: Grid, exact: bool, implementation: str) -> Tensor:
    """Run one implementation on checked arguments."""
    check = _checking and not torch.compiler.is_compiling()
    box = (list(grid.spacing), list(grid.walls), grid.central)
    if exact:
        if implementation == "reference":
            velocity, step = reference.decode_exact_differentiable(potential, harmonic, grid)
        else:
            velocity, step = torch.ops.shodh.decode_exact(potential, harmonic, *box)
        finite = step.isfinite() if check else None
    else:
        if implementation == "reference":
            velocity = reference.decode_reference(potential, harmonic, grid)
        else:
            velocity = torch.ops.shodh.decode(potential, harmonic, *box)
        finite = velocity.isfinite().flatten(1).all(1) if check else None
    if finite is not None and not bool(finite.all()):
        samples = (~finite).nonzero().flatten().tolist()
        raise NonFiniteError(
            f"expected a finite potential and harmonic whose velocity fits {velocity.dtype}, "
            f"given NaN, infinity or overflow in samples {samples}"
        )
    return velocity


def _raise_for_autocast(potential: Tensor, harmonic: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Under autocast, 16-bit inputs to float32: the decode is limited by memory, not by arithmetic."""
    device = potential.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return potential, harmonic
    narrow = (torch.float16, torch.bfloat16)
    if potential.dtype in narrow:
        potential = potential.float()
    if isinstance(harmonic, Tensor) and harmonic.dtype in narrow:
        harmonic = harmonic.to(potential.dtype)
    return potential, harmonic


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
    ``divergence(face_flux(u, spacing=s), boundary=b)`` is bitwise zero for every spacing ``s``. Meaningful only
    for the result of ``decode_velocity(..., exact=True)`` with the same spacing. Not differentiable.
    """
    ndim = check_field("velocity", velocity, VELOCITY_CHANNELS)
    check_exact_dtype(velocity.dtype)
    boundary = DEFAULT_BOUNDARY[:ndim]
    return reference.face_flux_reference(velocity, make_grid(ndim, spacing, boundary, "staggered"))
