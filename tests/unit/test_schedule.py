"""The learning rate."""

from __future__ import annotations

import pytest
import torch

from shodh.config import TrainConfig
from shodh.train.schedule import learning_rate


def test_warm_up_is_linear_and_the_cosine_ends_at_its_floor() -> None:
    config = TrainConfig(steps=100, warmup=10, lr=2.0, min_lr=0.1)
    rates = [learning_rate(step, config) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(2.0) and rates[55] == pytest.approx(1.1) and rates[100] == pytest.approx(0.2)
    assert all(a >= b for a, b in zip(rates[9:], rates[10:], strict=False))
    assert learning_rate(500, config) == pytest.approx(0.2)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (5, 5), (5, 50)])
def test_short_runs_have_finite_positive_rates(steps: int, warmup: int) -> None:
    config = TrainConfig(steps=steps, warmup=warmup, lr=1.0)
    assert all(0 < learning_rate(step, config) <= 1.0 for step in range(steps))


def test_one_cycle_is_that_of_torch() -> None:
    config = TrainConfig(steps=60, warmup=12, lr=3e-3, min_lr=1e-3, schedule="one_cycle")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.lr, total_steps=60, pct_start=12 / 60, div_factor=1e4, final_div_factor=0.1
    )
    for step in range(config.steps):
        assert learning_rate(step, config) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), step
        optimizer.step()
        if step + 1 < config.steps:
            theirs.step()


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (5, 5), (5, 50)])
def test_a_short_cycle_has_finite_positive_rates(steps: int, warmup: int) -> None:
    config = TrainConfig(steps=steps, warmup=warmup, lr=1.0, schedule="one_cycle")
    assert all(0 < learning_rate(step, config) <= 1.0 for step in range(steps + 2))
