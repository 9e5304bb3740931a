"""Vorticity flow: exact solutions, fourth order in time, invariants, initial law, and the error of the long steps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from shodh.core.errors import ConfigError
from shodh.physics import get_regime
from shodh.physics.regimes.vorticity_2d import Vorticity2d, VorticityEquation
from shodh.physics.solvers.spectral import SpectralGrid, advance, step

CELLS = 32


def equation(viscosity: float, amplitude: float) -> VorticityEquation:
    return VorticityEquation(SpectralGrid((CELLS, CELLS), (1.0, 1.0), torch.float64), viscosity, amplitude)


def vortices(space: SpectralGrid) -> Tensor:
    x, y = (2 * math.pi * c for c in space.centers())
    return space.forward((4 * math.pi * torch.cos(x) * torch.cos(y))[None, None])


def random_state(model: VorticityEquation) -> Tensor:
    return Vorticity2d(initial_scale=3e4).initial(model.space, 0)[None] * model.space.kept


def test_taylors_vortices_decay_exactly() -> None:
    """Their advection vanishes, so only the exact viscous factor acts."""
    model = equation(1e-2, 0.0)
    start = vortices(model.space)
    end = advance(model, start, 1.0, 0.8)
    torch.testing.assert_close(end, start * math.exp(-1e-2 * 8 * math.pi**2), rtol=1e-10, atol=1e-10)


def test_forced_laminar_flow_grows_as_its_exact_solution() -> None:
    """From rest, w = f / (8 pi^2 nu) (1 - exp(-8 pi^2 nu t)): the forcing has one |k|, so advection vanishes."""
    model, rate, time = equation(1e-2, 0.1), 1e-2 * 8 * math.pi**2, 3.0
    end = torch.zeros(1, 1, *model.space.modes, dtype=torch.complex128)
    for _ in range(30):
        end = step(model, end, torch.tensor([time / 30], dtype=torch.float64))
    expected = model.force * (1 - math.exp(-rate * time)) / rate
    # For a constant force the scheme is Simpson's rule for exp(-rate t): relative error (rate dt)^4 / 2880.
    bound = (rate * time / 30) ** 4 / 2880
    torch.testing.assert_close(end[0, 0], expected, rtol=2 * bound, atol=1e-14)


def test_steps_are_fourth_order() -> None:
    model = equation(1e-3, 0.1)
    start = random_state(model)
    ends = []
    for count in (8, 16, 32):
        state, dt = start, torch.tensor([0.32 / count], dtype=torch.float64)
        for _ in range(count):
            state = step(model, state, dt)
        ends.append(state)
    first, second = ((a - b).abs().max() for a, b in zip(ends, ends[1:]))
    assert math.log2(first / second) == pytest.approx(4.0, abs=0.3)


def test_advection_keeps_energy_and_enstrophy() -> None:
    """The truncated quadratic term does no work on either, to rounding."""
    model = equation(0.0, 0.0)
    state = random_state(model)
    slope, _ = model.tendency(state)
    space = model.space
    for weight in (torch.ones_like(space.inverse_square), space.inverse_square):
        work = space.mean_product(slope[:, 0] * weight, state[:, 0])
        scale = (
            space.mean_product(slope[:, 0] * weight, slope[:, 0]) * space.mean_product(state * weight, state)
        ).sqrt()
        assert float((work / scale).abs().max()) < 1e-13
        assert float(scale.min()) > 0


def test_enstrophy_follows_its_budget() -> None:
    """d/dt <w^2>/2 = <w f> - nu <|grad w|^2>, the right side integrated by Simpson's rule over a short time."""
    model = equation(1e-3, 0.1)
    space, states = model.space, [random_state(model)]
    for _ in range(2):
        states.append(advance(model, states[-1], 0.01, 0.4))

    def gain(state: Tensor) -> float:
        w = state[:, 0]
        return float(space.mean_product(w, model.force[None]) - 1e-3 * space.mean_product(w * space.square, w))

    half = [0.5 * float(space.mean_product(s[:, 0], s[:, 0])) for s in states]
    a, b, c = (gain(s) for s in states)
    assert half[2] - half[0] == pytest.approx(0.02 * (a + 4 * b + c) / 6, rel=1e-4)


def test_initial_vorticity_has_the_stated_covariance() -> None:
    """Variance of a mode over seeds, and the sum over modes, within five standard errors; zero mean flow."""
    regime, seeds = Vorticity2d(), 400
    space = SpectralGrid((CELLS, CELLS), (1.0, 1.0), torch.float64)
    modes = torch.stack([regime.initial(space, seed)[0] for seed in range(seeds)])
    square = modes.abs().square().mean(0)
    for i, j in ((1, 0), (1, 1), (2, 3)):
        expected = 7.0**3 * (4 * math.pi**2 * (i * i + j * j) + 49.0) ** -2.5
        assert abs(float(square[i, j]) / expected - 1.0) < 5 / math.sqrt(seeds)
    assert float(modes[:, 0, 0].abs().max()) == 0.0


def test_a_tenth_of_the_step_changes_a_frame_by_less_than_1e_5() -> None:
    """The claim of the module: steps far longer than the original's cost no accuracy."""
    regime = get_regime("vorticity_2d", double=True)
    usual = regime.simulate([3], (CELLS, CELLS), 4).values["vorticity"].astype(np.float64)
    fine = regime.simulate([3], (CELLS, CELLS), 4, courant=0.04).values["vorticity"].astype(np.float64)
    errors = [np.linalg.norm(usual[0, i] - fine[0, i]) / np.linalg.norm(fine[0, i]) for i in range(1, 4)]
    assert max(errors) < 1e-5, errors


@pytest.mark.parametrize("change", [{"viscosity": 0.0}, {"forcing": -0.1}, {"initial_scale": -1.0}, {"courant": 2.0}])
def test_bad_parameters_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        get_regime("vorticity_2d", **change)
