"""Numbers drawn by key and place: equal to a slow version, normal, independent, and the same however a batch is cut."""

from __future__ import annotations

import math

import pytest
import torch

from shodh.core.devices import send
from shodh.core.noise import fold, normal, normal_reference
from shodh.core.seeding import stable_seed

CPU = torch.device("cpu")
KEYS = [stable_seed("test", number) for number in range(64)]


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_values_are_those_of_whole_numbers(count: int) -> None:
    seeds = [0, 1, 2**63 - 1, *KEYS[:3]]
    expected = torch.tensor([normal_reference(seed, count) for seed in seeds], dtype=torch.float64).float()
    torch.testing.assert_close(normal(send(seeds, CPU), (count,)), expected, rtol=2**-23, atol=1e-12)


def test_a_batch_may_be_cut_anywhere() -> None:
    seeds = send(KEYS[:5], CPU)
    whole = normal(seeds, (3, 5, 7))
    for rows in (slice(0, 2), slice(2, 5), [4, 0]):
        assert torch.equal(normal(seeds[rows], (3, 5, 7)), whole[rows])
    assert torch.equal(normal(seeds, (50,)), whole.flatten(1)[:, :50]), "a longer draw begins with a shorter one"
    assert normal(seeds, ()).shape == (5,)


def test_the_distribution_is_normal() -> None:
    count = 1 << 14
    values = normal(send(KEYS, CPU), (count,)).double()
    number = values.numel()
    moments = [values.pow(power).mean().item() for power in (1, 2, 3, 4)]
    # Six standard errors of each moment of N(0, 1): variances 1, 2, 15 and 96.
    for moment, expected, variance in zip(moments, (0, 1, 0, 3), (1, 2, 15, 96), strict=True):
        assert abs(moment - expected) < 6 * math.sqrt(variance / number)
    ordered = values.flatten().sort().values
    distance = (torch.special.ndtr(ordered) - (torch.arange(number) + 0.5) / number).abs().max().item()
    assert distance < 2.0 / math.sqrt(number)  # Kolmogorov and Smirnov: a probability of 7e-4.


def test_keys_neighbours_and_layers_are_independent() -> None:
    count = 1 << 14
    neighbours = send(range(16), CPU)  # Seeds that differ by one are no worse than hashed ones.
    streams = torch.cat([normal(s, (count,)) for s in (send(KEYS[:16], CPU), neighbours, fold(neighbours, 0))])
    correlation = streams @ streams.T / count - torch.eye(len(streams))
    bound = 6 / math.sqrt(count)
    assert (correlation - correlation.diag().diag()).abs().max() < bound
    for distance in (1, 2, 3):
        assert (streams[:, distance:] * streams[:, :-distance]).mean(1).abs().max() < bound
        assert (streams[:, distance:].square() * streams[:, :-distance].square()).mean(1).sub(1).abs().max() < 5 * bound


def test_folded_seeds_are_new_ones() -> None:
    seeds = send(KEYS, CPU)
    every = torch.cat([seeds, *(fold(seeds, layer) for layer in range(24))])
    assert len(every.unique()) == len(every)
