"""Divergence-free decoding in plain torch: slow, obvious, on any device, differentiable twice.

It defines what every compiled back end must return, bit for bit: differences first, then the scale, in the order
written here, without fused multiply-add.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shodh.ops.grid import Grid

DECODE_GUARD = 1.0 + 2.0**-17  # rounding the potential raises the largest flux by at most 2.5 steps of 2^-23
RECOVERY_GUARD = 1.0 + 2.0**-19  # smaller, so that the recovered lattice is never coarser than the decode's
POTENTIAL_HEADROOM = 2.0**-27  # a potential this many times the largest flux coarsens the lattice


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Arithmetic dtype for a storage dtype: float32 for 16-bit and 8-bit floats, else the same."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def pin(f: Tensor, axis: int) -> Tensor:
    """Replace the last entry along ``axis`` by zero, without reading it."""
    return torch.cat([f.narrow(axis, 0, f.shape[axis] - 1), torch.zeros_like(f.narrow(axis, 0, 1))], axis)


def difference(f: Tensor, axis: int, grid: Grid, mirror: bool = False) -> Tensor:
    """Undivided difference of ``f [B, *grid]`` along a space axis.

    Staggered: ``f[i] - f[i-1]``, or mirrored ``f[i+1] - f[i]``, wrapped on a periodic axis and with zero beyond the
    ends of a walled one. Central: ``f[i+1] - f[i-1]``, wrapped.
    """
    dim, last = axis + 1, f.shape[axis + 1] - 1
    if grid.central:
        return torch.roll(f, -1, dim) - torch.roll(f, 1, dim)
    if not grid.walls[axis]:
        return torch.roll(f, -1, dim) - f if mirror else f - torch.roll(f, 1, dim)
    zero = torch.zeros_like(f.narrow(dim, 0, 1))
    if mirror:
        return torch.cat([f.narrow(dim, 1, last), zero], dim) - f
    return f - torch.cat([zero, f.narrow(dim, 0, last)], dim)


def pinned_components(potential: Tensor, grid: Grid) -> list[Tensor]:
    """Components of the potential, the tangential ones zero on the upper wall faces."""
    components = list(potential.unbind(1))
    names = range(3) if grid.ndim == 3 else (2,)
    for slot, component in enumerate(names):
        for axis, wall in enumerate(grid.walls):
            if wall and axis != component:
                components[slot] = pin(components[slot], axis + 1)
    return components


def inverse_spacing(grid: Grid) -> list[float]:
    """What undivided differences are multiplied by."""
    return [(0.5 if grid.central else 1.0) / h for h in grid.spacing]


def curl_components(potential: list[Tensor], inverse: list[float], grid: Grid, mirror: bool = False) -> list[Tensor]:
    """``u_i = D_j A_k * inverse_j - D_k A_j * inverse_k`` for cyclic (i, j, k); 2-D has ``A = (0, 0, psi)``."""
    if grid.ndim == 2:
        (psi,) = potential
        return [difference(psi, 1, grid) * inverse[1], -(difference(psi, 0, grid) * inverse[0])]
    velocity = []
    for i in range(3):
        j, k = (i + 1) % 3, (i + 2) % 3
        first, second = difference(potential[k], j, grid, mirror), difference(potential[j], k, grid, mirror)
        velocity.append(first * inverse[j] - second * inverse[k])
    return velocity


def add_harmonic(velocity: list[Tensor], harmonic: Tensor | None, grid: Grid) -> list[Tensor]:
    """Add one constant per periodic axis."""
    if harmonic is None:
        return velocity
    velocity = list(velocity)
    for column, axis in enumerate(grid.periodic_axes):
        velocity[axis] = velocity[axis] + harmonic[:, column].reshape(-1, *[1] * grid.ndim)
    return velocity


def decode_reference(potential: Tensor, harmonic: Tensor | None, grid: Grid) -> Tensor:
    """Plain decode ``curl(potential) + harmonic``; checked arguments, any strides."""
    dtype = compute_dtype(potential.dtype)
    components = [a.to(dtype) for a in pinned_components(potential, grid)]
    velocity = curl_components(components, inverse_spacing(grid), grid)
    velocity = add_harmonic(velocity, None if harmonic is None else harmonic.to(dtype), grid)
    return torch.stack(velocity, 1).to(potential.dtype)


def lattice_bits(dtype: torch.dtype) -> int:
    """Bits of the largest face flux in lattice steps.

    A difference of two fluxes takes one bit more, so 23 is the most that float32 sums exactly; it is also few
    enough that `face_flux` can undo the one rounding in ``flux / area``. In float64 the potential itself must stay
    below 2^51 steps.
    """
    return 23 if dtype == torch.float32 else 50


def lattice_floor(dtype: torch.dtype) -> int:
    """Exponent of the finest lattice step: velocities stay clear of subnormal numbers."""
    return -100 if dtype == torch.float32 else -990


def potential_scales(grid: Grid) -> list[float]:
    """Factors that turn potential components into edge integrals whose differences are face fluxes."""
    half = 0.5 if grid.central else 1.0
    if grid.ndim == 2:
        return [half * grid.reference_spacing / (grid.spacing[0] * grid.spacing[1])]
    scales = []
    for k in range(3):
        i, j = (k + 1) % 3, (k + 2) % 3
        scales.append(half * grid.reference_spacing / (grid.spacing[i] * grid.spacing[j]))
    return scales


def lattice_step(peak: Tensor, guard: float, dtype: torch.dtype) -> Tensor:
    """Lattice step for the largest magnitudes ``[B]``, float64: a power of two, NaN where ``peak`` is not finite."""
    peak = peak.double()
    _, exponent = torch.frexp(peak * guard)  # peak < 2^exponent
    exponent = (exponent - lattice_bits(dtype)).clamp(min=lattice_floor(dtype))
    step = torch.ldexp(torch.ones_like(peak), exponent)
    return torch.where(peak.isfinite(), step, math.nan)


@torch.no_grad()
def decode_exact_reference(potential: Tensor, harmonic: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
    """Exact decode; returns velocity and the lattice step ``[B]`` (NaN where a sample is not finite)."""
    dtype = potential.dtype
    per_sample = (-1, *[1] * grid.ndim)
    ones = [1.0] * grid.ndim
    edges = [
        a.double() * scale for a, scale in zip(pinned_components(potential, grid), potential_scales(grid), strict=True)
    ]
    through = None
    if harmonic is not None:
        through = harmonic.double() * harmonic.new_tensor(
            [grid.areas[axis] for axis in grid.periodic_axes], dtype=torch.float64
        )
    headroom = POTENTIAL_HEADROOM if dtype == torch.float32 else 1.0

    fluxes = add_harmonic(curl_components(edges, ones, grid), through, grid)
    magnitudes = [f.abs() for f in fluxes] + [e.abs() * headroom for e in edges]
    peak = torch.stack([m.flatten(1).amax(1) for m in magnitudes]).amax(0).to(dtype)
    step = lattice_step(peak, DECODE_GUARD, dtype)

    rounded = [torch.round(e / step.reshape(per_sample)) for e in edges]
    through = None if through is None else torch.round(through / step[:, None])
    fluxes = add_harmonic(curl_components(rounded, ones, grid), through, grid)
    velocity = [f * (step.reshape(per_sample) / area) for f, area in zip(fluxes, grid.areas, strict=True)]
    return torch.stack(velocity, 1).to(dtype), step


def decode_exact_differentiable(potential: Tensor, harmonic: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
    """Exact decode whose gradient is that of the plain one (straight through the rounding)."""
    velocity, step = decode_exact_reference(potential, harmonic, grid)
    if torch.is_grad_enabled() and (potential.requires_grad or (harmonic is not None and harmonic.requires_grad)):
        plain = decode_reference(potential, harmonic, grid)
        velocity = velocity + (plain - plain.detach())  # the bracket is exactly zero
    return velocity, step


def divergence_reference(velocity: Tensor, grid: Grid) -> Tensor:
    """Discrete divergence ``[B, *grid]``: face fluxes are summed before the division by a length.

    This order keeps the sum free of rounding when the fluxes lie on a lattice.
    """
    dtype = compute_dtype(velocity.dtype)
    total = None
    for axis, area in enumerate(grid.areas):
        flux = difference(velocity[:, axis].to(dtype), axis, grid) * area
        total = flux if total is None else total + flux
    assert total is not None
    scale = (0.5 if grid.central else 1.0) / grid.reference_spacing
    return (total * scale).to(velocity.dtype)


@torch.no_grad()
def face_flux_reference(velocity: Tensor, grid: Grid) -> Tensor:
    """Face fluxes of an exactly decoded velocity, restored to their lattice or a finer one.

    The stored ``u = flux / area`` is off by half a unit in the last place, less than half a step of any flux below
    ``2^lattice_bits`` steps, so rounding brings every flux back.
    """
    per_cell = (1, -1, *[1] * grid.ndim)
    flux = velocity.double() * velocity.new_tensor(grid.areas, dtype=torch.float64).reshape(per_cell)
    step = lattice_step(flux.abs().flatten(1).amax(1), RECOVERY_GUARD, velocity.dtype)
    step = step.reshape(-1, 1, *[1] * grid.ndim)
    return (torch.round(flux / step) * step).to(velocity.dtype)


def decode_adjoint_reference(gradient: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Gradients of potential and harmonic ``[B, P]`` for a gradient of the velocity: the mirrored stencil, and sums."""
    components = list(gradient.to(compute_dtype(gradient.dtype)).unbind(1))
    inverse = inverse_spacing(grid)
    if grid.ndim == 3:
        found = torch.stack(curl_components(components, inverse, grid, mirror=True), 1)
    else:
        x, y = difference(components[1], 0, grid, mirror=True), difference(components[0], 1, grid, mirror=True)
        found = (x * inverse[0] - y * inverse[1])[:, None]
    potential = torch.stack(pinned_components(found, grid), 1).to(gradient.dtype)
    space = tuple(range(2, gradient.dim()))
    harmonic = gradient[:, list(grid.periodic_axes)].sum(space, dtype=torch.float64)
    return potential, harmonic.to(gradient.dtype)
