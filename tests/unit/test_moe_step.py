"""What a training step gives its routers, and does to them afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shodh.config import ExpertsConfig
from shodh.moe.experts import ExpertLayerReference
from shodh.moe.step import finish_step, router_arguments

NAMES = [(0, 3, 1), (1, 0, 7)]
NOISY = {"kind": "noisy_topk", "score": "softmax", "normalise": "after"}


def config(router: dict[str, Any], **settings: Any) -> ExpertsConfig:
    return ExpertsConfig(hidden=16, router=router, **settings)


def test_only_an_oracle_is_told_the_regime() -> None:
    labels = torch.tensor([0, 1])
    for kind in ("token", "context", "two_level", "hash", "frozen"):
        assert router_arguments(config({"kind": kind}), labels, NAMES, 0, 5) == {}
    (name,) = told = router_arguments(config({"kind": "oracle"}), labels)
    assert name == "regime" and torch.equal(told["regime"], labels)
    assert router_arguments(config({"kind": "oracle"}, num_experts=0), labels) == {}, "a dense model has no router"


def test_only_a_kind_that_observes_is_shown_fingerprints_and_no_other_has_them_made() -> None:
    labels, seen = torch.tensor([0, 1]), torch.ones(2, 5)
    for kind in ("token", "two_level", "hash", "frozen"):
        told = router_arguments(config({"kind": kind}), labels, look=lambda: pytest.fail("no fingerprint is needed"))
        assert told == {}
    told = router_arguments(config({"kind": "operator"}), labels, NAMES, 0, 5, look=lambda: seen)
    assert list(told) == ["fingerprint"] and told["fingerprint"] is seen
    assert router_arguments(config({"kind": "operator"}, num_experts=0), labels, look=lambda: seen) == {}


def test_noise_depends_on_seed_step_and_sample_and_is_absent_in_evaluation() -> None:
    labels, noisy = torch.tensor([0, 1]), config(NOISY, top_k=2)
    assert router_arguments(noisy, labels, NAMES) == {}

    def drawn(names: Any, *key: int) -> list[int]:
        seeds: list[int] = router_arguments(noisy, labels, names, *key)["noise"].tolist()
        return seeds

    seeds = drawn(NAMES, 0, 5)
    assert seeds == drawn(iter(NAMES), 0, 5)
    assert seeds[::-1] == drawn(NAMES[::-1], 0, 5)
    others = [drawn(NAMES, *key) for key in ((1, 5), (0, 6))]
    assert len({*seeds, *others[0], *others[1]}) == 6


def test_temperatures_fall_by_their_factor_once_a_step_to_their_end() -> None:
    experts = config({"temperature_schedule": {"start": 2.0, "end": 0.5, "decay": 0.9}})
    layer = ExpertLayerReference(experts, 16)
    seen = [layer.router.temperature.item()]
    for _ in range(20):
        with torch.no_grad():
            layer.router(torch.zeros(1, 2, 16))  # A forward pass moves nothing.
        finish_step(layer, experts, counts=lambda: pytest.fail("no counts are needed"))
        seen.append(layer.router.temperature.item())
    assert seen == pytest.approx([max(0.5, 2.0 * 0.9**n) for n in range(21)], rel=1e-5)
    assert "router.temperature" in layer.state_dict()


def test_selection_biases_follow_the_counts_of_their_layers() -> None:
    experts = config({}, balance={"bias_rate": 0.5})
    layers = torch.nn.ModuleList(ExpertLayerReference(experts, 16) for _ in range(2))
    finish_step(layers, experts, counts=lambda: torch.tensor([[4, 0, 2, 2], [0, 0, 0, 8]]))
    assert layers[0].router.selection_bias.tolist() == [-0.5, 0.5, 0.0, 0.0]
    assert layers[1].router.selection_bias.tolist() == [0.5, 0.5, 0.5, -0.5]
