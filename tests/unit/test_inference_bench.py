"""What the comparison of model and solver rests on: the same initial state on a coarser grid, means over its cells."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shodh.physics.regime import smooth_noise
from tools.bench.inference import breakeven, coarsened, noise_of, verdict


@pytest.mark.parametrize(("factor", "fine"), [(2, (32, 24)), (4, (32, 64))])
def test_noise_of_a_coarse_grid_is_that_of_the_fine_one(factor: int, fine: tuple[int, ...]) -> None:
    coarse = tuple(n // factor for n in fine)
    arguments = ("waves", (1.0, 1.0), (0.15, 0.15))
    whole = smooth_noise(3, arguments[0], fine, *arguments[1:])
    with noise_of(factor, coarse):
        found = smooth_noise(3, arguments[0], coarse, *arguments[1:])
        assert torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(0)).shape == (3, 3, 3)
    other = smooth_noise(3, arguments[0], coarse, *arguments[1:])
    means = torch.from_numpy(coarsened(whole.numpy(), factor, 2, face=False))
    assert float((found - means).std()) < 0.12 < 1 < float((other - means).std())


def test_means_over_blocks_keep_the_flux_through_coarse_faces() -> None:
    values = np.random.default_rng(0).standard_normal((8, 4, 6, 3))
    found = coarsened(values, 2, 3, face=True)
    assert found.shape == (4, 2, 3, 3)
    assert found[1, 1, 2, 0] == pytest.approx(values[3, 2:4, 4:6, 0].mean())
    assert found[1, 1, 2, 2] == pytest.approx(values[2:4, 2:4, 5, 2].mean())
    assert coarsened(values[..., 0], 2, 3, face=False)[0, 0, 0] == pytest.approx(values[:2, :2, :2, 0].mean())


def test_training_is_paid_back_only_where_the_model_is_faster() -> None:
    assert breakeven(600.0, 3.0, 1.0) == 300.0
    assert breakeven(600.0, 1.0, 1.0) is None


@pytest.mark.parametrize(
    ("equal", "winners"), [(0.5, ["model", "solver"]), (4.0, ["model", "model"]), (None, ["model", "unknown"])]
)
def test_verdict_names_the_faster_one(equal: float | None, winners: list[str]) -> None:
    text = verdict(600.0, 1.0, 3.0, equal)
    parts = text.split("; ")
    for part, winner in zip(parts, winners, strict=True):
        assert winner == "unknown" if ": unknown" in part else f": the {winner} is" in part
    assert "after 300 forecasts" in parts[0]
    assert ("never" in text) == ("solver" in winners)
    assert "unknown number" in verdict(float("nan"), 1.0, 3.0, None)
