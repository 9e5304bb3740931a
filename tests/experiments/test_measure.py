"""What is read of a finished run's folder, and what is left of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shodh.checkpoint.folder import MANIFEST
from shodh.core.errors import CheckpointError
from shodh.experiments.harness.worker import prune_checkpoints
from shodh.experiments.transfer.measure import scheduled_checkpoints, seconds_per_step
from shodh.train.run_folder import RunFolder


def write_metrics(folder: Path, milliseconds: dict[int, float]) -> RunFolder:
    """``milliseconds`` a step by the number of steps at which they were logged."""
    lines = [json.dumps({"step": done - 1, "perf/step_ms": ms}) for done, ms in milliseconds.items()]
    lines.insert(1, json.dumps({"step": 9, "valid/field_mse": 1.0}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return RunFolder(folder)


def test_seconds_of_a_step_leave_out_start_and_validations(tmp_path: Path) -> None:
    """A validation after 20 and 40 steps falls into the intervals that follow the lines of these steps."""
    slow = {10: 90.0, 20: 10.0, 30: 70.0, 40: 12.0, 50: 80.0}
    assert seconds_per_step(write_metrics(tmp_path, slow), 20) == pytest.approx(0.011)
    assert seconds_per_step(write_metrics(tmp_path, {10: 5.0, 20: 7.0, 30: 9.0}), 10) == pytest.approx(0.007)
    assert seconds_per_step(RunFolder(tmp_path / "absent"), 10) is None


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run of 10 steps with checkpoints every 4, interrupted after 5."""
    for step in (4, 5, 8, 10):
        checkpoint = tmp_path / "checkpoints" / f"step_{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / MANIFEST).write_text(json.dumps({"state": {"step": step}, "files": {}, "topology": {}}))
    (tmp_path / "latest").write_text("step_00000010\n")
    return RunFolder(tmp_path)


def test_curves_have_the_checkpoints_of_the_schedule_alone(folder: RunFolder) -> None:
    assert [step for step, _ in scheduled_checkpoints(folder, 10, 4)] == [4, 8, 10]


def test_last_checkpoint_is_left_and_no_curve_is_drawn_without_the_others(folder: RunFolder) -> None:
    prune_checkpoints(folder)
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step_00000010"]
    with pytest.raises(CheckpointError, match="no checkpoint of step 4; to measure this run again, remove"):
        scheduled_checkpoints(folder, 10, 4)
