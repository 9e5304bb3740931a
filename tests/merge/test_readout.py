"""Read-outs find the coordinate that a loss has its minimum at, and count what they evaluate."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from shodh.core.errors import ConfigError, DataError
from shodh.merge import (
    calibrate,
    check_prefix,
    coordinate,
    fit_scale,
    read_gradient,
    read_line_search,
    read_prefix,
)
from shodh.merge.readout import BANK


def valley(best: float) -> Callable[[float], float]:
    """A loss that is not a parabola, least at ``best``."""
    return lambda alpha: math.cosh(1.7 * (alpha - best)) + 0.1 * (alpha - best) ** 4


def test_the_bank_is_the_published_one() -> None:
    assert BANK[0] == -1.5 and BANK[-1] == 1.5 and set(np.diff(BANK)) == {0.25}


@pytest.mark.parametrize("best", (-1.4, -0.3, 0.0, 0.61))
def test_prefix_takes_the_best_of_the_bank_and_evaluates_each_once(best: float) -> None:
    found = read_prefix(valley(best))
    assert found.alpha == min(BANK, key=lambda a: abs(a - best)) and found.loss == valley(best)(float(found.alpha))
    assert [a for a, _ in found.trace] == list(BANK)


@pytest.mark.parametrize("best", (-1.4, -0.31, 0.0, 0.61, 1.5))
def test_line_search_finds_the_minimum_between_bank_points(best: float) -> None:
    found = read_line_search(valley(best), tolerance=0.005)
    assert abs(float(found.alpha) - best) <= 0.01
    assert len(found.trace) <= len(BANK) + 20 and len({a for a, _ in found.trace}) == len(found.trace)


def test_line_search_stays_in_the_bank_and_is_never_worse_than_it() -> None:
    rough = lambda alpha: math.sin(40 * alpha) + alpha**2  # noqa: E731
    assert read_line_search(rough).loss <= (read_prefix(rough).loss or 0.0)
    assert read_line_search(valley(9.0)).alpha == 1.5


def test_a_rollout_that_blows_up_is_a_bad_coordinate() -> None:
    loss = lambda alpha: math.nan if alpha > 0.3 else (alpha - 0.4) ** 2  # noqa: E731
    assert read_prefix(loss).alpha == 0.25
    assert 0.25 <= float(read_line_search(loss, tolerance=1e-3).alpha) <= 0.3
    with pytest.raises(DataError, match="not finite at any"):
        read_prefix(lambda alpha: math.nan)
    with pytest.raises(ConfigError, match="bank of coordinates is empty"):
        read_prefix(loss, ())


def test_gradient_descends_to_the_minimum_in_few_evaluations() -> None:
    def loss(alpha: np.ndarray) -> tuple[float, np.ndarray]:
        away = alpha - np.array([0.37])
        return float(np.cosh(away).sum()), np.sinh(away)

    found = read_gradient(loss)
    assert found.alpha == pytest.approx(0.37, abs=1e-3) and len(found.trace) <= 8


def test_gradient_of_many_coordinates_stays_in_its_box() -> None:
    target = np.array([0.2, -0.9, 4.0])
    found = read_gradient(lambda a: (float(((a - target) ** 2).sum()), 2 * (a - target)), [0.0, 0.0, 0.0], limit=1.5)
    assert found.alpha == pytest.approx((0.2, -0.9, 1.5), abs=1e-4)


def test_gradient_steps_back_from_where_the_loss_is_not_finite() -> None:
    def loss(alpha: np.ndarray) -> tuple[float, np.ndarray]:
        (a,) = alpha
        return (math.nan, np.full(1, math.nan)) if a > 0.8 else (-math.log(1.0 - a) - 3 * a, 1 / (1.0 - alpha) - 3)

    found = read_gradient(loss, limit=1.5, max_evaluations=40)
    assert found.alpha == pytest.approx(2 / 3, abs=1e-2)
    with pytest.raises(DataError, match="not finite"):
        read_gradient(lambda a: (math.nan, a))


@pytest.mark.parametrize("gamma", (0.4, 1.0, 1.6))
def test_scale_finds_the_factor_that_validation_members_follow(gamma: float) -> None:
    low, high = 1.0, 3.0
    members = {v: valley(gamma * coordinate(v, low, high)) for v in (1.2, 1.7, 2.4, 2.8)}
    assert fit_scale(members, low, high).alpha == pytest.approx(gamma, abs=0.02)


def test_scale_never_asks_for_a_coordinate_outside_the_limit() -> None:
    asked: list[float] = []

    def loss(alpha: float) -> float:
        asked.append(alpha)
        return valley(3.0)(alpha)

    fit_scale({5.0: loss}, 1.0, 3.0)  # s = 3: beyond a factor of 1/2 the clip decides
    assert max(asked) == 1.5 and 0.0 in asked


@pytest.mark.parametrize("true", ("linear", "log"))
def test_the_map_of_the_parameter_is_chosen_on_validation(true: str) -> None:
    low, high = 1e-5, 1e-3
    values = (2e-5, 8e-5, 3e-4, 7e-4)
    members = {v: valley(0.9 * coordinate(v, low, high, true)) for v in values}  # type: ignore[arg-type]
    found = calibrate(members, low, high)
    assert found.scale == true and found.gamma == pytest.approx(0.9, abs=0.02)
    assert set(found.losses) == {"linear", "log"} and found.loss == found.losses[found.scale]


def test_a_range_through_zero_has_no_logarithm() -> None:
    assert set(calibrate({0.0: valley(0.0)}, -1.0, 1.0).losses) == {"linear"}
    with pytest.raises(ConfigError, match="none of the maps"):
        calibrate({0.0: valley(0.0)}, -1.0, 1.0, ("log",))
    with pytest.raises(ConfigError, match="no validation members"):
        fit_scale({}, 1.0, 2.0)


def test_a_prefix_must_leave_a_step_to_compare() -> None:
    check_prefix(5, 4)
    with pytest.raises(DataError, match="4 frames.* reads 4 "):
        check_prefix(4, 4)
