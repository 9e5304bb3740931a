"""Local physics of a sample at the size of its tokens: vorticity, strain rate, distance to a wall, porosity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import scipy
import torch
from torch import Tensor

from shodh.schema.fields import Boundary

# name: what it is, for tables and figures
QUANTITIES = {
    "vorticity": "|vorticity|",
    "strain_rate": "strain rate",
    "wall_distance": "distance to a wall or solid",
    "porosity": "porosity",
}


def _below(u: Tensor, dim: int, boundary: Boundary) -> Tensor:
    """Face values one cell below along ``dim``: wrapped, zero at a wall, the cell's own at an open end."""
    shifted = torch.roll(u, 1, dim)
    if boundary != "periodic":
        first = shifted.narrow(dim, 0, 1)
        first.copy_(u.narrow(dim, 0, 1) if boundary == "open" else torch.zeros_like(first))
    return shifted


def _slope(c: Tensor, dim: int, spacing: float, boundary: Boundary) -> Tensor:
    """Derivative of cell-centred values at the centres, second order; one-sided at ends that do not wrap."""
    if c.shape[dim] == 1:
        return torch.zeros_like(c)
    if boundary == "periodic":
        return (torch.roll(c, -1, dim) - torch.roll(c, 1, dim)) / (2 * spacing)
    (slope,) = torch.gradient(c, spacing=spacing, dim=dim, edge_order=2 if c.shape[dim] > 2 else 1)
    return slope


def velocity_gradient(velocity: Tensor, spacing: Sequence[float], boundary: Sequence[Boundary]) -> Tensor:
    """Gradient ``G[:, i, j] = d u_i / d x_j`` at cell centres of a staggered velocity, second order inside.

    Parameters
    ----------
    velocity : Tensor [B, D, *grid]
        Component ``i`` on the upper face of its cell along axis ``i``; D axes.

    Returns
    -------
    Tensor [B, D, D, *grid]
        In velocity units over length units, of the dtype of ``velocity``.
    """
    rows = []
    for i, u in enumerate(velocity.unbind(1)):
        below = _below(u, 1 + i, boundary[i])
        center = (u + below) / 2
        row = [_slope(center, 1 + j, spacing[j], boundary[j]) for j in range(velocity.shape[1])]
        row[i] = (u - below) / spacing[i]
        rows.append(torch.stack(row, 1))
    return torch.stack(rows, 1)


def vorticity_and_strain(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """``|curl u|`` and ``sqrt(2 S:S)`` with ``S = (G + G^T) / 2``, of `velocity_gradient`; both ``[B, *grid]``."""
    transposed = gradient.transpose(1, 2)
    # Every off-diagonal pair is met twice, hence the factors.
    vorticity = ((gradient - transposed).square().sum((1, 2)) / 2).sqrt()
    strain = ((gradient + transposed).square().sum((1, 2)) / 2).sqrt()
    return vorticity, strain


def wall_distance(
    solid: np.ndarray | None, grid: Sequence[int], spacing: Sequence[float], boundary: Sequence[Boundary]
) -> np.ndarray | None:
    """Distance of each cell's centre to the nearest wall, or centre of a solid cell; None where there is neither.

    Parameters
    ----------
    solid : ndarray [*grid], optional
        1 in solids; distances wrap around periodic axes.
    """
    walls = [axis for axis, kind in enumerate(boundary) if kind == "wall"]
    has_solid = solid is not None and bool((solid > 0.5).any())
    if not walls and not has_solid:
        return None
    distance = np.full(tuple(grid), np.inf)
    for axis in walls:
        height = (np.arange(grid[axis]) + 0.5) * spacing[axis]
        nearest = np.minimum(height, grid[axis] * spacing[axis] - height)
        distance = np.minimum(distance, nearest.reshape([-1 if a == axis else 1 for a in range(len(grid))]))
    if has_solid:
        assert solid is not None
        pad = [n // 2 if kind == "periodic" else 0 for n, kind in zip(grid, boundary, strict=True)]
        fluid = np.pad(solid <= 0.5, [(p, p) for p in pad], mode="wrap")
        inside = tuple(slice(p, p + n) for p, n in zip(pad, grid, strict=True))
        distance = np.minimum(distance, scipy.ndimage.distance_transform_edt(fluid, sampling=tuple(spacing))[inside])
    return distance


def token_means(values: Tensor, token_grid: Sequence[int]) -> Tensor:
    """Means over the cells of each token: ``[B, *grid] -> [B, tokens]``, x outermost."""
    for axis, tokens in enumerate(token_grid):
        values = values.unflatten(1 + axis, (tokens, -1)).mean(2 + axis)
    return values.flatten(1)


class LocalPhysics:
    """Quantities of `QUANTITIES` on the token grid of samples of one regime, as far as its fields give them.

    Parameters
    ----------
    spacing, boundary
        Cell sizes, in the file's units, and boundary of each axis.
    token_grid : sequence of int
    """

    def __init__(self, spacing: Sequence[float], boundary: Sequence[Boundary], token_grid: Sequence[int]) -> None:
        self.spacing, self.boundary, self.token_grid = tuple(spacing), tuple(boundary), tuple(token_grid)
        self._distance: dict[int, Tensor | None] = {}  # by trajectory: solids do not move

    def __call__(
        self, fields: Mapping[str, Tensor], static: Mapping[str, Tensor], trajectory: Sequence[int]
    ) -> dict[str, np.ndarray]:
        """``{quantity: [B, tokens]}`` of a batch in physical units; quantities that do not exist are left out.

        Parameters
        ----------
        fields, static : mapping
            By name: vectors ``[B, D, *grid]``, scalars ``[B, 1, *grid]``. ``velocity`` and ``solid`` are used.
        trajectory : sequence of int [B]
        """
        found: dict[str, Tensor] = {}
        velocity, solid = fields.get("velocity"), static.get("solid")
        if velocity is not None and velocity.shape[1] == len(self.spacing):
            gradient = velocity_gradient(velocity.double(), self.spacing, self.boundary)
            found["vorticity"], found["strain_rate"] = vorticity_and_strain(gradient)
        grid = next(iter(fields.values())).shape[2:]
        distances = [
            self._distances(solid[b, 0] if solid is not None else None, grid, t) for b, t in enumerate(trajectory)
        ]
        known = [d for d in distances if d is not None]
        if len(known) == len(distances):
            found["wall_distance"] = torch.stack(known)
        if solid is not None:
            found["porosity"] = 1 - solid[:, 0].double()
        return {name: token_means(values, self.token_grid).cpu().numpy() for name, values in found.items()}

    def _distances(self, solid: Tensor | None, grid: Sequence[int], trajectory: int) -> Tensor | None:
        if trajectory not in self._distance:
            mask = None if solid is None else solid.cpu().numpy()
            distance = wall_distance(mask, grid, self.spacing, self.boundary)
            self._distance[trajectory] = None if distance is None else torch.from_numpy(distance)
        return self._distance[trajectory]
