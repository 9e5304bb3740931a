"""A step with a loss or a gradient that is not finite is skipped by all ranks, counted, and moves nothing."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import rank_jobs
from helper import RankError, run_ranks
from laboratory import MORE_STAGES, Laboratory, Run

from shodh.checkpoint.folder import read_manifest
from shodh.core.weights import load_weights
from shodh.train.events import read_events
from shodh.train.schedule import learning_rate

pytestmark = pytest.mark.distributed
EXPERT = "feed_forward.experts.w2"


@pytest.mark.parametrize(
    ("stage", "precision", "where", "value"),
    [
        (1, "fp32", "attention.qkv.weight", math.nan),
        pytest.param(1, "bf16", EXPERT, math.inf, marks=pytest.mark.exhaustive),
        pytest.param(2, "fp32", EXPERT, -math.inf, marks=pytest.mark.exhaustive),
        (3, "bf16", EXPERT, math.nan),
        (2, "bf16", "loss", math.inf),
        pytest.param(3, "fp32", "target", math.nan, marks=pytest.mark.exhaustive),
    ],
)
def test_nothing_moves_in_a_step_that_one_rank_cannot_take(
    laboratory: Laboratory, stage: int, precision: str, where: str, value: float
) -> None:
    bad = [0, 4, 5]
    name = f"skip-{stage}-{precision}-{where}-{value}"
    overrides = laboratory.overrides(name, 2, stage, f"operator.train.precision={precision}")
    overrides += ["operator.train.log_every=4"]
    ranks = run_ranks(2, rank_jobs.pretrain_with_bad_steps, laboratory.config, overrides, bad, where, value)
    for rank in ranks:
        assert rank["finished"]
        assert [step for step, names in rank["changed"].items() if not names] == bad, rank["changed"][bad[0]]
        # The schedule waits: the rate of a step is that of as many steps taken.
        taken = [0, 0, 1, 2, 3, 3, 3, 4, 5, 6]
        assert rank["rates"] == [learning_rate(step, laboratory.load(overrides).operator.train) for step in taken]
    run = laboratory.load(overrides).run_dir
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = {line["step"]: line for line in lines if "train/lr" in line}
    assert sorted(steps) == list(range(10)), "every step, and not those of logging alone"
    assert [step for step, line in steps.items() if line["train/skipped"]] == bad
    assert [step for step, line in steps.items() if line["train/grad_norm"] is None] == bad
    assert [step for step, line in steps.items() if line["train/loss"] is None] == (
        bad if where in ("loss", "target") else []
    )
    manifest = read_manifest(run / "checkpoints" / "step_00000010")
    assert (manifest["state"]["skipped"], manifest["state"]["skipped_in_row"]) == (3, 0)
    weights = load_weights(run / "checkpoints" / "step_00000010" / "model.safetensors")
    assert all(bool(w.isfinite().all()) for w in weights.values())


@pytest.mark.parametrize(("where", "named"), [("target", "errors of "), (EXPERT, "gradients, of finite errors,")])
def test_too_many_in_a_row_stop_the_run_at_the_last_good_checkpoint(
    laboratory: Laboratory, where: str, named: str
) -> None:
    overrides = laboratory.overrides(f"stop-{where}", 2, 1, "operator.train.max_skipped_steps=3")
    overrides += ["operator.train.log_every=100", "operator.train.precision=bf16"]
    with pytest.raises(RankError) as caught:
        run_ranks(2, rank_jobs.pretrain_with_bad_steps, laboratory.config, overrides, [2, 6, 7, 8], where, math.nan)
    run = laboratory.load(overrides).run_dir
    text = str(caught.value)
    assert text.count("SharedError: 3 steps in a row up to step 9") == 2
    assert named in text and str(run / "checkpoints" / "step_00000005") in text
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("train/skipped")] == [2, 6, 7, 8]
    # A repeated run finds nothing in its way, and is the uninterrupted one to the last bit.
    run_ranks(2, rank_jobs.pretrain, laboratory.config, overrides, "auto")
    assert (run / "latest").read_text() == "step_00000010\n"
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and {*steps} == set(range(10))


def test_resumed_run_with_skipped_steps_is_bitwise_the_uninterrupted_one(laboratory: Laboratory) -> None:
    overrides = laboratory.overrides("skips", 2, 2)
    run_ranks(2, rank_jobs.pretrain_with_bad_steps, laboratory.config, overrides, [3, 4, 5], EXPERT, math.nan)
    run = laboratory.load(overrides).run_dir
    whole = {p.name: p.read_bytes() for p in (run / "checkpoints" / "step_00000010").glob("*.safetensors")}
    lost = run.with_name("skips-lost")
    run.rename(lost)
    (lost / "latest").write_text("step_00000005\n")
    again = [f"name={lost.name}", *overrides[1:]]
    run_ranks(2, rank_jobs.pretrain_with_bad_steps, laboratory.config, again, [3, 4, 5], EXPERT, math.nan, "auto")
    assert {p.name: p.read_bytes() for p in (lost / "checkpoints" / "step_00000010").glob("*.safetensors")} == whole


def test_no_checkpoint_of_weights_that_are_not_finite(laboratory: Laboratory) -> None:
    overrides = laboratory.overrides("overflow", 2, 3)
    with pytest.raises(RankError) as caught:
        run_ranks(2, rank_jobs.pretrain_with_broken_weights, laboratory.config, overrides, 7)
    text = str(caught.value)
    run = laboratory.load(overrides).run_dir
    assert "SharedError: no checkpoint of step 10 is written: " in text and "w2 of expert rank 1" in text
    assert str(run / "checkpoints" / "step_00000005") in text
    assert (run / "latest").read_text() == "step_00000005\n"


@pytest.mark.parametrize("stage", (*MORE_STAGES, 3))
def test_no_number_comes_from_memory_that_nobody_wrote(laboratory: Laboratory, stage: int) -> None:
    overrides = laboratory.overrides(f"dirty-{stage}", 2, stage)
    run_ranks(2, rank_jobs.pretrain_in_dirty_memory, laboratory.config, overrides)
    found = Run(laboratory.load(overrides).run_dir, overrides, [])
    expected = laboratory.run(2, 2, stage)
    assert found.training("train/loss") == pytest.approx(expected.training("train/loss"), rel=1e-4)
    assert found.training("train/grad_norm") == pytest.approx(expected.training("train/grad_norm"), rel=1e-3)
    assert read_manifest(found.checkpoint(10))["state"]["skipped"] == 0


def events(run: Path) -> list[tuple[str, int]]:
    return [(event["kind"], event["step"]) for event in read_events(run)]


@pytest.mark.parametrize(
    ("stage", "where", "named"),
    [
        (1, "target", "a spike, loss "),
        (3, EXPERT, "a spike, grad_norm "),
        pytest.param(3, "nan", "gradients, of finite errors, are not finite", marks=pytest.mark.exhaustive),
        pytest.param(2, EXPERT, "a spike, grad_norm ", marks=pytest.mark.exhaustive),
        pytest.param(3, "target", "a spike, loss ", marks=pytest.mark.exhaustive),
    ],
)
def test_a_spike_of_one_rank_is_skipped_by_all_and_a_resume_judges_alike(
    laboratory: Laboratory, stage: int, where: str, named: str
) -> None:
    """The run is lost after step 5; the eight steps that are compared with lie on both sides."""
    name = f"spike-{stage}-{where}"
    settings = ["operator.train.steps=12", "operator.train.spikes={window: 8, sigma: 20}"]
    overrides = laboratory.overrides(name, 2, stage, *settings)
    bad = (EXPERT, math.nan) if where == "nan" else (where, 300.0)
    job = (laboratory.config, overrides, [10], *bad)
    for rank in run_ranks(2, rank_jobs.pretrain_with_bad_steps, *job):
        assert [step for step, names in rank["changed"].items() if not names] == [10]
    run = laboratory.load(overrides).run_dir
    assert events(run) == [("skipped", 11)] and named in read_events(run)[0]["why"]
    state = read_manifest(run / "checkpoints" / "step_00000012")["state"]
    assert state["skipped"] == 1 and len(state["usual"]["loss"]) == 8
    if stage == 1:
        whole = {p.name: p.read_bytes() for p in (run / "checkpoints" / "step_00000012").glob("*.safetensors")}
        shutil.rmtree(run / "checkpoints" / "step_00000012")
        shutil.rmtree(run / "checkpoints" / "step_00000010")
        (run / "latest").write_text("step_00000005\n")
        run_ranks(2, rank_jobs.pretrain_with_bad_steps, *job, "auto")
        again = run / "checkpoints" / "step_00000012"
        assert {p.name: p.read_bytes() for p in again.glob("*.safetensors")} == whole
        assert read_manifest(again)["state"] == state and events(run) == [("skipped", 11)] * 2


def test_a_run_that_goes_back_is_one_that_was_resumed_with_other_batches(laboratory: Laboratory) -> None:
    overrides = laboratory.overrides("back", 2, 2, "operator.train.max_skipped_steps=3")
    job = (laboratory.config, overrides, [6, 7, 8], "target", math.nan, None, True)
    assert all(rank["finished"] for rank in run_ranks(2, rank_jobs.pretrain_with_bad_steps, *job))
    run = laboratory.load(overrides).run_dir
    assert events(run) == [("skipped", 7), ("skipped", 8), ("skipped", 9), ("rolled back", 9)]
    state = read_manifest(run / "checkpoints" / "step_00000010")["state"]
    assert [state[k] for k in ("skipped", "skipped_in_row", "passed", "rollbacks")] == [0, 0, 4, 1]
    lines = Run(run, [], []).lines()
    assert not any(line.get("train/skipped") for line in lines)
    # A process that starts at the checkpoint, four batches on, comes to the same bits.
    other = laboratory.copy(laboratory.run(2, 2, 2), "forward", until=5)
    manifest = other.checkpoint(5) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"passed": 0', '"passed": 4'))
    run_ranks(2, rank_jobs.pretrain, laboratory.config, other.overrides, "auto")
    assert other.lines() == lines
    name = "model.safetensors"
    assert (other.checkpoint(10) / name).read_bytes() == (run / "checkpoints" / "step_00000010" / name).read_bytes()
