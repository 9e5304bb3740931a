"""The incompressible solver between walls: order, conservation, budgets."""

from __future__ import annotations

import math

import pytest
import torch

from shodh.physics.solvers.mac import ChannelFlow
from shodh.physics.solvers.operators import inner
from shodh.physics.solvers.scalar import ScalarTransport

PI = math.pi


def random_flow(space: tuple[int, int, int] = (5, 7, 6), batch: int = 2, **options: object) -> ChannelFlow:
    flow = ChannelFlow(space, (1.0, 2.1, 1.3), batch, dtype=torch.float64, **{"viscosity": 0.02} | options)  # type: ignore[arg-type]
    noise = torch.randn(3, *space, batch, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    flow.set_velocity(noise)
    return flow


def taylor_green_error(cells: int, frame_cells: int) -> float:
    """Largest velocity error of a decaying Taylor-Green vortex after a fixed time, in a frame that may move."""
    time, viscosity = 0.5, 0.05
    h = 2 * PI / cells
    frame = frame_cells * h / time
    flow = ChannelFlow(
        (3, cells, cells), (1.0, 2 * PI, 2 * PI), 1, viscosity=viscosity, no_slip_bed=False,
        frame_velocity=frame, dtype=torch.float64,
    )  # fmt: skip
    centre = (torch.arange(cells, dtype=torch.float64) + 0.5) * h
    face = centre + 0.5 * h
    exact = torch.zeros(3, 3, cells, cells, 1, dtype=torch.float64)
    exact[1] = (torch.sin(face)[:, None] * torch.cos(centre))[None, ..., None]
    exact[2] = -(torch.cos(centre)[:, None] * torch.sin(face))[None, ..., None]
    flow.set_velocity(exact)
    steps = 3 * cells
    for _ in range(steps):
        flow.step(time / steps)
    at_rest = torch.roll(flow.get_velocity(), frame_cells, dims=2)
    return float((at_rest - exact * math.exp(-2 * viscosity * time)).abs().max())


@pytest.mark.parametrize("frame_cells", [0, 1])
def test_taylor_green_vortex_converges_at_second_order(frame_cells: int) -> None:
    coarse, fine = taylor_green_error(16, frame_cells), taylor_green_error(32, 2 * frame_cells)
    assert 1.8 < math.log2(coarse / fine) < 2.3


@pytest.mark.parametrize("frame", [0.0, 0.7])
def test_shear_flow_on_the_bed_decays_at_second_order(frame: float) -> None:
    """The slowest mode between a no-slip bed and a free-slip lid, ``sin(pi z / 2) exp(-nu pi^2 t / 4)``."""

    def error(cells: int) -> float:
        flow = ChannelFlow((cells, 2, 2), (1.0, 1.0, 1.0), 1, viscosity=0.5, frame_velocity=frame, dtype=torch.float64)
        z = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
        mode = torch.sin(0.5 * PI * z)[:, None, None, None].expand(cells, 2, 2, 1)
        flow.set_velocity(torch.stack((0 * mode, mode, 0 * mode)))
        steps, time = 3 * cells**2, 0.5
        for _ in range(steps // 2):
            flow.step(2 * time / steps)
        return float((flow.get_velocity()[1] - mode * math.exp(-0.5 * (PI / 2) ** 2 * time)).abs().max())

    assert 1.8 < math.log2(error(6) / error(12)) < 2.2


def test_half_poiseuille_flow_is_steady_under_its_force() -> None:
    """The parabola ``f/nu (z - z^2/2)`` plus the wall error ``f h^2 / (8 nu)`` is a fixed point of the scheme."""
    cells, force, viscosity = 9, 0.3, 0.1
    flow = ChannelFlow((cells, 3, 4), (1.0, 1.0, 1.0), 1, viscosity=viscosity, force=force, dtype=torch.float64)
    z = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    profile = force / viscosity * (z - 0.5 * z**2 + 0.125 / cells**2)
    velocity = torch.zeros(3, cells, 3, 4, 1, dtype=torch.float64)
    velocity[1] = profile[:, None, None, None]
    flow.set_velocity(velocity)
    for _ in range(20):
        flow.step(0.02)
    torch.testing.assert_close(flow.get_velocity(), velocity, atol=1e-12, rtol=0)
    torch.testing.assert_close(flow.wall_shear(), torch.tensor([force], dtype=torch.float64))


def test_time_integration_is_third_order() -> None:
    def run(steps: int) -> torch.Tensor:
        flow = random_flow((4, 6, 5), viscosity=0.01)
        for _ in range(steps):
            flow.step(0.08 / steps)
        return flow.get_velocity()

    reference = run(64)
    coarse, fine = ((run(n) - reference).norm() for n in (4, 8))
    assert 2.7 < math.log2(coarse / fine) < 3.4


@pytest.mark.parametrize("no_slip_bed", [False, True])
@pytest.mark.parametrize("frame", [0.0, 1.7])
def test_advection_neither_makes_nor_destroys_energy(no_slip_bed: bool, frame: float) -> None:
    flow = random_flow(viscosity=0.0, no_slip_bed=no_slip_bed, frame_velocity=frame)
    tendency = flow.tendency()
    power = (flow.interior * tendency).sum((0, 1, 2, 3))
    assert (power.abs() < 1e-12 * (flow.interior * tendency).abs().sum((0, 1, 2, 3))).all()


def test_viscosity_destroys_energy() -> None:
    flow = random_flow(viscosity=0.1)
    assert ((flow.interior * flow.tendency()).sum((0, 1, 2, 3)) < 0).all()


def test_momentum_changes_by_force_minus_wall_stress() -> None:
    flow = random_flow(force=1.3, frame_velocity=0.4)
    before, balance = flow.get_velocity()[1].mean((0, 1, 2)), 1.3 - flow.wall_shear()
    torch.testing.assert_close(flow.tendency()[1].mean((0, 1, 2)), balance, rtol=1e-12, atol=1e-13)
    dt = 1e-6
    flow.step(dt)
    after = flow.get_velocity()[1].mean((0, 1, 2))
    torch.testing.assert_close((after - before) / dt, balance, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 5e-6), (torch.float64, 1e-13)])
def test_projection_leaves_divergence_at_rounding(dtype: torch.dtype, bound: float) -> None:
    flow = ChannelFlow((9, 7, 10), (1.0, 2.0, 1.5), 3, viscosity=0.01, dtype=dtype)
    flow.set_velocity(torch.randn(3, 9, 7, 10, 3, generator=torch.Generator().manual_seed(1)))
    flow.step(1e-3)
    assert flow.divergence().abs().max() < bound / min(flow.spacing)
    assert flow.interior[0, -1].abs().max() == 0.0


def test_flows_of_a_batch_do_not_see_each_other() -> None:
    together, alone = random_flow(batch=3, frame_velocity=0.5), random_flow(batch=3, frame_velocity=0.5)
    quick = alone.velocity[..., 1:2].clone()
    together.interior[..., 0] *= 4.0
    together.fill_halos()
    single = ChannelFlow((5, 7, 6), (1.0, 2.1, 1.3), 1, viscosity=0.02, frame_velocity=0.5, dtype=torch.float64)
    single.velocity.copy_(quick)
    together.advance(0.3, 0.5)
    single.advance(0.3, 0.5)
    torch.testing.assert_close(together.velocity[..., 1:2], single.velocity, rtol=1e-12, atol=1e-12)


def test_a_flow_with_no_time_step_rests_bitwise() -> None:
    flow = random_flow()
    before = flow.velocity.clone()
    flow.step(torch.tensor([0.01, 0.0]))
    assert torch.equal(flow.velocity[..., 1], before[..., 1])
    assert not torch.equal(flow.velocity[..., 0], before[..., 0])


def test_scalar_follows_the_flow_and_keeps_its_total() -> None:
    flow = random_flow(frame_velocity=0.3)
    scalar = ScalarTransport(flow.space, flow.spacing, 2, 0.02, periodic=(False, True, True), dtype=torch.float64)
    scalar.values.uniform_(generator=torch.Generator().manual_seed(0))
    start = scalar.values.clone()
    flow.advance(0.2, 0.5, scalar)
    torch.testing.assert_close(scalar.values.sum((0, 1, 2)), start.sum((0, 1, 2)), rtol=1e-13, atol=0)
    assert (scalar.values - start).abs().max() > 0.1
    assert inner(flow.velocity, first=1).isfinite().all()
