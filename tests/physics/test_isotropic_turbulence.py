"""Forced and decaying isotropic turbulence: budget, steadiness, skewness, and conservation of dye."""

from __future__ import annotations

import numpy as np
import pytest

from shodh.core.errors import ConfigError
from shodh.physics import get_regime


@pytest.mark.exhaustive
def test_forced_turbulence_is_statistically_steady() -> None:
    """Over many turnovers the mean dissipation is the injection, but for the change of energy over the time."""
    injection, interval, frames = 0.1, 0.5, 61
    regime = get_regime("forced_turbulence", viscosity=0.05, spin_up=20.0, frame_interval=interval, courant=1.2)
    result = regime.simulate([0, 1], (16, 16, 16), frames)
    dissipation = result.diagnostics["dissipation_mean"]
    square = (result.values["velocity"].astype(np.float64) ** 2).sum(-1).mean((2, 3, 4))
    change = 0.5 * (square[:, -1] - square[:, 0]) / (interval * (frames - 1))
    # What is left of the budget is the quadrature of 61 samples and the energy that placement on faces changes.
    assert np.abs((change + dissipation) / injection - 1.0).max() < 0.03
    assert np.abs(dissipation / injection - 1.0).max() < 0.2
    early, late = square[:, : frames // 2].mean(1), square[:, frames // 2 :].mean(1)
    assert np.abs(late / early - 1.0).max() < 0.3


def test_decaying_turbulence_develops_the_skewness_of_turbulence() -> None:
    """Derivatives of a Gaussian field have none; in turbulence -0.4 to -0.55 (Sreenivasan and Antonia 1997)."""
    regime = get_regime("decaying_turbulence", frame_interval=0.2)
    start = regime.simulate([0, 1], (32, 32, 32), 1, spin_up=0.0).diagnostics
    developed = regime.simulate([0, 1], (32, 32, 32), 2).diagnostics
    assert np.abs(start["derivative_skewness_mean"]).max() < 0.1
    skewness = developed["derivative_skewness_mean"].mean()
    assert -0.55 < skewness < -0.4
    assert (developed["energy_mean"] < start["energy_mean"]).all()
    # Taylor Reynolds number u' lambda / nu, with lambda = 2 / k_0 for the initial spectrum and u' = 1.
    expected = 2.0 / (2.5 * 0.03)
    assert start["taylor_reynolds_mean"] == pytest.approx(expected, rel=0.1)
    assert start["energy_mean"] == pytest.approx(1.5, rel=1e-3)


@pytest.mark.parametrize("name", ["forced_turbulence", "decaying_turbulence"])
def test_dye_is_conserved_and_pressure_has_no_mean(name: str) -> None:
    values = get_regime(name, spin_up=0.0).simulate([1], (12, 12, 12), 4).values
    dye = values["tracer"].astype(np.float64).mean((2, 3, 4))
    assert np.abs(dye / dye[:, :1] - 1.0).max() < 1e-6
    assert dye.min() > 0.2
    pressure = values["pressure"].astype(np.float64)
    assert np.abs(pressure.mean((2, 3, 4))).max() < 1e-6 * np.abs(pressure).max()


def test_flow_at_early_times_does_not_depend_on_the_grid() -> None:
    """The middle one of three fine cells has the centre of the coarse one, where both hold the pressure."""
    regime = get_regime("decaying_turbulence", viscosity=0.2, double=True)
    coarse, fine = (
        regime.simulate([3], (n, n, n), 2, spin_up=0.0, frame_interval=0.1, peak_wavenumber=1.5) for n in (16, 48)
    )
    middle = fine.values["pressure"][..., 1::3, 1::3, 1::3]
    assert np.abs(coarse.values["pressure"] - middle).max() < 2e-3 * np.abs(middle).max()


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("forced_turbulence", {"forced_wavenumber": 0.5}),
        ("forced_turbulence", {"injection": 0.0}),
        ("decaying_turbulence", {"viscosity": -1.0}),
        ("decaying_turbulence", {"courant": 1.4}),
        ("decaying_turbulence", {"spin_up": -1.0}),
    ],
)
def test_impossible_parameters_are_refused(name: str, parameters: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(parameters))):
        get_regime(name, **parameters)
