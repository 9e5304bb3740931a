"""Information of local physics beyond the regime: planted, absent, and explained by the regime alone."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from shodh.routing.probe.specialisation import (
    BINS,
    conditional_information,
    count_bins,
    quantile_bins,
    shift_bins,
)

GRID, SAMPLES = (8, 8, 8), 6


def smooth(seed: int) -> np.ndarray:
    """Smooth periodic random fields ``[N, S]``: neighbours are not independent."""
    noise = np.random.default_rng(seed).standard_normal((SAMPLES, *GRID))
    return np.stack([gaussian_filter(n, 1.5, mode="wrap").ravel() for n in noise])


def binned(values: np.ndarray) -> np.ndarray:
    found = quantile_bins(values)
    assert found is not None
    return found[0]


def test_bins_hold_equal_parts_and_a_constant_has_none() -> None:
    values = np.random.default_rng(0).permutation(100).reshape(4, 25).astype(float)
    found = quantile_bins(values)
    assert found is not None
    assert np.bincount(found[0].ravel()).tolist() == [25] * BINS
    assert quantile_bins(np.full((2, 8), 3.0)) is None
    ties = quantile_bins(np.array([[0.0] * 9 + [1.0]]))
    assert ties is not None and ties[0].tolist() == [[0] * 9 + [1]]


def test_an_expert_that_follows_a_quantity_within_regimes_is_found() -> None:
    values = [smooth(1), smooth(2)]
    bins = [binned(v) for v in values]
    # Two experts a regime, split at the median: one bit, which the bins know.
    selected = [(b >= 2)[..., None] + 2 * r for r, b in enumerate(bins)]
    found = conditional_information(bins, selected, 4, [GRID] * 2)
    assert found.information == pytest.approx(np.log(2), abs=1e-9)
    assert found.entropy == pytest.approx(np.log(2), abs=1e-9)
    assert found.explained == pytest.approx(1, abs=0.1)
    assert found.p_value < 0.02


def test_a_smooth_routing_that_ignores_a_smooth_quantity_is_not_found() -> None:
    """Tokens are not independent: shuffled ones would call this significant, and rolled samples do not."""
    p_values, explained = [], []
    for seed in range(10):
        bins, selected = [binned(smooth(10 + seed))], [(smooth(50 + seed) > 0).astype(int)[..., None]]
        found = conditional_information(bins, selected, 2, [GRID])
        p_values.append(found.p_value)
        explained.append(found.explained)
        spread = float(found.null.std())
        assert abs(found.corrected) < 5 * spread
    assert sum(p < 0.05 for p in p_values) <= 3  # 0.5 of 10 expected; 4 or more has probability 0.001
    assert abs(np.mean(explained)) < 0.02


def test_routing_that_the_regime_settles_has_nothing_left_to_explain() -> None:
    bins = [binned(smooth(1)), binned(smooth(2))]
    selected = [np.full((SAMPLES, 512, 1), r) for r in range(2)]
    found = conditional_information(bins, selected, 2, [GRID] * 2)
    assert found.information == pytest.approx(0, abs=1e-12)
    assert found.explained is None


def test_counts_and_shifts() -> None:
    bins, selected = np.array([[0, 1, 1]]), np.array([[[0, 2], [2, 1], [2, 0]]])
    assert count_bins(bins, selected, 2, 3).tolist() == [[1, 0, 1], [1, 1, 2]]
    rolled = shift_bins(np.arange(24)[None].repeat(5, 0), (2, 3, 4), np.random.default_rng(0))
    assert (np.sort(rolled, 1) == np.arange(24)).all()
    whole = np.arange(24).reshape(2, 3, 4)
    shifts = [
        np.roll(whole, (a, b, c), (0, 1, 2)).ravel().tolist() for a in range(2) for b in range(3) for c in range(4)
    ]
    assert all(row.tolist() in shifts for row in rolled)
    assert len({tuple(row) for row in rolled}) > 1, "every sample by its own shift"
