"""The check after the first step: what stood still is named, unless float32 could not show its step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from shodh.train.engine import MovementCheck


def still_after(step: float, lr: float) -> list[str]:
    """Names found after every parameter but ``still`` went one ``step`` down its gradient, at a rate of ``lr``."""
    model = nn.ModuleDict({"norm": nn.LayerNorm(4), "map": nn.Linear(4, 4), "still": nn.Linear(4, 4)})
    for parameter in model.parameters():
        parameter._hp_mapping = SimpleNamespace(hp_fragment=parameter.data)  # type: ignore[attr-defined]
    check = MovementCheck(SimpleNamespace(module=model))
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    model["still"](model["map"](model["norm"](x))).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        if not name.startswith("still"):
            parameter.data -= step * parameter.grad.sign()
    return check.finish(lr)


def test_what_stood_still_is_named() -> None:
    assert still_after(1e-3, lr=1e-3) == ["still.bias", "still.weight"]


def test_a_step_that_float32_rounds_away_says_nothing() -> None:
    """Ones do not feel a step of 2e-8, the first of one cycle at a rate of 2e-4; smaller values do."""
    assert still_after(2e-8, lr=2e-8) == ["still.bias", "still.weight"]


@pytest.mark.parametrize("lr", (1e-3, 1e-7))
def test_ones_that_stand_still_at_a_step_they_could_feel_are_named(lr: float) -> None:
    assert "norm.weight" in still_after(0.0, lr=lr)
