"""Experts in plain torch: against a dense evaluation of all experts, and their initial weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from shodh.config import ExpertsConfig
from shodh.models.init import initialise
from shodh.moe.experts import (
    ExpertLayerReference,
    ExpertStack,
    FeedForward,
    build_dense,
)
from shodh.moe.routing import Routing

DIM, HIDDEN = 6, 8


def make(**settings: Any) -> ExpertLayerReference:
    config = ExpertsConfig(**{"num_experts": 4, "hidden": HIDDEN, "router": {"kind": "token"}, **settings})
    layer = ExpertLayerReference(config, DIM)
    initialise(torch.nn.ModuleDict({"layer": layer}), 1)
    return layer


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("activation", ["swiglu", "bilinear"])
@pytest.mark.parametrize("num_shared", [0, 2])
def test_output_is_the_weighted_sum_over_all_experts(top_k: int, activation: str, num_shared: int) -> None:
    layer = make(top_k=top_k, activation=activation, num_shared=num_shared)
    x = torch.randn(5, 3, DIM, generator=torch.Generator().manual_seed(0)).transpose(0, 1)
    out, routing = layer(x)
    gate = torch.einsum("bsd,ehd->besh", x, layer.experts.w1)
    up = torch.einsum("bsd,ehd->besh", x, layer.experts.w3)
    hidden = (F.silu(gate) if activation == "swiglu" else gate) * up
    every = torch.einsum("besh,edh->bsed", hidden, layer.experts.w2)
    weights = torch.zeros(15, 4).scatter(1, routing.selected, routing.probs.gather(1, routing.selected))
    expected = (every * weights.view(3, 5, 4, 1)).sum(2)
    if num_shared:
        shared = layer.shared_experts
        act = F.silu(shared.w1(x)) if activation == "swiglu" else shared.w1(x)
        assert shared.w1.weight.shape == (num_shared * HIDDEN, DIM)
        expected = expected + shared.w2(act * shared.w3(x))
    torch.testing.assert_close(out, expected)


def test_gradients_reach_the_used_experts_alone() -> None:
    layer = make()
    layer.router.selection_bias.copy_(torch.tensor([0.0, 5.0, 0.0, -5.0]))
    out, routing = layer(torch.randn(2, 4, DIM))
    assert (routing.selected == 1).all()
    out.sum().backward()
    for parameter in layer.experts.parameters():
        used = parameter.grad.flatten(1).abs().amax(1) > 0
        assert used.tolist() == [False, True, False, False]


def test_gradient_is_that_of_finite_differences() -> None:
    layer = make(top_k=2).double()
    x = torch.randn(1, 3, DIM, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    # The router rounds to float32, so the differences must not be too small.
    assert torch.autograd.gradcheck(lambda v: layer(v)[0], (x,), eps=1e-3, atol=2e-3)


def test_experts_start_different_and_independent_of_how_they_are_dealt_out() -> None:
    whole = ExpertStack(4, DIM, HIDDEN, "swiglu")
    whole.seeded_reset(7, "layer")
    for first in (0, 2):
        part = ExpertStack(2, DIM, HIDDEN, "swiglu", first)
        part.seeded_reset(7, "layer")
        for name, parameter in part.named_parameters():
            assert torch.equal(parameter, whole.get_parameter(name)[first : first + 2])
    for _, parameter in whole.named_parameters():
        std = parameter.std() * parameter.shape[2] ** 0.5
        assert 0.8 < std < 1.2, "LeCun normal"
        assert len({expert.flatten()[0].item() for expert in parameter}) == 4


def test_layers_and_seeds_draw_other_experts() -> None:
    states = []
    for key in ((7, "a"), (7, "b"), (8, "a")):
        stack = ExpertStack(2, DIM, HIDDEN, "swiglu")
        stack.seeded_reset(*key)
        states.append(stack.w1.clone())
    assert not any(torch.equal(states[i], states[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_bilinear_feed_forward_is_a_quadratic_form() -> None:
    layer = FeedForward(DIM, HIDDEN, "bilinear")
    x = torch.randn(5, DIM)
    torch.testing.assert_close(layer(-3 * x), 9 * layer(x))


def routed_sum(layer: ExpertLayerReference, every: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Weighted sum over a dense evaluation of all experts, ``every [B, S, E, O]``."""
    weights = torch.zeros(routing.probs.shape).scatter(1, routing.selected, routing.weights)
    return (every * weights.view(*every.shape[:3], 1)).sum(2)


@pytest.mark.parametrize("combine", ["sum", "mean"])
@pytest.mark.parametrize("width", [16, 32])
def test_linear_experts_are_one_affine_map_and_gelu(width: int, combine: str) -> None:
    router = {"score": "softmax", "normalise": "after"}
    layer = make(form="linear", hidden=width, top_k=2, num_shared=2, shared_combine=combine, router=router)
    with torch.no_grad():
        layer.experts.w2.normal_(generator=torch.Generator().manual_seed(2))
    x = torch.randn(3, 5, DIM, generator=torch.Generator().manual_seed(0))
    out, routing = layer(x)
    weight, bias = torch.cat((layer.experts.w1, layer.experts.w3), 1), layer.experts.w2[..., 0]
    every = F.gelu(torch.einsum("bsd,eod->bseo", x, weight) + bias)
    shared = F.gelu(layer.shared_experts.w1(x)).view(3, 5, 2, width)
    expected = routed_sum(layer, every, routing) + (shared.mean(2) if combine == "mean" else shared.sum(2))
    assert out.shape == (3, 5, width)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("combine", ["sum", "mean"])
def test_experts_without_a_gate_are_two_layers_with_gelu_between(combine: str) -> None:
    layer = make(activation="gelu", hidden=16, top_k=2, num_shared=2, shared_combine=combine)
    x = torch.randn(3, 5, DIM, generator=torch.Generator().manual_seed(0))
    out, routing = layer(x)
    first = torch.cat((layer.experts.w1, layer.experts.w3), 1)
    every = torch.einsum("bseh,edh->bsed", F.gelu(torch.einsum("bsd,ehd->bseh", x, first)), layer.experts.w2)
    shared = layer.shared_experts
    both = shared.w2(F.gelu(torch.cat((shared.w1(x), shared.w3(x)), -1)))
    torch.testing.assert_close(out, routed_sum(layer, every, routing) + both / (2 if combine == "mean" else 1))


def test_halves_cost_no_parameters() -> None:
    linear, ungated = make(form="linear", hidden=16, num_shared=0), make(activation="gelu", hidden=16, num_shared=0)
    assert sum(p.numel() for p in linear.experts.parameters()) == 4 * (DIM * 16 + 16)
    assert sum(p.numel() for p in ungated.experts.parameters()) == 4 * (DIM * 16 + 16 * DIM)


def test_linear_experts_start_different_with_zero_biases() -> None:
    whole = ExpertStack(4, DIM, 32, "linear")
    whole.seeded_reset(7, "layer")
    part = ExpertStack(2, DIM, 32, "linear", 2)
    part.seeded_reset(7, "layer")
    assert (whole.w2 == 0).all()
    for name in ("w1", "w3"):
        drawn = whole.get_parameter(name)
        assert torch.equal(part.get_parameter(name), drawn[2:])
        assert 0.8 < drawn.std() * DIM**0.5 < 1.2
        assert len({expert.flatten()[0].item() for expert in drawn}) == 4


def test_dense_baseline_of_linear_experts_has_their_active_size() -> None:
    config = ExpertsConfig(form="linear", hidden=32, num_experts=8, top_k=3, num_shared=2)
    dense = build_dense(config, DIM, 5)
    layer = ExpertLayerReference(config, DIM)
    active = sum(p.numel() for p in layer.shared_experts.parameters())
    active += sum(p.numel() for p in layer.experts.parameters()) * 3 // 8
    assert sum(p.numel() for p in dense.parameters()) == active
    assert dense(torch.randn(2, 4, DIM)).shape == (2, 4, 32)
