"""Random numbers are a function of what they are for."""

from __future__ import annotations

import itertools

import torch

from shodh.core.seeding import generator, stable_seed


def test_seed_of_a_key_never_changes() -> None:
    # Written down: another value would silently change every run that is resumed with a newer version.
    assert stable_seed(0, "noise", 1, 2) == 3420038565190068946


def test_keys_that_differ_anywhere_give_different_seeds() -> None:
    keys = [*itertools.product((0, 1), ("a", "b"), (0, 1)), (0,), ("0",), (0, "a"), ("a", 0), (1, 23), (12, 3)]
    seeds = [stable_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= s < 2**63 for s in seeds)


def test_generators_are_independent_of_what_was_drawn_before() -> None:
    first = torch.randn(5, generator=generator(3, "x"))
    torch.randn(7)
    assert torch.equal(torch.randn(5, generator=generator(3, "x")), first)
    assert not torch.equal(torch.randn(5, generator=generator(3, "y")), first)
