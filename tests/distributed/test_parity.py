"""A run is the same run on one rank, on two, with its experts spread over both, and with two copies of them on four."""

from __future__ import annotations

import pytest
import torch
from laboratory import Laboratory, Run, assert_same_output
from rank_jobs import probe_input

from shodh.core.weights import load_into, load_weights
from shodh.models.factory import build_operator
from shodh.schema.domain import num_static_features

pytestmark = pytest.mark.distributed

LAYOUTS = ((1, 1), (2, 1), (2, 2), (4, 2))  # ranks, of which so many share one set of experts
TERMS = ("train/balance_loss", "moe/switch", "moe/information", "moe/z_loss", "train/grad_norm")


def assert_same_training(one: Run, other: Run) -> None:
    assert len(one.training("train/loss")) == 10
    for name in ("train/loss", "train/latent_nmse"):
        assert other.training(name) == pytest.approx(one.training(name), rel=0, abs=1e-5), name
    for name in TERMS:
        assert other.training(name) == pytest.approx(one.training(name), rel=1e-5, abs=1e-7), name
    assert other.counts() == one.counts()


@pytest.mark.parametrize("stage", (1, 2, 3))
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_losses_gradient_norms_and_routing_do_not_depend_on_ranks(
    laboratory: Laboratory, layout: tuple[int, int], stage: int
) -> None:
    one = laboratory.run(1, 1, stage)
    clip = laboratory.load(one.overrides).operator.train.clip
    assert min(one.training("train/grad_norm")) > clip, "clipping must be at work"
    assert_same_training(one, laboratory.run(*layout, stage))


@pytest.mark.parametrize("stage", (2, 3))
def test_losses_do_not_depend_on_the_zero_stage(laboratory: Laboratory, stage: int) -> None:
    assert_same_training(laboratory.run(2, 2, 1), laboratory.run(2, 2, stage))


def test_validation_does_not_depend_on_ranks(laboratory: Laboratory) -> None:
    one, two = laboratory.run(1, 1, 1), laboratory.run(2, 2, 1)
    for regime in ("open_channel", "porous_media"):
        for name in ("latent_nmse", "persistence_nmse"):
            values = one.training(f"valid/{name}/{regime}")
            assert len(values) == 2
            assert two.training(f"valid/{name}/{regime}") == pytest.approx(values, abs=1e-5)
    assert two.training("valid/moe/regime_information") == pytest.approx(one.training("valid/moe/regime_information"))


def test_traced_samples_do_not_depend_on_ranks(laboratory: Laboratory) -> None:
    one, two = laboratory.run(1, 1, 1), laboratory.run(2, 2, 1)
    layers, validations, batch = 2, {4, 9}, 8
    assert {step for step, _, _ in one.samples()} == validations
    assert len(one.samples()) == len(validations) * batch * layers
    assert two.samples() == one.samples()


def test_gradient_accumulation_does_not_depend_on_ranks(laboratory: Laboratory) -> None:
    one = laboratory.run(1, 1, 2, "operator.train.micro_batch=4")
    assert_same_training(one, laboratory.run(2, 2, 2, "operator.train.micro_batch=2"))


def test_accumulated_gradient_is_that_of_the_whole_batch_but_for_the_balance(laboratory: Laboratory) -> None:
    off = [f"operator.experts.balance.{term}=0" for term in ("switch", "information")]
    whole = laboratory.run(2, 2, 1, *off)
    accumulated = laboratory.run(2, 2, 1, *off, "operator.train.micro_batch=1")
    for name in ("train/latent_nmse", "train/grad_norm"):
        assert accumulated.training(name) == pytest.approx(whole.training(name), rel=1e-5), name


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_exchange_format_is_the_same_for_every_layout(laboratory: Laboratory, stage: int) -> None:
    reference = load_weights(laboratory.run(1, 1, 1).checkpoint(10) / "model.safetensors")
    moved = load_weights(laboratory.run(1, 1, 1).checkpoint(5) / "model.safetensors")
    assert any(not torch.equal(reference[name], moved[name]) for name in reference)
    for layout in LAYOUTS:
        state = load_weights(laboratory.run(*layout, stage).checkpoint(10) / "model.safetensors")
        assert {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in reference.items()}
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, reference[name], rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("stage", (1, 2, 3))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_plain_torch_twin_gives_the_outputs_of_the_engine(
    laboratory: Laboratory, layout: tuple[int, int], stage: int
) -> None:
    run = laboratory.run(*layout, stage)
    config = laboratory.load(run.overrides)
    twin = build_operator(config)
    path = run.checkpoint(10) / "model.safetensors"
    load_into(twin, load_weights(path), path)
    with torch.no_grad():
        output = twin(*probe_input(config.data.history, config.tokenizer.latent_channels, num_static_features(1)))
    for rank in run.ranks:
        assert_same_output(output, rank, config)


def test_experts_of_the_first_checkpoint_differ_from_each_other(laboratory: Laboratory) -> None:
    state = load_weights(laboratory.run(2, 2, 1).checkpoint(5) / "model.safetensors")
    for name in ("w1", "w2", "w3"):
        experts = state[f"blocks.0.feed_forward.experts.{name}"]
        assert experts.shape[0] == 4
        for i in range(4):
            for j in range(i):
                assert (experts[i] - experts[j]).norm() > experts[i].norm()
