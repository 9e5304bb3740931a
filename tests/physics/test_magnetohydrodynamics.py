"""MHD: Alfven waves, ideal invariants, and a magnetic field without divergence."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from shodh.core.errors import ConfigError
from shodh.physics import get_regime
from shodh.physics.regimes.isotropic_turbulence import random_velocity
from shodh.physics.regimes.magnetohydrodynamics import InductionFlow
from shodh.physics.solvers.spectral import SpectralGrid, step
from shodh.physics.solvers.spectral_flow import IncompressibleFlow, kinetic_energy

TAU = 2.0 * math.pi


def make_grid(*cells: int) -> SpectralGrid:
    return SpectralGrid(cells, (TAU, TAU, TAU), torch.float64)


def march(flow: InductionFlow, state: torch.Tensor, time: float, steps: int) -> torch.Tensor:
    for _ in range(steps):
        state = step(flow, state, torch.tensor([time / steps], dtype=torch.float64))
    return state


@pytest.mark.parametrize("viscosity, resistivity", [(0.05, 0.05), (0.08, 0.02)])
def test_alfven_wave_oscillates_and_decays(viscosity: float, resistivity: float) -> None:
    """A shear wave along the mean field solves the equations at any amplitude.

    With equal diffusivities ``u = cos(k B_0 t) exp(-nu k^2 t) cos kz``; in general the matrix below, whose waves have
    the damping ``(nu + eta) k^2 / 2`` and the frequency ``sqrt((k B_0)^2 - ((nu - eta) k^2 / 2)^2)``.
    """
    space, k, mean_field, time = make_grid(6, 6, 12), 2, 1.5, 1.3
    z = space.centers()[2]
    values = torch.zeros(6, *space.grid, dtype=torch.float64)
    values[0] += torch.cos(k * z)
    values[5] += mean_field
    flow = InductionFlow(space, viscosity, resistivity)
    # Amplitudes of u = a cos kz and b = c sin kz: da/dt = k B_0 c - nu k^2 a, dc/dt = -k B_0 a - eta k^2 c.
    matrix = torch.tensor(
        [[-viscosity * k**2, k * mean_field], [-k * mean_field, -resistivity * k**2]], dtype=torch.float64
    )
    damping = 0.5 * (viscosity + resistivity) * k**2
    frequency = math.sqrt((k * mean_field) ** 2 - (0.5 * (viscosity - resistivity) * k**2) ** 2)
    eigenvalues = torch.linalg.eigvals(matrix)
    assert eigenvalues.real.tolist() == pytest.approx([-damping, -damping])
    assert eigenvalues.imag.abs().tolist() == pytest.approx([frequency, frequency])
    amplitude = torch.linalg.matrix_exp(matrix * time)[:, 0]
    expected = torch.zeros_like(values)
    expected[0] += amplitude[0] * torch.cos(k * z)
    expected[3] += amplitude[1] * torch.sin(k * z)
    expected[5] += mean_field
    errors = []
    for steps in (20, 40):
        found = space.inverse(march(flow, space.forward(values)[None], time, steps))[0]
        errors.append((found - expected).abs().max().item())
    assert math.log2(errors[0] / errors[1]) > 3.8
    assert errors[1] < 1e-5


def test_ideal_invariants_are_conserved_at_the_order_of_the_scheme() -> None:
    """Without diffusion energy, cross helicity and magnetic helicity change by the error of the steps alone."""
    space = make_grid(16, 16, 16)
    velocity, field = random_velocity(space, 1, 2.5), random_velocity(space, 2, 2.5)
    start = torch.cat((velocity, 0.7 * field + 0.2 * velocity))[None]
    flow = InductionFlow(space, 0.0, 0.0)
    before = flow.invariants(start)
    drifts: dict[str, list[float]] = {name: [] for name in before}
    for steps in (12, 24, 48):
        after = flow.invariants(march(flow, start, 0.5, steps))
        for name, value in after.items():
            drifts[name].append(abs((value - before[name]).item()) / before["energy"].item())
    for name, drift in drifts.items():
        assert 0 < drift[-1] < 1e-6, name
        assert math.log2(drift[0] / drift[-1]) / 2.0 > 3.7, name


def test_energy_budget_of_the_tendency() -> None:
    """Lorentz force and induction exchange energy exactly, for any truncated field with a mean."""
    space = make_grid(12, 15, 16)
    state = torch.cat((random_velocity(space, 1, 4.0), random_velocity(space, 2, 4.0)))
    state[5, 0, 0, 0] = 0.8
    slope = InductionFlow(space, 0.0, 0.0).tendency(state[None])[0]
    work = space.mean_product(slope, state[None])[0]
    assert work[:3].sum().abs() > 1e-3
    assert work.sum().abs() < 1e-12


def test_without_a_magnetic_field_it_is_the_flow() -> None:
    space = make_grid(12, 12, 12)
    velocity = random_velocity(space, 1, 2.5)[None]
    found, rate = InductionFlow(space, 0.0, 0.0).tendency(torch.cat((velocity, torch.zeros_like(velocity)), dim=1))
    expected, expected_rate = IncompressibleFlow(space, 0.0).tendency(velocity)
    assert (found[:, :3] - expected).abs().max() < 1e-14
    assert found[:, 3:].abs().max() == 0
    torch.testing.assert_close(rate, expected_rate, rtol=1e-12, atol=0)


def test_magnetic_field_keeps_its_mean_and_has_no_divergence() -> None:
    space = make_grid(16, 16, 16)
    regime = get_regime("magnetohydrodynamics", mean_field=0.7)
    state = march(InductionFlow(space, 0.05, 0.05), regime.initial(space, 3)[None], 0.5, 20)
    assert space.divergence(state[:, 3:]).abs().max() < 1e-14
    result = regime.simulate([3], (16, 16, 16), 3)
    field = result.values["magnetic_field"].astype(np.float64)
    assert np.abs(field.mean((2, 3, 4)) - [0.0, 0.0, 0.7]).max() < 1e-6
    scale = np.abs(field).max() / result.spacing[0]
    assert result.diagnostics["magnetic_field_divergence_max"] < 4 * np.finfo(np.float32).eps * scale


def test_start_has_equal_energies_and_no_preferred_helicity() -> None:
    space = make_grid(32, 32, 32)
    regime = get_regime("magnetohydrodynamics", mean_field=0.0)
    states = torch.stack([regime.initial(space, seed) for seed in range(4)])
    for part in (states[:, :3], states[:, 3:]):
        assert kinetic_energy(space, part).tolist() == pytest.approx([1.5] * 4)
    cross = regime.equations(space).invariants(states)["cross_helicity"]
    assert (cross.abs() < 0.3 * 3.0).all() and cross.min() < 0 < cross.max()


@pytest.mark.parametrize("parameters", [{"mean_field": -1.0}, {"magnetic_prandtl": 0.0}, {"viscosity": math.inf}])
def test_impossible_parameters_are_refused(parameters: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(parameters))):
        get_regime("magnetohydrodynamics", **parameters)
