"""Gradients by regime, and learning a fresh regime."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from published import published

from shodh.config import RunConfig, config_from_dict
from shodh.experiments.transfer.probe import (
    GROUPS,
    Probe,
    _gradients,
    gradient_cosines,
    group_of,
    learning_curve,
    plasticity,
)
from shodh.models.factory import build_operator
from shodh.models.init import initialise

CPU = torch.device("cpu")


def config_of(tree: dict[str, Any], kind: str) -> RunConfig:
    experts = {"num_experts": 4, "top_k": 1, "router": {"kind": kind, "groups": 2, "normalise": "before"}}
    operator = {"kind": "moe_pot", "dim": 16, "depth": 2, "heads": 2, "patch": 8, "experts": experts}
    train = {"steps": 3, "global_batch": 4}
    return config_from_dict(
        {**tree, "operator": published({**operator, "field": {"mlp": 16, "decoder": 8}, "train": train})}
    )


@pytest.fixture
def probe(tiny_tree: dict[str, Any]) -> Any:
    opened = Probe(config_of(tiny_tree, "oracle"), CPU)
    yield opened
    opened.close()


def model_of(config: RunConfig) -> torch.nn.Module:
    model = build_operator(config)
    initialise(model, 0)
    return model


def test_experts_that_regimes_do_not_share_have_nothing_in_common(probe: Probe) -> None:
    """An oracle gives each regime experts of its own; all else is shared."""
    cosines, _ = gradient_cosines(probe, model_of(probe.config), probe.fixed_batches(3))
    pair = "open_channel ~ porous_media"
    assert set(cosines) == set(GROUPS)
    assert cosines["experts"][pair] == 0.0
    assert all(0 < abs(cosines[group][pair]) < 1 for group in ("feed_forward", "rest"))


def test_equal_regimes_have_equal_gradients(probe: Probe) -> None:
    batch = probe.fixed_batches(3)["open_channel"]
    cosines, _ = gradient_cosines(probe, model_of(probe.config), {"a": batch, "b": batch})
    assert all(found["a ~ b"] == pytest.approx(1.0) for found in cosines.values())


def test_gradients_are_those_of_the_mean_error(probe: Probe) -> None:
    model, batch = model_of(probe.config), probe.fixed_batches(3)["open_channel"]
    probe.task.predict(model, batch)[1].mean().backward()
    own = [
        p.grad.double().flatten() for n, p in model.named_parameters() if group_of(n) == "rest" and p.grad is not None
    ]
    assert torch.allclose(_gradients(probe, model, batch)["rest"], torch.cat(own), rtol=1e-4, atol=1e-7)


def test_cosine_within_a_regime_is_of_the_two_halves_of_its_windows(probe: Probe) -> None:
    model, batches = model_of(probe.config), probe.fixed_batches(4)
    twice = {
        name: {key: torch.cat((values[:2], values[:2])) for key, values in batch.items()}
        for name, batch in batches.items()
    }
    _, within = gradient_cosines(probe, model, twice)
    assert all(cosine == pytest.approx(1.0) for group in within.values() for cosine in group.values())
    batches = probe.fixed_batches(5)
    between, within = gradient_cosines(probe, model, batches)
    assert set(within["rest"]) == set(batches) and all(cosine < 0.999 for cosine in within["rest"].values())
    whole = {name: _gradients(probe, model, batch)["rest"] for name, batch in batches.items()}
    expected = torch.nn.functional.cosine_similarity(*whole.values(), dim=0)
    assert between["rest"]["open_channel ~ porous_media"] == pytest.approx(float(expected), abs=1e-5)
    assert gradient_cosines(probe, model, probe.fixed_batches(1))[1] == {}


def test_errors_are_over_every_window_of_a_split(probe: Probe) -> None:
    windows = sum(len(batch["regime"]) for _, batch in probe.windows("valid"))
    assert windows == 2 * 2 * (6 - 2)  # two regimes, two trajectories of six frames, history two
    model = model_of(probe.config)
    whole = probe.errors(model)
    probe.config = probe.config.model_copy(
        update={"evaluation": probe.config.evaluation.model_copy(update={"batch": 3})}
    )
    for name, errors in probe.errors(model).items():
        assert errors.keys() == whole[name].keys()
        for key, values in errors.items():
            assert values == pytest.approx(whole[name][key], rel=1e-5)


def test_learning_curve_starts_at_the_model_and_leaves_it_as_it_was(tiny_tree: dict[str, Any]) -> None:
    config = config_of(tiny_tree, "token")
    probe, model = Probe(config, CPU), model_of(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    first, again = (learning_curve(probe, model, 3, 1e-2) for _ in range(2))
    other = learning_curve(probe, model, 3, 1e-4)
    probe.close()
    assert first == again and first[0] == other[0] and first[1:] != other[1:]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_fresh_regime_is_learned_with_the_biases_of_the_run(
    tiny_tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss-free balance moves the selection biases after every step, as in training."""
    config = config_of(tiny_tree, "token")
    experts = config.operator.experts
    balance = experts.balance.model_copy(update={"bias_rate": 0.1})
    changed = config.operator.model_copy(update={"experts": experts.model_copy(update={"balance": balance})})
    config = config.model_copy(update={"operator": changed})
    probe, learners = Probe(config, CPU), []
    monkeypatch.setattr("shodh.experiments.transfer.probe.copy.deepcopy", lambda m: learners.append(m) or m)
    learning_curve(probe, model_of(config), 1, 1e-2)
    probe.close()
    biases = [b for name, b in learners[0].named_buffers() if name.endswith("selection_bias")]
    assert biases and all(b.abs().max() > 0 for b in biases)


def test_area_ratio_is_above_one_where_training_has_cost_plasticity() -> None:
    assert plasticity([1.0, 0.5], [1.0, 0.25])["area_ratio"] == pytest.approx(1.2)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("blocks.0.feed_forward.layer.router.expert_gate.weight", "router"),
        ("blocks.0.feed_forward.experts.w1", "experts"),
        ("blocks.0.feed_forward.shared_experts.w1.weight", "feed_forward"),
        ("blocks.0.attention.qkv.weight", "rest"),
    ],
)
def test_groups_of_weights(name: str, group: str) -> None:
    assert group_of(name) == group
