"""When a run in a study's place is the same run: the rule of `shodh.experiments.harness.run`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published import published
from safetensors.torch import save_file

from shodh.config import RunConfig, config_from_dict, dump_config, to_dict
from shodh.config.reading import merge_trees
from shodh.core.errors import ConfigError, DataError
from shodh.data.identity import DataRecord
from shodh.experiments.harness.run import Run
from shodh.train.datasets import open_sources

OPERATOR = published(
    {"kind": "fno", "dim": 8, "depth": 1, "modes": 2, "train": {"steps": 2, "warmup": 1, "global_batch": 4}}
)
Place = Callable[..., Run]


@pytest.fixture
def place(tmp_path: Path, tiny_tree: dict[str, Any], tiny_data: Path) -> Place:
    """``place(**changes)``: a run of its own data and weights; the first call leaves it there, trained and measured."""
    shutil.copytree(tiny_data / "open_channel", tmp_path / "data")
    weights = tmp_path / "start.safetensors"
    save_file({"w": torch.zeros(3)}, weights)
    regimes = [{"name": "open_channel", "path": str(tmp_path / "data")}]
    tree = {**tiny_tree, "out": str(tmp_path / "runs"), "operator": OPERATOR, "data": {**tiny_tree["data"]}}
    tree["data"]["regimes"] = regimes

    def make(settings: dict[str, Any] | None = None, **changes: Any) -> Run:
        config = config_from_dict(merge_trees(tree, changes))
        return Run(
            "r", config, tmp_path / "result.json", "m:f", settings=settings or {"samples": 2}, weights=(weights,)
        )

    run = make()
    leave(run.config)
    run.result.write_text(json.dumps({"identity": run.identity(), "value": 1}))
    return make


def leave(config: RunConfig) -> None:
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(dump_config(config))
    DataRecord.of(open_sources(config), config.run_dir).save()


def test_the_same_run_is_kept(place: Place) -> None:
    place().check()
    assert place().finished and place().read()["value"] == 1


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 9}, "seed"),
        ({"operator": {"train": {"lr": 0.5}}}, "operator"),
        ({"evaluation": {"rollout": 1}}, "evaluation"),
        ({"data": {"history": 1}}, "data"),
        ({"family": {"name": "f", "parameters": {"x": 1.0}}}, "family"),
        ({"settings": {"samples": 3}}, "samples"),
    ],
)
@pytest.mark.parametrize("measured", [True, False])
def test_other_settings_are_refused_by_name(place: Place, changes: dict[str, Any], named: str, measured: bool) -> None:
    run = place(**changes)
    if not measured:
        run.result.unlink()
        if "settings" in changes:
            run.check()  # Nothing was measured with others.
            return
    with pytest.raises(ConfigError, match=f"run r: .* is of other settings of {named};"):
        run.check()


@pytest.mark.parametrize(
    "changes", [{"kernels": "torch"}, {"parallel": {"ep_size": 1, "nodes": 3}}, {"routing_trace": 5}]
)
def test_how_ranks_compute_makes_no_other_run(place: Place, changes: dict[str, Any]) -> None:
    place(**changes).check()


def test_data_that_changed_are_refused_and_data_that_moved_are_not(place: Place, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "data", moved)
    regimes = to_dict(place().config)["data"]["regimes"]
    regimes[0]["path"] = str(moved)
    place(data={"regimes": regimes}).check()
    (file, *_) = sorted((tmp_path / "data").rglob("train/*.hdf5"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 255
    file.write_bytes(bytes(content))
    with pytest.raises(DataError, match="has another content, of the same size"):
        place().check()
    shutil.rmtree(tmp_path / "data")
    place().check()  # A report needs no data.


def test_other_weights_are_refused_and_missing_ones_are_not_missed(place: Place, tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "start.safetensors")
    with pytest.raises(ConfigError, match="other settings of weights;"):
        place().check()
    (tmp_path / "start.safetensors").unlink()
    place().check()


def test_a_result_that_does_not_say_of_which_run_is_refused(place: Place) -> None:
    run = place()
    run.result.write_text('{"cell": {"name": "r"}}')
    with pytest.raises(ConfigError, match=r"result\.json is of other settings of"):
        run.check()
