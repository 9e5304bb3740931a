"""Channel flow past obstacles: mass, Poiseuille, drag of a cylinder, forces, and what trajectories hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from shodh.core.errors import ConfigError
from shodh.physics import get_regime
from shodh.physics.regimes.obstacle_flow_2d import ObstacleFlow2d
from shodh.physics.solvers.through_flow import ThroughFlow


def centres(cells: int, length: float) -> Tensor:
    return (torch.arange(cells, dtype=torch.float64) + 0.5) * length / cells


def channel(nx: int, ny: int, viscosity: float, *, plug: bool) -> ThroughFlow:
    """Empty channel 2 x 1 with unit mean inflow, uniform or parabolic."""
    y = centres(ny, 1.0)
    profile = torch.ones_like(y) if plug else 6 * y * (1 - y)
    solid = torch.zeros(nx, ny, 1, dtype=torch.bool)
    return ThroughFlow(solid, (2.0, 1.0), viscosity, profile / profile.mean(), torch.float64)


def test_uniform_inflow_develops_into_poiseuille_flow_at_second_order() -> None:
    """u = 6 y (1 - y) and dp/dx = -12 nu at the outlet of a viscous channel, long against its entry length."""
    errors = []
    for ny in (6, 12, 24):
        flow = channel(ny, ny, 0.2, plug=True)
        flow.advance(2.0, 0.8)
        y = centres(ny, 1.0)
        errors.append(float((flow.along[-2, :, 0] - 6 * y * (1 - y)).abs().max()))
        slope = float(torch.diff(flow.pressure, dim=0)[-3].mean() / flow.spacing[0])
    assert all(1.8 < math.log2(a / b) < 2.3 for a, b in zip(errors, errors[1:])), errors
    assert slope == pytest.approx(-12 * 0.2, rel=0.01)


def cylinder(nx: int, ny: int, reynolds: float, dtype: torch.dtype = torch.float32) -> ThroughFlow:
    """Schaefer and Turek's channel 2.2 x 0.41 with a cylinder of diameter 0.1 at (0.2, 0.2), unit mean inflow."""
    x, y = centres(nx, 2.2), centres(ny, 0.41)
    solid = ((x[:, None] - 0.2) ** 2 + (y - 0.2) ** 2 < 0.05**2)[..., None]
    profile = 6 * y * (0.41 - y) / 0.41**2
    return ThroughFlow(solid, (2.2, 0.41), 0.1 / reynolds, profile / profile.mean(), dtype)


def test_drag_of_a_cylinder_is_the_benchmarks() -> None:
    """Case 2D-1 (Re = 20): C_D = 5.5795. A staircase of 5 cells across misplaces the surface by up to half a cell."""
    flow = cylinder(110, 41, 20.0)
    for _ in range(30):
        flow.advance(0.05, 0.8)
    drag = float(flow.force[0, 0]) * 2.0 / 0.1
    assert drag == pytest.approx(5.5795, rel=0.08)
    # Steady: nothing slips through closed faces any more.
    assert float(flow.speed_in_solid().max()) < 1e-3


def test_force_on_the_solid_balances_momentum_and_pressure() -> None:
    """Steady control volume: drag = what enters minus what leaves minus the friction of the walls, to rounding."""
    y = centres(16, 1.0)
    solid = torch.zeros(32, 16, 1, dtype=torch.bool)
    solid[8:11, 6:9] = True
    profile = 6 * y * (1 - y)
    flow = ThroughFlow(solid, (2.0, 1.0), 0.05, profile / profile.mean(), torch.float64)
    flow.advance(15.0, 0.8)
    hx, hy = flow.spacing
    u, p = flow.along[..., 0], flow.pressure[..., 0]
    # The momentum cells of the faces 1 .. 31 reach from the first to the last cell centre.
    first, last = (p[i] + (0.5 * (u[i] + u[i + 1])) ** 2 - 0.05 * (u[i + 1] - u[i]) / hx for i in (0, len(p) - 1))
    through = float((first - last).sum() * hy)
    friction = float(0.05 * 2 * (u[1:-1, 0] + u[1:-1, -1]).sum() / hy * hx)
    assert float(flow.force[0, 0]) == pytest.approx(through - friction, rel=1e-6)


def test_mass_is_conserved_in_every_cell() -> None:
    """Also while the flow changes: solids do not spoil the projection; what leaves is what enters."""
    flow = cylinder(44, 16, 100.0, torch.float64)
    for _ in range(5):
        flow.advance(0.02, 0.8)
        assert float(flow.divergence().abs().max()) < 1e-11
        assert float(flow.along[-1].mean()) == pytest.approx(float(flow.along[0].mean()), abs=1e-13)
    assert float(flow.across[:, [0, -1]].abs().max()) == 0.0


@pytest.mark.slow
@pytest.mark.exhaustive
def test_vortices_are_shed_at_the_benchmarks_frequency() -> None:
    """Case 2D-2 (Re = 100): Strouhal number .295 to .305; 5 % for the staircase of 5 cells, and the sampling."""
    flow = cylinder(110, 41, 100.0)
    lift = []
    for _ in range(240):
        flow.advance(0.025, 0.8)
        lift.append(float(flow.force[1, 0]))
    late = np.array(lift[120:]) - np.mean(lift[120:])
    spectrum = np.abs(np.fft.rfft(late * np.hanning(len(late)), 16 * len(late)))
    strouhal = 0.1 * np.fft.rfftfreq(16 * len(late), 0.025)[spectrum.argmax()]
    assert 0.295 * 0.95 < strouhal < 0.305 * 1.05, strouhal


def test_a_flow_does_not_depend_on_its_neighbours() -> None:
    pair, alone = (
        get_regime("obstacle_flow_2d", spin_up=0.2).simulate(seeds, (24, 16), 2).values for seeds in ([3, 4], [4])
    )
    for name in pair:
        np.testing.assert_allclose(pair[name][1], alone[name][0], atol=2e-4)


def test_obstacles_are_apart_and_inside() -> None:
    regime = ObstacleFlow2d(obstacles=3, size=0.15)
    kinds = set()
    for seed in range(30):
        placed = regime.place(seed)
        kinds |= {o.kind for o in placed}
        for index, one in enumerate(placed):
            assert one.half_y < one.y < 1 - one.half_y and one.half_x < one.x < 1.2
            for other in placed[:index]:
                assert math.hypot(one.x - other.x, one.y - other.y) > one.radius + other.radius
    assert kinds == {"cylinder", "rectangle"}
    area = float(ObstacleFlow2d(kind="cylinder").solid(5, (256, 128)).double().mean()) * 2.0
    (obstacle,) = ObstacleFlow2d(kind="cylinder").place(5)
    assert area == pytest.approx(math.pi * obstacle.half_x**2, rel=0.03)


@pytest.mark.parametrize(
    "change",
    [{"reynolds": 0.0}, {"kind": "sphere"}, {"size": 0.5}, {"courant": 2.0}, {"spin_up": -1.0}, {"obstacles": 0}],
)
def test_bad_parameters_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        get_regime("obstacle_flow_2d", **change)


def test_too_many_obstacles_are_refused() -> None:
    with pytest.raises(ConfigError, match="no room"):
        get_regime("obstacle_flow_2d", obstacles=30).simulate([0], (16, 16), 1)
