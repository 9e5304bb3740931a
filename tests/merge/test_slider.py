"""A real operator on the line between two experts: derivatives in alpha against finite differences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from expert_weights import random_operator
from torch import Tensor, nn

from shodh.config import load_config
from shodh.core.errors import ConfigError
from shodh.core.weights import LazyWeights
from shodh.merge import Slider, compose, decompose, from_memory, read_gradient, to_memory
from shodh.models.factory import build_operator
from shodh.schema.domain import num_static_features


class Line(NamedTuple):
    model: nn.Module
    weights: tuple[LazyWeights, LazyWeights, LazyWeights]
    loss: Callable[[nn.Module], Tensor]


@pytest.fixture(scope="module")
def line(write_config: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Line:
    """In float64, with a router whose top-k does not change in the steps of a finite difference."""
    config = load_config(write_config(tmp_path_factory.mktemp("line") / "tiny.yaml"))
    states = [{n: t.double() for n, t in random_operator(config, *key).items()} for key in ((), ("low",), ("high",))]
    model = build_operator(config).double().requires_grad_(False)
    draw = torch.Generator().manual_seed(1)
    channels = config.tokenizer.latent_channels
    history = torch.randn(2, 2, channels, 2, 2, 2, generator=draw, dtype=torch.float64)
    static = torch.randn(2, num_static_features(1), 2, 2, 2, generator=draw, dtype=torch.float64)
    target = torch.randn(2, channels, 2, 2, 2, generator=draw, dtype=torch.float64)

    def loss(model: nn.Module) -> Tensor:
        return (model(history, static).latent - target).square().mean()

    anchor, low, high = (from_memory(s) for s in states)
    return Line(model, (anchor, low, high), loss)


def slider(line: Line, by: str = "all") -> Slider:
    anchor, low, high = line.weights
    return Slider(line.model, anchor, *decompose(anchor, low, high), by)  # type: ignore[arg-type]


def test_the_model_at_an_end_is_the_expert(line: Line) -> None:
    for alpha, expert in ((-1.0, line.weights[1]), (1.0, line.weights[2])):
        state = slider(line).set(alpha).state_dict()
        assert all(torch.equal(state[name], tensor.read()) for name, tensor in expert.items())


@pytest.mark.parametrize("by", ("all", "layer", "expert"))
def test_gradient_is_the_slope_of_the_loss(line: Line, by: str) -> None:
    """Central differences of second order: their error at a step of 1e-3 is below 1e-5 of the slope here."""
    moving = slider(line, by)
    count = len(moving.groups)
    at = np.linspace(-0.3, 0.4, count)
    value, gradient = moving.loss_and_gradient(line.loss)(at)
    assert gradient.shape == (count,) and value == pytest.approx(float(line.loss(moving.set(at))))
    step = 1e-4
    slopes = []
    for group in range(count):
        shift = step * np.eye(count)[group]
        ahead, behind = (float(line.loss(moving.set(at + sign * shift))) for sign in (1, -1))
        slopes.append((ahead - behind) / (2 * step))
    scale = np.abs(slopes).max()
    assert scale > 1e-4
    # The router computes in float32, so that differences carry a noise of 1e-7 / step.
    np.testing.assert_allclose(gradient, slopes, rtol=2e-3, atol=2e-3 * scale)


def test_slopes_by_layer_and_by_expert_add_up_to_the_whole(line: Line) -> None:
    totals = {}
    for by in ("all", "layer", "expert"):
        moving = slider(line, by)
        _, gradient = moving.loss_and_gradient(line.loss)(np.full(len(moving.groups), 0.2))
        totals[by] = gradient.sum()
    assert totals["layer"] == pytest.approx(totals["all"]) and totals["expert"] == pytest.approx(totals["all"])


def test_groups_name_what_they_move(line: Line) -> None:
    assert slider(line, "expert").groups[:2] == ["rest", "operator.blocks.0 expert 0"] or slider(line, "expert").groups[
        :2
    ] == ["rest", "blocks.0 expert 0"]
    moving = slider(line, "expert")
    alpha = np.zeros(len(moving.groups))
    alpha[2] = 1.0
    found, rest = moving.set(alpha).state_dict(), compose(line.weights[0], *decompose(*line.weights), 0.0)
    name = "blocks.0.feed_forward.experts.w1"
    assert torch.equal(found[name][1], line.weights[2][name].read()[1])
    assert torch.equal(found[name][0], rest[name].read()[0])
    with pytest.raises(ConfigError, match="2 coordinates; expected 9: rest"):
        moving.set([0.0, 1.0])
    with pytest.raises(ConfigError, match="by 'tensor'"):
        slider(line, "tensor")


def test_parameters_are_left_as_they_were(line: Line) -> None:
    slider(line).loss_and_gradient(line.loss)(np.zeros(1))
    assert not any(p.requires_grad for p in line.model.parameters())


def test_the_way_back_to_a_known_coordinate(line: Line) -> None:
    """Targets made by the model at alpha 0.6: gradient and bank both return there."""
    moving = slider(line)
    draw = torch.Generator().manual_seed(2)
    history = torch.randn(2, 2, 8, 2, 2, 2, generator=draw, dtype=torch.float64)
    static = torch.randn(2, num_static_features(1), 2, 2, 2, generator=draw, dtype=torch.float64)
    target = moving.set(0.6)(history, static).latent.clone()

    def loss(model: nn.Module) -> Tensor:
        latent: Tensor = model(history, static).latent
        return (latent - target).square().mean() / target.square().mean()

    assert moving.evaluate(loss)(0.6) == 0.0
    found = read_gradient(moving.loss_and_gradient(loss))
    assert found.alpha == pytest.approx(0.6, abs=0.02)
    assert moving.evaluate(loss)(-0.6) > 10 * (found.loss or 0.0)


def test_the_anchor_is_not_kept_in_memory_where_it_cancels(line: Line) -> None:
    moving = slider(line)
    assert moving._anchor is line.weights[0]
    assert to_memory(compose(line.weights[0], *decompose(*line.weights), 0.3)).keys() == line.weights[0].keys()
