"""The model card promises what the model does, and no more."""

from __future__ import annotations

from typing import Any

import pytest

from shodh.checkpoint.card import model_card


def description(*parts: str, dtype: str = "fp32") -> dict[str, Any]:
    run = {"name": "r", "seed": 0, "data": {"grid": [8, 8, 8], "history": 2}}
    sizes = {"total": 2, "active": 1}
    fields = [{"name": "velocity", "kind": "vector", "solenoidal": True}]
    values = {"run": run, "parts": parts, "dtype": dtype, "parameters": sizes, "fields": fields}
    return {**values, "regimes": ["a"], "source": {"step": 3}}


@pytest.mark.parametrize(("parts", "decoded"), [(("tokenizer", "operator"), True), (("operator",), False)])
def test_only_decoded_velocities_are_said_to_conserve_mass(parts: tuple[str, ...], decoded: bool) -> None:
    card = model_card(description(*parts))
    assert ("conserves mass by construction" in card) == decoded
    assert ("upper face of its cell" in card) == decoded
    assert ("neither conservation of mass nor no-slip" in card) != decoded


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_numbers_say_when_weights_were_stored_otherwise(dtype: str) -> None:
    numbers = {"split": "test", "regimes": {"a": {"latent_mse": {"model": 0.5, "persistence": 1.0}}}}
    card = model_card(description("operator", dtype=dtype), numbers)
    assert ("here they are bf16" in card) == (dtype == "bf16")
    assert "| a | latent_mse | 0.5 | 1 |" in card
    assert "No numbers of `launch/evaluate.py` came with these weights" in model_card(description("operator"))
