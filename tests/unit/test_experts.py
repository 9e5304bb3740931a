"""Experts in plain torch: against a dense evaluation of all experts, and their initial weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from shodh.config import ExpertsConfig
from shodh.models.init import initialise
from shodh.moe.experts import ExpertLayerReference, ExpertStack, FeedForward, reset_experts

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
    reset_experts(whole, 0, 7, "layer")
    for first in (0, 2):
        part = ExpertStack(2, DIM, HIDDEN, "swiglu")
        reset_experts(part, first, 7, "layer")
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
        reset_experts(stack, 0, *key)
        states.append(stack.w1.clone())
    assert not any(torch.equal(states[i], states[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_bilinear_feed_forward_is_a_quadratic_form() -> None:
    layer = FeedForward(DIM, HIDDEN, "bilinear")
    x = torch.randn(5, DIM)
    torch.testing.assert_close(layer(-3 * x), 9 * layer(x))
