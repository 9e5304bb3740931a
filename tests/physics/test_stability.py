"""Limits of stability: sharp on the worst mode of each scheme, and kept by every regime on fine grids."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch

from shodh.core.errors import UnstableError
from shodh.generation.checking import check
from shodh.physics.regimes.compressible_2d import IdealGas
from shodh.physics.solvers.convection import PlateTemperature
from shodh.physics.solvers.finite_volume import FiniteVolume
from shodh.physics.solvers.mac import ChannelFlow
from shodh.physics.solvers.operators import fill_periodic, inner, padded_like
from shodh.physics.solvers.scalar import SSP_RK2, SSP_RK3, ScalarTransport
from shodh.physics.solvers.spectral import COURANT_LIMIT, SpectralGrid, step
from shodh.physics.solvers.spectral_flow import IncompressibleFlow
from shodh.physics.solvers.stability import (
    IMAGINARY_RK3,
    REAL_RK2,
    REAL_RK3,
    SAFETY,
    advection_rate,
    central_rate,
    diffusion_rate,
    upwind_rate,
)
from shodh.physics.solvers.stabilized import legendre_step, stability_limit
from shodh.physics.solvers.through_flow import ThroughFlow
from tools.bench.fine_grids import EXPLICIT, fine

SPACE, SPACING = (4, 8, 6), (0.25, 0.1, 0.17)  # cells of three different edges
ALTERNATING = (torch.arange(4)[:, None, None] + torch.arange(8)[:, None] + torch.arange(6)) % 2 * -2.0 + 1.0
QUARTER = torch.cos(0.5 * math.pi * torch.arange(8, dtype=torch.float64)).view(1, 8, 1)  # four cells a wave, axis 1


def uniform(speed: Sequence[float]) -> torch.Tensor:
    """Padded face velocity of a uniform flow."""
    velocity = padded_like(SPACE, 1, components=3, like=torch.zeros(0, dtype=torch.float64))
    velocity += torch.tensor(speed, dtype=torch.float64).view(3, 1, 1, 1, 1)
    return velocity


def scalar_growth(
    speed: Sequence[float], diffusivity: float, weights: Sequence[float], real: float
) -> Callable[[float], float]:
    velocity = uniform(speed)

    def growth(share: float) -> float:
        scalar = ScalarTransport(SPACE, SPACING, 1, diffusivity, dtype=torch.float64)
        scalar.values += ALTERNATING[..., None]
        dt = share / float(scalar.stability_rate(advection_rate(velocity, SPACING), real))
        scalar.begin_step()
        for weight in weights:
            scalar.stage(velocity, weight, dt)
        return float(scalar.values.abs().max())

    return growth


def momentum_growth(speed: float, viscosity: float, mode: torch.Tensor) -> Callable[[float], float]:
    """A solenoidal mode across the channel on a uniform stream; walls are no-slip where nothing streams."""

    def growth(share: float) -> float:
        lengths = [n * h for n, h in zip(SPACE, SPACING)]
        walls = {"no_slip_bed": speed == 0, "no_slip_lid": speed == 0}
        flow = ChannelFlow(SPACE, lengths, 1, viscosity=viscosity, dtype=torch.float64, **walls)
        base = torch.zeros(3, *SPACE, 1, dtype=torch.float64)
        base[1] = speed
        disturbance = 1e-6 * torch.stack((0 * mode, SPACING[1] * mode, -SPACING[2] * mode)).double()[..., None]
        if speed:
            disturbance[1] = 0.0  # the wave along axis 1 is across it
        flow.set_velocity(base + disturbance)
        start = (flow.get_velocity() - base).abs().max()
        dt = share / float(flow.stability_rate())
        for _ in range(40):
            flow.step(dt)
        return float((flow.get_velocity() - base).abs().max() / start)

    return growth


def temperature_growth(speed: float, diffusivity: float, mode: torch.Tensor) -> Callable[[float], float]:
    velocity = uniform((0.0, speed, 0.0))

    def growth(share: float) -> float:
        heat = PlateTemperature(SPACE, SPACING, 1, diffusivity, torch.float64, "cpu")
        up = (torch.arange(4, dtype=torch.float64) + 0.5) / 4
        conduction = (1.0 - up).view(4, 1, 1, 1)
        heat.values += conduction + 1e-6 * mode[..., None]
        dt = share / float(heat.stability_rate(advection_rate(velocity, SPACING)))
        for _ in range(40):
            heat.begin_step()
            for weight in SSP_RK3:
                heat.stage(velocity, weight, dt)
        return float((heat.values - conduction).abs().max()) / 1e-6

    return growth


def gas_growth(share: float) -> float:
    """Density of alternating signs in a hypersonic stream: first-order upwind, whose waves all go one way."""
    density = 1.0 + 1e-6 * ((torch.arange(8)[:, None] + torch.arange(6)) % 2 * 2.0 - 1.0).double()
    state = torch.stack((density, *(torch.full_like(density, v) for v in (300.0, 200.0, 1e-3))))[..., None]
    solver = FiniteVolume(IdealGas(1.4), ("periodic", "periodic"), (0.1, 0.2), state, courant=1.0)
    waves, _ = solver.rates()
    for _ in range(10):
        solver.step(share / waves, torch.zeros_like(waves))
    return float((solver.conserved[0] - 1.0).abs().max()) / 1e-6


def spectral_growth(share: float) -> float:
    """A tracer's mode at the cutoff in a uniform stream along an axis on which ``n - 1`` is a multiple of 3."""
    space = SpectralGrid((100, 4, 4), (1.0, 1.0, 1.0), torch.float64)
    flow = IncompressibleFlow(space, 0.0)
    state = torch.zeros(1, 4, *space.modes, dtype=torch.complex128)
    state[0, 0, 0, 0, 0] = 1.0
    state[0, 3, space.cutoff[0], 0, 0] = state[0, 3, -space.cutoff[0], 0, 0] = 1.0
    dt = share * COURANT_LIMIT / flow.tendency(state)[1].double()
    for _ in range(10):
        state = step(flow, state, dt)
    return float(state[0, 3].abs().max())


def legendre_growth(share: float) -> float:
    dt = share * stability_limit(9)
    return float(legendre_step(lambda v, _: -v, torch.ones(1, dtype=torch.float64), 0.0, dt, 9).abs())


SHARP = {
    "scalar carried, RK3": scalar_growth((1.0, -0.7, 0.4), 0.0, SSP_RK3, REAL_RK3),
    "scalar carried, RK2": scalar_growth((1.0, -0.7, 0.4), 0.0, SSP_RK2, REAL_RK2),
    "scalar diffused": scalar_growth((0.0, 0.0, 0.0), 0.3, SSP_RK3, REAL_RK3),
    "scalar carried and diffused": scalar_growth((0.0, 1.0, 0.5), 0.02, SSP_RK3, REAL_RK3),
    "scalar carried and diffused, RK2": scalar_growth((0.0, 1.0, 0.5), 0.02, SSP_RK2, REAL_RK2),
    "momentum diffused between walls": momentum_growth(0.0, 0.1, ALTERNATING),
    "momentum carried": momentum_growth(2.0, 0.0, QUARTER.expand(SPACE)),
    "temperature diffused between plates": temperature_growth(0.0, 0.1, ALTERNATING.double()),
    "temperature carried": temperature_growth(2.0, 0.0, QUARTER.expand(SPACE)),
    "gas carried": gas_growth,
    "spectral mode carried": spectral_growth,
    "stabilised diffusion": legendre_growth,
}


@pytest.mark.parametrize("scheme", SHARP)
def test_the_limit_is_sharp_on_the_worst_mode(scheme: str) -> None:
    """It decays or keeps its size a little below the limit of stability and grows a little above."""
    assert SHARP[scheme](0.97) <= 1.0 + 1e-9
    assert SHARP[scheme](1.05) > 1.0 + 1e-3


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_spectra_of_a_joint_limit_lie_in_the_region_of_stability(share: float) -> None:
    """Random waves of both schemes, with ``share`` of the limit from advection: ``|R(dt lambda)| <= 1`` for all."""
    draw = torch.Generator().manual_seed(0)
    angle = 2 * math.pi * torch.rand(20_000, 3, generator=draw, dtype=torch.float64)
    angle[:8] = math.pi * torch.tensor([[i & 1, i >> 1 & 1, i >> 2] for i in range(8)])
    weight = torch.rand(2, 20_000, 3, generator=draw, dtype=torch.float64)
    carried, spread = weight / weight.sum(-1, keepdim=True)
    advection, diffusion = torch.tensor(share, dtype=torch.float64), 4.0 * (1.0 - share)

    def amplification(rate: torch.Tensor, symbol: torch.Tensor) -> torch.Tensor:
        z = symbol / rate
        return (1 + z + z**2 / 2 + z**3 / 6).abs()

    decay = (diffusion * 0.5 * spread * (1 - torch.cos(angle))).sum(-1)
    upwind = (carried * (1 - torch.exp(-1j * angle))).sum(-1) * share
    # The limiter at work in a smooth field: Fromm's scheme.
    fromm = (carried * (1 - torch.exp(-1j * angle)) * (1 + 0.5j * torch.sin(angle))).sum(-1) * share
    central = (carried * 1j * torch.sin(angle)).sum(-1) * share
    for symbol, rate in (
        (upwind, upwind_rate(advection, diffusion)),
        (fromm, upwind_rate(advection, diffusion) / SAFETY),
        (central, central_rate(advection, diffusion)),
    ):
        assert amplification(rate, -symbol - decay).max() <= 1.0 + 1e-4
    assert central_rate(torch.tensor(1.0), 0.0) == pytest.approx(1.0 / IMAGINARY_RK3)


def test_through_flow_keeps_a_small_disturbance_small_at_its_limit() -> None:
    """Power iteration on the step itself, with walls, outlet, pressure and projection; diffusion dominates."""

    def growth(share: float) -> float:
        y = (torch.arange(8, dtype=torch.float64) + 0.5) / 8
        solid = torch.zeros(8, 8, 2, dtype=torch.bool)
        flow = ThroughFlow(solid, (1.0, 1.0), 0.5, 6.0 * y * (1.0 - y), torch.float64)
        draw = torch.Generator().manual_seed(0)
        flow.across[2:6, 2:6, 1] += 1e-3 * torch.randn(4, 4, generator=draw, dtype=torch.float64)
        dt = share / flow.stability_rate().amax().expand(2)
        sizes = []
        for _ in range(40):
            flow.step(dt)
            sizes.append(float((flow.along[..., 1] - flow.along[..., 0]).abs().max()))
        return sizes[-1] / sizes[19]

    assert growth(1.0) < 1.0
    assert not growth(1.4) < 1.0  # it may overflow


def test_rates_count_advection_by_the_faces_of_a_cell_and_diffusion_by_its_edges() -> None:
    velocity = uniform((0.0, 0.0, 0.0))
    velocity[1, :, 3] = 2.0  # one plane of faces: half the outflow of either neighbour
    for axis in range(3):
        fill_periodic(velocity, axis + 1)
    assert float(advection_rate(velocity, SPACING)) == pytest.approx(0.5 * 2.0 / SPACING[1])
    inner(velocity, first=1)[1] = 2.0
    fill_periodic(velocity, 2)
    assert float(advection_rate(velocity, SPACING)) == pytest.approx(2.0 / SPACING[1])
    assert diffusion_rate(0.5, SPACING) == pytest.approx(2.0 * sum(h**-2 for h in SPACING))


@pytest.mark.parametrize("name", EXPLICIT)
def test_every_regime_keeps_its_limit_and_its_bounds_on_a_fine_grid(name: str) -> None:
    """At the spacing of 128 cells an axis, where diffusion is as fast as advection."""
    regime, grid = fine(name)
    trajectories = regime.simulate([1], grid, 4)
    solver = check(regime, trajectories, [0])[0]["solver"]
    assert 0.05 < solver["limit_share"] <= 1.0 and solver["steps"] >= 3 and solver["step_max"] > 0


def test_tracer_that_ignores_its_diffusion_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each limit alone, as it once was: the tracer of 128 cells blows up, and the check names when and how far."""
    monkeypatch.setattr(ScalarTransport, "stability_rate", lambda self, advection: 0.0 * advection)
    regime, grid = fine("open_channel")
    trajectories = regime.simulate([1], grid, 3)
    with pytest.raises(UnstableError, match="tracer of trajectory 5 is .* at time 0.0[48], outside"):
        check(regime, trajectories, [5])
