"""The Burgers equation against the exact solution of Cole (1951) and Hopf (1950)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from shodh.core.errors import ConfigError, NonFiniteError
from shodh.physics import get_regime
from shodh.physics.regimes.burgers import BurgersFlow
from shodh.physics.solvers.spectral import SpectralGrid, step

TIME = 1.0


def potential(space: SpectralGrid) -> Tensor:
    """A potential of three waves that no axis or plane is special for."""
    x, y, z = space.centers()
    return 0.5 * torch.cos(x + y) + 0.4 * torch.sin(y - z) + 0.3 * torch.cos(z + 2.0 * x)


def cole_hopf(space: SpectralGrid, viscosity: float, time: float) -> Tensor:
    """``u = -2 nu grad log theta`` with the heat equation for ``theta = exp(-phi / 2 nu)``, ``[3, *grid]``."""
    theta = torch.fft.rfftn(torch.exp(-potential(space) / (2.0 * viscosity)), norm="forward")
    theta = theta * torch.exp(-viscosity * space.square * time)
    return -2.0 * viscosity * space.inverse(space.gradient(theta)) / space.inverse(theta)


def solve(cells: int, steps: int, viscosity: float) -> tuple[SpectralGrid, Tensor]:
    space = SpectralGrid((cells,) * 3, (2.0 * math.pi,) * 3, torch.float64)
    flow, state = BurgersFlow(space, viscosity), space.forward(cole_hopf(space, viscosity, 0.0))[None]
    for _ in range(steps):
        state = step(flow, state, torch.tensor([TIME / steps], dtype=torch.float64))
    return space, space.inverse(state)[0]


def test_potential_flow_follows_cole_and_hopf_at_fourth_order() -> None:
    viscosity, errors = 0.6, []
    for steps in (16, 32):
        space, found = solve(32, steps, viscosity)
        expected = cole_hopf(space, viscosity, TIME)
        errors.append((found - expected).abs().max().item())
    assert (expected - cole_hopf(space, viscosity, 0.0)).abs().max() > 0.5
    assert math.log2(errors[0] / errors[1]) > 3.7
    assert errors[1] < 2e-8


def test_error_falls_exponentially_with_the_grid() -> None:
    viscosity, errors = 0.25, []
    for cells in (12, 18, 24):
        space, found = solve(cells, 32, viscosity)
        errors.append((found - cole_hopf(space, viscosity, TIME)).abs().max().item())
    # Faster than any power that two of the errors could suggest: here beyond the fourth, and growing.
    orders = [math.log(a / b) / math.log(n / m) for a, b, n, m in zip(errors, errors[1:], (18, 24), (12, 18))]
    assert orders[0] > 4 and orders[1] > orders[0]


def test_gradient_flows_stay_gradients_and_keep_their_momentum() -> None:
    result = get_regime("burgers", rotational=0.0, double=True).simulate([4], (24, 24, 24), 3)
    velocity = torch.from_numpy(result.values["burgers_velocity"][0]).double().movedim(-1, 1)
    space = SpectralGrid((24, 24, 24), result.lengths, torch.float64)
    spectrum = space.forward(velocity)
    curl, slope = space.inverse(space.curl(spectrum)), space.inverse(space.divergence(spectrum))
    assert curl.abs().max() < 1e-4 * slope.abs().max()
    assert velocity.mean((2, 3, 4)).abs().max() < 1e-6


def test_rotational_share_of_the_energy() -> None:
    space = SpectralGrid((24, 24, 24), (2.0 * math.pi,) * 3, torch.float64)
    initial = get_regime("burgers", rotational=0.3).initial(space, 5)
    vortices = space.project(initial)
    shares = space.mean_product(vortices, vortices).sum() / space.mean_product(initial, initial).sum()
    assert shares.item() == pytest.approx(0.3, abs=1e-6)


def test_compression_steepens_the_flow() -> None:
    result = get_regime("burgers", viscosity=0.1).simulate([0, 1], (24, 24, 24), 3)
    assert (result.diagnostics["convergence_max"] > 5.0).all()
    energy = (result.values["burgers_velocity"].astype(np.float64) ** 2).mean((2, 3, 4, 5))
    assert (np.diff(energy, axis=1) < 0).all()


def test_blow_up_names_regime_seed_and_remedy() -> None:
    """Without enough viscosity the shocks are thinner than the grid, and the truncated equation has no bound."""
    with pytest.raises(NonFiniteError, match=r"burgers.*seed 11.*viscosity"):
        get_regime("burgers", viscosity=1e-6, frame_interval=3.0).simulate([11], (12, 12, 12), 4)


@pytest.mark.parametrize("parameters", [{"rotational": 1.5}, {"viscosity": 0.0}, {"peak_wavenumber": -2.0}])
def test_impossible_parameters_are_refused(parameters: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(parameters))):
        get_regime("burgers", **parameters)
