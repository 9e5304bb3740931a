"""MoE-POT's kind of layer through the engine: 4 of 16 experts of form linear, any number of ranks, save and resume."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import rank_jobs
import torch
from helper import run_ranks, run_script
from laboratory import Laboratory, Run, assert_same_output

import shodh
from shodh.checkpoint.convert import convert
from shodh.core.weights import load_weights
from shodh.schema.domain import num_static_features

pytestmark = pytest.mark.distributed

LINEAR = (
    "form=linear",
    "num_experts=16",
    "top_k=4",
    "num_shared=2",
    "shared_combine=mean",
    "router.score=softmax",
    "router.normalise=after",
    "router.temperature_schedule={start: 2.0, end: 0.5, decay: 0.9}",
)
MOE_POT = (*LINEAR, "router.kind=token", "router.gate=conv", "router.granularity=sample", "balance.cv2=0.1")
NOISY = (*LINEAR, "router.kind=noisy_topk", "balance.importance=0.1", "balance.load=0.1", "balance.orthogonality=0.01")
TERMS = ("train/balance_loss", "train/grad_norm", "moe/switch", "moe/z_loss")


def settings(*lines: str) -> list[str]:
    return [f"operator.experts.{line}" for line in lines]


def assert_same_training(one: Run, other: Run, *more: str) -> None:
    assert len(one.training("train/loss")) == 10
    for name in ("train/loss", *TERMS, *more):
        assert other.training(name) == pytest.approx(one.training(name), rel=2e-5, abs=1e-6), name
    assert other.counts() == one.counts()


@pytest.mark.parametrize(("world", "stage"), [(2, 3), pytest.param(4, 1, marks=pytest.mark.exhaustive)])
def test_experts_on_several_ranks_train_as_on_one(laboratory: Laboratory, world: int, stage: int) -> None:
    """Losses, balance terms, gradient norms, choices and weights."""
    one = laboratory.run(1, 1, 1, *settings(*MOE_POT))
    other = laboratory.run(world, world, stage, *settings(*MOE_POT))
    assert_same_training(one, other, "moe/cv2")
    ours, theirs = (load_weights(r.checkpoint(10) / "model.safetensors") for r in (one, other))
    assert ours["blocks.0.feed_forward.experts.w1"].shape == (16, 16, 32)
    assert ours["blocks.0.feed_forward.experts.w2"].shape == (16, 32, 1)
    for name, tensor in theirs.items():
        torch.testing.assert_close(tensor, ours[name], rtol=0, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_noise_does_not_depend_on_ranks(laboratory: Laboratory) -> None:
    one, two = (laboratory.run(n, n, 1, *settings(*NOISY)) for n in (1, 2))
    assert_same_training(one, two, "moe/importance", "moe/load", "moe/orthogonality")


@pytest.mark.parametrize("stage", (pytest.param(1, marks=pytest.mark.exhaustive), 3))
def test_resumed_run_is_bitwise_the_uninterrupted_one(laboratory: Laboratory, stage: int) -> None:
    """With noise drawn by key, and the temperature restored."""
    run = laboratory.run(2, 2, stage, *settings(*NOISY))
    lost = laboratory.copy(run, f"lost-noisy-{stage}", until=5)
    run_ranks(2, rank_jobs.pretrain, laboratory.config, lost.overrides, "auto")
    assert lost.lines() == run.lines()
    before, after = (load_weights(r.checkpoint(10) / "model.safetensors") for r in (run, lost))
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def universal_folder(folder: Path, out: Path) -> Path:
    """What DeepSpeed's converter makes of a folder of its own."""
    from deepspeed.checkpoint.ds_to_universal import main

    main(
        SimpleNamespace(
            input_folder=str(folder),
            output_folder=str(out),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=False,
        )
    )
    return out


@pytest.mark.parametrize("stage", (pytest.param(1, marks=pytest.mark.exhaustive), 3))
def test_universal_checkpoint_keeps_both_halves_and_the_bias(
    laboratory: Laboratory, stage: int, tmp_path: Path
) -> None:
    run = laboratory.run(2, 2, stage, *settings(*NOISY))
    universal = universal_folder(laboratory.raw(run), tmp_path / "universal")
    convert(universal, tmp_path / "out", "fp32", config_path=run.path / "config.yaml")
    ours, wanted = (
        load_weights(tmp_path / "out" / "model.safetensors"),
        load_weights(run.checkpoint(10) / "model.safetensors"),
    )
    for name, tensor in wanted.items():
        assert torch.equal(ours[f"operator.{name}"], tensor), name


def test_converted_model_has_the_temperature_and_the_outputs_of_the_engine(
    laboratory: Laboratory, tmp_path: Path
) -> None:
    run = laboratory.run(2, 2, 3, *settings(*MOE_POT))
    raw = laboratory.raw(run)
    convert(raw, tmp_path / "out", "fp32", config_path=run.path / "config.yaml", verify=True)
    model = shodh.from_pretrained(tmp_path / "out")
    for block in model.operator.blocks:
        assert block.feed_forward.router.temperature.item() == pytest.approx(2.0 * 0.9**10, rel=1e-6)
    inputs = rank_jobs.probe_input(model.history, model.config.tokenizer.latent_channels, num_static_features(1))
    with torch.no_grad():
        output = model.operator(*inputs)
    for rank in run.ranks:
        assert_same_output(output, rank, model.config)


def test_routing_of_whole_samples_by_four_experts_is_traced_and_analysed(
    laboratory: Laboratory, tmp_path: Path
) -> None:
    run = laboratory.run(2, 2, 3, *settings(*MOE_POT))
    assert all(len(set(np.ravel(grid))) == 1 for grid in run.samples().values()), "one choice a sample"
    for counts in run.counts().values():
        # Four experts for each of the 8 tokens of a sample.
        assert all(n % 8 == 0 for regime in counts.values() for n in regime)
        assert sum(sum(regime) for regime in counts.values()) == 8 * 8 * 4
    done = run_script("tools/analyze_routing.py", run.path, "--out", tmp_path, "--no-probe")
    assert done.code == 0, done.stderr


@pytest.mark.parametrize("kind", ("hash", "frozen", "oracle"))
def test_control_routers_train_and_never_learn_to_route(laboratory: Laboratory, kind: str) -> None:
    run = laboratory.run(2, 2, 1, *settings("num_experts=4", "top_k=2", f"router.kind={kind}"))
    assert len(run.training("train/loss")) == 10
    early, late = (load_weights(run.checkpoint(step) / "model.safetensors") for step in (5, 10))
    router = {name for name in early if ".router." in name and not name.endswith("selection_bias")}
    learned = {name for name in router if not torch.equal(early[name], late[name])}
    assert bool(learned) == (kind == "oracle"), "an oracle learns to choose within the group it is given"
    information = run.training("moe/regime_information")
    if kind == "hash":
        assert max(information) == pytest.approx(0.0, abs=1e-9), "positions say nothing about the regime"
    if kind == "oracle":
        assert min(information) == pytest.approx(1.0)
