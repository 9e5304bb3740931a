"""Balance terms see the global batch: values, gradients, micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helper import run_ranks
from torch import Tensor

from shodh.config import ExpertsConfig
from shodh.models.init import initialise
from shodh.moe.balance import BalanceTerms, GlobalBalance
from shodh.moe.router import SemanticRouter

pytestmark = pytest.mark.distributed

DIM, TOKENS, SAMPLES = 12, 5, 8
SETTINGS: dict[str, dict[str, Any]] = {
    "token": {"top_k": 1, "router": {"kind": "token"}},
    "context-top2": {"top_k": 2, "router": {"kind": "context"}},
    "two_level": {"top_k": 1, "router": {"kind": "two_level", "groups": 3}},
    "two_level-top2": {"top_k": 2, "router": {"kind": "two_level", "groups": 2}},
}


def make_routers(name: str) -> list[SemanticRouter]:
    config = ExpertsConfig(num_experts=6, **SETTINGS[name])
    routers = [SemanticRouter(config, DIM) for _ in range(2)]
    for seed, router in enumerate(routers):
        initialise(torch.nn.ModuleDict({"router": router}), seed)
    return routers


def samples() -> Tensor:
    """A batch whose second half is another physics than the first, so that ranks see different things."""
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(SAMPLES, TOKENS, DIM, generator=draw)
    x[SAMPLES // 2 :] += 2 * torch.randn(DIM, generator=draw)
    return x


def evaluate(routers: list[SemanticRouter], x: Tensor, balance: GlobalBalance) -> BalanceTerms:
    routings = []
    for router in routers:
        router.batch_shape = (x.shape[0], x.shape[1])
        router(x.reshape(-1, DIM))
        routings.append(router.take())
    return balance(routings)


def gradients(routers: list[SemanticRouter], loss: Tensor) -> list[Tensor]:
    parameters = [p for router in routers for p in router.parameters()]
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def averaged(value: Tensor) -> Tensor:
    import torch.distributed as dist

    value = value.detach().clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def balance_on_ranks() -> dict[str, list[tuple[Tensor, list[Tensor]]]]:
    """For every setting and term: the mean over ranks of the value and of the gradients."""
    import torch.distributed as dist

    from shodh.train.runtime import start_distributed

    start_distributed()
    mine = samples().chunk(dist.get_world_size())[dist.get_rank()]
    found = {}
    for name in SETTINGS:
        routers = make_routers(name)
        terms = evaluate(routers, mine, GlobalBalance())
        switch = [torch.zeros(()) for _ in range(dist.get_world_size())]
        dist.all_gather(switch, terms.switch.detach())
        assert all(torch.equal(value, switch[0]) for value in switch), "every rank must see the same Switch term"
        found[name] = [(averaged(t), [averaged(g) for g in gradients(routers, t)]) for t in terms]
    return found


@pytest.fixture(scope="module")
def on_two_ranks() -> list[Any]:
    return run_ranks(2, balance_on_ranks)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("term", BalanceTerms._fields)
def test_mean_over_ranks_is_the_single_rank_value_and_gradient(on_two_ranks: Any, name: str, term: str) -> None:
    routers = make_routers(name)
    terms = evaluate(routers, samples(), GlobalBalance())
    index = BalanceTerms._fields.index(term)
    expected = gradients(routers, terms[index])
    assert max(float(g.abs().max()) for g in expected) > 1e-6
    for rank in on_two_ranks:
        value, gradient = rank[name][index]
        torch.testing.assert_close(value, terms[index].detach(), rtol=1e-5, atol=1e-7)
        for ours, theirs in zip(gradient, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
