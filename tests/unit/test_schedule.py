"""The learning rate."""

from __future__ import annotations

import pytest

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
