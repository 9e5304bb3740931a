"""``launch/study.py``: runs are made, kept, and named when they fail; bad input is answered with one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helper import ROOT, run_script
from published import TINY_MOE_POT

STUDY = "launch/study.py"


@pytest.fixture
def study_file(tmp_path: Path, write_config: Callable[..., Path]) -> Path:
    """A study of MoE-POT on the tiny data: no tokenizer, one block, two steps."""
    base = write_config(tmp_path / "base.yaml")
    tree = yaml.safe_load(base.read_text())
    tree["operator"] = {**TINY_MOE_POT, "loss": "mse"}
    tree["evaluation"] = {"rollout": 1, "starts": 0}  # All windows, as the study takes them.
    base.write_text(yaml.safe_dump(tree))
    study = {
        "name": "s",
        "question": "Does it help?",
        "out": str(tmp_path / "runs"),
        "base": str(base),
        "mixes": {"both": ["open_channel", "porous_media"]},
        "models": ["sparse", "dense_active"],
        "seeds": 1,
        "checkpoints": 2,
        "gradient_samples": 2,
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    return path


@pytest.mark.slow
def test_finished_runs_are_kept_and_a_failed_one_is_named(study_file: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs" / "s" / "runs"
    runs.mkdir(parents=True)
    blocked = runs / "both-dense_active-s0"
    blocked.write_text("a file where the run's folder should be")
    first = run_script(STUDY, "--config", study_file, "--jobs", "2")
    assert first.code == 1
    (line,) = (text for text in first.stderr.splitlines() if text.startswith("failed: "))
    assert "both-dense_active-s0" in line and "Not a directory" in line
    summary = json.loads((tmp_path / "runs" / "s" / "report" / "summary.json").read_text())
    assert "Not a directory" in summary["missing"]["both-dense_active-s0"]
    assert summary["verdict"] == "Not asked" and "Runs without a result, named below: 1 of 2" in summary["answer"]
    kept = runs / "both-sparse-s0" / "result.json"
    _check_result(json.loads(kept.read_text()))
    assert (kept.parent / "report" / "index.html").exists()
    assert [path.name for path in (kept.parent / "checkpoints").glob("step_*")] == ["step_00000002"]

    before = kept.stat().st_mtime_ns
    again = run_script(STUDY, "--config", study_file, "--only", "both-sparse-s0")
    assert again.code == 0 and summary["answer"] in again.stdout
    assert kept.stat().st_mtime_ns == before

    for setting, section in (("operator.train.lr=0.1", "operator"), ("study.gradient_samples=3", "gradient_samples")):
        changed = run_script(STUDY, "--config", study_file, "--set", setting, "--report-only")
        assert changed.code == 2 and f"other settings of {section}" in changed.stderr


def _check_result(result: dict[str, Any]) -> None:
    """The errors of the study are those of the evaluation, and the curve has its points."""
    assert [point["step"] for point in result["history"]] == [0, 1, 2]
    assert result["measure"] == "field_mse"
    for regime, error in result["errors"].items():
        expected = result["evaluation"]["regimes"][regime]["decoded_mse"]
        assert error["model"] == pytest.approx(expected["model"], rel=1e-5)
        assert error["persistence"] == pytest.approx(expected["persistence"], rel=1e-5)
        assert len(error["by_trajectory"]) == 1, "trajectories of the test split"
        assert error["by_trajectory"] == pytest.approx([error["model"]])
    for point in result["history"]:
        for cosines in point["cosines"].values():
            assert all(-1 <= c <= 1 for c in cosines.values())
    assert result["active_parameters"] < result["total_parameters"]
    assert result["flops_per_step"] > 0 and result["seconds_per_step"] > 0


@pytest.mark.slow
@pytest.mark.exhaustive
def test_interrupt_saves_a_checkpoint_and_starts_no_other_run(study_file: Path, tmp_path: Path) -> None:
    """Ctrl-C in a terminal goes to the study and to its runs at once."""
    command = [sys.executable, STUDY, "--config", str(study_file), "--set", "operator.train.steps=100000"]
    study = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "runs" / "s" / "jobs" / "both-sparse-s0.log"
    try:
        _wait_until(lambda: log.exists() and "step 20/" in log.read_text())
        os.killpg(study.pid, signal.SIGINT)
        _, stderr = study.communicate(timeout=60)
    finally:
        if study.poll() is None:
            os.killpg(study.pid, signal.SIGKILL)
    assert study.returncode == 3 and "stopped by a signal; the same command goes on" in stderr
    assert "stopped at step" in log.read_text() and not log.with_name("both-dense_active-s0.log").exists()
    assert (tmp_path / "runs" / "s" / "runs" / "both-sparse-s0" / "latest").exists()


def _wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)


def test_dry_run_lists_the_runs_and_touches_nothing(study_file: Path, tmp_path: Path) -> None:
    finished = run_script(STUDY, "--config", study_file, "--dry-run")
    assert finished.code == 0, finished.stderr
    assert "2 runs" in finished.stdout and "both-dense_active-s0" in finished.stdout
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--only", "nothing*"], "--only 'nothing*' matches no run; they are both-sparse-s0"),
        (["--jobs", "0"], "--jobs 0: must be at least 1"),
        (["--scale", "paper"], "not defined at scale paper"),
        (["--set", "operator.depht=1"], "did you mean 'depth'?"),
    ],
)
def test_bad_input_is_answered_in_one_line(study_file: Path, arguments: list[str], expected: str) -> None:
    finished = run_script(STUDY, "--config", study_file, *arguments)
    assert finished.code == 2
    (line,) = finished.stderr.splitlines()
    assert line.startswith("error: ") and expected in line


def test_missing_study_file(tmp_path: Path) -> None:
    finished = run_script(STUDY, "--config", tmp_path / "absent.yaml")
    assert finished.code == 2 and finished.stderr.startswith("error: cannot read configuration")


def test_tiny_study_of_the_project_is_dry_run() -> None:
    assert (ROOT / "launch" / "configs" / "study_tiny.yaml").exists()
    finished = run_script(STUDY, "--config", "launch/configs/study_tiny.yaml", "--dry-run")
    assert finished.code == 0, finished.stderr
    assert "both-sparse_oracle-s2" in finished.stdout
