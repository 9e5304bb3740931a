"""Interventions on routing: what must change nothing changes nothing, bit for bit; the rest does what it says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shodh.config import ExpertsConfig, OperatorConfig
from shodh.core.seeding import generator
from shodh.models.init import initialise
from shodh.models.operator import LatentTransformer, OperatorOutput
from shodh.routing.probe.causality import Intervention, changes_nothing, interventions
from shodh.routing.probe.interventions import (
    Override,
    at_layer,
    force,
    override_routing,
    remove,
    reroute,
    shuffle_tokens,
    sparse_layers,
    transplant,
)

EXPERTS, LAYERS, SAMPLES, TOKENS = 4, 2, 3, 8


def make(**experts: Any) -> LatentTransformer:
    settings = {"num_experts": EXPERTS, "hidden": 16, "router": {"kind": "token", "semantic_dim": 8}, **experts}
    config = OperatorConfig(dim=16, heads=2, depth=LAYERS, experts=ExpertsConfig(**settings))
    model = LatentTransformer(config, 5, 2, (2, 2, 2), 2)
    initialise(model, 1)
    return model.eval().requires_grad_(False)


def run(model: LatentTransformer, override: Override | None = None) -> OperatorOutput:
    draw = generator("test interventions")
    past, static = torch.randn(SAMPLES, 2, 5, 2, 2, 2, generator=draw), torch.randn(SAMPLES, 2, 2, 2, 2, generator=draw)
    if override is None:
        return model(past, static)
    with override_routing(model, override):
        return model(past, static)


def prefer(model: LatentTransformer, bias: list[float]) -> LatentTransformer:
    for layer in sparse_layers(model):
        layer.router.selection_bias.copy_(torch.tensor(bias))
    return model


def choices(output: OperatorOutput) -> Tensor:
    return torch.stack([r.selected.unflatten(0, (SAMPLES, TOKENS)) for r in output.routing])


def test_the_same_choices_change_nothing_and_hooks_are_gone_afterwards() -> None:
    model = make(top_k=2)
    intact = run(model)
    assert torch.equal(run(model, lambda _, d: (d.weights, d.selected)).latent, intact.latent)
    assert torch.equal(run(model, transplant(choices(intact))).latent, intact.latent)
    with pytest.raises(RuntimeError, match="stop"), override_routing(model, force(0)):
        raise RuntimeError("stop")
    assert torch.equal(run(model).latent, intact.latent)
    assert not any(layer.router._forward_hooks for layer in sparse_layers(model))


@pytest.mark.parametrize("kind", [remove, reroute])
def test_knocking_out_a_dead_expert_changes_nothing_and_a_used_one_does(kind: Any) -> None:
    model = prefer(make(), [0.0, 0.0, -9.0, 0.0])
    intact = run(model)
    assert not (choices(intact) == 2).any()
    assert torch.equal(run(model, kind(2)).latent, intact.latent)
    used = int(choices(intact)[0, 0, 0, 0])
    assert not torch.equal(run(model, kind(used)).latent, intact.latent)


def test_forcing_all_tokens_to_their_own_expert_changes_nothing_and_to_another_does() -> None:
    model = prefer(make(), [0.0, 9.0, 0.0, 0.0])
    intact = run(model)
    assert torch.equal(run(model, force(1)).latent, intact.latent)
    forced = run(model, force(3))
    assert not torch.equal(forced.latent, intact.latent)
    assert (choices(forced) == 3).all(), "the reported routing is what happened"
    assert forced.routing[0].counts.tolist() == [0, 0, 0, SAMPLES * TOKENS]


def test_a_removed_expert_is_one_whose_output_is_zero() -> None:
    model, silent = make(top_k=2), make(top_k=2)
    sparse_layers(silent)[1].experts.w2[0].zero_()
    torch.testing.assert_close(run(model, at_layer(1, remove(0))).latent, run(silent).latent)


def test_one_layer_is_changed_and_those_before_it_are_not() -> None:
    model = make()
    intact, changed = run(model), run(model, at_layer(1, force(2)))
    assert torch.equal(choices(changed)[0], choices(intact)[0])
    assert (choices(changed)[1] == 2).all()


def test_rerouted_tokens_meet_the_next_best_expert_at_the_weight_they_had() -> None:
    model = make(top_k=2)
    intact, changed = run(model), run(model, at_layer(0, reroute(1)))
    before, after, probs = choices(intact)[0], choices(changed)[0], intact.routing[0].probs.view(SAMPLES, TOKENS, -1)
    struck = before == 1
    assert struck.any() and not struck.all()
    assert torch.equal(after[~struck], before[~struck])
    third = probs.argsort(-1, descending=True)[..., 2:3].expand_as(before)
    assert torch.equal(after[struck], third[struck])


def test_where_every_other_expert_serves_a_token_a_rerouted_slot_is_taken_away() -> None:
    model = make(num_experts=2, top_k=2)
    torch.testing.assert_close(run(model, reroute(0)).latent, run(model, remove(0)).latent)


def test_shuffled_tokens_keep_the_usage_of_each_sample_and_lose_their_place() -> None:
    model = make()
    intact = choices(run(model))[0]
    shuffled = choices(run(model, at_layer(0, shuffle_tokens(0))))[0]
    assert not torch.equal(shuffled, intact)
    assert torch.equal(shuffled.flatten(1).sort(1).values, intact.flatten(1).sort(1).values)
    assert torch.equal(choices(run(model, at_layer(0, shuffle_tokens(0))))[0], shuffled), "drawn by its key"
    assert not torch.equal(choices(run(model, at_layer(0, shuffle_tokens(1))))[0], shuffled)
    alike = prefer(model, [9.0, 0.0, 0.0, 0.0])
    assert torch.equal(run(alike, shuffle_tokens(0)).latent, run(alike).latent), "all choices are the same"


def test_what_is_skipped_changes_nothing_indeed() -> None:
    """The shortcut for dead experts and settled layers against the forward pass that it saves."""
    model = prefer(make(), [1.0, 0.2, -9.0, 0.0])
    intact = run(model)
    selected = choices(intact).numpy()
    makers: dict[str, Any] = {"remove": remove, "reroute": reroute, "force": force}
    skipped = 0
    for intervention in interventions(LAYERS, EXPERTS, 1):
        if intervention.kind in makers and changes_nothing(intervention, selected):
            override = makers[intervention.kind](intervention.expert)
            override = override if intervention.layer is None else at_layer(intervention.layer, override)
            assert torch.equal(run(model, override).latent, intact.latent), intervention
            skipped += 1
    assert skipped >= 2 * (LAYERS + 1)
    assert not changes_nothing(Intervention("shuffle tokens", 0, seed=0), np.zeros((LAYERS, 1, 2, 1), dtype=int))
