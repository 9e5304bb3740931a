"""Noisy top-k, the controls, normalisation after the top-k, and what routers refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from shodh.config import ExpertsConfig
from shodh.models.init import initialise
from shodh.moe.routers import Router, make_router
from shodh.moe.routing import NO_INPUTS, RouterInputs, Routing

DIM, SAMPLES, TOKENS, EXPERTS = 10, 3, 7, 6
AFTER = {"score": "softmax", "normalise": "after"}
NOISY = {"kind": "noisy_topk", **AFTER}
SEEDS = RouterInputs(noise=torch.tensor([11, 12, 13]))


def make(router: dict[str, Any], top_k: int = 2, seed: int = 0, **settings: Any) -> Router:
    module = make_router(ExpertsConfig(num_experts=EXPERTS, top_k=top_k, router=router, **settings), DIM)
    initialise(torch.nn.ModuleDict({"router": module}), seed)
    return module


def route(router: Router, x: Tensor, inputs: RouterInputs = NO_INPUTS) -> Routing:
    routing: Routing = router(x, inputs)
    return routing


def tokens(seed: int = 1, samples: int = SAMPLES) -> Tensor:
    return torch.randn(samples, TOKENS, DIM, generator=torch.Generator().manual_seed(seed))


def trained(router: Router) -> Router:
    """A noisy router whose gates are no longer zero."""
    with torch.no_grad():
        for number, parameter in enumerate(router.parameters()):
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return router


@pytest.mark.parametrize("kind", ["token", "context", "frozen", "oracle"])
def test_weights_after_the_top_k_are_the_softmax_of_the_chosen_logits(kind: str) -> None:
    told = RouterInputs(regime=torch.tensor([1, 0, 1])) if kind == "oracle" else NO_INPUTS
    routing = route(make({"kind": kind, "groups": 2, **AFTER}, top_k=3), tokens(), told)
    torch.testing.assert_close(routing.weights, routing.logits.gather(1, routing.selected).softmax(-1))
    chosen = routing.probs.gather(1, routing.selected)
    torch.testing.assert_close(routing.weights, chosen / chosen.sum(-1, keepdim=True))
    torch.testing.assert_close(routing.probs.sum(-1), torch.ones(len(chosen)))


def test_temperature_sharpens_the_weights_and_keeps_the_choice() -> None:
    schedule = {"temperature_schedule": {"start": 2.0, "end": 0.5, "decay": 0.25}}
    plain, router = make(AFTER), make({**AFTER, **schedule})
    for temperature in (2.0, 0.5):
        routing, cold = route(plain, tokens()), route(router, tokens())
        assert torch.equal(routing.selected, cold.selected)
        expected = (routing.logits.gather(1, routing.selected) / temperature).softmax(-1)
        torch.testing.assert_close(cold.weights, expected)
        router.finish_step()


def test_noisy_gates_start_at_zero_and_get_gradients() -> None:
    router = make(NOISY)
    assert all((parameter == 0).all() for parameter in router.parameters())
    routing = route(router, tokens(), SEEDS)
    assert routing.counts.max() < len(routing.selected), "noise alone spreads the tokens"
    (routing.weights.square().sum() + routing.load_probs.square().sum()).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in router.parameters())


def test_noise_of_a_sample_depends_on_its_seed_alone() -> None:
    router, x = trained(make(NOISY)), tokens()
    together = route(router, x, SEEDS)
    for b in range(SAMPLES):
        alone = route(router, x[b : b + 1], RouterInputs(noise=SEEDS.noise[b : b + 1]))
        torch.testing.assert_close(alone.logits, together.logits.view(SAMPLES, TOKENS, -1)[b])
    assert not torch.equal(route(router, x, RouterInputs(noise=torch.tensor([1, 2, 3]))).logits, together.logits)
    assert not torch.equal(route(router, x, SEEDS.at_layer(0)).logits, route(router, x, SEEDS.at_layer(1)).logits)


def test_evaluation_has_no_noise() -> None:
    router, x = trained(make(NOISY)).eval(), tokens()
    routing = route(router, x)
    torch.testing.assert_close(routing.logits, router.expert_gate(x.flatten(0, 1))[0])
    assert routing.load_probs is None


def test_smooth_load_is_the_probability_to_be_chosen_when_one_noise_is_drawn_anew() -> None:
    """Shazeer 2017, appendix A: the noise of the other experts stays."""
    router, x = trained(make(NOISY)), tokens(samples=1)
    routing = route(router, x, RouterInputs(noise=torch.tensor([5])))
    clean, std = router.expert_gate(x[0])[0], torch.nn.functional.softplus(router.noise_gate(x[0])[0])
    draws = 20000
    normal = torch.randn(draws, TOKENS, EXPERTS, generator=torch.Generator().manual_seed(0))
    for expert in range(EXPERTS):
        noisy = routing.logits.detach().unsqueeze(0).repeat(draws, 1, 1)
        noisy[:, :, expert] = (clean + normal * std)[:, :, expert].detach()
        chosen = (noisy.topk(2, -1).indices == expert).any(-1).float().mean(0)
        # Five standard errors of a share.
        torch.testing.assert_close(routing.load_probs[:, expert].detach(), chosen, rtol=0, atol=5 * 0.5 / draws**0.5)


@pytest.mark.parametrize("top_k", [1, 4])
def test_hash_goes_by_position_alone_and_uses_every_expert_equally(top_k: int) -> None:
    router, length = make({"kind": "hash"}, top_k), 4 * EXPERTS
    x = torch.randn(2, length, DIM)
    routing = route(router, x)
    assert routing.counts.tolist() == [2 * 4 * top_k] * EXPERTS
    assert all(len(set(row)) == top_k for row in routing.selected.tolist())
    assert torch.equal(routing.selected, route(router, 3 * x.flip(0) + 1).selected)
    assert torch.equal(routing.weights, torch.full((2 * length, top_k), 1 / top_k))
    torch.testing.assert_close(routing.probs.sum(-1), torch.ones(2 * length))
    assert not list(router.parameters())


def test_hash_travels_with_the_weights_through_any_precision() -> None:
    one, other = make({"kind": "hash"}, seed=0), make({"kind": "hash"}, seed=1)
    x = torch.randn(1, 20, DIM)
    before = route(one, x).selected
    assert not torch.equal(route(other, x).selected, before)
    other.load_state_dict(one.to(torch.bfloat16).state_dict())
    assert torch.equal(route(other, x).selected, before)


def test_frozen_router_chooses_by_content_and_has_nothing_to_train() -> None:
    router = make({"kind": "frozen"})
    assert not list(router.parameters())
    x = tokens().requires_grad_()
    routing = route(router, x)
    free = make({"kind": "token"})
    assert torch.equal(routing.selected, route(free, x).selected), "the random router that others start from"
    routing.weights.sum().backward()
    assert x.grad.abs().max() > 0, "features still feel their weights"


@pytest.mark.parametrize("top_k", [1, 2])
def test_oracle_gives_each_regime_experts_of_its_own(top_k: int) -> None:
    router, regime = make({"kind": "oracle", "groups": 3}, top_k), torch.tensor([2, 0, 2])
    routing = route(router, tokens(), RouterInputs(regime=regime))
    assert torch.equal(routing.selected // 2, regime.repeat_interleave(TOKENS)[:, None].expand(-1, top_k))
    assert torch.equal(routing.group_probs.argmax(-1), regime.repeat_interleave(TOKENS))
    torch.testing.assert_close(routing.probs.sum(-1), torch.ones(SAMPLES * TOKENS))
    router.selection_bias[:2] = 9.0
    again = route(router, tokens(), RouterInputs(regime=regime))
    assert torch.equal(again.selected // 2, routing.selected // 2), "no bias moves a regime to another's experts"


@pytest.mark.parametrize(
    ("router", "inputs", "message"),
    [
        ({"kind": "token"}, RouterInputs(regime=torch.zeros(3, dtype=torch.long)), "takes no regime label"),
        ({"kind": "oracle"}, NO_INPUTS, "needs the regime"),
        ({"kind": "oracle"}, RouterInputs(regime=torch.tensor([0, 2, 1])), "do not fit router.groups=2"),
        (NOISY, NO_INPUTS, "needs noise in training: 3 seeds"),
        (NOISY, RouterInputs(noise=torch.tensor([1])), "needs noise in training: 3 seeds"),
        ({"kind": "token"}, SEEDS, "is not noisy"),
        ({"kind": "operator"}, NO_INPUTS, "needs the fingerprint"),
        ({"kind": "oracle"}, RouterInputs(torch.tensor([0, 1, 0]), view=torch.zeros(3, 2)), "takes no fingerprint"),
    ],
)
def test_router_refuses_what_it_does_not_use_and_asks_for_what_it_does(
    router: dict[str, Any], inputs: RouterInputs, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        route(make(router), tokens(), inputs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router": {"gate": "conv"}}, "use score softmax"),
        ({"router": {"kind": "noisy_topk"}}, "score softmax, normalise after"),
        ({"router": {"kind": "hash", "granularity": "sample"}}, "use kind frozen"),
        ({"router": {"temperature_schedule": {"start": 0.1}}}, "the temperature falls"),
        ({"router": {"kind": "oracle", "groups": 4}, "num_experts": 6}, "not divisible by router.groups=4"),
        ({"router": AFTER}, "use router.normalise=before, or a larger top_k"),
        ({"router": NOISY, "num_experts": 1}, "use top_k of at least 2"),
        ({"router": {"kind": "two_level", **AFTER}, "top_k": 2}, "gate of the groups would get no gradient"),
        ({"router": {"kind": "operator", **AFTER}, "top_k": 2}, "gate of the groups would get no gradient"),
        ({"router": {"kind": "operator", "groups": 1}}, "use router.groups of at least 2"),
        ({"router": {"kind": "operator"}, "num_experts": 3, "top_k": 2}, "use router.groups of at least 2"),
        ({"router": {"kind": "operator", "groups": 4}, "num_experts": 6}, "not divisible by router.groups=4"),
        ({"router": {"kind": "two_level", "groups_by": "mlp"}}, "two_level does not read it"),
        ({"router": {"kind": "operator", "groups_by": "mlp", "cluster_samples": 512}}, "nothing reads it"),
        ({"router": {"kind": "operator", "cluster_samples": 15}}, "use at least 16"),
        ({"router": {"semantic_dim": 1}}, "greater than or equal to 2"),
        ({"balance": {"load": 0.1}}, "balance.load is defined by the noise"),
        ({"form": "linear", "hidden": 24}, "multiple of 16"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ExpertsConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "groups"),
    [
        ({"router": {"kind": "operator"}, "num_experts": 12}, 12),
        ({"router": {"kind": "operator"}, "num_experts": 12, "top_k": 2}, 6),
        ({"router": {"kind": "operator"}, "num_experts": 9, "top_k": 2}, 3),
        ({"router": {"kind": "operator", "groups": 2}, "num_experts": 12}, 2),
        ({"router": {"kind": "two_level"}, "num_experts": 12}, 2),
    ],
)
def test_operator_has_as_many_groups_as_leave_each_enough_experts(settings: dict[str, Any], groups: int) -> None:
    assert ExpertsConfig(**settings).groups == groups


@pytest.mark.parametrize("gate", ["linear", "conv"])
def test_orthogonality_is_measured_where_it_has_a_weight(gate: str) -> None:
    router = {"score": "softmax", "gate": gate}
    assert route(make(router), tokens()).similarity is None
    routing = route(make(router, balance={"orthogonality": 0.1}), tokens())
    assert 0 < routing.similarity.item() < 1
