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
from shodh.moe.routers import Router, make_router
from shodh.moe.routing import RouterInputs

pytestmark = pytest.mark.distributed

DIM, TOKENS, SAMPLES = 12, 5, 8
SETTINGS: dict[str, dict[str, Any]] = {
    "token": {"top_k": 1, "router": {"kind": "token"}},
    "context-top2": {"top_k": 2, "router": {"kind": "context"}},
    "two_level": {"top_k": 1, "router": {"kind": "two_level", "groups": 3}},
    "two_level-top2": {"top_k": 2, "router": {"kind": "two_level", "groups": 2}},
    "noisy_topk-top2": {
        "top_k": 2,
        "router": {"kind": "noisy_topk", "score": "softmax", "normalise": "after", "gate": "conv"},
        "balance": {"load": 0.1, "orthogonality": 0.1},
    },
    "sample-after-top4": {
        "top_k": 4,
        "router": {"score": "softmax", "normalise": "after", "granularity": "sample", "temperature_schedule": {}},
        "balance": {"cv2": 0.1},
    },
}


def make_routers(name: str) -> list[Router]:
    config = ExpertsConfig(num_experts=6, **SETTINGS[name])
    routers = [make_router(config, DIM) for _ in range(2)]
    for seed, router in enumerate(routers):
        initialise(torch.nn.ModuleDict({"router": router}), seed)
    return routers


def samples() -> Tensor:
    """A batch whose second half is another physics than the first, so that ranks see different things."""
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(SAMPLES, TOKENS, DIM, generator=draw)
    x[SAMPLES // 2 :] += 2 * torch.randn(DIM, generator=draw)
    return x


def evaluate(routers: list[Router], x: Tensor, balance: GlobalBalance) -> BalanceTerms:
    routings = []
    for router in routers:
        seeds = (1e6 * x.abs().sum((1, 2))).long() if router.kind == "noisy_topk" else None
        routings.append(router(x, RouterInputs(noise=seeds)))
    return balance(routings)


def gradients(routers: list[Router], loss: Tensor) -> list[Tensor]:
    parameters = [p for router in routers for p in router.parameters()]
    if not loss.requires_grad:  # A term that this router does not have.
        return [torch.zeros_like(p) for p in parameters]
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
        for term in ("switch", "importance", "cv2", "load", "orthogonality"):
            value = getattr(terms, term).detach()
            values = [torch.zeros(()) for _ in range(dist.get_world_size())]
            dist.all_gather(values, value)
            # A local mean is made global by adding the difference, which rounds.
            tolerance = 1e-6 * float(value.abs())
            assert all(abs(float(other - value)) <= tolerance for other in values), f"ranks see another {term} term"
        found[name] = [(averaged(t), [averaged(g) for g in gradients(routers, t)]) for t in terms]
    return found


@pytest.fixture(scope="module")
def on_ranks() -> dict[int, list[Any]]:
    return {world: run_ranks(world, balance_on_ranks) for world in (2, 4)}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("term", BalanceTerms._fields)
def test_mean_over_ranks_is_the_single_rank_value_and_gradient(on_ranks: Any, name: str, term: str) -> None:
    routers = make_routers(name)
    terms = evaluate(routers, samples(), GlobalBalance())
    index = BalanceTerms._fields.index(term)
    expected = gradients(routers, terms[index])
    asked = term not in ("load", "orthogonality") or term in SETTINGS[name].get("balance", {})
    assert (max(float(g.abs().max()) for g in expected) > 1e-6) is asked
    for value, gradient in (rank[name][index] for world in (2, 4) for rank in on_ranks[world]):
        torch.testing.assert_close(value, terms[index].detach(), rtol=1e-5, atol=1e-7)
        for ours, theirs in zip(gradient, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
