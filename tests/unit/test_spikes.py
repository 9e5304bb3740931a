"""A spike is what stands out from the last steps that were taken."""

from __future__ import annotations

import json
import math
import random

import pytest

from shodh.config import SpikeConfig
from shodh.core.errors import CheckpointError
from shodh.train.spikes import Usual


def fed(values: list[float], **config: float) -> Usual:
    usual = Usual(SpikeConfig(**{"window": 16, **config}))  # type: ignore[arg-type]
    for value in values:
        usual.judge({"loss": value, "grad_norm": 2 * value})
        usual.finish(applied=True)
    return usual


NOISE = [1.0 + 0.01 * math.sin(7.0 * n) for n in range(16)]  # mean 1, deviation .007


@pytest.mark.parametrize(
    ("loss", "norm", "named"),
    [(1.05, 2.0, "loss"), (1.0, 2.1, "grad_norm"), (1.03, 2.05, None), (-5.0, 0.0, None), (math.nan, 2.0, None)],
)
def test_six_deviations_above_the_mean(loss: float, norm: float, named: str | None) -> None:
    usual = fed(NOISE)
    assert usual.judge({"loss": loss, "grad_norm": norm}) is (named is not None)
    assert (usual.spike or "").partition(" ")[0] == (named or "")


def test_nothing_is_a_spike_until_the_window_is_full_and_equal_values_need_more_than_one_percent() -> None:
    assert not fed(NOISE[:15]).judge({"loss": 100.0, "grad_norm": 1.0})
    same = fed([1.0] * 16)
    assert not same.judge({"loss": 1.009, "grad_norm": 2.0}) and same.judge({"loss": 1.011, "grad_norm": 2.0})


def test_a_step_that_was_not_taken_is_not_usual() -> None:
    usual = fed(NOISE)
    for _ in range(50):
        assert usual.judge({"loss": 9.0, "grad_norm": 2.0})
        usual.finish(applied=False)
    usual.finish(applied=False)  # Not finite: without a judgement.
    assert usual.spike is None
    assert not usual.judge({"loss": 1.0, "grad_norm": 2.0})


def test_what_a_checkpoint_holds_is_the_same_to_the_last_bit() -> None:
    draw = random.Random(0)
    usual = fed([draw.random() for _ in range(40)])
    again = Usual(SpikeConfig(window=16))
    again.load(json.loads(json.dumps(usual.state())))
    assert again.state() == usual.state() and len(usual.state()["loss"]) == 16
    for damaged in ({"loss": [1.0]}, {"loss": ["x"], "grad_norm": []}, 3):
        with pytest.raises(CheckpointError, match="damaged"):
            again.load(damaged)
