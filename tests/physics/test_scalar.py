"""Transport of a passive scalar: order, conservation, bounds."""

from __future__ import annotations

import math

import pytest
import torch

from shodh.physics.solvers.operators import fill_periodic, inner, padded_like
from shodh.physics.solvers.poisson import closed_faces, project_around_solids
from shodh.physics.solvers.scalar import SSP_RK3, ScalarTransport

PI = math.pi


def pad(velocity: torch.Tensor) -> torch.Tensor:
    """Periodic padded velocity from ``[3, *space, B]``."""
    padded = padded_like(velocity.shape[1:4], velocity.shape[4], components=3, like=velocity)
    inner(padded, first=1).copy_(velocity)
    for axis in range(3):
        fill_periodic(padded, axis + 1)
    return padded


def advance(scalar: ScalarTransport, velocity: torch.Tensor, time: float, steps: int) -> None:
    for _ in range(steps):
        scalar.begin_step()
        for weight in SSP_RK3:
            scalar.stage(velocity, weight, time / steps)


def flow_around_solids(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, tuple[float, float, float]]:
    """A random solenoidal velocity ``[3, *space, B]`` of O(1) around random solids ``[B, *space]``."""
    grid, spacing = (9, 8, 11), (0.1, 0.12, 0.09)
    solid = torch.rand(batch, *grid, generator=torch.Generator().manual_seed(4)) < 0.25
    noise = torch.randn(batch, 3, *grid, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    velocity, _ = project_around_solids(noise, solid, spacing)
    return velocity.permute(1, 2, 3, 4, 0).contiguous(), solid, spacing


def test_smooth_profile_is_carried_at_second_order() -> None:
    """Oblique advection and diffusion of a wave against its exact solution, in the 1-norm (limiters clip extrema)."""

    def error(cells: int) -> float:
        speeds, diffusivity, time = (1.0, -0.5, 0.0), 0.01, 0.5
        x = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
        phase = 2 * PI * (x[:, None, None, None] + x[:, None, None])
        scalar = ScalarTransport((cells, cells, 2), (1 / cells,) * 3, 1, diffusivity, dtype=torch.float64)
        scalar.values += torch.sin(phase)
        velocity = torch.empty(3, cells, cells, 2, 1, dtype=torch.float64)
        velocity.copy_(torch.tensor(speeds, dtype=torch.float64).view(3, 1, 1, 1, 1))
        advance(scalar, pad(velocity), time, 2 * cells)
        exact = torch.sin(phase - 2 * PI * sum(speeds) * time) * math.exp(-8 * PI**2 * diffusivity * time)
        return float((scalar.values - exact).abs().mean())

    assert 1.7 < math.log2(error(24) / error(48)) < 2.6


def test_total_is_conserved_and_solids_stay_empty() -> None:
    velocity, solid, spacing = flow_around_solids()
    open_faces = (~closed_faces(solid)).permute(1, 2, 3, 4, 0)
    scalar = ScalarTransport(solid.shape[1:], spacing, 2, 0.01, open_faces=open_faces, dtype=torch.float64)
    pores = (~solid).permute(1, 2, 3, 0)
    scalar.values += torch.rand(scalar.values.shape, generator=torch.Generator().manual_seed(6)) * pores
    start = scalar.values.clone()
    advance(scalar, pad(velocity), 0.3, 60)
    torch.testing.assert_close(scalar.values.sum((0, 1, 2)), start.sum((0, 1, 2)), rtol=1e-13, atol=0)
    assert scalar.values[~pores].abs().max() == 0.0
    assert (scalar.values - start).abs().max() > 0.3


def test_constant_stays_constant_in_the_pores() -> None:
    velocity, solid, spacing = flow_around_solids()
    open_faces = (~closed_faces(solid)).permute(1, 2, 3, 4, 0)
    scalar = ScalarTransport(solid.shape[1:], spacing, 2, 0.01, open_faces=open_faces, dtype=torch.float64)
    pores = (~solid).permute(1, 2, 3, 0)
    scalar.values += 0.7 * pores
    advance(scalar, pad(velocity), 0.3, 60)
    torch.testing.assert_close(scalar.values[pores], torch.full_like(scalar.values[pores], 0.7), rtol=0, atol=1e-7)


@pytest.mark.parametrize("periodic", [True, False])
def test_sharp_patch_stays_within_its_bounds(periodic: bool) -> None:
    """Pure advection of a 0/1 patch by a strong random solenoidal flow overshoots by less than two per cent."""
    velocity, solid, spacing = flow_around_solids()
    if not periodic:
        solid = torch.zeros_like(solid)
        solid[:, -1] = True  # closes the axis by a wall, as the flag does
        noise = torch.randn(2, 3, *solid.shape[1:], generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        projected, _ = project_around_solids(noise, solid, spacing)
        velocity = projected.permute(1, 2, 3, 4, 0).contiguous()
    open_faces = (~closed_faces(solid)).permute(1, 2, 3, 4, 0)
    scalar = ScalarTransport(
        solid.shape[1:], spacing, 2, 0.0, periodic=(periodic, True, True), open_faces=open_faces, dtype=torch.float64
    )
    scalar.values[:5, :, :6] = 1.0
    scalar.values *= (~solid).permute(1, 2, 3, 0)
    rate = float(sum(velocity[a].abs() / spacing[a] for a in range(3)).max())  # type: ignore[union-attr]
    steps = math.ceil(0.5 * rate / 0.8)
    for _ in range(steps):
        advance(scalar, pad(velocity), 0.5 / steps, 1)
        assert -0.02 < float(scalar.values.min()) and float(scalar.values.max()) < 1.02


def test_each_scalar_may_have_its_own_step() -> None:
    velocity, solid, spacing = flow_around_solids()
    scalars = [ScalarTransport(solid.shape[1:], spacing, 2, 0.01, dtype=torch.float64) for _ in range(2)]
    for scalar in scalars:
        scalar.values.uniform_(generator=torch.Generator().manual_seed(1))
    start = scalars[0].values.clone()
    padded = pad(velocity)
    scalars[0].begin_step(), scalars[1].begin_step()
    for weight in SSP_RK3:
        scalars[0].stage(padded, weight, torch.tensor([0.01, 0.0], dtype=torch.float64))
        scalars[1].stage(padded, weight, 0.01)
    assert torch.equal(scalars[0].values[..., 1], start[..., 1])
    assert torch.equal(scalars[0].values[..., 0], scalars[1].values[..., 0])
