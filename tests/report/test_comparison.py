"""Paired tests over seeds, against the definitions and SciPy."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from shodh.report.comparison import compare, holm, sign_flip, what_seeds_can_show


def test_ratio_interval_and_p_are_those_of_a_paired_t_test_on_logs() -> None:
    rng = np.random.default_rng(0)
    errors, others = rng.uniform(0.5, 1.0, 7), rng.uniform(0.6, 1.1, 7)
    found = compare(errors.tolist(), others.tolist())
    expected = stats.ttest_rel(np.log(errors), np.log(others))
    interval = expected.confidence_interval(0.95)
    assert found.p_t == pytest.approx(expected.pvalue)
    assert (math.log(found.low), math.log(found.high)) == pytest.approx((interval.low, interval.high))
    assert found.ratio == pytest.approx(stats.gmean(errors) / stats.gmean(others))
    assert found.wins == int((errors < others).sum())


def test_sign_flip_agrees_with_scipys_exact_permutation_test() -> None:
    differences = np.array([0.3, -0.1, 0.25, 0.4, 0.05])
    expected = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert sign_flip(differences.tolist()) == pytest.approx(expected.pvalue)


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
    assert (found.ratio, found.p_t, found.p_sign, found.verdict) == (1.0, 1.0, 1.0, "equal")


def test_holm_is_that_of_the_textbook() -> None:
    """p of 0.01, 0.02, 0.03, 0.04 in a family of four: 0.04, 0.06, 0.06, 0.06; one seed is no member."""
    known = compare([0.8, 0.81, 0.79], [1, 1, 1])
    family = [replace(known, p_t=p) for p in (0.03, 0.01, 0.04, 0.02)]
    alone = compare([0.8], [1.0])
    assert [c.p_holm for c in holm([*family, alone])] == pytest.approx([0.06, 0.04, 0.06, 0.06, 1.0])


def test_one_of_many_comparisons_needs_more_than_one_alone() -> None:
    close = compare([0.90, 0.93, 0.87], [1, 1, 1])
    assert close.verdict == "lower"
    assert holm([close, *[compare([1.0, 1.1, 0.9], [1, 1, 1])] * 9])[0].verdict == "open"
