"""The three-dimensional Taylor-Green vortex: known energy, enstrophy and early decay."""

from __future__ import annotations

import math

import numpy as np
import pytest

from shodh.physics import get_regime


@pytest.mark.parametrize("classical", [True, False])
def test_energy_and_enstrophy_at_the_start(classical: bool) -> None:
    """1/8 and 3/8 for every member of the family; the largest speed of the classical one is 1."""
    regime = get_regime("taylor_green", classical=classical, spin_up=0.0, double=True)
    result = regime.simulate([1, 2], (16, 16, 16), 1)
    assert result.diagnostics["energy_mean"] == pytest.approx(0.125, rel=1e-12)
    assert result.diagnostics["enstrophy_max"] == pytest.approx(0.375, rel=1e-12)
    same = np.array_equal(result.values["velocity"][0], result.values["velocity"][1])
    assert same == classical


def test_early_decay_of_energy() -> None:
    """``E = exp(-6 nu t) / 8`` while enstrophy has barely grown; the growth makes the decay a little faster.

    The enstrophy rises from 3/8 only in proportion to ``t^2``, so the correction is of third order in the time.
    """
    losses = []
    for time in (0.1, 0.2):
        regime = get_regime("taylor_green", reynolds=100.0, classical=True, spin_up=time, double=True)
        energy = regime.simulate([0], (32, 32, 32), 1).diagnostics["energy_mean"].item()
        losses.append(math.exp(-6.0 * 0.01 * time) - energy / 0.125)
    assert energy / 0.125 == pytest.approx(0.98806, abs=1e-5)
    assert math.log2(losses[1] / losses[0]) == pytest.approx(3.0, abs=0.15)


def test_vortex_stretching_raises_the_enstrophy() -> None:
    regime = get_regime("taylor_green", reynolds=100.0, classical=True, spin_up=0.0, frame_interval=3.0)
    result = regime.simulate([0], (24, 24, 24), 2)
    assert result.diagnostics["enstrophy_max"] > 0.375 * 1.3
    # The classical vortex stays mirror-symmetric: u is odd and p even about x = 0, which is a face of the grid.
    velocity, pressure = result.values["velocity"][0, 1], result.values["pressure"][0, 1]
    assert np.abs(velocity[-1, ..., 0]).max() < 1e-5
    assert np.abs(pressure - pressure[::-1]).max() < 1e-5 * np.abs(pressure).max()
