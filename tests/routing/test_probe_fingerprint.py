"""Reading the regime off the routing: accuracies that can be computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from shodh.routing.fingerprint import logistic, nearest_mean, read_regimes

ROWS = 20


def shares(regime: list[float], rng: np.random.Generator, noise: float = 0.02) -> np.ndarray:
    drawn = np.abs(np.array(regime) + noise * rng.standard_normal((ROWS, len(regime))))
    return drawn / drawn.sum(1, keepdims=True)


def samples(regimes: list[list[float]], seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return np.concatenate([shares(r, rng) for r in regimes]), np.repeat(np.arange(len(regimes)), ROWS)


def test_regimes_with_experts_of_their_own_are_read_without_error() -> None:
    regimes = [[0.9, 0.05, 0.05], [0.05, 0.9, 0.05], [0.3, 0.3, 0.4]]
    for reading in read_regimes(*samples(regimes, 0), *samples(regimes, 1), 3).values():
        assert reading.accuracy == 1
        assert reading.confusion.tolist() == (ROWS * np.eye(3)).tolist()
        assert reading.chance == pytest.approx(1 / 3)


def test_regimes_with_one_routing_are_read_by_chance() -> None:
    """Two alike, one apart: the accuracy is (1/2 + 1/2 + 1) / 3, within five standard deviations."""
    regimes = [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.1, 0.1, 0.8]]
    for reading in read_regimes(*samples(regimes, 0), *samples(regimes, 1), 3).values():
        assert reading.confusion[2, 2] == ROWS
        right = reading.confusion[0, 0] + reading.confusion[1, 1]
        assert abs(right - ROWS) < 5 * (2 * ROWS / 4) ** 0.5
        assert not reading.confusion[:2, 2].any()


def test_nearest_mean_keeps_the_labels_it_was_fitted_on() -> None:
    fit, labels = np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([4, 7])
    assert nearest_mean(fit, labels, np.array([[0.2, 0.8], [0.9, 0.1]])).tolist() == [4, 7]
    assert logistic(fit, labels, np.array([[0.2, 0.8], [0.9, 0.1]])).tolist() == [4, 7]


def test_a_single_regime_is_always_read() -> None:
    assert logistic(np.ones((3, 2)), np.zeros(3, dtype=int), np.ones((2, 2))).tolist() == [0, 0]
