"""What is refused before anything is measured, each with one line that says what to do."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from known_family import GRID, REGIME, known_study

from shodh.checkpoint.folder import read_manifest, write_manifest
from shodh.core.errors import CheckpointError, ConfigError, DataError
from shodh.experiments.composition.bench import Bench
from shodh.experiments.composition.members import Family, open_members, read_case
from shodh.experiments.composition.runs import make
from shodh.experiments.composition.settings import CCMConfig
from shodh.experiments.harness.worker import write_result
from shodh.schema.space import Space

CPU = torch.device("cpu")


@pytest.fixture
def copied(known: CCMConfig, tmp_path: Path) -> CCMConfig:
    """The study with models of its own, which may be changed, on the same data."""
    study = known_study(tmp_path, data=str(known.data))
    shutil.copytree(known.folder / "converted", study.folder / "converted")
    return study


def change(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edit what a converted folder says of itself."""
    path = folder / "config.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    write_manifest(folder, [folder / name for name in read_manifest(folder)["files"]])


def test_members_are_opened_in_memory_with_their_range(known: CCMConfig) -> None:
    family = open_members(known, 0, CPU)
    assert (family.range.name, family.range.low, family.range.high) == ("viscosity", 0.01, 0.03)
    assert family.regime == REGIME and not family.sparse and family.channels == {"vorticity": slice(0, 1)}
    case = read_case(known, family, 0.0225, "test")
    assert case.frames.shape == (3, 7, 1, *GRID) and case.static.shape == (3, 0, *GRID)
    assert [len(part.frames) for part in case.chunks(2)] == [2, 1]


def test_a_copy_has_weights_of_its_own(known: CCMConfig) -> None:
    family = open_members(known, 0, CPU)
    other = family.copy_of(family.low)
    family.put(family.high)
    for name, weight in other.named_parameters():
        assert torch.equal(weight, family.low[name].read())


def test_experts_of_another_anchor_are_refused(copied: CCMConfig) -> None:
    change(copied.folder_of(0, "high"), lambda c: c["source"].update(init_from="0" * 64))
    with pytest.raises(CheckpointError, match=r"high was fine-tuned from another checkpoint \(000000000000\.\.\.\)"):
        open_members(copied, 0, CPU)


def test_missing_metadata_are_named(copied: CCMConfig) -> None:
    change(copied.folder_of(0, "low"), lambda c: c["run"].pop("family"))
    with pytest.raises(ConfigError, match=r"low: its configuration does not give a value of 'viscosity'"):
        open_members(copied, 0, CPU)


def test_experts_of_other_values_than_the_study_s_are_refused(copied: CCMConfig) -> None:
    change(copied.folder_of(0, "high"), lambda c: c["run"]["family"]["parameters"].update(viscosity=0.04))
    with pytest.raises(CheckpointError, match=r"high was trained at viscosity = 0\.04, and the study's high expert is"):
        open_members(copied, 0, CPU)


def test_a_missing_member_is_named(copied: CCMConfig) -> None:
    shutil.rmtree(copied.folder_of(0, "low"))
    with pytest.raises(CheckpointError, match=re.escape(f"{copied.folder_of(0, 'low')} is not a converted folder")):
        open_members(copied, 0, CPU)


def test_models_of_several_regimes_are_refused(copied: CCMConfig) -> None:
    def add_regime(content: dict[str, Any]) -> None:
        content["run"]["data"]["regimes"].append({**content["run"]["data"]["regimes"][0], "name": "shear_2d"})

    folders = [copied.folder_of(0, member) for member in ("anchor", "low", "high")]
    for folder in folders:
        space = Space.load(folder)
        replace(space, regimes=(*space.regimes, replace(space.regimes[0], name="shear_2d"))).save(folder)
        change(folder, add_regime)
    with pytest.raises(CheckpointError, match="on the fields of one regime; this one is on the fields of"):
        Family(folders[0], folders[1], folders[2], "viscosity", CPU)


def test_missing_data_and_short_trajectories_name_the_value(known: CCMConfig, tmp_path: Path) -> None:
    family = open_members(known, 0, CPU)
    elsewhere = known_study(tmp_path)
    with pytest.raises(DataError, match=r"viscosity = 0\.0225: .*no training files"):
        read_case(elsewhere, family, 0.0225, "test")
    with pytest.raises(DataError, match=r"viscosity = 0\.0225: .*"):
        read_case(known.model_copy(update={"rollout": 9}), family, 0.0225, "test")


def test_nothing_is_left_behind_by_an_evaluation_that_fails(copied: CCMConfig) -> None:
    shutil.rmtree(copied.folder_of(0, "low"))
    with pytest.raises(CheckpointError):
        write_result(make(copied, 0, None), CPU)
    assert not copied.results_file(0).exists() and not copied.results_file(0).parent.exists()


def test_a_study_without_observed_steps_is_refused(known: CCMConfig) -> None:
    with pytest.raises(DataError, match="give at least 3"):
        Bench(open_members(known, 0, CPU), 0, 3)
