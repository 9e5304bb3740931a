"""Batches depend on seed and step alone, have fixed shares, and use a pool up before they repeat."""

from __future__ import annotations

from collections import Counter

import pytest

from shodh.data import MixtureSampler, batch_counts
from shodh.data.mixture import temperature_shares
from shodh.core.errors import ConfigError, DataError, TopologyError

SIZES, SHARES = [37, 11, 101], [2.0, 1.0, 5.0]


def sampler(global_batch: int = 16, seed: int = 3) -> MixtureSampler:
    return MixtureSampler(seed, SIZES, SHARES, global_batch)


def test_every_batch_has_the_same_shares():
    for step in range(30):
        assert Counter(regime for regime, _ in sampler().batch(step)) == {0: 4, 1: 2, 2: 10}


def test_a_pool_is_used_up_before_anything_repeats():
    drawn: dict[int, list[int]] = {0: [], 1: [], 2: []}
    mixture = sampler()
    for step in range(60):
        for regime, index in mixture.batch(step):
            drawn[regime].append(index)
    for regime, size in enumerate(SIZES):
        epochs = [drawn[regime][start : start + size] for start in range(0, len(drawn[regime]) - size + 1, size)]
        assert len(epochs) >= 2
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)  # every epoch in another order


def test_a_batch_may_be_larger_than_a_pool():
    batch = MixtureSampler(0, [3, 50], [1, 1], 16).batch(4)
    assert Counter(i for r, i in batch if r == 0).most_common()[-1][1] >= 2
    assert {i for r, i in batch if r == 0} == {0, 1, 2}


def test_batches_do_not_depend_on_the_order_in_which_they_are_asked_for():
    forward, fresh = sampler(), sampler()
    batches = [forward.batch(step) for step in range(40)]
    assert [fresh.batch(step) for step in reversed(range(40))] == batches[::-1]
    assert sampler().batch(1_000_003) == fresh.batch(1_000_003)


def test_seeds_and_regimes_have_their_own_orders():
    assert sampler(seed=1).batch(0) != sampler(seed=2).batch(0)
    batch = MixtureSampler(0, [1000, 1000], [1, 1], 20).batch(0)
    assert [i for r, i in batch if r == 0] != [i for r, i in batch if r == 1]


def test_order_is_the_same_for_ever():
    """A checkpoint stores no permutation: this one must come out on any version of any library."""
    assert MixtureSampler(0, [10, 5], [2, 1], 6).batch(1) == [(0, 7), (1, 2), (0, 5), (0, 1), (1, 1), (0, 2)]


@pytest.mark.parametrize(("world", "num_micro"), [(1, 1), (2, 1), (1, 2), (4, 2), (8, 2), (2, 8)])
def test_parts_make_up_the_batch_whatever_their_number(world, num_micro):
    mixture = sampler(global_batch=16)
    for step in (0, 7):
        parts = [
            mixture.local_batch(step, rank, world, micro, num_micro)
            for micro in range(num_micro)
            for rank in range(world)
        ]
        assert [sample for part in parts for sample in part] == mixture.batch(step)
        assert len({len(part) for part in parts}) == 1


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_parts_have_the_global_shares(parts):
    mixture = MixtureSampler(0, [100, 100, 100], [2, 1, 1], 32)  # counts 16, 8, 8: divisible by all numbers of parts
    for rank in range(parts):
        counts = Counter(regime for regime, _ in mixture.local_batch(5, rank, parts))
        assert counts == {0: 16 // parts, 1: 8 // parts, 2: 8 // parts}


@pytest.mark.parametrize(
    ("world", "shares", "global_batch"), [(3, [4, 2, 1], 105), (5, [4, 2, 1], 105), (2, [5, 1, 1, 1], 8)]
)
def test_parts_come_as_near_to_the_shares_as_whole_samples_allow(world, shares, global_batch):
    mixture = MixtureSampler(0, [100] * len(shares), shares, global_batch)
    for rank in range(world):
        counts = Counter(regime for regime, _ in mixture.local_batch(2, rank, world))
        for regime, count in enumerate(mixture.counts):
            assert abs(counts[regime] - count / world) <= 1


def test_indivisible_batch_is_refused_with_a_number_that_works():
    with pytest.raises(TopologyError, match="use a multiple of 6"):
        sampler(16).local_batch(0, 0, 3, 0, 2)


def test_shares_are_rounded_by_the_largest_remainder():
    assert batch_counts([1, 1], 7) == (4, 3)
    assert batch_counts([0.5, 0.3, 0.2], 10) == (5, 3, 2)
    assert batch_counts([0.31, 0.33, 0.36], 8) == (2, 3, 3)
    assert batch_counts([47, 16, 15.8, 12, 9.2], 10) == (5, 2, 1, 1, 1)


@pytest.mark.parametrize("shares", [[5.0, 1.0, 2.0], [0.9, 0.05, 0.05], [1, 1, 1 / 3]])
def test_a_batch_without_a_regime_is_refused_and_the_proposed_size_works(shares):
    with pytest.raises(ConfigError, match="without samples; use a global batch of at least") as error:
        batch_counts(shares, 2)
    assert min(batch_counts(shares, int(str(error.value).split()[-1]))) >= 1


def test_senseless_mixtures_are_refused():
    for shares in ([1.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")], [1.0]):
        with pytest.raises(ConfigError):
            MixtureSampler(0, [5, 5], shares, 8)
    with pytest.raises(ConfigError, match="seed"):
        MixtureSampler(-1, [5], [1], 8)
    with pytest.raises(DataError, match="regime 1"):
        MixtureSampler(0, [5, 0], [1, 1], 8)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_eight_regimes_keep_their_composition_on_every_number_of_ranks(world):
    sizes = [10 * (n + 1) for n in range(8)]
    mixture = MixtureSampler(0, sizes, temperature_shares(sizes, [1.0] * 8, 2.0), 64)
    for step in (0, 7, 1000):
        parts = [mixture.local_batch(step, rank, world) for rank in range(world)]
        assert [sample for part in parts for sample in part] == mixture.batch(step)
        counts = [Counter(regime for regime, _ in part) for part in parts]
        assert sum(counts, Counter()) == dict(enumerate(mixture.counts))
        # evenly interleaved: no rank's count of a regime is off its share by more than one
        assert all(abs(c[r] - mixture.counts[r] / world) <= 1 for c in counts for r in range(8))


def test_temperature_goes_from_proportional_to_equal():
    sizes = [100, 400, 1600]
    assert temperature_shares(sizes, [1, 1, 1], 1.0) == pytest.approx([1 / 16, 1 / 4, 1])
    assert temperature_shares(sizes, [1, 1, 1], 2.0) == pytest.approx([1 / 4, 1 / 2, 1])
    assert temperature_shares(sizes, [1, 1, 1], 1e9) == pytest.approx([1, 1, 1])
    assert temperature_shares(sizes, [3, 2, 1], None) == [3, 2, 1]
    assert temperature_shares(sizes, [3, 2, 1], 2.0) == pytest.approx([3 / 4, 1, 1])
    with pytest.raises(ConfigError, match="temperature"):
        temperature_shares(sizes, [1, 1, 1], -1.0)
