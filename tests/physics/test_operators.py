"""The staggered difference operators and the direct solvers built on them."""

from __future__ import annotations

import pytest
import torch

from shodh.physics.solvers.operators import divergence_padded, fill_periodic, inner, padded_like, subtract_gradient
from shodh.physics.solvers.poisson import ChannelPoisson, PeriodicPoisson, closed_faces, project_around_solids

SPACE, SPACING = (5, 7, 6), (0.3, 0.2, 0.5)


def random_padded(seed: int, components: int = 0, wall: bool = False) -> torch.Tensor:
    """Random padded field, periodic, or walled along the first axis (zero normal velocity, Neumann scalar)."""
    like = torch.empty(0, dtype=torch.float64)
    field = padded_like(SPACE, 2, components=components, like=like)
    first = 1 if components else 0
    inner(field, first=first).copy_(
        torch.randn(inner(field, first=first).shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    )
    if wall and components:
        field[0, 0] = 0.0
        field[0, SPACE[0]] = 0.0
    elif wall:
        field[0], field[-1] = field[1], field[-2]
    for axis in range(1 if wall else 0, 3):
        fill_periodic(field, first + axis)
    return field


def laplacian(padded: torch.Tensor) -> torch.Tensor:
    total = torch.zeros_like(inner(padded))
    for axis in range(3):
        n = SPACE[axis]
        line = padded
        for other in range(3):
            if other != axis:
                line = line.narrow(other, 1, SPACE[other])
        total += (line.narrow(axis, 2, n) - 2 * line.narrow(axis, 1, n) + line.narrow(axis, 0, n)) / SPACING[axis] ** 2
    return total


@pytest.mark.parametrize("wall", [False, True])
def test_gradient_is_the_negative_adjoint_of_the_divergence(wall: bool) -> None:
    velocity, potential = random_padded(1, components=3, wall=wall), random_padded(2, wall=wall)
    gradient = torch.zeros_like(velocity)
    subtract_gradient(gradient, potential, SPACING)
    work = -(inner(velocity, first=1) * inner(gradient, first=1)).sum()
    power = -(inner(potential) * divergence_padded(velocity, SPACING)).sum()
    torch.testing.assert_close(work, power, rtol=1e-12, atol=1e-12)


def test_divergence_of_gradient_is_the_compact_laplacian() -> None:
    potential = random_padded(3)
    gradient = torch.zeros(3, *potential.shape, dtype=torch.float64)
    subtract_gradient(gradient, potential, SPACING)
    gradient.neg_()
    for axis in range(3):
        fill_periodic(gradient, axis + 1)
    torch.testing.assert_close(divergence_padded(gradient, SPACING), laplacian(potential), rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("wall", [False, True])
def test_poisson_solvers_invert_the_discrete_laplacian(wall: bool) -> None:
    potential = random_padded(4, wall=wall)
    expected = inner(potential) - inner(potential).mean((0, 1, 2), keepdim=True)
    kind = ChannelPoisson if wall else PeriodicPoisson
    solver = kind(SPACE, SPACING, torch.float64, "cpu")
    solution = solver.solve(laplacian(potential).permute(3, 0, 1, 2).contiguous())
    torch.testing.assert_close(solution.permute(1, 2, 3, 0), expected, rtol=1e-11, atol=1e-11)


def random_solids(batch: int, grid: tuple[int, int, int]) -> torch.Tensor:
    return torch.rand(batch, *grid, generator=torch.Generator().manual_seed(0)) < 0.3


def test_projection_around_solids_is_divergence_free_and_impermeable() -> None:
    grid, spacing = (9, 11, 8), (0.11, 0.1, 0.12)
    solid = random_solids(3, grid)
    noise = torch.randn(3, 3, *grid, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    velocity, divergence = project_around_solids(noise, solid, spacing)
    assert velocity[closed_faces(solid)].abs().max() == 0.0
    total = sum((velocity[:, a] - velocity[:, a].roll(1, a + 1)) / spacing[a] for a in range(3))
    assert isinstance(total, torch.Tensor)
    assert total.abs().max() <= 1e-9 * noise.abs().max() / min(spacing)
    torch.testing.assert_close(total.abs().flatten(1).amax(1), divergence)
    assert velocity.abs().mean() > 0.1


def test_projection_around_solids_takes_the_nearest_field() -> None:
    grid, spacing = (8, 7, 9), (0.1, 0.1, 0.1)
    solid = random_solids(2, grid)
    noise = torch.randn(2, 3, *grid, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    velocity, _ = project_around_solids(noise, solid, spacing)
    again, _ = project_around_solids(velocity, solid, spacing)
    torch.testing.assert_close(again, velocity, atol=1e-8, rtol=0)
    other, _ = project_around_solids(noise.roll(3, -1), solid, spacing)
    removed = (noise - velocity).masked_fill(closed_faces(solid), 0.0)
    assert abs((removed * other).sum()) < 1e-6 * removed.norm() * other.norm()
