"""Compressible flow: the initial law of PDEBench, conservation, positivity, and convergence of a viscous run."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from shodh.core.errors import ConfigError
from shodh.physics import get_regime
from shodh.physics.regimes.compressible_2d import AMPLITUDE, Compressible2d


def initial(regime: Compressible2d, seed: int, cells: int = 32) -> np.ndarray:
    return regime.initial_state(seed, (cells, cells)).numpy()


def test_initial_fields_follow_the_law() -> None:
    """Mean speed M c without a window, relative deviations in their interval; about half are windowed."""
    regime, windowed = Compressible2d(mach=0.3), 0
    for seed in range(60):
        density, u, v, pressure = initial(regime, seed)
        speed = np.hypot(u, v)
        if speed[0, 0] < 1e-3 * speed.max():
            windowed += 1
            continue
        sound = math.sqrt(regime.gamma * pressure.mean() / density.mean())
        assert speed.mean() == pytest.approx(0.3 * sound, rel=0.02)
        for scalar in (density, pressure):
            deviation = np.abs(scalar / scalar.mean() - 1.0).mean()
            assert AMPLITUDE[0] * 0.9 < deviation < AMPLITUDE[1] * 1.1
    assert 15 <= windowed <= 45


def test_initial_state_is_one_function_on_all_grids() -> None:
    """Values at the centres of a grid three times finer include those of the coarse one."""
    regime = Compressible2d()
    for seed in (1, 2, 3):
        np.testing.assert_allclose(initial(regime, seed, 48)[:, 1::3, 1::3], initial(regime, seed, 16), rtol=0.02)


@pytest.mark.parametrize("viscosity", [0.0, 1e-8, 0.1])
def test_mass_and_energy_are_conserved_and_stay_positive(viscosity: float) -> None:
    regime = get_regime("compressible_2d", mach=1.0, shear_viscosity=viscosity, bulk_viscosity=viscosity)
    result = regime.simulate([1, 2], (16, 16), 3)
    assert result.values["density"].min() > 0 and result.values["pressure"].min() > 0
    # Rounding of fp32, some 10 steps of random walk.
    assert result.diagnostics["mass_drift"].max() < 1e-5
    assert result.diagnostics["energy_drift"].max() < 1e-5
    assert result.diagnostics["steps"].min() > 5


def test_viscous_flow_converges_under_refinement() -> None:
    """The published viscous setting; differences of coarse-grained solutions fall at second order once resolved."""
    fields = []
    for cells in (16, 32, 64):
        regime = Compressible2d(mach=0.3, shear_viscosity=0.3, bulk_viscosity=0.3, modes=1, double=True)
        state = regime.solver(regime.initial_state(4, (cells, cells))[..., None])
        assert bool(state.advance(0.02).all())
        conserved = state.conserved[..., 0]
        fields.append(torch.nn.functional.avg_pool2d(conserved, cells // 16) if cells > 16 else conserved)
    coarse, fine = ((a - b).abs().mean() for a, b in zip(fields, fields[1:]))
    assert math.log2(coarse / fine) > 1.7


@pytest.mark.parametrize(
    "change", [{"courant": 0.6}, {"mach": 0.0}, {"shear_viscosity": -1.0}, {"bulk_viscosity": math.nan}, {"gamma": 1.0}]
)
def test_bad_parameters_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        get_regime("compressible_2d", **change)
