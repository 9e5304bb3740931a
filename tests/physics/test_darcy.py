"""Darcy flow: checkerboards, mass balance, wells."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from shodh.core.errors import ConfigError, NonFiniteError
from shodh.physics import get_regime
from shodh.physics.regimes.darcy import WellRates
from shodh.physics.solvers.conduction import HeterogeneousDiffusion
from shodh.schema.fields import Trajectories

GRID = (16, 12, 20)


def checkerboard_error(cells: int, ratio: float) -> float:
    """Relative error of the permeability of an extruded checkerboard of two by two squares."""
    half = cells // 2
    side = (torch.arange(cells) // half) % 2
    black = (side[:, None] + side) % 2 == 0
    permeability = torch.where(black, ratio, 1.0).double()[None, :, :, None].expand(1, cells, cells, 2)
    medium = HeterogeneousDiffusion(permeability.contiguous(), (1 / cells,) * 3, smooth=False)
    along, across = (float(medium.effective_conductivity(axis)) for axis in (0, 1))
    assert along == pytest.approx(across, rel=1e-6)
    assert float(medium.effective_conductivity(2)) == pytest.approx(0.5 * (1 + ratio), rel=1e-12)
    return along / math.sqrt(ratio) - 1


@pytest.mark.parametrize("ratio", [4.0, 25.0])
def test_checkerboard_converges_to_the_geometric_mean(ratio: float) -> None:
    """Dykhne (1971): ``sqrt(k1 k2)``. The flux is singular at the corners, ``r^(s - 1)`` with
    ``s = 4/pi arctan(k2 / k1)^(1/2)``, so the energy, and the permeability with it, converges at order ``2 s``."""
    errors = [abs(checkerboard_error(cells, ratio)) for cells in (8, 16, 32)]
    order = 8 / math.pi * math.atan(1 / math.sqrt(ratio))
    for coarse, fine in zip(errors, errors[1:]):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


@pytest.fixture(scope="module")
def result() -> Trajectories:
    return get_regime("darcy").simulate([0, 1], GRID, 4)


def test_stored_flux_balances_the_wells_and_nothing_else(result: Trajectories) -> None:
    """Divergence of the stored flux is the source, to the solver's tolerance and fp32 rounding."""
    regime = get_regime("darcy")
    assert (result.diagnostics["mass_imbalance"] < 1e-5).all()
    flux = result.values["flux"].astype(np.float64)
    total = sum((flux[..., a] - np.roll(flux[..., a], 1, axis=2 + a)) / result.spacing[a] for a in range(3))
    rounding = np.finfo(np.float32).eps * np.abs(flux).max() / min(result.spacing)
    for b, seed in enumerate((0, 1)):
        wells = regime.make_wells(seed, GRID, result.lengths).numpy()
        rates = np.stack([WellRates([seed], regime.wells, regime.rate)(time)[0].numpy() for time in result.time])
        source = np.einsum("tw,wxyz->txyz", rates, wells)
        assert np.abs(source).max() > 1.0
        error = np.linalg.norm((total[b] - source).reshape(4, -1), axis=1)
        size = np.linalg.norm(source.reshape(4, -1), axis=1)
        assert (error < 1e-5 * size + 4 * rounding * math.sqrt(source[0].size)).all()
    assert np.abs(flux[..., -1, 2]).max() == 0.0


def test_flux_follows_from_pressure_and_permeability(result: Trajectories) -> None:
    pressure = torch.from_numpy(result.values["pressure"][:, -1]).double()
    permeability = torch.from_numpy(result.values["permeability"]).double()
    medium = HeterogeneousDiffusion(permeability, result.spacing, closed_axis=2)
    expected = torch.stack(medium.flux(pressure), dim=-1).numpy()
    # Differences of a pressure rounded to fp32, times the largest permeability.
    bound = float(permeability.max()) * 2e-7 * float(pressure.abs().max()) / min(result.spacing)
    np.testing.assert_allclose(result.values["flux"][:, -1], expected, rtol=0, atol=bound)


def test_permeability_spans_decades_and_pressure_has_no_mean(result: Trajectories) -> None:
    assert (result.diagnostics["permeability_decades"] > 2.0).all()
    pressure = result.values["pressure"].astype(np.float64)
    assert np.abs(pressure.mean((2, 3, 4))).max() < 1e-6 * np.abs(pressure).max()


def test_consecutive_frames_clearly_differ(result: Trajectories) -> None:
    for name in ("pressure", "flux"):
        values = result.values[name].astype(np.float64)
        change = np.linalg.norm(values[:, 1:] - values[:, :-1]) / np.linalg.norm(values[:, 1:])
        assert 0.1 < change < 0.8


def test_rates_sum_to_zero_and_change_smoothly() -> None:
    rates = WellRates([1, 2], 5, 2.0)
    for time in (0.0, 0.7, 100.0):
        assert rates(time).sum(1).abs().max() < 1e-13
        assert 0 < float((rates(time + 1e-3) - rates(time)).abs().max()) < 0.1
    assert torch.equal(WellRates([2], 5, 2.0)(0.3)[0], rates(0.3)[1])


def test_solver_that_does_not_converge_is_an_error() -> None:
    with pytest.raises(NonFiniteError, match=r"darcy.*seed 5.*max_iterations"):
        get_regime("darcy", max_iterations=3).simulate([5], (12, 12, 12), 1)
    with pytest.raises(ConfigError, match="wells"):
        get_regime("darcy", wells=1)
