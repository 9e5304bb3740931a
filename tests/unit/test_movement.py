"""The check after the first step: what stood still is named, unless float32 could not show its step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from shodh.train.engine import MovementCheck


def still_after(lr: float, clip: float = 1.0, lost: str = "", put_back: str = "", zero: str = "") -> list[str]:
    """Names found after a step of AdamW, of which no parameter is to be named but those of the arguments.

    Parameters
    ----------
    clip : float
        Gradient norm that the optimiser is given.
    lost, put_back, zero : str
        Beginning of names: that the optimiser does not have, whose old value is put back, without gradient.
    """
    model = nn.ModuleDict({"norm": nn.LayerNorm(4), "map": nn.Linear(4, 4), "more": nn.Linear(4, 4)})
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [p for name, p in named.items() if not lost or not name.startswith(lost)], lr=lr, weight_decay=0
    )
    for parameter in named.values():
        parameter._hp_mapping = SimpleNamespace(  # type: ignore[attr-defined]
            hp_fragment=parameter.data, hp_fragment_address=SimpleNamespace(start=0, numel=parameter.numel())
        )
    check = MovementCheck(SimpleNamespace(module=model, optimizer=SimpleNamespace(optimizer=optimizer)))
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    output = model["more"](model["map"](model["norm"](x)))
    (output.square().sum() * (0.0 if zero == "all" else 1.0)).backward()
    nn.utils.clip_grad_norm_(named.values(), clip)
    before = {name: p.detach().clone() for name, p in named.items()}
    optimizer.step()
    for name, parameter in named.items():
        if put_back and name.startswith(put_back):
            parameter.data.copy_(before[name])
    return check.finish(lr)


@pytest.mark.parametrize("lr", (1e-3, 1e-7))
def test_what_stood_still_is_named(lr: float) -> None:
    assert still_after(lr, lost="more") == ["more.bias", "more.weight"]
    assert still_after(lr, put_back="norm.weight") == ["norm.weight"]


@pytest.mark.parametrize(
    ("lr", "clip"),
    [(1e-3, 1.0), (2e-8, 1.0), (1e-3, 1e-13), (1e-3, 1e-30), (1e-45, 1.0), (0.0, 1.0)],
    ids=["usual", "one cycle's first", "heavy clipping", "heaviest clipping", "least rate", "no rate"],
)
def test_a_step_that_float32_rounds_away_says_nothing(lr: float, clip: float) -> None:
    """Ones do not feel a step of 2e-8, nor, after AdamW's epsilon, one of a clipped gradient of 1e-13."""
    assert still_after(lr, clip) == []


def test_what_has_no_gradient_may_stand_still() -> None:
    assert still_after(1e-3, zero="all") == []


def test_frozen_experts_are_found_after_heavy_clipping_too() -> None:
    assert still_after(1e-3, 1e-13, lost="more") == ["more.bias", "more.weight"]
