"""Radial dam break: against the one-dimensional equation in the radius, symmetry, mass, initial law."""

from __future__ import annotations

import math

import numpy as np
import pytest

from shodh.core.errors import ConfigError
from shodh.physics import get_regime
from shodh.physics.regimes.shallow_water_2d import ShallowWater2d


def radial_reference(radius: float, time: float, cells: int = 2000, edge: float = 2.5) -> tuple[np.ndarray, np.ndarray]:
    """Depth on ``r`` of ``h_t + (h u)_r = -h u / r`` from 2 inside ``radius`` over 1: Rusanov fluxes, first order."""
    dr = edge / cells
    r, faces = (np.arange(cells) + 0.5) * dr, np.arange(cells + 1) * dr
    h, q, now = np.where(r < radius, 2.0, 1.0), np.zeros(cells), 0.0
    while now < time:
        dt = min(0.45 * dr / (np.abs(q / h) + np.sqrt(h)).max(), time - now)
        left = np.stack((np.append(h[0], h), np.append(-q[0], q)))
        right = np.stack((np.append(h, h[-1]), np.append(q, q[-1])))
        speed = np.maximum(*(np.abs(s[1] / s[0]) + np.sqrt(s[0]) for s in (left, right)))
        fluxes = [np.stack((s[1], s[1] ** 2 / s[0] + 0.5 * s[0] ** 2)) for s in (left, right)]
        flux = 0.5 * (fluxes[0] + fluxes[1]) - 0.5 * speed * (right - left)
        # Fluxes through circles; the pressure acts on the sides of a sector too.
        change = (faces[1:] * flux[:, 1:] - faces[:-1] * flux[:, :-1]) / (r * dr)
        h, q, now = h - dt * change[0], q - dt * (change[1] - 0.5 * h**2 / r), now + dt
    return r, h


def solve(cells: int, radius: float = 0.5, frames: int = 2) -> np.ndarray:
    regime = ShallowWater2d(radius_min=radius, radius_max=radius, frame_interval=0.5 / (frames - 1), double=True)
    return regime.simulate([0], (cells, cells), frames).values["height"][0].astype(np.float64)


def test_radial_dam_break_converges_to_the_equation_in_the_radius() -> None:
    """Error in L1 falls at first order, as it must at a bore."""
    r, reference = radial_reference(0.5, 0.5)
    errors = []
    for cells in (32, 64, 128):
        x = ((np.arange(cells) + 0.5) / cells - 0.5) * 5.0
        radius = np.hypot(x[:, None], x)
        exact = np.interp(radius, r, reference)
        errors.append(np.abs(solve(cells)[-1] - exact)[radius < 2.4].mean())
    assert all(math.log2(a / b) > 0.8 for a, b in zip(errors, errors[1:])), errors


def test_mass_is_exact_until_waves_reach_the_ends() -> None:
    height = solve(48, frames=3)
    totals = height.sum((1, 2)) * (5.0 / 48) ** 2
    assert np.abs(totals - totals[0]).max() < 1e-6 * totals[0]
    # The mean depth of cut cells gives the volume of the column: 64 points a cell on the rim.
    assert totals[0] == pytest.approx(25.0 + math.pi * 0.25, rel=1e-4)


def test_solution_keeps_the_symmetry_of_the_square() -> None:
    height = solve(32)[-1]
    for mirrored in (height[::-1], height[:, ::-1], height.T):
        np.testing.assert_allclose(height, mirrored, atol=1e-6)


def test_radii_are_uniform_in_their_interval_and_waves_leave() -> None:
    regime = get_regime("shallow_water_2d")
    radii = np.array([regime.radius(seed) for seed in range(500)])  # type: ignore[attr-defined]
    assert radii.min() >= 0.3 and radii.max() <= 0.7 and abs(radii.mean() - 0.5) < 5 * 0.4 / math.sqrt(12 * 500)
    late = get_regime("shallow_water_2d", frame_interval=8.0).simulate([1], (24, 24), 2)
    assert np.abs(late.values["height"][0, 1] - 1.0).max() < 0.05 < np.abs(late.values["height"][0, 0] - 1.0).max()


@pytest.mark.parametrize(
    "change", [{"courant": 0.6}, {"radius_min": 0.8}, {"radius_max": 2.6}, {"depth_outside": 0.0}, {"gravity": -1.0}]
)
def test_bad_parameters_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        get_regime("shallow_water_2d", **change)
