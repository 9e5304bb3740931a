"""One run of regimes with different fields, boundaries and space dimensions: trained on two ranks, then evaluated."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rank_jobs
import torch
import yaml
from helper import ROOT, run_ranks, run_script
from scipy.io import netcdf_file

import shodh
from shodh.checkpoint.convert import convert
from shodh.config import load_config, to_dict
from shodh.config.reading import merge_trees
from shodh.data import write_trajectories
from shodh.evaluate.evaluation import evaluate, open_run
from shodh.evaluate.report import write_report
from shodh.schema.fields import Boundary, Field, RegimeSchema, Trajectories
from shodh.train.metrics import read_metrics
from shodh.train.opening import open_run_data

pytestmark = pytest.mark.distributed

VELOCITY = Field("velocity", "vector", placement="face", solenoidal=True)
STORED: dict[str, tuple[tuple[Field, ...], tuple[Boundary, ...]]] = {
    "stream": ((VELOCITY, Field("dye")), ("periodic", "periodic", "wall")),
    "rock": ((Field("heat"), Field("conductivity", static=True)), ("open", "wall", "periodic")),
    "sheet": ((VELOCITY, Field("dye")), ("periodic", "periodic")),
}
VOCABULARY = [
    {"name": "velocity", "kind": "vector", "solenoidal": True, "optional": True},
    {"name": "dye", "positive": True, "optional": True},
    {"name": "heat", "optional": True},
    {"name": "conductivity", "static": True, "static_scale": "log", "optional": True},
]


def trajectories(name: str, batch: int, seed: int) -> Trajectories:
    """Five frames of 16 cells an axis of slowly changing noise."""
    rng = np.random.default_rng(seed)
    fields, boundary = STORED[name]
    grid = (16,) * len(boundary)
    values: dict[str, np.ndarray] = {}
    for f in fields:
        if f.static:
            values[f.name] = np.exp(rng.standard_normal((batch, *grid))).astype(np.float32)
            continue
        shape = (*grid, len(grid)) if f.kind == "vector" else grid
        walk = rng.standard_normal((batch, 1, *shape)) + 0.3 * rng.standard_normal((batch, 5, *shape)).cumsum(1)
        values[f.name] = (np.abs(walk) if f.name == "dye" else walk).astype(np.float32)
    return Trajectories(RegimeSchema(name, fields, boundary), (1.0,) * len(grid), 0.1 * np.arange(5), values)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, write_config: Callable[..., Path]) -> dict[str, Any]:
    """A tokenizer trained on one rank, an operator on two with two experts each, and the evaluation of both."""
    root = tmp_path_factory.mktemp("mixed")
    regimes = []
    for number, name in enumerate(STORED):
        for part, split in enumerate(("train", "valid", "test")):
            path = root / name / "data" / split / f"{name}.hdf5"
            write_trajectories(path, trajectories(name, 2, 10 * number + part))
        only = [f.name for f in STORED[name][0]]
        regimes.append({"name": name, "path": str(root / name), "only": only})
    changes = {"data": {"fields": VOCABULARY, "regimes": regimes}, "operator": {"train": {"steps": 4}}}
    config = write_config(root / "mixed.yaml", **changes)
    common = [f"deepspeed={ROOT / 'ds_configs' / 'zero1.json'}", "parallel.ep_size=2", "evaluation.rollout=2"]
    run_ranks(2, rank_jobs.train_tokenizer, config, common)
    run_ranks(2, rank_jobs.pretrain, config, common)
    folder = load_config(config, common).run_dir
    evaluator = open_run(folder, None, torch.device("cpu"))
    evaluation = evaluate(evaluator, "test")
    text = write_report(evaluator.folder, evaluation)
    labels = {example.regime: example.labels for example in evaluation.examples}
    return {"evaluator": evaluator, "metrics": evaluation.metrics, "labels": labels, "text": text, "folder": folder}


def test_errors_are_reported_of_the_fields_that_exist_and_of_no_others(run: dict[str, Any]) -> None:
    found = {name: set(regime["vrmse"]) for name, regime in run["metrics"]["regimes"].items()}
    assert found == {"stream": {"velocity", "dye"}, "rock": {"heat"}, "sheet": {"velocity", "dye"}}
    assert all(np.isfinite(r["decoded_mse"]["model"]) for r in run["metrics"]["regimes"].values())
    assert run["labels"] == {
        "stream": ["velocity x", "velocity y", "velocity z", "dye"],
        "rock": ["heat"],
        "sheet": ["velocity x", "velocity y", "dye"],
    }
    assert "rock" in run["text"] and (run["folder"] / "report" / "slices_sheet.png").exists()


def test_report_states_the_speed_of_both_trainings(run: dict[str, Any]) -> None:
    header, *rows = csv.reader((run["folder"] / "report" / "speed.csv").open())
    assert {"samples/s", "ms a step", "TFLOP/s a rank"} < set(header) and not {"MFU", "energy (kWh)"} & set(header)
    assert [row[0] for row in rows] == ["tokenizer", "operator"] and rows[1][1] == "4"
    assert all(float(cell) >= 0 for row in rows for cell, name in zip(row[2:], header[2:], strict=True) if cell)


def test_export_writes_the_fields_that_exist_in_physical_units(run: dict[str, Any], tmp_path: Path) -> None:
    done = run_script("tools/export_fields.py", run["folder"], "--format", "netcdf", "--out", tmp_path)
    assert done.code == 0, done.stderr
    target = run["evaluator"].config.data.history
    for number, (name, scalar) in enumerate((("stream", "dye"), ("rock", "heat"), ("sheet", "dye"))):
        with netcdf_file(tmp_path / f"{run['folder'].name}_{name}_00000.nc", mmap=False) as file:
            found = {key: value[:] for key, value in file.variables.items()}
        expected = trajectories(name, 2, 10 * number + 2).values[scalar][0, target]
        expected = expected if expected.ndim == 3 else np.repeat(expected[..., None], 16, 2)
        np.testing.assert_allclose(found[f"{scalar}_truth"][0], expected, atol=1e-5)
        axes = {"stream": "xyz", "rock": "", "sheet": "xy"}[name]
        assert {key for key in found if key.startswith("velocity_truth")} == {f"velocity_truth_{a}" for a in axes}


def test_velocity_of_every_regime_is_divergence_free_in_its_own_dimensions(run: dict[str, Any]) -> None:
    for name in ("stream", "sheet"):
        divergence = run["metrics"]["regimes"][name]["divergence"]
        assert divergence["velocity/fp64"]["max_over_gradient"] < 1e-12
        assert divergence["velocity/exact_flux"]["max"] == 0.0
    assert "velocity/fp64" not in run["metrics"]["regimes"]["rock"]["divergence"]


def test_experts_and_validation_see_all_regimes(run: dict[str, Any]) -> None:
    last = read_metrics(run["folder"] / "metrics.jsonl")[-1]
    assert {f"valid/latent_nmse/{name}" for name in STORED} <= set(last)
    tokenizer = read_metrics(run["evaluator"].config.tokenizer_dir / "metrics.jsonl")[-1]
    measured = {key.removeprefix("valid/vrmse_square/") for key in tokenizer if "vrmse_square/" in key}
    by_regime = {"velocity/stream", "velocity/sheet", "dye/stream", "dye/sheet", "heat/rock"}
    assert measured == by_regime | {"velocity", "dye", "heat"}


def test_tokenizer_of_all_serves_a_run_of_some_of_its_regimes(run: dict[str, Any]) -> None:
    config = run["evaluator"].config
    data = config.data.model_copy(update={"regimes": config.data.regimes[1:]})
    regimes, trained = open_run_data(config.model_copy(update={"data": data}))
    assert regimes.names == ["rock", "sheet"] and len(trained.model.basis.heads) == 2
    assert regimes.space.domains == run["evaluator"].regimes.space.domains[1:]


@pytest.mark.parametrize("names", [("rock", "stream"), ("rock",), ("sheet", "rock", "stream")])
def test_model_has_the_latents_of_its_tokenizer_whatever_regimes_its_run_has_in_whatever_order(
    run: dict[str, Any], names: tuple[str, ...], tmp_path: Path
) -> None:
    """A tokenizer numbers its sets of fields by its own regimes.

    Models of a run of others numbered them by its own, which gave one set the mean and deviation of another, or did not
    load."""
    first = run["evaluator"].config
    regimes = [next(r for r in to_dict(first)["data"]["regimes"] if r["name"] == name) for name in names]
    tree = merge_trees(to_dict(first), {"name": "others", "out": str(tmp_path), "data": {"regimes": regimes}})
    tree["tokenizer"]["run"] = str(first.tokenizer_dir)
    config = tmp_path / "others.yaml"
    config.write_text(yaml.safe_dump(tree))
    run_ranks(1, rank_jobs.pretrain, config, ["parallel.ep_size=1"])
    folder = tmp_path / "others"
    convert(folder, tmp_path / "converted")
    evaluation = evaluate(open_run(folder, None, torch.device("cpu")), "test")
    assert set(evaluation.metrics["regimes"]) == set(names)
    tokenizer = shodh.from_pretrained(first.tokenizer_dir)
    models = [shodh.from_pretrained(path) for path in (folder, tmp_path / "converted")]
    draw = torch.Generator().manual_seed(0)
    fields, static = (torch.rand(1, *shape, *tokenizer.grid, generator=draw) for shape in ((1, 5), (1,)))
    for name, model in itertools.product({*names} & {"stream", "rock"}, models):
        expected = tokenizer.encode(fields, static, regime=name)
        assert torch.equal(model.encode(fields, static, regime=name), expected), name
