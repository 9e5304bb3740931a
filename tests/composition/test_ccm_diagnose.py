"""Routing along the direction, of plain selections and of real sparse models."""

from __future__ import annotations

import json
import math

import pytest
import torch

from shodh.core.weights import LazyWeights
from shodh.experiments.composition.bench import Bench
from shodh.experiments.composition.diagnose import diagnose_family, routing_along, share_moved, usage_divergence
from shodh.experiments.composition.members import open_members, read_case
from shodh.experiments.composition.runs import make
from shodh.experiments.composition.settings import CCMConfig
from shodh.experiments.harness.worker import write_result
from shodh.merge import from_memory, to_memory

CPU = torch.device("cpu")


def test_divergence_of_usage_is_jensen_and_shannon_s_in_bits() -> None:
    left, right, half = (torch.tensor(s).unsqueeze(1) for s in ([0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1]))
    assert usage_divergence(left, left) == 0.0
    assert usage_divergence(left, right) == pytest.approx(1.0)
    # H(3/4, 1/4) - H(1/2, 1/2) / 2 - H(1, 0) / 2
    entropy = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert usage_divergence(left, half) == pytest.approx(entropy - 0.5)
    assert usage_divergence(half, half.flip(0)) == 0.0


def test_moved_assignments_do_not_depend_on_the_order_of_a_token_s_experts() -> None:
    here = torch.tensor([[0, 1], [2, 3]])
    assert share_moved(here, here.flip(1)) == 0.0
    assert share_moved(here, torch.tensor([[0, 2], [2, 3]])) == 0.25
    assert share_moved(here, here.flip(0)) == 1.0


def test_routing_changes_where_the_routers_cross_over(known_sparse: CCMConfig) -> None:
    """Biases of the experts' routers such that the first two of four are chosen at -1, the others from 0 on."""
    family = open_members(known_sparse, 0, CPU)
    family.low, family.high = (
        with_bias(weights, bias) for weights, bias in ((family.low, [1e3, 1e3, 0, 0]), (family.high, [0, 0, 2e3, 2e3]))
    )
    bench = Bench(family, known_sparse.prefix, known_sparse.rollout)
    found = routing_along(bench, [read_case(known_sparse, family, 0.01, "test")], (-1.0, 0.0, 1.0))
    assert found == {"alphas": [-1.0, 0.0, 1.0], "divergence": [[1.0, 0.0, 0.0]], "moved": [[1.0, 0.0, 0.0]]}


def with_bias(weights: LazyWeights, bias: list[float]) -> LazyWeights:
    """The weights with another bias of the router of the only sparse layer."""
    state = to_memory(weights)
    (name,) = (n for n in state if n.endswith("router.expert_gate.bias"))
    return from_memory({**state, name: torch.tensor(bias)})


def test_a_sparse_family_is_evaluated_with_a_coordinate_for_each_expert(known_sparse: CCMConfig) -> None:
    write_result(make(known_sparse, 0, None), CPU)
    found = json.loads(known_sparse.results_file(0).read_text())
    for entry in found["values"]:
        by_expert = entry["methods"]["gradient_by_expert"]
        assert len(by_expert["alpha"]) == 1 + 4  # the rest, and the four experts of the sparse layer
        assert entry["methods"]["scale"]["error"] < 1e-4 < entry["methods"]["anchor"]["error"]
    updates = found["diagnostics"]["updates"]
    assert len(updates["experts"]) == 4
    assert {"routed experts", "shared experts", "attention or mixing"} <= set(updates["components"])
    assert len(found["diagnostics"]["routing"]["divergence"]) == 1


def test_a_dense_family_has_no_routing(known: CCMConfig) -> None:
    bench = Bench(open_members(known, 0, CPU), known.prefix, known.rollout)
    assert diagnose_family(bench, [])["routing"] is None
