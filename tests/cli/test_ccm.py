"""``launch/ccm.py``: a family from nothing to a report, finished pieces kept; bad input is answered with one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from helper import ROOT, run_script
from published import published

from shodh.schema.space import Space

STUDY = "launch/ccm.py"


@pytest.fixture
def study_file(tmp_path: Path) -> Path:
    """Vortices of 16 x 16 cells at three viscosities, an FNO of one layer, two steps."""
    base = {
        "name": "base",
        "data": {
            "grid": [16, 16],
            "history": 1,
            "fields": [{"name": "vorticity"}],
            "regimes": [{"name": "vorticity_2d", "path": "unset"}],
        },
        "operator": published(
            {
                "kind": "fno",
                "dim": 8,
                "modes": 4,
                "depth": 1,
                "train": {"steps": 1, "warmup": 1, "global_batch": 4, "log_every": 1, "valid_batches": 1},
            }
        ),
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    study = {
        "name": "c",
        "question": "Does it help?",
        "out": str(tmp_path / "runs"),
        "data": str(tmp_path / "data"),
        "base": str(tmp_path / "base.yaml"),
        "backbones": {"fno": {}},
        "seeds": 1,
        "anchor_steps": 2,
        "expert_steps": 2,
        "expert_lr": 0.01,
        "prefix": 1,
        "rollout": 2,
        "methods": ["anchor", "low", "high", "coord", "scale", "prefix"],
        "family": {
            "regime": "vorticity_2d",
            "parameter": "viscosity",
            "frames": 4,
            "train": 2,
            "valid": 1,
            "test": 1,
            "low": 0.001,
            "high": 0.01,
            "support": [0.001, 0.01],
            "extrapolation": [0.02],
            "validation": [0.001, 0.01],
        },
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    return path


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)  # Its workers import everything, one after another.
def test_a_family_from_nothing_to_a_report(study_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "c"
    # A file where the low expert's folder should be: its run fails, those that do not need it are made.
    blocked = folder / "runs" / "seed0-low"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("no folder")
    first = run_script(STUDY, "--config", study_file, "--jobs", "2", timeout=600)
    assert first.code == 1
    (line,) = (text for text in first.stderr.splitlines() if text.startswith("failed: "))
    assert "seed0-low" in line and "Not a directory" in line
    anchor, high = (folder / "converted" / "seed0" / member for member in ("anchor", "high"))
    assert high.exists() and not (folder / "results").exists()

    blocked.unlink()
    before = {path: path.stat().st_mtime_ns for path in (anchor / "config.json", high / "config.json")}
    second = run_script(STUDY, "--config", study_file, timeout=600)
    assert second.code == 0, second.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    low = folder / "converted" / "seed0" / "low"
    descriptions = [config_of(path) for path in (anchor, low, high)]
    spaces = [Space.load(path).regimes for path in (anchor, low, high)]
    assert len({space[0].constants for space in spaces}) == 1
    assert [d["source"]["init_from"] for d in descriptions[1:]] == [descriptions[0]["source"]["sha256"]] * 2
    assert [d["run"]["family"]["parameters"]["viscosity"] for d in descriptions] == [[0.001, 0.01], 0.001, 0.01]
    result = json.loads((folder / "results" / "seed0.json").read_text())
    assert [value["value"] for value in result["values"]] == [0.001, 0.01, 0.02]
    at_low = result["values"][0]["methods"]
    assert at_low["coord"]["error"] == at_low["low"]["error"] != at_low["anchor"]["error"]
    assert (folder / "report" / "index.html").exists()

    shutil.rmtree(folder / "runs")
    shutil.rmtree(tmp_path / "data")
    again = run_script(STUDY, "--config", study_file, "--report-only")
    assert again.code == 0 and again.stdout == second.stdout
    assert not (tmp_path / "data").exists()


def test_dry_run_lists_values_and_runs_and_touches_nothing(study_file: Path, tmp_path: Path) -> None:
    finished = run_script(STUDY, "--config", study_file, "--dry-run")
    assert finished.code == 0, finished.stderr
    assert "extrapolation" in finished.stdout and "seed0-evaluate" in finished.stdout
    assert not (tmp_path / "runs").exists() and not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--only", "nothing*"], "--only 'nothing*' matches no run; they are seed0-anchor, seed0-low"),
        (["--only", "seed0-low"], "seed0-low needs seed0-anchor, which is not finished; choose it too"),
        (["--seeds", "0"], "--seeds 0: must be at least 1"),
        (["--scale", "paper"], "not defined at scale paper; it has ['tiny']"),
        (["--backbone", "unet"], "backbone 'unet': the study has ['fno']"),
        (["--set", "study.rollout=3"], "trajectories have 4 frames, and history 1, prefix 1 and rollout 3 need 5"),
        (["--set", "study.family.low=0.002"], "low=0.002 is not in the support [0.001, 0.01]"),
        (["--set", "operator.depht=1"], "did you mean 'depth'?"),
    ],
)
def test_bad_input_is_answered_in_one_line(
    study_file: Path, tmp_path: Path, arguments: list[str], expected: str
) -> None:
    finished = run_script(STUDY, "--config", study_file, *arguments)
    assert finished.code == 2
    (line,) = finished.stderr.splitlines()
    assert line.startswith("error: ") and expected in line
    assert not (tmp_path / "data").exists()


def test_study_of_the_project_is_dry_run() -> None:
    assert (ROOT / "launch" / "configs" / "ccm_vorticity.yaml").exists()
    finished = run_script(STUDY, "--config", "launch/configs/ccm_vorticity.yaml", "--scale", "paper", "--dry-run")
    assert finished.code == 0, finished.stderr
    assert "seed2-evaluate" in finished.stdout
