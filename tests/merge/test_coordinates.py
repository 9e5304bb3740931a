"""From physical parameters to coordinates, by layer and by expert."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch
from expert_weights import EXPERTS

from shodh.core.errors import ConfigError
from shodh.merge import Coordinates, Range, coordinate, extrapolation, from_memory, read_coord, read_coordinates
from shodh.merge.components import component, layer
from shodh.merge.coordinates import Rule

WEIGHTS = from_memory({EXPERTS: torch.zeros(3, 2, 2), "operator.embed.weight": torch.zeros(4, 2)})


@pytest.mark.parametrize(("low", "high"), [(0.1, 0.7), (1e-5, 3e-3), (5.0, 2.0)])
@pytest.mark.parametrize("scale", ("linear", "log"))
def test_experts_lie_exactly_at_the_ends(low: float, high: float, scale: str) -> None:
    assert coordinate(low, low, high, scale) == -1.0  # type: ignore[arg-type]
    assert coordinate(high, low, high, scale) == 1.0  # type: ignore[arg-type]


def test_the_middle_is_the_mean_of_the_scale() -> None:
    assert coordinate(2.0, 1.0, 3.0) == pytest.approx(0.0, abs=1e-15)
    assert coordinate(1e-4, 1e-5, 1e-3, "log") == pytest.approx(0.0, abs=1e-14)
    assert coordinate(4.0, 1.0, 3.0) == 2.0
    assert coordinate(1e-2, 1e-5, 1e-3, "log") == pytest.approx(2.0)


def test_readout_from_metadata_clips_and_warns_outside(caplog: pytest.LogCaptureFixture) -> None:
    family = Range("viscosity", 1e-5, 1e-3, "log")
    with caplog.at_level(logging.WARNING):
        assert read_coord(1e-4, family).alpha == pytest.approx(0.0, abs=1e-14)
        assert not caplog.records
        assert read_coord(1e-2, family).alpha == 1.5
        assert read_coord(2e-3, family, gamma=0.5).alpha == pytest.approx(0.5 * (1 + math.log10(2.0)))
    assert all(text in caplog.text for text in ("viscosity = 0.01", "1e-05", "0.001", "0.5 of", "log"))
    assert extrapolation(1e-2, 1e-5, 1e-3, "log") == pytest.approx(0.5) and extrapolation(2.0, 1.0, 3.0) == 0.0


def test_values_off_the_scale_are_refused() -> None:
    for arguments, expected in (
        ((0.0, 1.0, 2.0, "log"), "a positive number on a logarithmic scale"),
        ((math.nan, 1.0, 2.0), "a finite number"),
        ((1.0, 2.0, 2.0), "span no direction"),
        ((1.0, 2.0, 3.0, "sqrt"), "expected one of"),
    ):
        with pytest.raises(ConfigError, match=expected):
            coordinate(*arguments)
    with pytest.raises(ConfigError, match="viscosity: both experts were trained at 2"):
        Range("viscosity", 2.0, 2.0)


def test_later_rules_go_before_earlier_ones() -> None:
    rules = (
        Rule(match="operator.*", alpha=0.1),
        Rule(match="*.experts.*", alpha=0.2, experts=(0, 2)),
        Rule(match="*.experts.*", alpha=0.3, experts=(2,)),
    )
    found = Coordinates((0.0,), rules)
    found.check(WEIGHTS)
    assert found.at(EXPERTS, (3, 2, 2)).tolist() == [[0.2, 0.1, 0.3]]
    assert found.at("operator.embed.weight", (4, 2)).tolist() == [0.1]
    assert found.at("tokenizer.x", (4, 2)).tolist() == [0.0]
    assert found.negated().at(EXPERTS, (3, 2, 2)).tolist() == [[-0.2, -0.1, -0.3]]


def test_coordinates_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "by-layer.yaml"
    path.write_text("default: 0.25\nrules:\n  - {match: '*.experts.*', experts: [1], alpha: -1}\n")
    assert read_coordinates(path).at(EXPERTS, (3, 2, 2)).tolist() == [[0.25, -1.0, 0.25]]
    path.write_text("rules: [{match: operator.embed.*, alpha: 1}]\n")
    assert read_coordinates(path, 0.5).default == (0.5,)
    for text, expected in (
        ("rules: []\n", "no default"),
        ("default: 0\nrule: []\n", "rule: Extra inputs"),
        ("default: [1, 2]\nrules: [{match: a, alpha: 1}]\n", "expected 2 numbers"),
        ("default: .nan\n", "finite"),
        ("{", "not valid YAML"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=expected):
            read_coordinates(path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_coordinates(tmp_path / "absent.yaml")


def test_rules_that_do_nothing_are_refused() -> None:
    for rule, expected in (
        (Rule(match="blocks.*", alpha=0.0), r"no tensor matches 'blocks.\*'"),
        (Rule(match="*.embed.*", alpha=0.0, experts=(0,)), "matches no tensor of routed experts"),
        (Rule(match="*.experts.*", alpha=0.0, experts=(0, 3)), r"no experts \[3\]; there are 3"),
    ):
        with pytest.raises(ConfigError, match=expected):
            Coordinates((0.0,), (rule,)).check(WEIGHTS)


def test_components_and_layers_of_the_project_s_names() -> None:
    block = "operator.blocks.10"
    for name, what, where in (
        (f"{block}.feed_forward.experts.w2", "routed experts", block),
        (f"{block}.feed_forward.shared_experts.w1.weight", "shared experts", block),
        (f"{block}.feed_forward.router.expert_gate.prototypes", "router", block),
        (f"{block}.attention.qkv.weight", "attention or mixing", block),
        (f"{block}.feed_forward.w1.weight", "feed-forward", block),
        (f"{block}.norm1.weight", "other", block),
        (f"{block}.local.weight", "attention or mixing", block),
        ("operator.lift.weight", "embeddings", "operator.lift"),
        ("operator.aggregate.gamma", "embeddings", "operator.aggregate"),
        ("operator.hidden.bias", "output", "operator.hidden"),
        ("operator.decode.mix.weight", "output", "operator.decode.mix"),
        ("operator.embed.weight", "embeddings", "operator.embed"),
        ("operator.position.position", "embeddings", "operator.position"),
        ("operator.head.bias", "output", "operator.head"),
        ("tokenizer.encoder.0.weight", "tokenizer", "tokenizer.encoder.0"),
    ):
        assert (component(name), layer(name)) == (what, where), name
