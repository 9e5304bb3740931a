"""Paired tests over seeds, against the definitions and SciPy."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from shodh.report.statistics import (
    MARGIN,
    bootstrap_by_seed,
    compare,
    holm,
    mean_intervals,
    nested_bootstrap,
    sign_flip,
    what_seeds_can_show,
    what_trajectories_can_show,
)


def test_ratio_interval_and_p_are_those_of_a_paired_t_test_on_logs() -> None:
    rng = np.random.default_rng(0)
    errors, others = rng.uniform(0.5, 1.0, 7), rng.uniform(0.6, 1.1, 7)
    found = compare(errors.tolist(), others.tolist())
    expected = stats.ttest_rel(np.log(errors), np.log(others))
    interval = expected.confidence_interval(0.95)
    assert found.p_differs == pytest.approx(expected.pvalue)
    assert (math.log(found.low), math.log(found.high)) == pytest.approx((interval.low, interval.high))
    assert found.ratio == pytest.approx(stats.gmean(errors) / stats.gmean(others))
    assert found.wins == int((errors < others).sum())


def test_sign_flip_counts_the_sign_patterns_whose_mean_is_as_far_from_zero() -> None:
    differences = np.array([0.3, -0.1, 0.25, 0.4, 0.05])
    patterns = np.array(list(itertools.product((-1, 1), repeat=5)))
    expected = (abs(patterns @ differences) >= abs(differences.sum()) - 1e-12).mean()
    assert sign_flip(differences.tolist()) == pytest.approx(expected)


def test_three_agreeing_seeds_cannot_give_a_small_sign_flip_p() -> None:
    assert sign_flip([0.5, 0.5, 0.6]) == 0.25
    assert "0.25" in what_seeds_can_show(3) and "2.48" in what_seeds_can_show(3)
    assert "no comparison" in what_seeds_can_show(2)


@pytest.mark.parametrize(
    ("errors", "others", "verdict"),
    [
        ([0.80, 0.81, 0.79], [1.0, 1.0, 1.0], "lower"),
        ([1.0, 1.0, 1.0], [0.80, 0.81, 0.79], "higher"),
        ([1.001, 0.999, 1.0], [1.0, 1.0, 1.0], "equal"),
        ([0.9, 1.2, 0.95], [1.0, 1.0, 1.0], "open"),
        ([0.990, 0.991, 0.989], [1.0, 1.0, 1.0], "equal"),  # significant, and below the margin
        ([0.5, 0.5001], [1.0, 1.0], "open"),  # significant, and two seeds are no comparison
        ([0.5], [1.0], "open"),
    ],
)
def test_verdict(errors: list[float], others: list[float], verdict: str) -> None:
    assert compare(errors, others).verdict == verdict


def test_equal_errors_are_equal() -> None:
    found = compare([0.5, 0.6, 0.7], [0.5, 0.6, 0.7])
    assert (found.ratio, found.p_differs, found.p_sign, found.verdict) == (1.0, 1.0, 1.0, "equal")


def test_p_of_equality_is_of_both_one_sided_tests_and_falls_where_the_interval_leaves_the_margin() -> None:
    logs = np.random.default_rng(1).normal(0.002, 0.01, 6)
    sides = ((math.log(1 + MARGIN), "less"), (-math.log(1 + MARGIN), "greater"))
    expected = max(stats.ttest_1samp(logs, end, alternative=side).pvalue for end, side in sides)
    found = compare(np.exp(logs).tolist(), [1.0] * 6)
    assert found.p_equal == pytest.approx(2 * expected)
    for scale in np.linspace(0.2, 4, 40):
        c = compare(np.exp(scale * logs).tolist(), [1.0] * 6)
        assert (c.p_equal < 0.05) == (1 / (1 + MARGIN) < c.low and c.high < 1 + MARGIN)


def test_holm_is_that_of_the_textbook() -> None:
    """p of 0.01, 0.02, 0.03, 0.04 in a family of four: 0.04, 0.06, 0.06, 0.06; one seed is no member."""
    known = compare([0.8, 0.81, 0.79], [1, 1, 1])
    family = {p: replace(known, p_differs=p) for p in (0.03, 0.01, 0.04, 0.02)}
    adjusted = holm({**family, 1.0: compare([0.8], [1.0])})
    assert {p: c.p_holm for p, c in adjusted.items()} == pytest.approx(
        {0.03: 0.06, 0.01: 0.04, 0.04: 0.06, 0.02: 0.06, 1.0: 1.0}
    )


@pytest.mark.parametrize(
    ("close", "verdict"), [([0.90, 0.93, 0.87], "lower"), ([1.0, 1.005, 0.995], "equal")], ids=["lower", "equal"]
)
def test_one_of_many_claims_needs_more_than_one_alone(close: list[float], verdict: str) -> None:
    alone = compare(close, [1, 1, 1])
    assert alone.verdict == verdict
    others = {n: compare([1.0, 1.1, 0.9], [1, 1, 1]) for n in range(9)}
    assert holm({**others, 9: alone})[9].verdict == "open"


@pytest.mark.parametrize(
    ("errors", "others", "verdict", "wins"),
    [
        ([0.80, 0.81, 0.79, None], [1.0] * 4, "open", 3),
        ([0.80, 0.81, 0.79, math.nan], [1.0] * 4, "open", 3),
        ([1.20, 1.21, 1.19, math.inf], [1.0] * 4, "higher", 0),
        ([0.80, 0.81, 0.79, 0.80], [1.0, 1.0, 1.0, None], "lower", 4),
        ([1.20, 1.21, 1.19, 1.20], [1.0, 1.0, 1.0, None], "open", 1),
        ([1.001, 0.999, 1.0, None], [1.0] * 4, "open", 1),
        ([0.80, 0.81, 0.79, None], [1.0, 1.0, 1.0, None], "open", 3),
        ([0.80, 0.81, None], [1.0] * 3, "open", 2),
        ([None] * 3, [1.0] * 3, "open", 0),
    ],
)
def test_a_diverged_seed_counts_as_infinite_and_favours_nobody(
    errors: list[float | None], others: list[float | None], verdict: str, wins: int
) -> None:
    found = compare(errors, others)
    assert (found.verdict, found.wins) == (verdict, wins)
    lost = sum(e is None or not math.isfinite(e) for e in errors)
    assert (found.seeds, found.diverged) == (len(errors), lost)


def test_bootstrap_over_seeds_and_trajectories_has_the_spread_of_both() -> None:
    """Against the spread of the ratio over whole experiments: other seeds, and other trajectories that they share."""
    rng = np.random.default_rng(2)

    def experiment() -> tuple[np.ndarray, np.ndarray]:
        of_seed, of_trajectory = rng.normal(0, 0.05, (12, 1)), rng.normal(0, 0.3, (1, 20))
        return np.exp(of_seed + of_trajectory), np.ones((12, 20))

    truth = [np.log(a.mean(1) / b.mean(1)).mean() for a, b in (experiment() for _ in range(2000))]
    widths = []
    for _ in range(20):
        interval = nested_bootstrap(*([side] for side in experiment()))
        assert interval is not None
        widths.append(math.log(interval.high / interval.low))
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.std(truth), rel=0.15)
    t_interval = [compare(a.mean(1).tolist(), b.mean(1).tolist()) for a, b in (experiment() for _ in range(20))]
    assert np.mean(widths) > 2 * np.mean([math.log(c.high / c.low) for c in t_interval])


def test_trajectories_that_both_models_share_cancel() -> None:
    shared = np.exp(np.random.default_rng(3).normal(0, 1, (1, 9))) * np.ones((4, 1))
    interval = nested_bootstrap([0.8 * shared], [shared])
    assert interval == pytest.approx((0.8, 0.8))
    assert nested_bootstrap([shared[:1]], [shared[:1]]) is None
    assert nested_bootstrap([np.where(shared > 1, np.inf, 1.0)], [shared]) is None


def test_groups_are_weighed_alike_or_by_their_errors() -> None:
    """A tenth of the error in one group, all of it in the other: sqrt(.1), or nearly 1 where the other is larger."""
    small, large = np.full((3, 5), 0.01), np.full((3, 5), 1.0)
    apart = nested_bootstrap([0.1 * small, large], [small, large])
    joint = nested_bootstrap([0.1 * small, large], [small, large], joint=True)
    assert apart == pytest.approx((math.sqrt(0.1),) * 2)
    assert joint == pytest.approx(((1 + 0.001) / (1 + 0.01),) * 2)


@pytest.mark.parametrize(("trajectories", "seeds", "least"), [(8, 1, 0.92), (16, 1, 0.92), (8, 3, 0.92)])
def test_intervals_of_means_hold_what_they_promise(trajectories: int, seeds: int, least: float) -> None:
    """300 data sets at once; every trajectory has a level of its own that all seeds share, which a t interval over
    seeds would miss."""
    draw = np.random.default_rng(0)
    levels = draw.standard_normal((1, trajectories, 300))
    values = levels + 0.3 * draw.standard_normal((seeds, trajectories, 300))
    low, high = mean_intervals(values, draws=1000)
    covered = ((low <= 0) & (high >= 0)).mean()
    assert least <= covered <= (0.99 if seeds == 1 else 1)
    np.testing.assert_array_less(low, values.mean((0, 1)))


def test_undefined_values_are_left_out_of_an_interval_and_diverged_ones_end_it() -> None:
    values = np.array([[[1.0, 1.0, np.nan, 5.0], [2.0, np.inf, np.nan, np.nan], [3.0, 2.0, 4.0, 5.0]]])
    low, high = mean_intervals(values)
    assert 1 <= low[0] < 2 < high[0] <= 3
    assert high[1] == np.inf and np.isnan(low[2]) and low[3] == high[3] == 5
    assert np.isnan(mean_intervals(values[:, :1])).all(), "one trajectory has no interval"


def test_a_small_test_set_is_named() -> None:
    assert what_trajectories_can_show({"a": 8, "b": 9}) == []
    few, lone = what_trajectories_can_show({"a": 2, "b": 1, "c": 8})
    assert "a 2, b 1" in few and "c" not in few.split("(")[1].split(")")[0] and "b" in lone


def test_bootstrap_by_seed_pairs_seeds_and_needs_every_group() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.lognormal(size=(2, 3, 2, 8))
    by_seed = [{seed: [list(group) for group in side[seed]] for seed in range(3)} for side in (ours, theirs)]
    expected = nested_bootstrap(*([side[:, group] for group in range(2)] for side in (ours, theirs)))
    assert expected is not None and bootstrap_by_seed(*by_seed) == expected
    assert bootstrap_by_seed({**by_seed[0], 7: [[1.0] * 8] * 2}, dict(reversed(by_seed[1].items()))) == expected
    squares = [
        {seed: [[x * x for x in group] for group in groups] for seed, groups in side.items()} for side in by_seed
    ]
    straight = nested_bootstrap(*([np.square(side[:, group]) for group in range(2)] for side in (ours, theirs)))
    assert straight is not None
    assert bootstrap_by_seed(squares[0], squares[1], squared=True) == pytest.approx([end**0.5 for end in straight])
    assert bootstrap_by_seed({0: by_seed[0][0]}, {1: by_seed[1][1]}) is None
    assert bootstrap_by_seed({**by_seed[0], 2: [by_seed[0][2][0], None]}, by_seed[1]) is None
