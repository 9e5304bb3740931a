"""bf16 training: it learns, and what must stay in float32 does so, also through a checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import rank_jobs
import torch
from helper import run_ranks
from laboratory import MORE_STAGES, Laboratory

from shodh.core.precision import OPERATIONS
from shodh.core.weights import load_weights
from shodh.train.metrics import read_metrics

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("stage", (1, 3))
def test_bf16_run_follows_the_float32_run_and_keeps_its_selection_bias(laboratory: Laboratory, stage: int) -> None:
    run = laboratory.run(2, 2, stage, "operator.train.precision=bf16")
    errors, exact = (r.training("train/latent_nmse") for r in (run, laboratory.run(2, 2, stage)))
    assert errors == pytest.approx(exact, rel=0.05) and errors != exact
    weights = load_weights(run.checkpoint(10) / "model.safetensors")
    for rank in run.ranks:
        assert rank["parameter_dtypes"] == {torch.bfloat16}
        biases = {name: b for name, b in rank["buffers"].items() if name.endswith("selection_bias")}
        assert len(biases) == 2
        for name, bias in biases.items():
            assert bias.dtype == torch.float32
            # Ten steps of one thousandth each: not representable in bf16.
            steps = bias / 1e-3
            torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
            assert steps.abs().max() >= 2
            assert weights[name].dtype == torch.float32 and torch.equal(weights[name], bias)


@pytest.mark.parametrize("stage", (*MORE_STAGES, 3))
def test_resumed_bf16_run_is_bitwise_the_uninterrupted_one(laboratory: Laboratory, stage: int) -> None:
    whole = laboratory.run(2, 2, stage, "operator.train.precision=bf16")
    lost = laboratory.copy(whole, f"bf16-{stage}", until=5)
    ranks = run_ranks(2, rank_jobs.pretrain, laboratory.config, lost.overrides, "auto")
    assert lost.lines() == whole.lines()
    name = "model.safetensors"
    assert (lost.checkpoint(10) / name).read_bytes() == (whole.checkpoint(10) / name).read_bytes()
    for again, before in zip(ranks, whole.ranks, strict=True):
        for name in (n for n in before["buffers"] if n.endswith("selection_bias")):
            assert again["buffers"][name].dtype == torch.float32
            assert torch.equal(again["buffers"][name], before["buffers"][name]), name


def test_tokenizer_trains_alike_on_one_rank_and_two_and_in_bf16(laboratory: Laboratory) -> None:
    losses = {}
    for name, world, stage, precision in [
        ("one", 1, 1, "fp32"),
        ("two", 2, 3, "fp32"),
        ("bf16", 2, 1, "bf16"),
    ]:
        overrides = laboratory.overrides(name, 1, stage, f"tokenizer.train.precision={precision}")
        overrides[1] = f"tokenizer.run={laboratory.config.parent / name}"
        run_ranks(world, rank_jobs.train_tokenizer, laboratory.config, overrides)
        folder = laboratory.load(overrides).tokenizer_dir
        losses[name] = [line["train/loss"] for line in read_metrics(folder / "metrics.jsonl") if "train/loss" in line]
        state = load_weights(folder / "tokenizer.safetensors")
        assert state["latent_mean"].dtype == state["latent_std"].dtype == torch.float32
        assert bool((state["latent_std"] > 0).all()) and not torch.equal(state["latent_std"], torch.ones(8))
        assert all(math.isfinite(value) for value in losses[name])
    assert losses["two"] == pytest.approx(losses["one"], abs=1e-5)
    assert losses["bf16"] == pytest.approx(losses["one"], rel=0.02)


def test_no_entry_lets_tf32_into_float32_or_keeps_the_user_from_it(laboratory: Laboratory, tmp_path: Path) -> None:
    steps = [f"{stage}.train.steps=1" for stage in ("tokenizer", "operator")]
    overrides = [*laboratory.overrides("products", 1, 1, *steps), f"tokenizer.run={tmp_path / 'tokenizer'}"]
    (found,) = run_ranks(1, rank_jobs.products_of_every_entry, laboratory.config, overrides, tmp_path / "converted")
    exact, user = dict.fromkeys(OPERATIONS, "ieee"), found["seen"].pop("user")[0]
    assert user["cuda.matmul"] == user["cudnn.conv"] == "tf32"
    for entry in ("train_tokenizer", "pretrain", "evaluate", "from_pretrained"):
        assert found["seen"][entry] and all(met == exact for met in found["seen"][entry]), entry
        assert found["seen"][f"after {entry}"] == [user], entry
    assert found["metrics"]["float32_products"] == exact
    for folder in (laboratory.load(overrides).run_dir, tmp_path / "tokenizer"):
        assert json.loads((folder / "env.json").read_text())["float32_products"] == exact
