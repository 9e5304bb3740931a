"""Statistics of routing against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from shodh.routing.resampling import Units, estimate_information, share_intervals
from shodh.routing.statistics import (
    bifurcation_step,
    changed,
    co_activation,
    equal_neighbours,
    information,
    joint_counts,
    load,
    miller_madow,
    mutual_information,
    purity,
    spatial_coherence,
)


def test_load_by_hand() -> None:
    """Counts 1, 2, 5, 0: mean 2, variance 14/4, Gini from the ranked shares 0, 1, 2, 5 of 8."""
    found = load(np.array([1, 2, 5, 0]))
    assert found.max_violation == pytest.approx(5 / 2 - 1)
    assert found.cv == pytest.approx(math.sqrt(14 / 4) / 2)
    assert found.gini == pytest.approx((-3 * 0 - 1 * 1 + 1 * 2 + 3 * 5) / 8 / 4)
    nats = -(1 / 8 * math.log(1 / 8) + 1 / 4 * math.log(1 / 4) + 5 / 8 * math.log(5 / 8))
    assert found.entropy == pytest.approx(nats / math.log(4))
    assert found.effective == pytest.approx(math.exp(nats))
    assert found.dead == 1


@pytest.mark.parametrize("experts", [2, 8])
def test_load_at_its_ends(experts: int) -> None:
    even, one = load(np.full(experts, 7)), load(np.eye(experts)[1] * 7)
    assert (even.max_violation, even.cv, even.gini, even.dead) == pytest.approx((0, 0, 0, 0))
    assert (even.entropy, even.effective) == pytest.approx((1, experts))
    assert (one.max_violation, one.gini, one.entropy) == pytest.approx((experts - 1, 1 - 1 / experts, 0))
    assert (one.effective, one.dead) == (1, experts - 1)


def test_load_keeps_leading_axes_and_knows_no_counts() -> None:
    found = load(np.array([[[3, 1], [0, 0]]]))
    assert found.gini.shape == (1, 2)
    assert found.dead[0, 0] == 0 and all(np.isnan(v[0, 1]) for v in found)


def test_dead_means_less_than_a_hundredth_of_the_even_share() -> None:
    assert load(np.array([997, 3, 1000, 0])).dead == 2  # even: 500, a hundredth of it: 5 > 3
    assert load(np.array([990, 10, 1000, 0])).dead == 1


def test_perfect_split() -> None:
    assert information(np.array([[8, 0], [0, 8]])) == pytest.approx((1, 1))
    assert information(np.array([[0, 30], [10, 0]])) == pytest.approx((1, 1))


def test_two_experts_a_regime() -> None:
    """The expert names the regime, but the regime leaves one bit about the expert open: NMI = 1 / sqrt(2)."""
    table = np.array([[8, 8, 0, 0], [0, 0, 8, 8]])
    assert information(table) == pytest.approx((1, math.sqrt(0.5)))
    assert information(table, 0.05) == pytest.approx((1, math.sqrt(0.5)))  # chance takes nothing from a perfect split


def test_independent_and_collapsed_tables_tell_nothing() -> None:
    assert information(np.array([[3, 6], [4, 8]])) == pytest.approx((0, 0), abs=1e-12)
    assert information(np.array([[3, 0], [4, 0]])) == (0, 0)


def test_one_regime_has_no_information() -> None:
    assert all(np.isnan(v) for v in information(np.array([[3, 4], [0, 0]])))
    assert all(np.isnan(v) for v in information(np.array([[0, 0], [0, 0]])))


def test_information_by_hand() -> None:
    """Joint 3/8 1/8 1/8 3/8: I = 2 ln 2 - H(3/8, 1/8, 1/8, 3/8)."""
    nats = 2 * math.log(2) + 2 * (3 / 8 * math.log(3 / 8) + 1 / 8 * math.log(1 / 8))
    table = np.array([[3, 1], [1, 3]])
    assert mutual_information(table) == pytest.approx(nats)
    assert information(table).u == pytest.approx(nats / math.log(2))
    assert information(table, 0.01).u == pytest.approx((nats - 0.01) / (math.log(2) - 0.01))
    assert purity(table) == pytest.approx(6 / 8)


def test_miller_madow_is_the_mean_of_chance() -> None:
    """(R - 1)(E - 1) / 2N; empty rows and columns do not count."""
    assert miller_madow(np.full((3, 5), 10)) == pytest.approx(2 * 4 / (2 * 150))
    assert miller_madow(np.array([[10, 0, 10], [0, 0, 0], [10, 0, 10]])) == pytest.approx(1 / 80)
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(400, np.full(12, 1 / 12), size=4000).reshape(-1, 3, 4)
    error = mutual_information(drawn).std() / math.sqrt(4000)
    assert mutual_information(drawn).mean() == pytest.approx(6 / 800, abs=4 * error + 6 / 800 * 0.02)


@pytest.mark.parametrize(("u", "expected"), [
    ([0.1, 0.95, 0.5, 0.92, 0.99], 30),
    ([0.95, 0.95, 0.95, 0.95, 0.95], 0),
    ([0.1, 0.95, 0.95, 0.95, 0.85], None),
    ([0.1, 0.95, float("nan"), 0.95, 0.95], 10),
    ([0.1, 0.1, 0.1, 0.95, float("nan")], 30),
    ([float("nan")] * 5, None),
])  # fmt: skip
def test_bifurcation_is_held_to_the_end(u: list[float], expected: int | None) -> None:
    assert bifurcation_step(np.arange(0, 50, 10), np.array(u)) == expected


def test_transitions_and_switches() -> None:
    first, second = np.array([[0, 0], [1, 2]]), np.array([[1, 1], [0, 1]])
    assert joint_counts(first, second, 3, 2).tolist() == [[0, 2], [1, 0], [0, 1]]
    assert changed(first, second) == 1.0 and changed(first, first) == 0.0


def test_co_activation_is_conditional() -> None:
    pairs = np.array([[10, 5, 0], [5, 20, 0], [0, 0, 0]])
    found = co_activation(pairs)
    assert found[:2].tolist() == [[1, 0.5, 0], [0.25, 1, 0]] and np.isnan(found[2]).all()


def test_equal_neighbours_by_hand() -> None:
    assert equal_neighbours(np.array([[[0, 0], [0, 1]]])) == 0.5
    assert equal_neighbours(np.zeros((2, 3, 3, 3))) == 1.0
    checkerboard = np.indices((1, 4, 4, 4)).sum(0) % 2
    assert equal_neighbours(checkerboard) == 0.0
    assert np.isnan(equal_neighbours(np.zeros((2, 1, 1))))


def test_coherence_against_permuted_places() -> None:
    rng = np.random.default_rng(1)
    halves = np.zeros((4, 6, 6, 6), dtype=int)
    halves[:, :3] = 1
    # 216 tokens, half each: two different places are equal with probability (108 - 1) / 215.
    found = spatial_coherence(halves, rng)
    assert found.null == pytest.approx(107 / 215, abs=0.005) and found.equal == 1 - 36 / 540 and found.z > 20
    noise = spatial_coherence(rng.integers(0, 2, (4, 6, 6, 6)), rng)
    assert abs(noise.z) < 4
    assert spatial_coherence(np.ones((4, 6, 6, 6), dtype=int), rng).z == 0
    # Each sample at its own expert is what it chose, not where: chance.
    own = np.broadcast_to(np.arange(4)[:, None, None, None], (4, 6, 6, 6))
    assert spatial_coherence(own, rng).z == 0


def sample_units(draws: np.ndarray, regimes: int) -> Units:
    """One unit a row of counts; regimes in turn."""
    counts = np.zeros((len(draws), regimes, draws.shape[1]), dtype=int)
    counts[np.arange(len(draws)), np.arange(len(draws)) % regimes] = draws
    return Units(counts, "samples")


def test_correlated_tokens_do_not_pass_for_information() -> None:
    """Every sample sends all its tokens to one random expert: far more information by chance than token counts say."""
    plain, corrected = [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        units = sample_units(64 * np.eye(4, dtype=int)[rng.integers(0, 4, 60)], 2)
        plain.append(float(information(units.table, miller_madow(units.table)).u))
        corrected.append(estimate_information(units, rng, 200).u.value)
    error = np.std(corrected) / math.sqrt(40)
    assert abs(np.mean(corrected)) < 3 * error < np.mean(plain)


def test_few_uneven_samples_of_regimes_that_differ() -> None:
    """Five samples a regime that scatter about its mean: the estimate is near the truth and within its interval."""
    regimes, experts, number = 12, 8, 5
    errors, outside = [], 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        means = rng.dirichlet(np.full(experts, 0.5), regimes)
        truth = float(information(means).u)
        counts = np.zeros((regimes * number, regimes, experts), dtype=int)
        for unit in range(len(counts)):
            counts[unit, unit % regimes] = rng.multinomial(64, rng.dirichlet(10 * means[unit % regimes] + 1e-3))
        u = estimate_information(Units(counts, "samples"), rng, 200).u
        errors.append(u.value - truth)
        outside += not u.low <= truth <= u.high
        assert u.low <= u.value <= u.high
    assert abs(np.mean(errors)) < 0.02
    assert outside <= 10


def test_uniform_random_is_zero_within_the_interval_nearly_always() -> None:
    """By its level an interval misses in a twentieth of the cases; both ends clip at zero, so in no more."""
    missed = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        units = sample_units(rng.multinomial(32, np.full(8, 1 / 8), 48), 3)
        estimate = estimate_information(units, rng, 200)
        missed += estimate.u.low > 0 or estimate.nmi.low > 0
        assert abs(estimate.u.value) < 0.02
    assert missed <= 5  # P(more than 5 of 40 at 1/20) < 0.02


def test_share_intervals_cover_and_shrink_with_samples() -> None:
    truth, covered, widths = np.array([0.5, 0.3, 0.2]), [], {40: 0.0, 640: 0.0}
    for number in widths:
        for seed in range(30):
            rng = np.random.default_rng(seed)
            low, high = share_intervals(sample_units(rng.multinomial(64, truth, number), 2), rng, 200)
            covered.append(((low <= truth) & (truth <= high)).mean())
            widths[number] += (high - low).mean() / 30
    assert 0.88 < np.mean(covered) < 0.99  # 95 % nominally; percentile intervals of 20 samples are a little short
    assert widths[40] / widths[640] == pytest.approx(4, rel=0.1)  # sixteen times the samples


def test_units_are_drawn_not_tokens() -> None:
    """Samples that send all tokens to one expert: the interval is that of few coin flips, whatever the tokens."""
    rng = np.random.default_rng(5)
    one = sample_units(np.eye(2, dtype=int)[np.arange(40) // 2 % 2], 2)
    many = Units(one.counts * 1000, "samples")
    for units in (one, many):
        low, high = share_intervals(units, rng, 2000)
        assert (high - low).mean() == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 20), rel=0.15)
