"""``launch/finetune.py`` from end to end on tiny data, on two ranks, and its answers to bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pytest
import yaml
from helper import run_script
from published import TINY_MOE_POT

FINETUNE = "launch/finetune.py"


@pytest.fixture
def run(tmp_path: Path, write_config: Callable[..., Path], tiny_data: Path) -> Path:
    """A run on one tiny regime, trained for two steps."""
    path = write_config(tmp_path / "base.yaml")
    tree = yaml.safe_load(path.read_text())
    regimes = [{"name": "open_channel", "path": str(tiny_data / "open_channel")}]
    tree |= {"operator": TINY_MOE_POT, "evaluation": {"rollout": 2}, "data": {**tree["data"], "regimes": regimes}}
    path.write_text(yaml.safe_dump(tree))
    finished = run_script("launch/pretrain.py", "--config", path)
    assert finished.code == 0, finished.stderr
    return tmp_path / "runs" / "tiny"


@pytest.mark.slow
def test_runs_are_trained_once_and_reported(run: Path, tiny_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    regime = f"unseen={tiny_data / 'porous_media'}"
    arguments = ["--run", run, "--regime", regime, "--trajectories", "2", "--seeds", "1", "--steps", "2"]
    arguments += ["--out", tmp_path, "--name", "tuned"]
    finished = run_script(FINETUNE, *arguments, "--train", "new_expert", "--jobs", "2")
    assert finished.code == 0, finished.stderr
    runs = {path.parent.name: json.loads(path.read_text()) for path in (out / "runs").glob("*/result.json")}
    assert runs.keys() == {f"unseen-n2-{method}-s0" for method in ("zero_shot", "new_expert", "scratch")}
    errors = {name: values["evaluation"]["regimes"]["unseen"]["vrmse"] for name, values in runs.items()}
    for field in ("velocity", "tracer"):
        found = [error[field]["model"] for error in errors.values()]
        assert len(set(found)) == 3, "each method has an error of its own"
        assert len({error[field]["persistence"] for error in errors.values()}) == 1, "on the same windows"
    for values in runs.values():
        regime_of = values["evaluation"]["regimes"]["unseen"]
        for field, kept in values["by_trajectory"]["vrmse"].items():
            assert len(kept) == regime_of["trajectories"]
            assert fmean(kept) == pytest.approx(regime_of["vrmse"][field]["model"], rel=1e-6)
            rolled = values["by_trajectory"]["rollout"][field]
            assert fmean(rolled) == pytest.approx(fmean(regime_of["rollout"][field]["model"]), rel=1e-6)
    assert "unseen  tracer    2             new_expert   1" in finished.stdout
    assert (out / "report" / "index.html").exists()
    before = {name: (out / "runs" / name / "result.json").stat().st_mtime_ns for name in runs}
    again = run_script(FINETUNE, *arguments, "--train", "new_expert")
    assert again.code == 0 and again.stdout == finished.stdout
    assert before == {name: (out / "runs" / name / "result.json").stat().st_mtime_ns for name in runs}
    changed = run_script(FINETUNE, *arguments, "--train", "new_expert", "--set", "operator.train.clip=2")
    assert changed.code == 2 and "other settings of operator" in changed.stderr

    dry = run_script(FINETUNE, *arguments, "--train", "new_expert", "all", "--dry-run")
    assert dry.code == 0 and dry.stdout.count("finished") == 3 and dry.stdout.count("to do") == 1
    for bad, expected in (
        (["--trajectories", "9"], "--trajectories 9: regime 'unseen' has 3 training trajectories"),
        (["--regime", f"other={tmp_path / 'nowhere'}"], "nowhere: it does not exist"),
        (["--run", tmp_path], "is not a run folder"),
        (["--jobs", "0"], "--jobs 0: must be at least 1"),
        (["--steps", "0"], "steps: Input should be greater than 0"),
        (["--config", tmp_path / "absent.yaml"], "cannot read configuration"),
    ):
        refused = run_script(FINETUNE, *arguments, *bad)
        assert refused.code == 2, refused.stdout
        (line,) = refused.stderr.splitlines()
        assert line.startswith("error: ") and expected in line


def test_what_is_missing_is_said() -> None:
    finished = run_script(FINETUNE, "--run", "runs/x")
    assert finished.code == 2 and finished.stderr.startswith("error: ") and finished.stderr.count("\n") == 1
    assert all(option in finished.stderr for option in ("--run", "--regime", "--config"))


def test_help_has_an_example() -> None:
    finished = run_script(FINETUNE, "--help")
    assert finished.code == 0 and "--trajectories 1 4 16" in finished.stdout
