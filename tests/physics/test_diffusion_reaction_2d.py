"""FitzHugh-Nagumo: the uniform state, its linear growth rates, order in space and time, the initial noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from shodh.core.errors import ConfigError
from shodh.physics import get_regime
from shodh.physics.regimes.diffusion_reaction_2d import EDGE, DiffusionReaction2d, fitzhugh_nagumo

UNIFORM = -(5e-3 ** (1 / 3))


def growth(square: float) -> tuple[float, Tensor]:
    """Largest growth rate and its eigenvector about the uniform state at squared wavenumber ``square``."""
    jacobian = torch.tensor([[1 - 3 * UNIFORM**2, -1.0], [1.0, -1.0]], dtype=torch.float64)
    values, vectors = torch.linalg.eig(jacobian - square * torch.diag(torch.tensor([1e-3, 5e-3], dtype=torch.float64)))
    best = int(values.real.argmax())
    return float(values.real[best]), vectors[:, best].real


def test_uniform_state_and_its_instability_are_the_known_ones() -> None:
    assert pytest.approx(-0.170998, abs=1e-6) == UNIFORM
    state = torch.full((2, 1, 1, 1), UNIFORM, dtype=torch.float64)
    assert float(fitzhugh_nagumo(5e-3)(state).abs().max()) < 1e-15
    rates = {k: growth(k * k)[0] for k in np.arange(1.0, 40.0, 0.05)}
    fastest = max(rates, key=rates.__getitem__)
    assert fastest == pytest.approx(13.9, abs=0.1) and rates[fastest] == pytest.approx(0.27231, abs=1e-5)
    unstable = [k for k, rate in rates.items() if rate > 0]
    assert min(unstable) == pytest.approx(5.1, abs=0.1) and max(unstable) == pytest.approx(26.2, abs=0.1)


@pytest.mark.parametrize("mode", [(9, 0), (4, 8), (20, 0)])
def test_a_small_perturbation_grows_at_the_rate_of_its_discrete_symbol(mode: tuple[int, int]) -> None:
    """Modes cos(pi m x / L) satisfy no flux; the third is stable and decays."""
    cells, time, h = 32, 1.0, EDGE / 32
    square = sum((2 * math.sin(math.pi * m / (2 * cells)) / h) ** 2 for m in mode)
    rate, vector = growth(square)
    x = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    shape = torch.cos(math.pi * mode[0] * x)[:, None] * torch.cos(math.pi * mode[1] * x)
    start = UNIFORM + 1e-7 * vector.view(2, 1, 1, 1) * shape
    system = DiffusionReaction2d().system((cells, cells))
    end = system.advance(start, time, 0.0125)
    measured = math.log(float((end - UNIFORM).norm() / (start - UNIFORM).norm())) / time
    # Second order in time: (rate dt)^2 of the fastest mode involved.
    assert measured == pytest.approx(rate, abs=1e-3)
    assert (rate > 0) == (mode != (20, 0))


def smooth_start(cells: int) -> Tensor:
    x = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    u = torch.cos(math.pi * x)[:, None] * torch.cos(2 * math.pi * x)
    return torch.stack((u, 0.5 * u.T))[:, None]


def test_second_order_in_space() -> None:
    ends = []
    for cells in (16, 32, 64):
        end = DiffusionReaction2d().system((cells, cells)).advance(smooth_start(cells), 1.0, 0.0125)
        ends.append(torch.nn.functional.avg_pool2d(end[:, 0], cells // 16))
    first, second = ((a - b).abs().max() for a, b in zip(ends, ends[1:]))
    assert math.log2(first / second) == pytest.approx(2.0, abs=0.2)


def test_second_order_in_time() -> None:
    system = DiffusionReaction2d().system((16, 16))
    ends = [system.advance(smooth_start(16), 1.0, dt) for dt in (0.05, 0.025, 0.0125)]
    first, second = ((a - b).abs().max() for a, b in zip(ends, ends[1:]))
    assert math.log2(first / second) == pytest.approx(2.0, abs=0.3)


def test_default_step_resolves_the_noise() -> None:
    """A quarter of the step changes the frames by less than 1 % from the second on: diffusion has calmed the noise."""
    regime = get_regime("diffusion_reaction_2d")
    usual, fine = (regime.simulate([1], (32, 32), 6, time_step=dt).values["activator"] for dt in (0.0125, 0.003125))
    error = np.linalg.norm(usual - fine, axis=(2, 3)) / np.linalg.norm(fine, axis=(2, 3))
    assert error.max() < 0.01, error


def test_initial_fields_are_independent_unit_noise() -> None:
    values = get_regime("diffusion_reaction_2d").simulate([1, 2], (64, 64), 1).values
    draws = np.stack([values["activator"][0, 0], values["inhibitor"][0, 0], values["activator"][1, 0]])
    correlation = np.cov(draws.reshape(3, -1))
    # Five standard errors of 4096 draws.
    np.testing.assert_allclose(correlation, np.eye(3), atol=5 * math.sqrt(2 / 4096))


@pytest.mark.parametrize("change", [{"diffusivity_u": 0.0}, {"noise": 2.0}, {"k": math.inf}, {"time_step": -1.0}])
def test_bad_parameters_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        get_regime("diffusion_reaction_2d", **change)
