"""The router that goes by fingerprints: on any ranks, after a resume, in bf16 and in the model of a checkpoint."""

from __future__ import annotations

from typing import Any

import pytest
import rank_jobs
import torch
from helper import run_ranks
from laboratory import Laboratory, Run, assert_same_output

from shodh.core.weights import load_into, load_weights
from shodh.models.factory import build_operator
from shodh.moe.fingerprint import fingerprint
from shodh.schema.domain import num_static_features

pytestmark = pytest.mark.distributed

GROUPS = {
    "mlp": ("operator.experts.router={kind: operator, groups: 2, groups_by: mlp}",),
    # Full at step 8 of 10, after the checkpoint of step 5: eight samples a step.
    "clusters": ("operator.experts.router={kind: operator, groups: 4, groups_by: clusters, cluster_samples: 64}",),
}
BF16 = "operator.train.precision=bf16"
NAMES = ("centres", "spread", "samples", "seen", "found")


def state(run: Run, step: int = 10) -> dict[str, torch.Tensor]:
    return load_weights(run.checkpoint(step) / "model.safetensors")


@pytest.mark.parametrize("by", GROUPS)
def test_routing_does_not_depend_on_ranks(laboratory: Laboratory, by: str) -> None:
    one, other = laboratory.run(1, 1, 1, *GROUPS[by]), laboratory.run(2, 2, 3, *GROUPS[by])
    assert len(one.training("train/loss")) == 10
    assert other.training("train/loss") == pytest.approx(one.training("train/loss"), rel=0, abs=1e-5)
    assert other.counts() == one.counts()
    ours, theirs = state(one), state(other)
    for name in (n for n in ours if n.startswith("router.")):
        torch.testing.assert_close(theirs[name], ours[name], rtol=0, atol=1e-5)


def test_a_resumed_run_finds_the_same_clusters(laboratory: Laboratory) -> None:
    whole = laboratory.run(2, 2, 1, *GROUPS["clusters"], BF16)
    lost = laboratory.copy(whole, "operator-clusters", until=5)
    run_ranks(2, rank_jobs.pretrain, laboratory.config, lost.overrides, "auto")
    assert lost.lines() == whole.lines()
    name = "model.safetensors"
    assert (lost.checkpoint(10) / name).read_bytes() == (whole.checkpoint(10) / name).read_bytes()


def test_clusters_are_found_on_the_way_and_are_float32_in_the_checkpoint(laboratory: Laboratory) -> None:
    run = laboratory.run(2, 2, 1, *GROUPS["clusters"], BF16)
    half, full = state(run, 5), state(run)
    assert half["router.seen"] == 40 and half["router.found"] == 32
    assert full["router.seen"] == full["router.found"] == 64
    assert (
        torch.equal(full["router.samples"][:40], half["router.samples"][:40])
        and full["router.samples"].abs().any(1).all()
    )
    for rank in run.ranks:
        for name in (f"router.{n}" for n in NAMES):
            assert full[name].dtype == rank["buffers"][name].dtype == torch.float32
            assert torch.equal(full[name], rank["buffers"][name])


@pytest.mark.parametrize(("by", "layout"), [("mlp", (2, 2, 3)), ("clusters", (2, 2, 3)), ("clusters", (2, 2, 1, BF16))])
def test_the_model_of_a_checkpoint_decides_as_the_engine(
    laboratory: Laboratory, by: str, layout: tuple[Any, ...]
) -> None:
    world, ep, stage, *more = layout
    run = laboratory.run(world, ep, stage, *GROUPS[by], *more)
    config = laboratory.load(run.overrides)
    twin = build_operator(config)
    path = run.checkpoint(10) / "model.safetensors"
    load_into(twin, load_weights(path), path)
    history, static = rank_jobs.probe_input(
        config.data.history, config.tokenizer.latent_channels, num_static_features(1)
    )
    seen = fingerprint(history, torch.ones(len(history), 3, dtype=torch.bool))
    with torch.no_grad():
        output = twin(history, static, fingerprint=seen)
    for rank in run.ranks:
        if not more:
            assert_same_output(output, rank, config)
        groups, experts = config.operator.experts.groups, config.operator.experts.num_experts
        for routing, selected in zip(output.routing, rank["selected"], strict=True):
            # The group goes by the fingerprint, which is float32 in both; the expert of it by a bf16 token.
            assert torch.equal(routing.selected * groups // experts, selected * groups // experts)
