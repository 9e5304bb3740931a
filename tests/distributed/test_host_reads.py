"""Between logging steps no rank waits for its device, and ranks meet when they said they would."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rank_jobs
import torch
from helper import run_ranks
from laboratory import Laboratory

from shodh.train.callbacks import StopSignal, checkpoints

ON_THE_HOST = {"sample_names", "_shift"}  # What they read are the keys of samples, and numbers drawn from these.


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "stage"), [(1, 1), (2, 2)])
def test_a_step_that_is_not_logged_reads_nothing(laboratory: Laboratory, ranks: int, stage: int) -> None:
    quiet = [f"operator.train.{name}" for name in ("log_every=100", "valid_every=0", "checkpoint_every=0")]
    overrides = laboratory.overrides(f"reads{ranks}", 1, stage, *quiet)
    for seen in run_ranks(ranks, rank_jobs.pretrain_counting_reads, laboratory.config, overrides, 4):
        ours = {function for file, function in seen["reads"] if "/shodh/" in file}
        assert ours <= ON_THE_HOST
        assert "sample_names" in ours, "reads are noted"
        assert len(seen["reads"]) - sum("/shodh/" in file for file, _ in seen["reads"]) <= 4  # DeepSpeed's clipping.


@pytest.mark.parametrize(("seconds", "between"), [(0.001, 10), (0.3, 3), (7.0, 1)])
def test_ranks_meet_after_a_second_or_ten_steps(monkeypatch: Any, seconds: float, between: int) -> None:
    """However fast the steps, a signal is heard at most ten steps later; however slow, never later than the next."""
    clock, heard = [0.0], []
    monkeypatch.setattr(checkpoints.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(checkpoints.signals, "hold", lambda *_: None)
    monkeypatch.setattr(checkpoints, "reduce_metrics", lambda given, _: {name: v for name, (v, _) in given.items()})
    two = SimpleNamespace(world_size=2)
    engine = SimpleNamespace(device=torch.device("cpu"))
    trainer: Any = SimpleNamespace(step=0, topology=two, engine=engine, finished=False, stopping=False, meeting=True)
    callback = StopSignal(Path("run"))
    callback.start(trainer)
    for _ in range(40):
        trainer.step += 1
        clock[0] += seconds
        if trainer.step == 22:
            monkeypatch.setattr(checkpoints.signals, "asked", lambda: True)
        callback.after_step(trainer)
        heard += [trainer.step] * trainer.meeting
        if trainer.stopping:
            break
    assert heard[0] == 1 and {b - a for a, b in zip(heard, heard[1:], strict=False)} == {between}
    assert 22 <= trainer.step < 22 + between
