"""``launch/study.py`` with a file of kind map: made, reported, and refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from helper import ROOT, run_script

STUDY, MAP = "launch/study.py", "launch/configs/study_map.yaml"


@pytest.fixture
def short(tmp_path: Path) -> Path:
    """The map of the tree with models of one layer and two steps, in a folder of the test."""
    tree = yaml.safe_load((ROOT / MAP).read_text())
    tree |= {"out": str(tmp_path / "runs"), "grid": 16, "held_out": 4, "gradient_samples": 4}
    tree["operator"] |= {"depth": 1, "train": {**tree["operator"]["train"], "steps": 2}}
    tree |= {"samples": 1, "regimes": ["advection_right", "advection_left"]}
    tree.pop("scales")
    path = tmp_path / "study_map.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.slow
def test_map_is_made_and_reported(short: Path, tmp_path: Path) -> None:
    finished = run_script(STUDY, "--config", short)
    assert finished.code == 0, finished.stderr
    folder = tmp_path / "runs" / "map"
    summary = json.loads((folder / "report" / "summary.json").read_text())
    assert summary["missing"] == {}
    assert {row["model"] for row in summary["transfer"]["index"]} == {
        "dense", "dense_router", "dense_total", "token", "operator", "operator_gate", "oracle", "hash",
    }  # fmt: skip
    assert len(summary["gradients"]["gradient_norms"]) == 2
    assert (folder / "report" / "index_by_model.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--only", "nothing*"], "matches no run"),
        (["--keep-checkpoints"], "--keep-checkpoints"),
        (["--set", "operator.depht=1"], "did you mean 'depth'?"),
        (["--set", "study.dims=[12]", "study.expansion=0.5"], "no multiple of 8"),
        (["--set", "study.apart.own=[heads.*]"], "'heads.*' matches no parameter"),
        (["--set", "study.sample=1"], "did you mean 'samples'?"),
    ],
)
def test_bad_input_is_answered_in_one_line(short: Path, arguments: list[str], expected: str) -> None:
    finished = run_script(STUDY, "--config", short, *arguments)
    assert finished.code == 2
    (line,) = finished.stderr.splitlines()
    assert line.startswith("error: ") and expected in line
