"""At the start the size of the residual stream does not depend on the depth, dense or sparse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shodh.config import ExpertsConfig, OperatorConfig
from shodh.models.init import initialise
from shodh.models.operator import LatentTransformer

FEED_FORWARDS: dict[str, dict[str, Any]] = {
    "dense": {"num_experts": 0, "top_k": 2, "num_shared": 2},
    "dense, linear": {"num_experts": 0, "top_k": 2, "num_shared": 2, "form": "linear"},
    "sparse": {"num_experts": 4, "top_k": 1},
    "bilinear": {"num_experts": 4, "top_k": 2, "activation": "bilinear"},
    "ungated": {"num_experts": 4, "top_k": 2, "activation": "gelu"},
    "linear": {"num_experts": 4, "top_k": 4, "form": "linear", "num_shared": 2, "shared_combine": "mean"},
    "no shared": {"num_experts": 4, "top_k": 4, "num_shared": 0},
    "strong": {"num_experts": 4, "top_k": 1, "num_shared": 4, "router": {"score": "softmax"}},
}


def variances(depth: int, mixer: str, experts: dict[str, Any]) -> list[float]:
    """Of the stream before the first block and behind the last."""
    config = OperatorConfig(
        dim=32, heads=4, depth=depth, mixer=mixer, experts=ExpertsConfig(**{"hidden": 32, **experts})
    )
    model = LatentTransformer(config, 4, 1, (4, 4, 4), 2)
    initialise(model, 0)
    seen: list[torch.Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model.norm.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model(torch.randn(4, 2, 4, 4, 4, 4, generator=draw), torch.randn(4, 1, 4, 4, 4, generator=draw))
    return [float(x.var()) for x in seen]


@pytest.mark.parametrize("mixer", ["attention", "fourier"])
@pytest.mark.parametrize("name", FEED_FORWARDS)
def test_depth_does_not_change_the_size_of_the_stream(name: str, mixer: str) -> None:
    """A branch has about the variance of its normalised input at most: with n branches of 1/n each, two in all."""
    grown = []
    for depth in (2, 24):
        start, end = variances(depth, mixer, FEED_FORWARDS[name])
        grown.append(end / start)
    assert grown[1] == pytest.approx(grown[0], rel=0.25)
    assert grown[1] < (8.0 if name == "strong" else 3.0)


def test_scaled_branches_are_all_of_them() -> None:
    """Each block: attention, routed and shared experts; the others keep the variance of their inputs."""
    config = OperatorConfig(dim=64, heads=4, depth=8, experts=ExpertsConfig(num_experts=4, hidden=64))
    model = LatentTransformer(config, 4, 1, (2, 2, 2), 2)
    initialise(model, 0)
    for name, parameter in model.blocks[3].named_parameters():
        if parameter.ndim > 1 and ".router." not in name:
            scaled = name.endswith(("attention.out.weight", "experts.w2", "shared_experts.w2.weight"))
            gain = float(parameter.std()) * parameter.shape[-1] ** 0.5
            assert gain == pytest.approx(0.25 if scaled else 1.0, rel=0.1), name
