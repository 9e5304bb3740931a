"""Conduction in heterogeneous media: decay, layers, maximum principle, conservation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from shodh.core.errors import ConfigError
from shodh.physics import get_regime
from shodh.physics.regime import smooth_noise
from shodh.physics.regimes.heat import TravellingSources, mixture
from shodh.physics.solvers.conduction import HeterogeneousDiffusion
from shodh.physics.solvers.stabilized import legendre_step, legendre_steps

SPACE, SPACING = (8, 10, 6), (0.1, 0.12, 0.2)


def random_medium(seed: int = 0, batch: int = 1) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.exp(2.0 * torch.randn(batch, *SPACE, generator=draw, dtype=torch.float64))


def test_mode_decays_at_the_discrete_rate_with_second_order_in_time() -> None:
    """``exp(-k k_d^2 t)`` with ``k_d = 2 sin(pi m / n) / h``."""
    conductivity, time = 0.7, 0.02
    medium = HeterogeneousDiffusion(torch.full((1, *SPACE), conductivity, dtype=torch.float64), SPACING)
    angle = [2 * math.pi * m * torch.arange(n, dtype=torch.float64) / n for m, n in zip((1, 2, 1), SPACE)]
    mode = torch.cos(angle[0][:, None, None] + angle[1][:, None] + angle[2])[None]
    squared = sum((2 * math.sin(math.pi * m / n) / h) ** 2 for m, n, h in zip((1, 2, 1), SPACE, SPACING))

    def error(steps: int) -> float:
        state = mode
        for _ in range(steps):
            state = legendre_step(lambda y, _: medium.tendency(y), state, 0.0, time / steps, 7)
        return float((state - mode * math.exp(-conductivity * squared * time)).abs().max())

    coarse, fine = error(16), error(32)
    assert fine < 2e-4
    assert 1.9 < math.log2(coarse / fine) < 2.1


def test_layers_conduct_in_series_and_in_parallel_exactly() -> None:
    layers = torch.tensor([0.1, 3.0, 1.0, 40.0, 0.5, 2.0, 7.0, 0.9], dtype=torch.float64)
    conductivity = layers[None, :, None, None].expand(1, *SPACE).clone()
    medium = HeterogeneousDiffusion(conductivity, SPACING, smooth=False)
    assert float(medium.effective_conductivity(0)) == pytest.approx(1 / float((1 / layers).mean()), rel=1e-7)
    for axis in (1, 2):
        assert float(medium.effective_conductivity(axis)) == pytest.approx(float(layers.mean()), rel=1e-12)


@pytest.mark.parametrize("smooth", [False, True])
def test_effective_conductivity_lies_within_the_wiener_bounds(smooth: bool) -> None:
    conductivity = random_medium(batch=2)
    # The discrete medium has the conductivities of its faces: bounds of cell means hold for them a fortiori.
    medium = HeterogeneousDiffusion(conductivity, SPACING, smooth=smooth)
    for axis in (0, 2):
        effective = medium.effective_conductivity(axis)
        assert (effective > 1 / (1 / conductivity).flatten(1).mean(1)).all()
        assert (effective < conductivity.flatten(1).mean(1)).all()


def test_steady_temperature_does_not_depend_on_the_preconditioner() -> None:
    source = torch.randn(1, *SPACE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    solutions = []
    for smooth in (False, True):
        medium = HeterogeneousDiffusion(random_medium(), SPACING, closed_axis=1, smooth=smooth)
        result = medium.solve(source, tolerance=1e-10, max_iterations=2000)
        assert float(result.residual) <= 1e-10
        rest = medium.tendency(result.solution) + source - source.mean()
        assert rest.norm() < 1e-8 * source.norm()
        solutions.append(result.solution)
    torch.testing.assert_close(*solutions, rtol=0, atol=1e-7 * float(solutions[0].abs().max()))


@pytest.mark.parametrize("closed_axis", [None, 0, 2])
def test_operator_is_symmetric_and_conserves_heat(closed_axis: int | None) -> None:
    medium = HeterogeneousDiffusion(random_medium(batch=2), SPACING, closed_axis=closed_axis)
    a, b = torch.randn(2, 2, *SPACE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    forth, back = (a * medium.tendency(b)).sum(), (b * medium.tendency(a)).sum()
    assert float(forth) == pytest.approx(float(back), rel=1e-11)
    assert medium.tendency(a).sum((1, 2, 3)).abs().max() < 1e-12 * medium.tendency(a).abs().max() * a.numel()
    assert (a * medium.tendency(a)).sum() < 0
    if closed_axis is not None:
        assert float(medium.flux(a)[closed_axis].select(closed_axis + 1, -1).abs().max()) == 0.0


def test_temperature_keeps_its_bounds() -> None:
    """Maximum principle: without sources no new extremes, at the longest steps that the scheme takes."""
    conductivity = random_medium(3)
    medium = HeterogeneousDiffusion(conductivity, SPACING)
    radius = 4.0 * float(conductivity.max()) * sum(h**-2 for h in SPACING)
    state = (torch.rand(1, *SPACE, generator=torch.Generator().manual_seed(4)) > 0.5).double()
    for interval in (1.0 / radius, 30.0 / radius, 3000.0 / radius):
        steps, stages = legendre_steps(interval, radius)
        values = state
        for _ in range(steps):
            values = legendre_step(lambda y, _: medium.tendency(y), values, 0.0, interval / steps, stages)
        assert values.min() > -1e-12 and values.max() < 1 + 1e-12


def test_sources_sum_to_zero_and_travel() -> None:
    grid, lengths = (16, 12, 8), (1.0, 0.75, 0.5)
    sources = TravellingSources([3, 4], grid, lengths, 6, 0.08, 2.0)
    like = torch.zeros(1, dtype=torch.float64)
    now, later = sources(0.0, like), sources(0.05, like)
    assert now.shape == (2, *grid)
    assert now.sum((1, 2, 3)).abs().max() < 1e-10 * now.abs().sum()
    assert (now - later).norm() > 0.3 * now.norm()
    alone = TravellingSources([4], grid, lengths, 6, 0.08, 2.0)(0.05, like)
    torch.testing.assert_close(alone[0], later[1])


def test_mixture_keeps_its_contrast() -> None:
    conductivity = mixture(5, (16, 16, 16), (1.0, 1.0, 1.0), 0.25, 100.0)
    assert 0.1 <= float(conductivity.min()) and float(conductivity.max()) <= 10.0
    assert float(conductivity.max() / conductivity.min()) > 30.0


def test_regime_solves_its_equation() -> None:
    """A frame against extrapolated small Euler steps."""
    grid, spin_up, interval = (12, 10, 8), 0.01, 0.002
    result = get_regime("heat", double=True, spin_up=spin_up, frame_interval=interval).simulate([6], grid, 2)
    medium = HeterogeneousDiffusion(mixture(6, grid, result.lengths, 0.25, 30.0)[None], result.spacing)
    sources = TravellingSources([6], grid, result.lengths, 8, 0.08, 4.0)

    def euler(steps: int) -> torch.Tensor:
        state, dt = smooth_noise(6, "temperature", grid, result.lengths, [0.1] * 3)[None], (spin_up + interval) / steps
        for index in range(steps):
            state = state + dt * (medium.tendency(state) + sources(index * dt - spin_up, state))
        return state

    exact = (2 * euler(800) - euler(400)).numpy()[0]
    first, last = result.values["temperature"][0]
    assert np.linalg.norm(last - first) > 0.02 * np.linalg.norm(exact)
    assert np.linalg.norm(last - exact) < 2e-3 * np.linalg.norm(exact)


def test_heat_stays_alive_and_keeps_its_content() -> None:
    result = get_regime("heat").simulate([0], (20, 20, 20), 5)
    values = result.values["temperature"].astype(np.float64)
    change = np.linalg.norm(values[:, 1:] - values[:, :-1]) / np.linalg.norm(values[:, 1:])
    assert 0.1 < change < 0.6
    assert np.abs(values.mean((2, 3, 4))).max() < 1e-5
    assert (values.std((2, 3, 4)) > 0.3).all()


@pytest.mark.parametrize("parameters", [{"contrast": 0.5}, {"sources": 3}, {"source_speed": -1.0}, {"spin_up": -1.0}])
def test_bad_parameters_are_refused(parameters: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(parameters))):
        get_regime("heat", **parameters)
