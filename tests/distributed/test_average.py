"""The average of the weights: its formula, every layout, a resume, and a training that does not notice it."""

from __future__ import annotations

from pathlib import Path

import pytest
import rank_jobs
import torch
from helper import run_ranks, run_script
from laboratory import Laboratory, Run
from safetensors.torch import load_file
from test_layouts import ROUNDING

import shodh
from shodh.checkpoint.folder import read_manifest
from shodh.checkpoint.pretrained import ShodhModel
from shodh.core.errors import CheckpointError
from shodh.core.topology import plan_topology
from shodh.core.weights import AVERAGED, WEIGHTS
from shodh.experiments.transfer.probe import Probe
from shodh.train.datasets import mixture_loader
from shodh.train.decoded import with_fields
from shodh.train.trainer import to_device

pytestmark = pytest.mark.distributed

DECAY = 0.8
AVERAGE = tuple(
    f"operator.train.{setting}"
    for setting in (f"ema={DECAY}", "best.measure=valid/decoded_vrmse", "checkpoint_every=1", "keep_checkpoints=20")
)


@pytest.fixture
def averaged(laboratory: Laboratory) -> Run:
    return laboratory.run(2, 2, 1, *AVERAGE)


def weights_of(run: Run, step: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(run.checkpoint(step) / name)


def test_the_average_is_that_of_the_weights_of_every_step(averaged: Run) -> None:
    """In float64 from the checkpoints: what the first update finds is the weights before the first step."""
    steps = [weights_of(averaged, step, WEIGHTS) for step in range(1, 11)]
    found = [weights_of(averaged, step, AVERAGED) for step in range(1, 11)]
    names = [n for n in steps[0] if not torch.equal(steps[0][n], steps[-1][n]) and not n.endswith("selection_bias")]
    assert len(names) > 20
    for name in names:
        average = found[0][name].double()
        for n in range(1, 10):
            kept = min(DECAY, (1 + n) / (10 + n))
            average = kept * average + (1 - kept) * steps[n][name].double()
            torch.testing.assert_close(found[n][name].double(), average, rtol=0, atol=1e-6)
        assert not torch.equal(found[-1][name], steps[-1][name])
    assert found[0].keys() == steps[0].keys()
    assert read_manifest(averaged.checkpoint(10))["state"]["ema"] == {"decay": DECAY, "updates": 10}


@pytest.mark.parametrize(
    ("layout", "more", "settings"),
    [
        ((2, 2, 1), (), AVERAGE),
        pytest.param(
            (2, 1, 3),
            ("operator.train.precision=bf16",),
            (f"operator.train.ema={DECAY}",),
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_training_does_not_notice_the_average_nor_its_validation(
    laboratory: Laboratory, layout: tuple[int, int, int], more: tuple[str, ...], settings: tuple[str, ...]
) -> None:
    """Bit by bit, though the model computes with other weights at every validation: in fp32, bf16 and under ZeRO 3."""
    plain, other = laboratory.run(*layout, *more), laboratory.run(*layout, *more, *settings)
    assert list(plain.training("train/loss")) == other.training("train/loss")
    ours, theirs = weights_of(plain, 10, WEIGHTS), weights_of(other, 10, WEIGHTS)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert plain.lines()[-1]["valid/latent_nmse"] != other.lines()[-1]["valid/latent_nmse"]


@pytest.mark.parametrize("layout", [(1, 1, 3), (2, 1, 2)])
def test_the_average_moves_to_every_layout(
    laboratory: Laboratory, averaged: Run, layout: tuple[int, int, int], tmp_path: Path
) -> None:
    world, ep_size, stage = layout
    overrides = laboratory.overrides(tmp_path.name, ep_size, stage, *AVERAGE)
    moves = [(averaged.checkpoint(5), None)]
    run_ranks(world, rank_jobs.resume_many, laboratory.config, overrides, moves, tmp_path / "again")
    rewritten = (tmp_path / "again" / "0" / AVERAGED).read_bytes()
    assert rewritten == (averaged.checkpoint(5) / AVERAGED).read_bytes()
    ours = load_file(laboratory.load(overrides).run_dir / "checkpoints" / "step_00000010" / AVERAGED)
    theirs = weights_of(averaged, 10, AVERAGED)
    worst = max(float((ours[n] - theirs[n]).abs().max() / theirs[n].abs().max().clamp(min=1e-3)) for n in theirs)
    assert worst < 10 * ROUNDING


def test_a_resumed_run_has_the_bits_of_the_average(laboratory: Laboratory, averaged: Run) -> None:
    lost = laboratory.copy(averaged, "averaged-lost", until=5)
    run_ranks(2, rank_jobs.pretrain, laboratory.config, lost.overrides, "auto")
    assert lost.lines() == averaged.lines()
    for name in (AVERAGED, WEIGHTS):
        assert (lost.checkpoint(10) / name).read_bytes() == (averaged.checkpoint(10) / name).read_bytes()
    assert read_manifest(lost.checkpoint(10))["state"] == read_manifest(averaged.checkpoint(10))["state"]


def test_an_average_begins_at_the_weights_of_a_run_that_had_none(laboratory: Laboratory) -> None:
    run = laboratory.copy(laboratory.run(2, 2, 1), "averaged-late", until=5)
    overrides = [*laboratory.overrides("averaged-late", 1, 1), "operator.train.ema=0.999", "operator.train.steps=6"]
    run_ranks(1, rank_jobs.pretrain, laboratory.config, overrides, "auto")
    before, after, average = (weights_of(run, *place) for place in ((5, WEIGHTS), (6, WEIGHTS), (6, AVERAGED)))
    for name in (n for n in before if n.endswith("weight")):
        expected = 0.1 * before[name].double() + 0.9 * after[name].double()
        torch.testing.assert_close(average[name].double(), expected, rtol=0, atol=1e-6)


def test_the_weights_that_are_read_are_the_average_and_validation_was_of_these(
    laboratory: Laboratory, averaged: Run
) -> None:
    config = laboratory.load(averaged.overrides)
    models = {kind: shodh.from_pretrained(averaged.path, weights=kind) for kind in (None, "ema", "raw")}
    for kind, name in ((None, AVERAGED), ("ema", AVERAGED), ("raw", WEIGHTS)):
        stored, model = weights_of(averaged, 10, name), models[kind]
        assert all(torch.equal(p, stored[n]) for n, p in model.operator.named_parameters())  # type: ignore[union-attr]
        assert model.description.source.ema == (kind != "raw")
    assert models["raw"].description.source.sha256 != models["ema"].description.source.sha256
    with pytest.raises(CheckpointError, match="no average of the weights, and ema ones were asked for"):
        ShodhModel.from_pretrained(laboratory.run(2, 2, 1).path, weights="ema")

    probe = Probe(config, torch.device("cpu"))
    probe.task.tokenizer = models["ema"].tokenizer
    windows = with_fields(config, probe.regimes, probe._open)("valid")
    loader = mixture_loader(windows, config, plan_topology(1, 1, 4, 8), 0)
    with torch.no_grad():
        (batch,) = loader.iterate(0, 1)
        found = probe.task.measured(models["ema"].operator, to_device(batch, torch.device("cpu"))).errors
    line = averaged.lines()[-1]
    for name in ("latent_nmse", "decoded_vrmse", "persistence_vrmse"):
        values, regime = found[name]
        means = [float(values[regime == r].mean()) for r in (0, 1)]
        assert line[f"valid/{name}"] == pytest.approx(sum(means) / 2, rel=1e-4)
        assert [line[f"valid/{name}/{r}"] for r in probe.regimes.names] == pytest.approx(means, rel=1e-4)
    probe.close()


def test_a_step_that_was_not_taken_is_not_averaged(laboratory: Laboratory) -> None:
    overrides = laboratory.overrides("averaged-skipping", 1, 1, f"operator.train.ema={DECAY}", "operator.train.steps=6")
    arguments = (laboratory.config, overrides, [1, 2], "loss", float("nan"))
    run_ranks(1, rank_jobs.pretrain_with_bad_steps, *arguments)
    state = read_manifest(laboratory.load(overrides).run_dir / "checkpoints" / "step_00000006")["state"]
    assert state["skipped"] == 2 and state["ema"]["updates"] == 4


def test_frozen_weights_are_in_the_average_as_they_are(laboratory: Laboratory, averaged: Run) -> None:
    """From either weights of another run."""
    tuned = ("finetune.train=experts", "operator.train.steps=2", f"operator.train.ema={DECAY}")
    for kind, name in (("ema", AVERAGED), ("raw", WEIGHTS)):
        overrides = laboratory.overrides(f"averaged-frozen-{kind}", 1, 1, *tuned)
        options = ("--init-from", str(averaged.path), "--weights", kind)
        finished = run_script("launch/pretrain.py", "--config", laboratory.config, "--set", *overrides, *options)
        assert finished.code == 0, finished.stderr
        last = laboratory.load(overrides).run_dir / "checkpoints" / "step_00000002"
        given, average, stepped = weights_of(averaged, 10, name), load_file(last / AVERAGED), load_file(last / WEIGHTS)
        still = {n for n in given if torch.equal(given[n], average[n])}
        assert {n for n in given if torch.equal(given[n], stepped[n])} == still
        moved = {n for n in given.keys() - still if not n.endswith("selection_bias")}
        assert moved == {n for n in given if ".experts." in n}
