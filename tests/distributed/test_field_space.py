"""An operator on the fields themselves, in two dimensions: trained, resumed, evaluated, converted, probed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rank_jobs
import torch
from helper import ROOT, run_ranks
from laboratory import Run
from published import published

import shodh
from shodh.checkpoint.convert import convert
from shodh.config import load_config
from shodh.core.errors import CheckpointError
from shodh.data import write_trajectories
from shodh.evaluate.evaluation import Evaluator, evaluate, open_run
from shodh.evaluate.regime_evaluation import RegimeEvaluation
from shodh.evaluate.report import write_report
from shodh.moe.trace import read_trace
from shodh.report.page import write_page
from shodh.routing.probe.sections import probe_model
from shodh.schema.fields import Boundary, Field, RegimeSchema, Trajectories
from shodh.schema.space import Space
from shodh.train.field_task import FieldTask
from shodh.train.opening import open_data
from shodh.train.plan import make_plan
from shodh.train.plan_text import describe_plan
from shodh.train.run_folder import RunFolder

pytestmark = pytest.mark.distributed

GRID, FRAMES, STEPS = (16, 8), 6, 6
STORED: dict[str, tuple[tuple[Field, ...], tuple[Boundary, ...]]] = {
    "waves": ((Field("flow", "vector"), Field("height"), Field("solid", static=True)), ("open", "wall")),
    "dye": ((Field("dye"),), ("periodic", "periodic")),
}
VOCABULARY = [
    {"name": "flow", "kind": "vector", "optional": True},
    {"name": "height", "optional": True},
    {"name": "dye", "optional": True},
    {"name": "solid", "static": True, "optional": True},
]
OPERATOR = published(
    {
        "kind": "moe_pot",
        "dim": 16,
        "depth": 2,
        "heads": 2,
        "patch": 4,
        "field": {"mlp": 16},
        "input_noise": 0.05,
        "experts": {"num_experts": 4, "top_k": 2, "hidden": 16, "router": {"kind": "token"}},
        "train": {
            "steps": STEPS,
            "global_batch": 4,
            "lr": 2.0e-3,
            "schedule": "one_cycle",
            "warmup": 2,
            "log_every": 1,
            "valid_every": 3,
            "checkpoint_every": 3,
            "valid_batches": 1,
        },
    }
)


def trajectories(name: str, batch: int, seed: int) -> Trajectories:
    """Slowly changing noise about 3, in two dimensions."""
    rng = np.random.default_rng(seed)
    fields, boundary = STORED[name]
    values: dict[str, np.ndarray] = {}
    for f in fields:
        shape = (*GRID, 2) if f.kind == "vector" else GRID
        if f.static:
            values[f.name] = rng.random((batch, *GRID)) < 0.2
            continue
        walk = rng.standard_normal((batch, 1, *shape)) + 0.3 * rng.standard_normal((batch, FRAMES, *shape)).cumsum(1)
        values[f.name] = (3.0 + walk).astype(np.float32)
    return Trajectories(RegimeSchema(name, fields, boundary), (2.0, 1.0), 0.1 * np.arange(FRAMES), values)


class Fields:
    """The configuration, and runs of it: ``run(world, ep_size, stage)``, each made once."""

    def __init__(self, config: Path) -> None:
        self.config = config
        self._runs: dict[tuple[int, ...], Run] = {}

    def overrides(self, name: str, ep_size: int, stage: int) -> list[str]:
        return [f"name={name}", f"deepspeed={ROOT / 'ds_configs' / f'zero{stage}.json'}", f"parallel.ep_size={ep_size}"]

    def run(self, world: int, ep_size: int, stage: int = 1) -> Run:
        key = (world, ep_size, stage)
        if key not in self._runs:
            overrides = self.overrides(f"run{len(self._runs)}", ep_size, stage)
            ranks = run_ranks(world, rank_jobs.pretrain, self.config, overrides)
            self._runs[key] = Run(load_config(self.config, overrides).run_dir, overrides, ranks)
        return self._runs[key]


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory, write_config: Callable[..., Path]) -> Fields:
    root = tmp_path_factory.mktemp("fields")
    regimes = []
    for number, name in enumerate(STORED):
        for part, split in enumerate(("train", "valid", "test")):
            path = root / name / "data" / split / f"{name}.hdf5"
            write_trajectories(path, trajectories(name, 2, 10 * number + part))
        regimes.append({"name": name, "path": str(root / name), "only": [f.name for f in STORED[name][0]]})
    data = {"grid": list(GRID), "fields": VOCABULARY, "regimes": regimes}
    tree = {"data": data, "operator": OPERATOR, "evaluation": {"rollout": 3, "starts": 0}}
    return Fields(write_config(root / "fields.yaml", **tree))


@pytest.fixture(scope="module")
def opened(fields: Fields) -> Evaluator:
    return open_run(fields.run(2, 2).path, None, torch.device("cpu"))


def test_expert_parallel_ranks_train_what_one_rank_trains(fields: Fields) -> None:
    one, two = fields.run(1, 1), fields.run(2, 2)
    for name in ("train/loss", "train/field_l2re", "train/balance_loss", "train/grad_norm"):
        assert len(one.training(name)) == STEPS
        assert two.training(name) == pytest.approx(one.training(name), rel=1e-5)
    losses = one.training("train/loss")
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("stage", (pytest.param(1, marks=pytest.mark.exhaustive), 3))
def test_resumed_run_is_bitwise_the_uninterrupted_one(fields: Fields, stage: int) -> None:
    whole = fields.run(2, 2, stage)
    again = Run(whole.path.with_name(f"again{stage}"), [f"name=again{stage}", *whole.overrides[1:]], [])
    shutil.copytree(whole.path, again.path)
    shutil.rmtree(again.checkpoint(STEPS))
    (again.path / "latest").write_text("step_00000003\n")
    run_ranks(2, rank_jobs.pretrain, fields.config, again.overrides, "auto")
    assert again.lines() == whole.lines()
    weights = [run.checkpoint(STEPS) / "model.safetensors" for run in (again, whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_resumed_run_keeps_its_normalisation(fields: Fields) -> None:
    """Statistics of data that grew must not change what the numbers of a run mean."""
    whole = fields.run(2, 2)
    folder = RunFolder(whole.path.with_name("grown"))
    folder.path.mkdir()
    space = Space.load(whole.path)
    waves, dye = space.regimes
    replace(space, regimes=(waves, replace(dye, constants=(("dye", 0.0, 5.0),)))).save(folder.path)
    config = load_config(fields.config, whole.overrides)
    resumed, *_ = open_data(config, folder, torch.device("cpu"))
    fresh, *_ = open_data(config, None, torch.device("cpu"))
    assert (
        resumed.space.normalizer.constants["dye"]["dye"][1] == 5.0 != fresh.space.normalizer.constants["dye"]["dye"][1]
    )


def test_samples_are_traced_on_their_plane_of_tokens(fields: Fields) -> None:
    samples = fields.run(2, 2).samples()
    assert {np.asarray(top1).shape for top1 in samples.values()} == {(4, 2)}
    records = list(read_trace(fields.run(2, 2).path / "routing" / "rank0.jsonl"))
    assert {r.top_k for r in records} == {2} and {r.num_experts for r in records} == {4}


def test_evaluation_counts_existing_fields_and_reports_every_step(opened: Evaluator) -> None:
    evaluation = evaluate(opened, "test")
    regimes = evaluation.metrics["regimes"]
    assert {name: set(r["l2re"]) for name, r in regimes.items()} == {"waves": {"flow", "height"}, "dye": {"dye"}}
    for regime in regimes.values():
        for measure in ("rollout", "rollout_l2re"):
            for kinds in regime[measure].values():
                assert len(kinds["model"]) == len(kinds["persistence"]) == 3
                assert all(np.isfinite(kinds["model"]))
    # Fields about 3 with a spread of about 1: in units, the norm of the target is larger than of normalised fields.
    dye = regimes["dye"]
    assert dye["l2re_physical"] == dye["nrmse"]
    assert dye["l2re_physical"]["dye"]["persistence"] < 0.6 * dye["l2re"]["dye"]["persistence"]
    text = write_report(opened.folder, evaluation)
    assert "nRMSE, in units, height" in text and "step 3" in text and "atent" not in text
    names = {p.name for p in opened.folder.report.iterdir()}
    assert "trajectories.csv" in names
    assert {
        "slices_dye.png",
        "rollout.png",
        "training.png",
        "expert_shares.png",
        "rollouts.csv",
        "spectra.png",
    } <= names


def task_of(opened: Evaluator, loss: str) -> FieldTask:
    operator = opened.config.operator.model_copy(update={"loss": loss})
    return FieldTask(opened.config.model_copy(update={"operator": operator}), opened.regimes, [])


@pytest.mark.parametrize("measure", ("l2re", "mse"))
def test_absent_fields_are_given_as_ones_and_cost_nothing(opened: Evaluator, measure: str) -> None:
    task = task_of(opened, "relative_l2" if measure == "l2re" else "mse")
    assert task.measure == measure
    draw = torch.Generator().manual_seed(0)
    frames, static = torch.randn(2, 3, 4, *GRID, generator=draw), torch.randn(2, 1, *GRID, generator=draw)
    regime = torch.tensor([0, 1])  # flow, height; dye
    padded, given = task._windows({"fields": frames, "static": static, "regime": regime})
    exists = torch.tensor([[True, True, True, False], [False, False, False, True]])
    for sample in range(2):
        assert bool((padded[sample, :, ~exists[sample]] == 1).all())
        assert torch.equal(padded[sample, :, exists[sample]], frames[sample, :, exists[sample]])
    assert torch.equal(given[0], static[0]) and bool((given[1] == 1).all())
    prediction, target = frames[:, 0], frames[:, 1]
    errors = task._errors(prediction, target, regime, given)
    ratio = (prediction - target).flatten(2).norm(dim=2) / target.flatten(2).norm(dim=2)
    by_channel = ratio if measure == "l2re" else (prediction - target).square().mean((2, 3))
    torch.testing.assert_close(errors, torch.stack((by_channel[0, :3].mean(), by_channel[1, 3])))


def test_noise_is_relative_to_the_size_of_each_channel(opened: Evaluator) -> None:
    history = torch.randn(2, 3, 4, *GRID, generator=torch.Generator().manual_seed(0))
    scale = task_of(opened, "mse")._noise_scale(history)
    assert isinstance(scale, torch.Tensor)
    assert scale.shape == (2, 1, 4, 1, 1)
    assert float(scale[1, 0, 2]) == pytest.approx(float(history[1, :, 2].square().mean().sqrt()), rel=1e-6)


def test_persistence_is_the_error_of_the_last_frame(opened: Evaluator) -> None:
    """Computed here from the file, in physical units."""
    regimes = evaluate(opened, "test").metrics["regimes"]
    dye = trajectories("dye", 2, 12).values["dye"].astype(np.float64)
    for step in (1, 2, 3):
        pairs = [(dye[b, t], dye[b, t + step]) for b in range(2) for t in range(1, FRAMES - 3)]
        expected = np.mean([np.linalg.norm(u - v) / np.linalg.norm(v) for u, v in pairs])
        found = regimes["dye"]["rollout_nrmse"]["dye"]["persistence"][step - 1]
        assert found == pytest.approx(expected, rel=1e-5)


def test_numbers_depend_on_neither_ranks_nor_batches_and_follow_from_the_rows(opened: Evaluator) -> None:
    """Two ranks with three windows a batch, against one with all in one."""
    one = evaluate(opened, "test")
    ranks = run_ranks(2, rank_jobs.evaluate_run, opened.folder.path, 3)
    for metrics in ranks:
        assert (metrics["ranks"], metrics["windows"]) == (2, one.metrics["windows"])
        assert metrics["routing"] == one.metrics["routing"]
        for path, value in leaves(one.metrics["regimes"]):
            assert dict(leaves(metrics["regimes"]))[path] == pytest.approx(value, rel=1e-4, abs=1e-6, nan_ok=True), path
    rows = one.trajectories.query("regime == 'dye' and measure == 'vrmse' and of == 'model' and step == 2")
    assert rows["value"].mean() == pytest.approx(one.metrics["regimes"]["dye"]["rollout"]["dye"]["model"][1])
    assert len(rows) == one.metrics["trajectories"]["dye"] == 2 and one.metrics["cannot_be_concluded"]


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a nested value by its path."""
    if isinstance(tree, float):
        yield path, tree
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    for key, value in items:
        yield from leaves(value, f"{path}/{key}")


def test_bf16_networks_agree_to_their_rounding(opened: Evaluator) -> None:
    half = evaluate(replace(opened, precision="bf16"), "test").metrics
    whole = evaluate(opened, "test").metrics
    assert half["precision"] == "bf16" and next(opened.operator.parameters()).dtype == torch.float32
    for regime in ("waves", "dye"):
        errors, exact = half["regimes"][regime]["decoded_mse"], whole["regimes"][regime]["decoded_mse"]
        assert errors["model"] == pytest.approx(exact["model"], rel=0.05) and errors["model"] != exact["model"]
        assert errors["persistence"] == exact["persistence"]


def test_converted_model_rolls_out_as_the_evaluation_does(opened: Evaluator, tmp_path: Path) -> None:
    convert(opened.folder.path, tmp_path / "out", verify=True)
    model = shodh.from_pretrained(tmp_path / "out")
    assert (model.grid, model.num_channels, model.num_static) == (GRID, 4, 1)
    trained = dict(opened.operator.named_buffers())
    temperatures = [name for name in trained if "temperature" in name]
    assert temperatures and all(torch.equal(trained[n], dict(model.operator.named_buffers())[n]) for n in temperatures)
    for number, regime in enumerate(model.regimes):
        part = RegimeEvaluation(opened, number, "test")
        batch = next(part.windows())
        normal, stored = batch.fields, batch.static
        fields = opened.regimes.space.normalizer.denormalize(normal, regime)
        with torch.no_grad():
            labels = part.forecaster.labels(number, normal)
            expected = part.forecaster.step(batch.states[:, :2], batch.features, labels).latent
        found = model.predict(fields[:, :2], stored, regime)
        expected = opened.regimes.space.normalizer.denormalize(expected, regime)
        torch.testing.assert_close(found[:, part.channels], expected[:, part.channels], rtol=1e-5, atol=1e-5)
        junk = fields[:, :2].clone()
        absent = [c for c in range(model.num_channels) if c not in part.channels]
        junk[:, :, absent] = 1e6
        assert torch.equal(model.predict(junk, stored, regime)[:, part.channels], found[:, part.channels])
        assert model.rollout(fields[:, :2], stored, regime, steps=3).shape == (len(normal), 3, 4, *GRID)
    with pytest.raises(CheckpointError, match="potential"):
        model.predict(fields[:, :2], stored, regime, exact=True)


def test_checkpoint_outside_its_run_says_what_is_missing(opened: Evaluator, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(opened.folder.path, run)
    (run / "space.json").unlink()
    convert(run, tmp_path / "out")
    assert open_run(run, None, torch.device("cpu")).regimes.space == opened.regimes.space
    (run / "checkpoints" / f"step_{STEPS:08d}" / "space.json").unlink()
    for use in (lambda: convert(run, tmp_path / "other"), lambda: open_run(run, None, torch.device("cpu"))):
        with pytest.raises(CheckpointError, match=r"space\.json"):
            use()


def test_probe_maps_the_plane_and_makes_a_page(opened: Evaluator, tmp_path: Path) -> None:
    sections = probe_model(opened, limit=2, seeds=1)
    write_page(tmp_path, "probe", None, sections)
    assert {p.name for p in tmp_path.glob("map_*.png")} == {"map_waves.png", "map_dye.png"}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["probe_fingerprint"]["chance"]["trained regimes"] == 0.5


def test_dry_run_counts_the_tokens_of_a_plane(fields: Fields) -> None:
    plan = make_plan(load_config(fields.config, fields.overrides("plan", 2, 1)), 1, 2)
    assert plan.tokens_per_sample == 8 and plan.stage.memory.activations > 0
    assert "16 x 8, 4 channels, 1 static" in describe_plan(plan)
