"""Whatever the configuration accepts, every weight of a router that is trained is moved by the task itself."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from shodh.config import ExpertsConfig
from shodh.models.init import initialise
from shodh.moe.experts import ExpertLayerReference
from shodh.moe.routing import RouterInputs

DIM, SAMPLES, TOKENS = 16, 4, 6
KINDS = ("token", "context", "two_level", "operator", "noisy_topk", "hash", "frozen", "oracle")
#: Experts, top-k, groups.
SIZES = ((1, 1, 1), (2, 1, 1), (2, 1, 2), (2, 2, 1), (4, 1, 2), (4, 2, 2), (4, 4, 1), (4, 1, 4))
ROUTERS = [
    dict(zip(("score", "gate", "normalise", "granularity"), chosen, strict=True))
    for chosen in itertools.product(("cosine", "softmax"), ("linear", "conv"), ("before", "after"), ("token", "sample"))
]


def accepted(kind: str) -> list[ExpertsConfig]:
    """All combinations of a kind that are not refused."""
    found = []
    for router, (experts, top_k, groups) in itertools.product(ROUTERS, SIZES):
        settings: dict[str, Any] = {**router, "kind": kind, "groups": groups, "semantic_dim": 2}
        try:
            found.append(ExpertsConfig(num_experts=experts, top_k=top_k, hidden=16, router=settings))
        except ValidationError:
            continue
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_task_moves_every_trained_weight_of_a_router(kind: str) -> None:
    configs = accepted(kind)
    assert configs
    trained = 0
    for config in configs:
        layer = ExpertLayerReference(config, DIM)
        initialise(torch.nn.ModuleDict({"layer": layer}), 0)
        draw = torch.Generator().manual_seed(1)
        x, weight = (torch.randn(SAMPLES, TOKENS, DIM, generator=draw) for _ in range(2))
        regime = torch.arange(SAMPLES) % config.groups if kind == "oracle" else None
        noise = torch.arange(SAMPLES) if kind == "noisy_topk" else None
        view = torch.randn(SAMPLES, config.groups, generator=draw, requires_grad=True)
        told = RouterInputs(regime, noise, view if kind == "operator" else None)
        (layer(x, told)[0] * weight).sum().backward()
        for name, parameter in layer.router.named_parameters():
            trained += 1
            assert parameter.grad is not None and parameter.grad.any(), f"{name} of {config}"
        assert kind != "operator" or (view.grad is not None and view.grad.any()), f"the gate of the model, of {config}"
    assert bool(trained) == (kind not in ("hash", "frozen"))


@pytest.mark.parametrize(
    ("settings", "gates"),
    [
        ({"num_experts": 1}, set()),
        ({"num_experts": 2, "router": {"kind": "two_level", "groups": 2}}, {"group_gate"}),
        ({"num_experts": 2, "router": {"kind": "two_level", "groups": 1}}, {"expert_gate"}),
        ({"num_experts": 2, "router": {"kind": "oracle", "groups": 2}}, set()),
        ({"num_experts": 4, "router": {"kind": "two_level", "groups": 2}}, {"group_gate", "expert_gate"}),
    ],
)
def test_a_gate_without_alternatives_is_kept_and_not_trained(settings: dict[str, Any], gates: set[str]) -> None:
    router = ExpertLayerReference(ExpertsConfig(**settings), DIM).router
    assert {name.split(".")[0] for name, _ in router.named_parameters()} == gates
    assert "expert_gate.prototypes" in router.state_dict(), "checkpoints of any such run fit"
