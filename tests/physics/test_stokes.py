"""Creeping flow through voxel solids against exact and tabulated solutions."""

from __future__ import annotations

import math

import pytest
import torch

from shodh.physics.geometry import pore_space, sphere_pack
from shodh.physics.solvers.krylov import CGResult, conjugate_gradients
from shodh.physics.solvers.poisson import closed_faces
from shodh.physics.solvers.stokes import StokesSolver


def permeability(solid: torch.Tensor, spacing: float, **options: object) -> torch.Tensor:
    """``K [3, 3]`` of one geometry."""
    return StokesSolver(solid[None], (spacing,) * 3, **options).unit_flows().permeability[0]  # type: ignore[arg-type]


def test_plane_poiseuille_flow_is_exact_at_the_nodes() -> None:
    """Voxel walls lie half a cell from the nodes; the parabola plus the constant h^2 / 8 solves the scheme exactly."""
    gap, h = 7, 0.1
    solid = torch.zeros(1, 4, 10, 5, dtype=torch.bool)
    solid[:, :, gap:] = True
    solver = StokesSolver(solid, (h, h, h), tolerance=1e-11, dtype=torch.float64)
    velocity, residual = solver.solve(0)
    assert float(residual.max()) <= 1e-11
    y = (torch.arange(gap, dtype=torch.float64) + 0.5) * h
    exact = 0.5 * y * (gap * h - y) + h**2 / 8
    torch.testing.assert_close(velocity[0, 0, :, :gap], exact[:, None].expand(4, gap, 5), rtol=1e-8, atol=0)
    assert velocity[0, 1:].abs().max() < 1e-9 * exact.max()


def test_square_duct_flow_converges_at_second_order() -> None:
    """Mean velocity 0.0351443 G a^2 / mu."""

    def error(cells: int) -> float:
        solid = torch.ones(2, cells + 1, cells + 2, dtype=torch.bool)
        solid[:, :cells, :cells] = False
        solver = StokesSolver(solid[None], (1 / cells,) * 3, tolerance=1e-9, dtype=torch.float64)
        velocity, _ = solver.solve(0)
        return abs(float(velocity[0, 0, :, :cells, :cells].mean()) / 0.0351443 - 1)

    coarse, fine = error(8), error(16)
    assert fine < 0.02
    assert 1.8 < math.log2(coarse / fine) < 2.2


@pytest.mark.parametrize("concentration, expected", [(0.064, 7.608e-2), (0.125, 3.985e-2), (0.216, 1.915e-2)])
def test_simple_cubic_array_has_the_drag_of_zick_and_homsy(concentration: float, expected: float) -> None:
    """The staircase leaves up to 4 % at 32 cells (Zick & Homsy, J. Fluid Mech. 115, 1982)."""
    cells = 32
    x = (torch.arange(cells) + 0.5) / cells - 0.5
    radius = (3 * concentration / (4 * math.pi)) ** (1 / 3)
    solid = x[:, None, None] ** 2 + x[:, None] ** 2 + x**2 < radius**2
    k = permeability(solid, 1 / cells)
    assert float(k[0, 0]) == pytest.approx(expected, rel=0.045)
    isotropic = k[0, 0] * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(k, isotropic, rtol=1e-4, atol=1e-4 * float(k[0, 0]))


@pytest.mark.parametrize("concentration, drag", [(0.1, 24.83), (0.2, 51.53)])
def test_square_array_of_cylinders_has_the_drag_of_sangani_and_acrivos(concentration: float, drag: float) -> None:
    cells = 48
    x = (torch.arange(cells) + 0.5) / cells - 0.5
    disc = x[:, None] ** 2 + x**2 < concentration / math.pi
    solver = StokesSolver(disc[None, :, :, None].expand(1, cells, cells, 2), (1 / cells,) * 3)
    velocity, _ = solver.solve(0)
    assert 1 / float(velocity[0, 0].mean()) == pytest.approx(drag, rel=0.03)


@pytest.fixture(scope="module")
def pack() -> torch.Tensor:
    solid = pore_space(sphere_pack(3, (15, 18, 13), 0.6, 0.4))
    assert solid is not None
    return torch.from_numpy(solid)[None]


def test_unit_flows_are_divergence_free_and_rest_on_solids(pack: torch.Tensor) -> None:
    h = 1 / 18
    flows = StokesSolver(pack, (h, h, h)).unit_flows()
    assert float(flows.residual.max()) <= 1e-5
    for velocity in flows.velocity:
        assert velocity[closed_faces(pack)].abs().max() == 0.0
        total = sum((velocity[:, a] - velocity[:, a].roll(1, a + 1)) / h for a in range(3))
        assert isinstance(total, torch.Tensor)
        assert total.abs().max() <= 1e-9 * velocity.abs().max() / h


def test_permeability_is_symmetric_and_positive(pack: torch.Tensor) -> None:
    """Lorentz reciprocity, for an anisotropic random medium."""
    k = permeability(pack[0], 1 / 18, tolerance=1e-8, dtype=torch.float64)
    torch.testing.assert_close(k, k.T, rtol=0, atol=1e-6 * float(k.abs().max()))
    assert torch.linalg.eigvalsh(k).min() > 0


def test_single_and_double_precision_agree(pack: torch.Tensor) -> None:
    single = permeability(pack[0], 1 / 18)
    double = permeability(pack[0], 1 / 18, tolerance=1e-9, dtype=torch.float64)
    torch.testing.assert_close(single, double, rtol=0, atol=1e-4 * float(double.abs().max()))


def test_geometries_of_a_batch_do_not_see_each_other(pack: torch.Tensor) -> None:
    other = torch.roll(pack, 1, 1) | torch.roll(pack, 2, 2)
    both = StokesSolver(torch.cat((pack, other)), (1 / 18,) * 3).solve(2)[0]
    alone = StokesSolver(pack, (1 / 18,) * 3).solve(2)[0]
    torch.testing.assert_close(both[:1], alone, rtol=0, atol=1e-5 * float(alone.abs().max()))


def test_asking_rarely_whether_all_have_converged_changes_nothing() -> None:
    matrix = torch.randn(3, 12, 12, dtype=torch.float64)
    matrix = matrix @ matrix.transpose(1, 2) + torch.eye(12, dtype=torch.float64)
    rhs = torch.randn(3, 12, dtype=torch.float64) * torch.tensor([[1.0], [0.0], [1e-8]])

    def solve(look_every: int) -> CGResult:
        return conjugate_gradients(
            lambda x: torch.einsum("bij,bj->bi", matrix, x),
            rhs,
            precondition=lambda r: r,
            tolerance=1e-6,
            max_iterations=40,
            look_every=look_every,
        )

    often, rarely = solve(1), solve(7)
    assert torch.equal(often.solution, rarely.solution) and torch.equal(often.residual, rarely.residual)
    assert often.iterations == rarely.iterations < 40
    assert float(often.residual.max()) <= 1e-6
