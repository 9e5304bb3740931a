"""Staggered difference operators shared by the solvers.

Internal layout. The solvers keep a batch of ``B`` trajectories innermost, ``[*space, B]`` (vectors
``[3, *space, B]``), so that a slice along any space axis stays a long contiguous run. A *padded* field carries one
halo layer on both sides of every space axis. Component ``i`` of a velocity lives on the *upper* face of its cell
along axis ``i`` (see :mod:`shodh.schema.fields`): on padded arrays the lower face of the first cell is the halo entry.

With this placement the divergence is a backward and the gradient a forward difference, and they are negative
adjoints of each other; that is what makes projections exact and pressure do no work.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def inner(padded: Tensor, first: int = 0) -> Tensor:
    """View without the halo of the three space axes that start at dimension ``first``."""
    for axis in range(first, first + 3):
        padded = padded.narrow(axis, 1, padded.shape[axis] - 2)
    return padded


def shifted(padded: Tensor, axis: int, offset: int, first: int = 0) -> Tensor:
    """View of the interior moved by ``offset`` cells (-1, 0 or 1) along space axis ``axis``."""
    for a in range(3):
        start = 1 + offset if a == axis else 1
        padded = padded.narrow(first + a, start, padded.shape[first + a] - 2)
    return padded


def fill_periodic(padded: Tensor, axis: int) -> None:
    """Copy the opposite interior layers into the halo of a periodic dimension ``axis``, in place."""
    n = padded.shape[axis]
    padded.select(axis, 0).copy_(padded.select(axis, n - 2))
    padded.select(axis, n - 1).copy_(padded.select(axis, 1))


def padded_like(space: Sequence[int], batch: int, *, components: int = 0, like: Tensor) -> Tensor:
    """Zeros ``[components,] n+2, n+2, n+2, batch`` with dtype and device of ``like``."""
    shape = [n + 2 for n in space] + [batch]
    if components:
        shape = [components, *shape]
    return torch.zeros(shape, dtype=like.dtype, device=like.device)


def divergence_padded(velocity: Tensor, spacing: Sequence[float], out: Tensor | None = None) -> Tensor:
    """``sum_i (u_i[c] - u_i[c - e_i]) / h_i``, shape ``[*space, B]``, of a padded face velocity ``[3, *(n+2), B]``."""
    out = torch.sub(shifted(velocity[0], 0, 0), shifted(velocity[0], 0, -1), out=out)
    out.mul_(1.0 / spacing[0])
    for axis in (1, 2):
        weight = 1.0 / spacing[axis]
        out.add_(shifted(velocity[axis], axis, 0), alpha=weight)
        out.sub_(shifted(velocity[axis], axis, -1), alpha=weight)
    return out


def subtract_gradient(velocity: Tensor, potential: Tensor, spacing: Sequence[float]) -> None:
    """``u_i -= (p[c+e_i] - p[c]) / h_i`` on the interior, in place; both arguments are padded."""
    here = inner(potential)
    for axis in range(3):
        component = inner(velocity[axis])
        component.sub_(shifted(potential, axis, 1), alpha=1.0 / spacing[axis])
        component.add_(here, alpha=1.0 / spacing[axis])


def divergence(components: Sequence[Tensor], spacing: Sequence[float], first: int) -> Tensor:
    """Divergence of unpadded face velocities whose wall faces, if any, are stored as zeros.

    Parameters
    ----------
    components : 3 Tensors
        The last face of a walled axis must be zero: then wrapping around equals the wall.
    spacing : 3 floats
    first : int
        Dimension of the first space axis.
    """
    x, y, z = ((u - torch.roll(u, 1, dims=first + axis)) / spacing[axis] for axis, u in enumerate(components))
    return x + y + z


def gradient(values: Tensor, spacing: Sequence[float], periodic: Sequence[bool], first: int) -> list[Tensor]:
    """Forward differences at the upper faces of unpadded ``values``: the negative adjoint of `divergence`.

    The last face of an axis that is not periodic is a wall and gets zero.
    """
    components = []
    for axis, (h, wraps) in enumerate(zip(spacing, periodic, strict=True)):
        difference = (torch.roll(values, -1, dims=first + axis) - values).mul_(1.0 / h)
        if not wraps:
            difference.select(first + axis, -1).zero_()
        components.append(difference)
    return components
