"""Rayleigh-Benard convection: onset, exact budgets, heat flux."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from shodh.core.errors import ConfigError
from shodh.physics import get_regime
from shodh.physics.solvers.convection import Convection

CRITICAL_RAYLEIGH, CRITICAL_WAVENUMBER = 1707.762, 3.117


def two_dimensional_cell(cells: int, rayleigh: float, prandtl: float, amplitude: float) -> Convection:
    """One pair of rolls of the critical wavelength, disturbed by its first mode."""
    box = (1.0, 2 * math.pi / CRITICAL_WAVENUMBER, 1.0)
    flow = Convection((cells, cells, 2), box, 1, rayleigh=rayleigh, prandtl=prandtl, dtype=torch.float64)
    middle = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    mode = torch.sin(math.pi * middle)[:, None] * torch.cos(2 * math.pi * middle)
    flow.temperature.values += amplitude * mode[:, :, None, None]
    flow.set_velocity(torch.zeros_like(flow.interior))
    return flow


def random_cells(prandtl: float = 0.7) -> Convection:
    draw = torch.Generator().manual_seed(0)
    flow = Convection((7, 6, 5), (1.0, 1.3, 0.9), 2, rayleigh=3e3, prandtl=prandtl, dtype=torch.float64)
    flow.set_velocity(torch.randn(3, 7, 6, 5, 2, generator=draw, dtype=torch.float64))
    flow.temperature.values += 0.3 * torch.randn(7, 6, 5, 2, generator=draw, dtype=torch.float64)
    return flow


def growth_rate(cells: int, rayleigh: float) -> float:
    """Of a disturbance of 1e-6, after the faster modes have died."""
    flow = two_dimensional_cell(cells, rayleigh, 1.0, 1e-6)
    flow.run(14.0, 0.5)
    before = (flow.temperature.values - flow.conduction).norm()
    flow.run(7.0, 0.5)
    return float(torch.log((flow.temperature.values - flow.conduction).norm() / before)) / 7.0


@pytest.mark.exhaustive
def test_convection_starts_at_the_critical_rayleigh_number() -> None:
    """Zero of the growth rate between 0.95 and 1.05 Ra_c: second order in the spacing, 1707.762 in the limit."""

    def critical(cells: int) -> float:
        low, high = 0.95 * CRITICAL_RAYLEIGH, 1.05 * CRITICAL_RAYLEIGH
        below, above = growth_rate(cells, low), growth_rate(cells, high)
        assert above > below
        return low - below * (high - low) / (above - below)

    coarse, fine = critical(6), critical(12)
    order = math.log2((coarse - CRITICAL_RAYLEIGH) / (fine - CRITICAL_RAYLEIGH))
    assert 1.8 < order < 2.2
    # Extrapolation leaves the fourth order: about a quarter of the square of the coarse grid's 13 %.
    assert fine + (fine - coarse) / 3 == pytest.approx(CRITICAL_RAYLEIGH, rel=6e-3)


def test_conduction_is_an_exact_state() -> None:
    flow = Convection((6, 4, 4), (1.0, 1.0, 1.0), 1, rayleigh=1e4, prandtl=1.0, dtype=torch.float64)
    flow.run(2.0, 1.0)
    assert flow.interior.abs().max() < 1e-14
    torch.testing.assert_close(flow.temperature.values, flow.conduction.expand(6, 4, 4, 1), rtol=0, atol=1e-13)
    for nusselt in flow.heat_flux():
        assert float(nusselt) == pytest.approx(1.0, abs=1e-12)
    kinetic, thermal = flow.dissipation()
    assert float(kinetic) < 1e-28
    assert float(thermal) == pytest.approx(float(flow.temperature.diffusivity), rel=1e-12)


def test_budgets_of_energy_and_temperature_variance_close_exactly() -> None:
    """``dE/dt = D (Nu_volume - 1) - eps`` and ``d<T^2/2>/dt = D Nu_bottom - eps_T`` with ``D = 1/sqrt(Ra Pr)``."""
    flow = random_cells()
    heating = flow.temperature.tendency(flow.velocity)
    power = (flow.interior * flow.tendency()).mean((1, 2, 3)).sum(0)
    kinetic, thermal = flow.dissipation()
    bottom, _, volume = flow.heat_flux()
    diffusivity = flow.temperature.diffusivity
    torch.testing.assert_close(power, diffusivity * (volume - 1) - kinetic, rtol=1e-12, atol=1e-14)
    variance = (flow.temperature.values * heating).mean((0, 1, 2))
    torch.testing.assert_close(variance, diffusivity * bottom - thermal, rtol=1e-12, atol=1e-14)
    assert (volume - 1).abs().min() > 0.01


@pytest.mark.exhaustive
def test_steady_rolls_carry_the_known_heat_and_obey_the_exact_relations() -> None:
    """Nu = 2.116 at Ra = 5000, Pr = 0.71, k = 3.117 (Clever & Busse, J. Fluid Mech. 65, 1974), at second order."""
    nusselt = {}
    for cells in (8, 12):
        flow = two_dimensional_cell(cells, 5000.0, 0.71, 0.3)
        flow.run(50.0, 1.0)
        bottom, top, volume = (float(n) for n in flow.heat_flux())
        kinetic, thermal = (float(d) / flow.temperature.diffusivity for d in flow.dissipation())
        for other in (top, volume, kinetic + 1.0, thermal):
            assert other == pytest.approx(bottom, rel=1e-3)
        nusselt[cells] = bottom
    # Weights of Richardson's extrapolation for errors proportional to h^2.
    assert (9 * nusselt[12] - 4 * nusselt[8]) / 5 == pytest.approx(2.116, rel=0.01)
    assert nusselt[12] == pytest.approx(2.116, rel=0.05)


def test_no_slip_holds_at_both_plates() -> None:
    flow = random_cells()
    flow.run(0.1, 0.5)
    for halo, cell in ((0, 1), (-1, -2)):
        inside = flow.velocity[1:, cell, 1:-1, 1:-1]
        torch.testing.assert_close(flow.velocity[1:, halo, 1:-1, 1:-1], -inside, rtol=0, atol=0)
        assert inside.abs().max() > 1e-3


def test_time_integration_of_flow_and_temperature_is_third_order() -> None:
    def solve(steps: int) -> torch.Tensor:
        flow = random_cells()
        for _ in range(steps):
            flow.step(0.08 / steps, flow.temperature)
        return torch.cat((flow.get_velocity(), flow.temperature.values[None]))

    reference = solve(64)
    coarse, fine = ((solve(n) - reference).norm() for n in (4, 8))
    assert 2.7 < math.log2(coarse / fine) < 3.4


def test_cells_of_a_batch_do_not_see_each_other() -> None:
    both, changed = random_cells(), random_cells()
    changed.interior[..., 0] *= 3.0
    changed.fill_halos()
    both.run(0.3, 0.5)
    changed.run(0.3, 0.5)
    torch.testing.assert_close(both.velocity[..., 1], changed.velocity[..., 1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(both.temperature.values[..., 1], changed.temperature.values[..., 1])


def test_regime_convects_and_its_flow_is_divergence_free() -> None:
    result = get_regime("rayleigh_benard", rayleigh=5e4, spin_up=20.0).simulate([0], (12, 12, 16), 3)
    diagnostics = result.diagnostics
    assert diagnostics["nusselt_volume"].min() > 2.0
    u = result.values["velocity"].astype(np.float64)
    terms = ((u[..., a] - np.roll(u[..., a], 1, axis=2 + a)) / result.spacing[a] for a in range(3))
    divergence = np.abs(sum(terms, start=np.zeros(u.shape[:-1]))).max()
    assert divergence < 4 * np.finfo(np.float32).eps * np.abs(u).max() / min(result.spacing)
    assert np.abs(u[..., -1, 2]).max() == 0.0
    temperature = result.values["temperature"].astype(np.float64)
    assert -0.05 < temperature.min() and temperature.max() < 1.05
    assert temperature[..., 0].mean() > 0.6 > 0.4 > temperature[..., -1].mean()
    deviation = temperature - temperature.mean((2, 3, 4), keepdims=True)
    assert 0.05 < np.linalg.norm(temperature[:, 1:] - temperature[:, :-1]) / np.linalg.norm(deviation[:, 1:]) < 0.6


@pytest.mark.parametrize("parameters", [{"rayleigh": -1.0}, {"courant": 2.0}, {"spin_up": float("inf")}])
def test_bad_parameters_are_refused(parameters: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(parameters))):
        get_regime("rayleigh_benard", **parameters)
