"""The best checkpoint of a run: named by the newest one, whole after a kill, kept, and read by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import rank_jobs
import torch
from helper import RankError, run_ranks, run_script
from laboratory import Laboratory, Run
from safetensors.torch import load_file
from test_average import AVERAGE

import shodh
from shodh.checkpoint.description import read_description
from shodh.checkpoint.folder import best_checkpoint, checkpoints_of, read_manifest, verify_checkpoint
from shodh.core.weights import AVERAGED, WEIGHTS
from shodh.experiments.finetuning.measure import measure as tuning_measure
from shodh.experiments.harness.run import Run as StudyRun
from shodh.experiments.harness.run import judged_checkpoint
from shodh.experiments.transfer.measure import measure as transfer_measure

pytestmark = pytest.mark.distributed

MEASURE = "valid/latent_nmse"
BEST = tuple(
    f"operator.train.{setting}"
    for setting in ("valid_every=2", "checkpoint_every=0", "keep_checkpoints=1", f"best.measure={MEASURE}")
)


def lowest(run: Run, name: str = MEASURE) -> tuple[int, float]:
    """Step and value of the lowest validation in the metrics."""
    value, step = min((line[name], line["step"] + 1) for line in run.lines() if name in line)
    return int(step), value


def test_the_best_checkpoint_is_that_of_the_lowest_validation_and_outlives_the_others(laboratory: Laboratory) -> None:
    run = laboratory.run(1, 1, 1, *BEST)
    step, value = lowest(run)
    state = read_manifest(run.checkpoint(10))["state"]
    assert state["best"] == {
        "step": step,
        "measure": MEASURE,
        "value": value,
        "persistence": next(ln["valid/persistence_nmse"] for ln in run.lines() if ln.get(MEASURE) == value),
    }
    assert state["stale"] == (10 - step) // 2 and state["ended"] is None
    assert best_checkpoint(run.path) == run.checkpoint(step) and judged_checkpoint(run.path) == "best"
    assert {p.name for p in checkpoints_of(run.path)} == {run.checkpoint(step).name, run.checkpoint(10).name}


def test_a_kill_while_the_best_is_written_leaves_the_one_before(laboratory: Laboratory) -> None:
    overrides = laboratory.overrides("best-killed", 1, 1, *BEST)
    with pytest.raises(RankError, match="rank 0 died"):
        run_ranks(1, rank_jobs.pretrain_with_failing_save, laboratory.config, overrides, 2, "kill", timeout=60)
    folder = laboratory.load(overrides).run_dir
    best = best_checkpoint(folder)
    assert best is not None and best.name == "step_00000002" and verify_checkpoint(best)
    run_ranks(1, rank_jobs.pretrain, laboratory.config, overrides, "auto")
    whole = laboratory.run(1, 1, 1, *BEST)
    again = Run(folder, overrides, [])
    assert again.lines() == whole.lines()
    assert read_manifest(again.checkpoint(10))["state"] == read_manifest(whole.checkpoint(10))["state"]
    assert best_checkpoint(folder) == again.checkpoint(lowest(whole)[0])


def test_a_run_without_a_better_validation_ends_and_is_not_trained_on_silently(laboratory: Laboratory) -> None:
    settings = [
        *laboratory.overrides("stale", 1, 1, *BEST),
        "operator.train.lr=1.0e-30",
        "operator.train.valid_every=1",
    ]

    def train(patience: int) -> tuple[str, int]:
        more = (f"operator.train.best.patience={patience}", "--resume", "auto")
        finished = run_script("launch/pretrain.py", "--config", laboratory.config, "--set", *settings, *more)
        assert finished.code == 0, finished.stderr
        return finished.stderr, len(Run(laboratory.load(settings).run_dir, [], []).training("train/loss"))

    said, steps = train(2)
    assert steps == 3 and "the run ends at step 3 of 10: valid/latent_nmse was not below" in said
    folder = laboratory.load(settings).run_dir
    assert read_manifest(folder / "checkpoints" / "step_00000003")["state"]["ended"] in said
    said, steps = train(2)
    assert steps == 3 and "this run has ended: valid/latent_nmse was not below" in said
    said, steps = train(4)
    assert steps == 5 and "resumed from" in said
    assert {p.name for p in checkpoints_of(folder)} == {"step_00000001", "step_00000005"}


def test_an_unknown_measure_is_one_line_and_nothing_is_written(laboratory: Laboratory) -> None:
    settings = [*laboratory.overrides("unknown", 1, 1), "operator.train.best.measure=valid/decoded"]
    finished = run_script("launch/pretrain.py", "--config", laboratory.config, "--set", *settings)
    assert finished.code == 2 and not laboratory.load(settings).run_dir.exists()
    line = finished.stderr.strip().splitlines()[-1]
    assert (
        line.startswith("error: train.best.measure=valid/decoded")
        and "use valid/latent_nmse, valid/decoded_vrmse" in line
    )


def test_every_reader_takes_the_best_checkpoint_and_either_weights(laboratory: Laboratory, tmp_path: Path) -> None:
    run = laboratory.run(2, 2, 1, *AVERAGE)
    step, _ = lowest(run, "valid/decoded_vrmse")
    best = run.checkpoint(step)
    for kind, name in (("ema", AVERAGED), ("raw", WEIGHTS)):
        stored = load_file(best / name)
        loaded = shodh.from_pretrained(run.path, checkpoint="best", weights=kind)
        assert all(torch.equal(p, stored[n]) for n, p in loaded.operator.named_parameters())  # type: ignore[union-attr]
        out = tmp_path / kind
        done = run_script("tools/convert_checkpoint.py", run.path, out, "--tag", "best", "--weights", kind, "--verify")
        assert done.code == 0, done.stderr
        written = load_file(out / WEIGHTS)
        assert all(torch.equal(stored[n], written[f"operator.{n}"]) for n in stored)
        assert ("exponential moving average" in (out / "README.md").read_text()) == (kind == "ema")
        assert read_description(out).source.model_dump(include={"step", "ema"}) == {"step": step, "ema": kind == "ema"}
    refused = run_script("tools/convert_checkpoint.py", tmp_path / "ema", tmp_path / "no", "--weights", "raw")
    assert refused.code == 2 and "holds the average of the weights alone" in refused.stderr
    copy = laboratory.copy(run, "best-evaluated")
    shown = run_script("launch/evaluate.py", "--run", copy.path, "--checkpoint", "best", "--weights", "raw")
    assert shown.code == 0 and f"checkpoint {best.name}, test split" in shown.stdout, shown.stderr
    assert f"best checkpoint: {best.name}, valid/decoded_vrmse" in shown.stdout


def test_studies_judge_a_run_by_its_best_checkpoint_with_the_last_beside_it(laboratory: Laboratory) -> None:
    source = laboratory.run(2, 2, 1, *AVERAGE)
    run, best = laboratory.copy(source, "judged"), source.checkpoint(lowest(source, "valid/decoded_vrmse")[0])
    overrides = [f"name={run.path.name}", *source.overrides[1:]]
    settings: dict[str, Any] = {"gradient_samples": 2, "fresh": None}
    job = StudyRun("judged", laboratory.load(overrides), run.path / "result.json", "", settings=settings)
    found = transfer_measure(job, torch.device("cpu"))
    assert found["checkpoint"] == found["evaluation"]["checkpoint"] == best.name
    assert found["errors"].keys() == found["last"].keys()
    assert (found["errors"] == found["last"]) == (best.name == "step_00000010")
    tuned = tuning_measure(job, torch.device("cpu"))
    assert tuned["evaluation"]["checkpoint"] == best.name and tuned["last"].keys() == found["last"].keys()
    assert found["evaluation"]["weights"] == "ema"


def test_a_tokenizer_is_published_from_its_best_checkpoint_and_average(laboratory: Laboratory) -> None:
    train = [f"tokenizer.train.{s}" for s in ("ema=0.5", "valid_every=1", "best.measure=valid/decoded_vrmse")]
    overrides = ["name=averaged", f"deepspeed={laboratory.overrides('', 1, 1)[2].partition('=')[2]}", *train]
    run_ranks(1, rank_jobs.train_tokenizer, laboratory.config, overrides)
    folder = laboratory.load(overrides).tokenizer_dir
    best = best_checkpoint(folder)
    assert best is not None
    source = read_description(folder).source
    assert source.ema and source.step == read_manifest(best)["state"]["step"]
    stored, published = load_file(best / AVERAGED), load_file(folder / "tokenizer.safetensors")
    assert all(torch.equal(stored[n], published[n]) for n in stored if not n.startswith("latent_"))
    line = Run(folder, [], []).lines()[-1]
    assert line["valid/decoded_vrmse"] > 0 and {
        f"valid/decoded_vrmse/{r}" for r in ("open_channel", "porous_media")
    } < set(line)
