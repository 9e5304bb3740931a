"""The router: hard choice, soft weight, and no more context than its kind allows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from shodh.config import ExpertsConfig
from shodh.models.init import initialise
from shodh.moe.routers import Router, make_router
from shodh.moe.routing import Routing

DIM, SAMPLES, TOKENS, EXPERTS = 10, 3, 7, 6
KINDS = ("token", "context", "two_level")


def make(seed: int = 0, **settings: Any) -> Router:
    router = settings.pop("router", {})
    config = ExpertsConfig(num_experts=EXPERTS, router={"kind": "token", "groups": 3, **router}, **settings)
    module = make_router(config, DIM)
    initialise(torch.nn.ModuleDict({"router": module}), seed)
    return module


def route(router: Router, x: Tensor) -> tuple[Tensor, Routing]:
    routing: Routing = router(x)
    return routing.weights, routing


def tokens(seed: int = 1) -> Tensor:
    return torch.randn(SAMPLES, TOKENS, DIM, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("score", ["cosine", "softmax"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_weights_are_the_probabilities_of_the_chosen_experts(kind: str, score: str, top_k: int) -> None:
    scores, routing = route(make(top_k=top_k, router={"kind": kind, "score": score}), tokens())
    rows = SAMPLES * TOKENS
    assert scores.shape == routing.selected.shape == (rows, top_k)
    torch.testing.assert_close(routing.probs.sum(-1), torch.ones(rows))
    assert torch.equal(scores, routing.probs.gather(1, routing.selected))
    assert torch.equal(routing.counts.long(), torch.bincount(routing.selected.flatten(), minlength=EXPERTS))
    assert all(len(set(row)) == top_k for row in routing.selected.tolist())
    if kind != "two_level":
        assert torch.equal(routing.selected, routing.probs.topk(top_k).indices)
        assert routing.group_probs.shape == (rows, 0)


@pytest.mark.parametrize("score", ["cosine", "softmax"])
def test_two_levels_pick_a_group_by_the_sample_and_an_expert_in_it_by_the_token(score: str) -> None:
    _, routing = route(make(top_k=2, router={"kind": "two_level", "score": score}), tokens())
    group = routing.group_probs.argmax(-1)
    assert torch.equal(routing.selected // 2, group[:, None].expand(-1, 2))
    assert torch.equal(group.view(SAMPLES, TOKENS), group.view(SAMPLES, TOKENS)[:, :1].expand(-1, TOKENS))
    torch.testing.assert_close(routing.probs.view(-1, 3, 2).sum(-1), routing.group_probs)


@pytest.mark.parametrize("kind", KINDS)
def test_decision_of_a_sample_does_not_depend_on_the_other_samples(kind: str) -> None:
    router, x = make(router={"kind": kind}), tokens()
    _, together = route(router, x)
    for b in range(SAMPLES):
        _, alone = route(router, x[b : b + 1])
        torch.testing.assert_close(alone.probs, together.probs[b * TOKENS : (b + 1) * TOKENS])


@pytest.mark.parametrize("kind", KINDS)
def test_order_of_the_tokens_does_not_matter(kind: str) -> None:
    router, x = make(router={"kind": kind}), tokens()
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0))
    _, plain = route(router, x)
    _, shuffled = route(router, x[:, order])
    expected = plain.probs.view(SAMPLES, TOKENS, -1)[:, order].flatten(0, 1)
    torch.testing.assert_close(shuffled.probs, expected)


def test_only_the_context_kinds_look_at_the_rest_of_the_sample() -> None:
    x = tokens()
    other = x.clone()
    other[:, 1:] += 3.0
    for kind in KINDS:
        router = make(router={"kind": kind})
        first = [route(router, v)[1].probs.view(SAMPLES, TOKENS, -1)[:, 0] for v in (x, other)]
        assert torch.equal(*first) == (kind == "token")


@pytest.mark.parametrize("kind", KINDS)
def test_sample_granularity_gives_all_tokens_of_a_sample_the_same_expert(kind: str) -> None:
    _, routing = route(make(router={"kind": kind, "granularity": "sample"}), tokens())
    chosen = routing.selected.view(SAMPLES, TOKENS)
    assert torch.equal(chosen, chosen[:, :1].expand(-1, TOKENS))


def test_cosine_scores_do_not_depend_on_the_length_of_a_token() -> None:
    router, x = make(router={"score": "cosine"}), tokens()
    torch.testing.assert_close(route(router, 7.5 * x)[1].probs, route(router, x)[1].probs)
    cosine = route(router, x)[1].logits / router.expert_gate.log_temperature.exp()
    assert cosine.abs().max() <= 1 + 1e-6
    torch.testing.assert_close(router.expert_gate.log_temperature.exp(), torch.tensor([8.0]))


@pytest.mark.parametrize("kind", KINDS)
def test_selection_bias_changes_the_choice_and_never_the_weights(kind: str) -> None:
    router, x = make(router={"kind": kind}), tokens()
    _, plain = route(router, x)
    router.selection_bias[4] = 5.0
    scores, biased = route(router, x)
    assert (biased.selected == 4).all() and not (plain.selected == 4).all()
    assert torch.equal(biased.probs, plain.probs)
    assert torch.equal(scores[:, 0], plain.probs[:, 4])


def test_scores_are_computed_in_float32_whatever_comes_in() -> None:
    router = make(router={"kind": "two_level"})
    scores, routing = route(router.to(torch.bfloat16), tokens().to(torch.bfloat16))
    assert {t.dtype for t in (scores, routing.probs, routing.logits, routing.group_probs)} == {torch.float32}
    torch.testing.assert_close(routing.probs.sum(-1), torch.ones(SAMPLES * TOKENS), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient_from_the_weights_alone(kind: str) -> None:
    router = make(router={"kind": kind})
    scores, _ = route(router, tokens())
    scores.square().sum().backward()
    for name, parameter in router.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        assert parameter.ndim > 0, "a 0-dim parameter breaks DeepSpeed's bf16 broadcast on gloo"
