"""The potential of a face field: its decode is the orthogonal projection onto divergence-free fields."""

from __future__ import annotations

import itertools

import pytest
import torch

from shodh.ops import decode_velocity, divergence, helmholtz_potential

BOXES = [((5, 6, 7), boundary, (0.7, 1.3, 0.4)) for boundary in itertools.product(("periodic", "wall"), repeat=3)] + [
    ((6, 9), boundary, (0.5, 1.25)) for boundary in itertools.product(("periodic", "wall"), repeat=2)
]


def random_field(grid: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, len(grid), *grid, generator=generator, dtype=torch.float64)


def project(w: torch.Tensor, spacing: tuple[float, ...], boundary: tuple[str, ...]) -> torch.Tensor:
    potential, harmonic = helmholtz_potential(w, spacing=spacing, boundary=boundary)
    return decode_velocity(potential, harmonic, spacing=spacing, boundary=boundary)


@pytest.mark.parametrize(("grid", "boundary", "spacing"), BOXES)
def test_decode_is_the_orthogonal_projection(grid, boundary, spacing):
    w = random_field(grid, 0)
    u = project(w, spacing, boundary)
    assert divergence(u, spacing=spacing, boundary=boundary).abs().max() < 1e-12
    # Orthogonal: the rest is orthogonal to every divergence-free field, so also to the projection of another field.
    other = project(random_field(grid, 1), spacing, boundary)
    assert abs(float(((w - u) * other).sum())) < 1e-10 * float(w.square().sum())
    assert float(u.square().sum()) > 0.1 * float(w.square().sum())
    torch.testing.assert_close(project(u, spacing, boundary), u, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("grid", "boundary", "spacing"), BOXES)
def test_every_divergence_free_field_is_recovered(grid, boundary, spacing):
    """The remainder ``w - u`` of a projection is a gradient: adding gradients never changes the decode."""
    w = random_field(grid, 2)
    gradient = w - project(w, spacing, boundary)
    torch.testing.assert_close(
        project(gradient, spacing, boundary), torch.zeros_like(w), rtol=0, atol=1e-11 * float(w.abs().max())
    )


def test_single_precision_and_strided_input_agree_with_double():
    w = random_field((8, 6, 10), 3).transpose(2, 4)
    boundary, spacing = ("periodic", "periodic", "wall"), (1.0, 0.5, 0.25)
    double = project(w, spacing, boundary)
    single = project(w.float(), spacing, boundary)
    torch.testing.assert_close(single.double(), double, rtol=0, atol=2e-5)


def test_gradient_is_the_projection_itself():
    """P is symmetric and linear, so the gradient of ``<P w, g>`` with respect to w is ``P g``."""
    boundary, spacing = ("periodic", "wall", "periodic"), (1.0, 2.0, 0.5)
    w = random_field((4, 5, 6), 4).requires_grad_()
    g = random_field((4, 5, 6), 5)
    (gradient,) = torch.autograd.grad((project(w, spacing, boundary) * g).sum(), w)
    torch.testing.assert_close(gradient, project(g, spacing, boundary), rtol=0, atol=1e-12)
