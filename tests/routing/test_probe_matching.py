"""Match of experts: a permuted copy of a model is matched exactly."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from shodh.config import ExpertsConfig, OperatorConfig
from shodh.core.seeding import generator
from shodh.models.init import initialise
from shodh.models.operator import LatentTransformer
from shodh.routing.probe.interventions import sparse_layers
from shodh.routing.probe.matching import agreement, assignment_overlap, match_experts
from shodh.routing.probe.similarity import cka_matrix, expert_outputs
from shodh.routing.statistics import joint_counts

EXPERTS = 5


def make() -> LatentTransformer:
    experts = ExpertsConfig(num_experts=EXPERTS, hidden=16, router={"kind": "token", "semantic_dim": 8})
    model = LatentTransformer(OperatorConfig(dim=16, heads=2, depth=2, experts=experts), 5, 2, (4, 4, 4), 2)
    initialise(model, 4)
    return model.eval().requires_grad_(False)


def permute(layer: nn.Module, order: torch.Tensor) -> None:
    """Expert ``i`` becomes the old expert ``order[i]``."""
    for parameter in (*layer.experts.parameters(), layer.router.expert_gate.prototypes, layer.router.selection_bias):
        parameter.copy_(parameter[order].clone())


def test_a_permuted_copy_is_matched_exactly_by_outputs_and_by_tokens() -> None:
    model, copy = make(), make()
    draw = generator("test matching")
    orders = [torch.randperm(EXPERTS, generator=draw) for _ in sparse_layers(copy)]
    for layer, order in zip(sparse_layers(copy), orders, strict=True):
        permute(layer, order)
    past, static = torch.randn(4, 2, 5, 4, 4, 4, generator=draw), torch.randn(4, 2, 4, 4, 4, generator=draw)
    first, second = model(past, static), copy(past, static)
    torch.testing.assert_close(first.latent, second.latent)
    for number, order in enumerate(orders):
        inputs = torch.randn(64, 16, generator=draw)
        outputs = [expert_outputs(sparse_layers(m)[number].experts, inputs) for m in (model, copy)]
        match = match_experts(cka_matrix(*outputs))
        assert order[match.second].tolist() == match.first.tolist()
        np.testing.assert_allclose(match.values, 1, atol=1e-6)
        assert match.chance < 0.7

        selected = [output.routing[number].selected.numpy() for output in (first, second)]
        joint = joint_counts(*selected, EXPERTS, EXPERTS)
        by_tokens = match_experts(assignment_overlap(joint))
        alive = np.unique(selected[0])
        pairs = dict(zip(by_tokens.first, by_tokens.second, strict=True))
        assert [int(order[pairs[e]]) for e in alive] == alive.tolist()
        assert agreement(joint, by_tokens) == 1


def test_overlap_is_that_of_the_sets_of_tokens() -> None:
    joint = joint_counts(np.array([0, 0, 0, 1]), np.array([2, 2, 1, 1]), 2, 3)
    np.testing.assert_allclose(assignment_overlap(joint), [[0, 1 / 4, 2 / 3], [0, 1 / 2, 0]])


def test_the_best_total_wins_over_the_best_pair_and_spare_experts_stay_single() -> None:
    match = match_experts(np.array([[0.9, 0.8, 0.0], [0.8, 0.1, np.nan]]))
    assert match.first.tolist() == [0, 1] and match.second.tolist() == [1, 0]
    assert match.mean == 0.8
