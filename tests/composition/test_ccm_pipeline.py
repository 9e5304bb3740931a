"""Runs of a composition study, its data, and the normalisation that experts take from their anchor."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from known_family import MEAN, SCALE, study_tree
from published import published

from shodh.config import dump_config
from shodh.config.reading import section_from_dict
from shodh.core.errors import CheckpointError, ConfigError
from shodh.data import SPLITS, WellFile, compute_statistics, read_stats
from shodh.experiments.composition.data import join_support, make_data, missing_files, requests
from shodh.experiments.composition.runs import describe_study, expand, make
from shodh.experiments.composition.settings import CCMConfig
from shodh.experiments.harness.run import Run
from shodh.experiments.harness.runner import check_forerunners
from shodh.train.opening import inherited_normalizer

SMALL: dict[str, Any] = published({"kind": "fno", "dim": 8, "depth": 1, "modes": 2})


def make_study(root: Path, family: dict[str, Any] | None = None, **changes: Any) -> CCMConfig:
    settings = {"train": 3, "valid": 2, "test": 2, "per_file": 2, **(family or {})}
    return section_from_dict(CCMConfig, study_tree(root, SMALL, settings, **changes), "study")


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory) -> CCMConfig:
    """A study whose data are made; read them, never change them."""
    study = make_study(tmp_path_factory.mktemp("solved"))
    assert make_data(study, "cpu", 1) == 2 * 4 + 2 * 3  # Of each value in the support, and of each other.
    return study


def trajectories(folder: Path, split: str) -> int:
    return sum(WellFile(path).num_trajectories for path in (folder / "data" / split).glob("*.hdf5"))


def first_state(folder: Path, split: str) -> np.ndarray:
    with h5py.File(min((folder / "data" / split).glob("*.hdf5"))) as file:
        return np.asarray(file["t0_fields/vorticity"][0, 0])


def test_every_value_has_the_trajectories_that_its_part_needs(solved: CCMConfig) -> None:
    counts = {v: [trajectories(solved.value_folder(v), s) for s in SPLITS] for v in solved.family.values}
    assert counts == {0.01: [3, 2, 2], 0.0225: [1, 2, 2], 0.03: [3, 2, 2], 0.0325: [1, 1, 2]}


def test_initial_states_differ_from_value_to_value_and_split_to_split(solved: CCMConfig) -> None:
    states = [first_state(solved.value_folder(v), s) for v in solved.family.values for s in SPLITS]
    distances = [np.abs(a - b).max() for i, a in enumerate(states) for b in states[:i]]
    assert min(distances) > 0.1 * np.std(states)


def test_the_anchor_reads_the_files_of_the_support_and_no_others(solved: CCMConfig) -> None:
    linked = sorted(solved.anchor_folder.glob("data/train/*.hdf5"))
    assert [p.name for p in linked] == [f"{v!r}_vorticity_2d_0000{i}.hdf5" for v in (0.01, 0.03) for i in (0, 2)]
    assert all(os.stat(p).st_nlink == 2 for p in linked)
    assert [trajectories(solved.anchor_folder, s) for s in SPLITS] == [6, 4, 4]
    found = read_stats(solved.anchor_folder / "stats.yaml")
    expected = compute_statistics(linked, ["vorticity"])
    assert {k: v.get("vorticity") for k, v in found.items()} == {k: v.get("vorticity") for k, v in expected.items()}


def test_what_is_there_is_not_made_again(solved: CCMConfig) -> None:
    before = {p: p.stat().st_mtime_ns for p in solved.data.rglob("*") if p.is_file()}
    assert make_data(solved, "cpu", 1) == 0 and not missing_files(solved)
    assert {p: p.stat().st_mtime_ns for p in solved.data.rglob("*") if p.is_file()} == before


def test_a_support_that_changed_is_joined_anew(solved: CCMConfig, tmp_path: Path) -> None:
    shutil.copytree(solved.data, tmp_path / "data")  # Copies: the links are no longer links, and are made again.
    study = make_study(tmp_path)
    join_support(study)
    (study.anchor_folder / "data" / "train" / "0.07_vorticity_2d_00000.hdf5").write_text("a value of old")
    lost = study.anchor_folder / "data" / "test" / "0.01_vorticity_2d_00005.hdf5"
    lost.unlink()
    join_support(study)
    assert lost.exists() and len(list(study.anchor_folder.glob("data/*/*.hdf5"))) == 8
    assert read_stats(study.anchor_folder / "stats.yaml") == read_stats(solved.anchor_folder / "stats.yaml")


def test_files_are_copied_where_the_file_system_has_no_links(
    solved: CCMConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(solved.data, tmp_path / "data", ignore=shutil.ignore_patterns("support"))
    study = make_study(tmp_path)

    def refuse(*_: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    join_support(study)
    copies = {p: p.stat().st_ino for p in study.anchor_folder.glob("data/*/*.hdf5")}
    assert len(copies) == 8
    join_support(study)
    assert {p: p.stat().st_ino for p in copies} == copies


def test_data_of_other_settings_are_refused(solved: CCMConfig, tmp_path: Path) -> None:
    study = make_study(tmp_path, {"test": 3}, data=str(solved.data))
    with pytest.raises(ConfigError, match=r"was made with trajectories=7.*--set study\.data=FOLDER"):
        missing_files(study)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ({"regime": "vortexity"}, "family.regime 'vortexity': expected one of acoustics"),
        ({"parameter": "viscocity"}, "vorticity_2d has no parameter 'viscocity'; it has .*viscosity"),
        ({"fixed": {"height": 2.0}}, "vorticity_2d has no parameter 'height'"),
    ],
)
def test_unknown_physics_is_refused(
    tmp_path: Path, family: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(tmp_path, family)
    monkeypatch.setattr(CCMConfig, "base_config", make_study(tmp_path).base_config)
    with pytest.raises(ConfigError, match=message):
        requests(study)


def test_runs_wait_for_what_they_need(tmp_path: Path) -> None:
    study = make_study(tmp_path, seeds=2)
    every = {run.name: run for run in expand(study)}
    assert list(every)[:4] == ["seed0-anchor", "seed0-low", "seed0-high", "seed0-evaluate"] and len(every) == 8
    assert every["seed1-low"].after == ("seed1-anchor",)
    assert every["seed1-evaluate"].after == ("seed1-anchor", "seed1-low", "seed1-high")
    assert [every[f"seed1-{m}"].weights for m in ("anchor", "high")] == [(), (study.folder_of(1, "anchor"),)]
    job = json.loads(json.dumps(every["seed1-evaluate"].to_job()))
    assert section_from_dict(CCMConfig, job["told"]["study"], "job") == study
    again = Run.of_job(job, "job")
    assert again.to_job() == job and (again.labels["seed"], again.trains) == (1, False)


def test_a_run_without_its_forerunners_is_refused(tmp_path: Path) -> None:
    anchor, low, *_ = every = expand(make_study(tmp_path))
    with pytest.raises(ConfigError, match="seed0-low needs seed0-anchor, which is not finished; choose it too"):
        check_forerunners([low], every)
    check_forerunners([low, anchor], every)
    anchor.result.parent.mkdir(parents=True)
    anchor.result.write_text("{}")
    check_forerunners([low], every)


def test_runs_of_other_settings_are_refused(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    config = study.run_config(0, "low")
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(dump_config(config))
    make(study, 0, "low").check()
    make(study, 0, "high").check()
    changed = study.model_copy(update={"expert_lr": 0.5})
    with pytest.raises(ConfigError, match="seed0-low: .* is of other settings of operator; choose another --name"):
        make(changed, 0, "low").check()


def test_results_of_other_settings_are_refused_and_stay(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    run = make(study, 0, None)
    assert not run.finished
    run.result.parent.mkdir(parents=True)
    run.result.write_text(json.dumps({"identity": run.identity()}))
    run.check()
    assert make(study, 0, None).finished and not make(study, 1, None).finished
    for changed in ({"methods": ("anchor", "coord")}, {"prefix": 1}, {"set": ("operator.dim=16",)}):
        with pytest.raises(ConfigError, match=r"seed0\.json is of other settings of"):
            make(study.model_copy(update=changed), 0, None).check()
    make(study.model_copy(update={"question": "Why?", "seeds": 9}), 0, None).check()
    assert run.result.exists()


def test_a_dry_run_says_what_is_missing_and_makes_nothing(solved: CCMConfig, tmp_path: Path) -> None:
    text = describe_study(solved, expand(solved))
    assert "seed0-anchor" in text and "to do" in text and "0 PFLOP" not in text
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.startswith("0.0")}
    assert rows["0.01"] == ["support", "low", "0"] and rows["0.0325"] == ["extrapolation", "0"]
    fresh = make_study(tmp_path)
    assert "interpolation          3" in describe_study(fresh, expand(fresh))
    assert not fresh.data.exists() and not fresh.folder.exists()


def test_an_expert_takes_the_anchor_s_normalisation(known: CCMConfig) -> None:
    """From a converted folder and from a checkpoint in its run, whatever the expert's own data are."""
    config = known.run_config(0, "low")
    found = inherited_normalizer(config, known.folder_of(0, "anchor"))
    assert found.constants == {"vorticity_2d": {"vorticity": (MEAN, SCALE)}}
    run = known.run_config(0, "anchor").run_dir
    assert inherited_normalizer(config, run / "checkpoints" / "step_1").constants == found.constants


def test_a_start_that_is_no_anchor_is_refused(known: CCMConfig, tmp_path: Path) -> None:
    config = known.run_config(0, "low")
    with pytest.raises(CheckpointError, match="does not say its normalisation"):
        inherited_normalizer(config, tmp_path / "runs" / "checkpoints" / "step_1")
    regimes = (config.data.regimes[0].model_copy(update={"name": "waves"}),)
    other = config.model_copy(update={"data": config.data.model_copy(update={"regimes": regimes})})
    with pytest.raises(CheckpointError, match=r"was not trained on \['waves'\]"):
        inherited_normalizer(other, known.folder_of(0, "anchor"))
    fields = (config.data.fields[0].model_copy(update={"name": "height"}),)
    other = config.model_copy(update={"data": config.data.model_copy(update={"fields": fields})})
    with pytest.raises(CheckpointError, match=r"fields \['vorticity'\], and this run has \['height'\]"):
        inherited_normalizer(other, known.folder_of(0, "anchor"))
