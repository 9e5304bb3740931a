"""The model card promises what the model does, and no more."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from shodh.checkpoint.card import model_card
from shodh.schema.conditions import Condition
from shodh.schema.domain import Domain
from shodh.schema.fields import Field
from shodh.schema.space import RegimeSpace, Space


def description(*parts: str, dtype: str = "fp32") -> dict[str, Any]:
    run = {"name": "r", "seed": 0, "data": {"grid": [8, 8, 8], "history": 2}}
    sizes = {"total": 2, "active": 1}
    return {"run": run, "parts": parts, "dtype": dtype, "parameters": sizes, "source": {"step": 3}}


VELOCITY = Field("velocity", "vector", solenoidal=True, placement="face")
REGIME = RegimeSpace.of("a", Domain(("periodic",) * 3, (1.0, 1.0, 1.0)), {"velocity": (0.0, 1.0)})
SPACE = Space((VELOCITY,), 3, (REGIME,))


@pytest.mark.parametrize(("parts", "decoded"), [(("tokenizer", "operator"), True), (("operator",), False)])
def test_only_decoded_velocities_are_said_to_conserve_mass(parts: tuple[str, ...], decoded: bool) -> None:
    card = model_card(description(*parts), SPACE)
    assert ("conserves mass by construction" in card) == decoded
    assert "upper face of its cell" in card and 'placement="center"' in card, "files are averaged onto faces"
    assert ("neither conservation of mass nor no-slip" in card) != decoded


def test_conditions_stand_with_their_ranges_and_in_the_call() -> None:
    step = Condition("time_step", False, 0.1, 0.1, (("a", 0.1, 0.1),))
    nu = Condition("nu", True, 0.0, 1.0, (("a", 1e-4, 1e-2),))
    card = model_card(description("operator"), replace(SPACE, conditions=(step, nu)))
    assert "\n| conditions | time_step 0.1 to 0.1, nu 0.0001 to 0.01 |\n" in card
    assert "regime=\"a\", conditions={'nu': 0.0001})" in card, "what has one value is not asked for"
    assert "conditions" not in model_card(description("operator"), SPACE)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_numbers_say_when_weights_were_stored_otherwise(dtype: str) -> None:
    numbers = {"split": "test", "regimes": {"a": {"latent_mse": {"model": 0.5, "persistence": 1.0}}}}
    card = model_card(description("operator", dtype=dtype), SPACE, numbers)
    assert ("here they are bf16" in card) == (dtype == "bf16")
    assert "| a | latent_mse | 0.5 | 1 |" in card
    assert "No numbers of `launch/evaluate.py` came with these weights" in model_card(description("operator"), SPACE)
