"""In bf16 gradients are summed in float32, over ranks and over micro-batches, at every ZeRO stage."""

from __future__ import annotations

import pytest
from engine_jobs import compiled_by_engine, error_of_gradient
from helper import ROOT, run_ranks

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("accumulation", (1, 4))
@pytest.mark.parametrize("stage", (1, 2, 3))
def test_optimiser_gets_the_float32_mean_of_the_bf16_gradients(stage: int, accumulation: int) -> None:
    """Against the same gradients summed in float64: float32 rounds to 6e-8, and bf16 would to 4e-3."""
    errors = run_ranks(2, error_of_gradient, ROOT / "ds_configs" / f"zero{stage}.json", accumulation)
    assert max(errors) < 1e-6


def test_engine_brings_no_compiler() -> None:
    """Seconds of every start."""
    assert run_ranks(1, compiled_by_engine, ROOT / "ds_configs" / "zero1.json") == [[]]
