"""Local physics on staggered grids: analytic flows, order of convergence, distances that wrap around."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from shodh.routing.probe.local_physics import (
    LocalPhysics,
    token_means,
    velocity_gradient,
    vorticity_and_strain,
    wall_distance,
)
from shodh.schema.fields import Boundary

Flow = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
PERIODIC: tuple[Boundary, ...] = ("periodic",) * 3


def staggered(flow: Flow, grid: tuple[int, ...], lengths: tuple[float, ...]) -> Tensor:
    """Values of a flow on the upper faces, ``[1, 3, *grid]``."""
    components = []
    for i in range(3):
        axes = [
            (torch.arange(n, dtype=torch.float64) + (1.0 if a == i else 0.5)) * length / n
            for a, (n, length) in enumerate(zip(grid, lengths, strict=True))
        ]
        components.append(flow(*torch.meshgrid(*axes, indexing="ij"))[i])
    return torch.stack(components)[None]


def test_vorticity_and_strain_converge_at_second_order() -> None:
    """Taylor-Green vortex, whose components change along every axis."""

    def vortex(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x.sin() * y.cos() * z.cos(), -x.cos() * y.sin() * z.cos(), 0 * x

    errors = []
    for n in (4, 8):
        grid, lengths = (3 * n, 4 * n, 5 * n), (2 * np.pi,) * 3
        spacing = [length / m for length, m in zip(lengths, grid, strict=True)]
        vorticity, strain = vorticity_and_strain(velocity_gradient(staggered(vortex, grid, lengths), spacing, PERIODIC))
        axes = [(torch.arange(m, dtype=torch.float64) + 0.5) * h for m, h in zip(grid, spacing, strict=True)]
        x, y, z = torch.meshgrid(*axes, indexing="ij")
        tilted = (x.cos() * y.sin() * z.sin()).square() + (x.sin() * y.cos() * z.sin()).square()
        spin = (tilted + (2 * x.sin() * y.sin() * z.cos()).square()).sqrt()
        stretch = (tilted + (2 * x.cos() * y.cos() * z.cos()).square()).sqrt()
        found = ((vorticity[0], spin), (strain[0], stretch))
        errors.append([float((a - b).square().mean().sqrt()) for a, b in found])
    orders = np.log2(np.array(errors[0]) / np.array(errors[1]))
    assert (orders > 1.9).all()


@pytest.mark.parametrize("boundary", ["wall", "open"])
def test_rotation_and_shear_are_exact_away_from_the_ends(boundary: Boundary) -> None:
    """Linear fields have no truncation error; rigid rotation has no strain, simple shear as much as vorticity."""
    grid, spacing, kinds = (8, 6, 4), (0.5, 0.25, 1.0), (boundary,) * 3
    lengths = tuple(n * h for n, h in zip(grid, spacing, strict=True))
    inside = (slice(None), slice(2, -2), slice(2, -2), slice(1, -1))

    rotation = staggered(lambda x, y, z: (-1.5 * y, 1.5 * x, 0 * z), grid, lengths)
    vorticity, strain = (a[inside] for a in vorticity_and_strain(velocity_gradient(rotation, spacing, kinds)))
    torch.testing.assert_close(vorticity, torch.full_like(vorticity, 3.0))
    torch.testing.assert_close(strain, torch.zeros_like(strain), atol=1e-12, rtol=0)

    shear = staggered(lambda x, y, z: (2.0 * z, 0 * y, 0 * x), grid, lengths)
    vorticity, strain = (a[inside] for a in vorticity_and_strain(velocity_gradient(shear, spacing, kinds)))
    torch.testing.assert_close(vorticity, torch.full_like(vorticity, 2.0))
    torch.testing.assert_close(strain, torch.full_like(strain, 2.0))


def test_shear_between_walls_is_seen_up_to_the_walls() -> None:
    shear = staggered(lambda x, y, z: (z * (1 - z), 0 * y, 0 * x), (4, 4, 8), (1.0, 1.0, 1.0))
    kinds: tuple[Boundary, ...] = ("periodic", "periodic", "wall")
    vorticity, _ = vorticity_and_strain(velocity_gradient(shear, (0.25, 0.25, 0.125), kinds))
    z = (torch.arange(8, dtype=torch.float64) + 0.5) / 8
    torch.testing.assert_close(vorticity[0], (1 - 2 * z).abs().expand(4, 4, 8), atol=1e-12, rtol=0)


def test_distance_to_walls_is_that_of_cell_centres() -> None:
    distance = wall_distance(None, (2, 3, 4), (1.0, 1.0, 0.5), ("periodic", "open", "wall"))
    assert distance is not None
    np.testing.assert_allclose(distance, np.broadcast_to([0.25, 0.75, 0.75, 0.25], (2, 3, 4)))
    assert wall_distance(np.zeros((2, 2, 2)), (2, 2, 2), (1.0, 1.0, 1.0), PERIODIC) is None


def test_distance_to_solids_wraps_around_periodic_axes_and_no_others() -> None:
    solid = np.zeros((8, 4, 6))
    solid[0, 0, 0] = 1
    spacing = (0.5, 1.0, 2.0)
    kinds: tuple[Boundary, ...] = ("periodic", "open", "periodic")
    distance = wall_distance(solid, solid.shape, spacing, kinds)
    index = np.stack(np.meshgrid(*(np.arange(n) for n in solid.shape), indexing="ij"))
    steps = [np.minimum(index[0], 8 - index[0]) * 0.5, index[1] * 1.0, np.minimum(index[2], 6 - index[2]) * 2.0]
    np.testing.assert_allclose(distance, np.sqrt(sum(s**2 for s in steps)))


def test_token_means_are_in_the_order_of_the_tokens() -> None:
    values = torch.arange(2 * 4 * 4 * 2, dtype=torch.float64).view(2, 4, 4, 2)
    means = token_means(values, (2, 2, 1))
    assert means.shape == (2, 4)
    torch.testing.assert_close(means[1, 2], values[1, 2:, :2].mean())


def test_quantities_that_a_regime_does_not_have_are_left_out() -> None:
    heat = {"temperature": torch.zeros(1, 1, 4, 4, 4)}
    assert LocalPhysics((1.0,) * 3, PERIODIC, (2, 2, 2))(heat, {}, [0]) == {}
    solid = {"solid": torch.zeros(1, 1, 4, 4, 4)}
    solid["solid"][0, 0, :2] = 1
    found = LocalPhysics((1.0,) * 3, PERIODIC, (2, 2, 2))(heat, solid, [0])
    assert sorted(found) == ["porosity", "wall_distance"]
    assert found["porosity"].tolist() == [[0.0] * 4 + [1.0] * 4]
