"""Ranks, experts and batch: what is accepted fits, what is refused says what would."""

from __future__ import annotations

import itertools
import re

import pytest

from shodh.core.errors import TopologyError
from shodh.core.topology import plan_topology, refit_topology


def test_every_accepted_layout_covers_the_batch_and_the_experts() -> None:
    accepted = 0
    for world, ep, experts, batch, micro in itertools.product(
        range(1, 9), range(1, 9), (0, 1, 4, 6, 8), (4, 8, 24), (None, 1, 2, 3)
    ):
        per_rank = batch / world
        fits = world % ep == 0 and (experts % ep == 0 if experts else ep == 1) and per_rank.is_integer()
        fits = fits and (micro is None or per_rank % micro == 0)
        if not fits:
            with pytest.raises(TopologyError):
                plan_topology(world, ep, experts, batch, micro)
            continue
        plan = plan_topology(world, ep, experts, batch, micro)
        accepted += 1
        assert plan.global_batch == batch == world * plan.micro_batch * plan.accumulation
        assert plan.expert_replicas * ep == world
        assert plan.micro_batch == (micro or batch // world)
    assert accepted > 100


def test_too_few_ranks_names_the_launcher_option() -> None:
    with pytest.raises(TopologyError, match=r"ep_size=4.* 4 ranks.* 2.*--num_gpus 4"):
        plan_topology(2, 4, 8, 16)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((6, 4, 8, 12), "ep_size"),
        ((4, 4, 6, 8), "ep_size"),
        ((2, 1, 4, 12, 4), "micro_batch"),
    ],
)
def test_suggested_values_are_accepted(arguments: tuple[int, ...], named: str) -> None:
    with pytest.raises(TopologyError) as caught:
        plan_topology(*arguments)
    suggested = re.search(named + r" in \[([\d, ]+)\]", str(caught.value))
    assert suggested is not None
    position = {"ep_size": 1, "micro_batch": 4}[named]
    for value in map(int, suggested[1].split(",")):
        plan_topology(*arguments[:position], value, *arguments[position + 1 :])


def test_degree_suggested_for_too_few_ranks_is_accepted() -> None:
    with pytest.raises(TopologyError) as caught:
        plan_topology(6, 8, 8, 12)
    suggested = re.search(r"--set parallel.ep_size=(\d+)", str(caught.value))
    assert suggested is not None and plan_topology(6, int(suggested[1]), 8, 12).ep_size == 2


def test_a_run_that_goes_on_keeps_its_batch_at_any_ranks_that_divide_it() -> None:
    accepted = 0
    for world, ep, experts, batch, micro, most in itertools.product(
        range(1, 13), (1, 2, 4, 8), (0, 4, 8, 24), (8, 24), (None, 2, 3), (None, 4)
    ):
        if batch % world:
            with pytest.raises(TopologyError) as caught:
                refit_topology(world, ep, experts, batch, micro, most)
            near = [int(n) for n in re.findall(r"\d+", re.search(r"start ([\d or]+) ranks", str(caught.value))[1])]  # type: ignore[index]
            assert near and all(batch % n == 0 for n in near)
            assert not any(batch % n == 0 for n in range(min([*near, world]) + 1, max([*near, world])) if n not in near)
            continue
        plan = refit_topology(world, ep, experts, batch, micro, most)
        assert plan.global_batch == batch and (experts == 0 or experts % plan.ep_size == 0)
        assert plan.micro_batch <= (micro or most or batch)
        if experts and world % ep == 0 and experts % ep == 0:
            assert plan.ep_size == ep, "what fits is kept"
        if micro is not None and (batch // world) % micro == 0:
            assert plan.micro_batch == micro
        accepted += 1
    assert accepted > 100


@pytest.mark.parametrize(
    ("world", "ep", "experts", "expected"), [(12, 8, 24, 6), (6, 4, 8, 2), (1, 8, 8, 1), (4, 3, 8, 4)]
)
def test_the_nearest_expert_degree_is_taken(world: int, ep: int, experts: int, expected: int) -> None:
    assert refit_topology(world, ep, experts, 24, None).ep_size == expected
