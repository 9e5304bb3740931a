"""Training through forecasts in a row: loss and gradients against the obvious loop, on fields and on latents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_forecaster import build
from torch import Tensor

from shodh.config import BalanceConfig
from shodh.models.forecaster import Forecaster
from shodh.moe.balance import GlobalBalance
from shodh.moe.routing import join_decisions
from shodh.moe.step import router_arguments
from shodh.train.datasets import Regimes
from shodh.train.field_task import operator_task
from shodh.train.operator_task import OperatorTask
from shodh.train.trainer import Batch, to_device

STEPS = 3
UNBALANCED = dict.fromkeys(BalanceConfig.model_fields, 0.0)
NAMES = [(0, 4, 1), (1, 2, 0)]


def configured(kind: str, **settings: Any) -> tuple[OperatorTask, Forecaster, Batch]:
    """A task, its model, and a batch of two samples of different regimes with ``STEPS`` frames to be predicted."""
    config, forecaster = build(kind)
    unroll = config.operator.unroll.model_copy(update=settings)
    experts = config.operator.experts.model_copy(update={"balance": BalanceConfig.model_construct(**UNBALANCED)})
    changes = {"unroll": unroll, "random_shifts": False, "experts": experts}
    config = config.model_copy(update={"operator": config.operator.model_copy(update=changes)})
    regimes = Regimes([], forecaster.space)
    task = operator_task(config, regimes, [], forecaster.tokenizer)
    keys = {name: torch.tensor(values) for name, values in zip(("regime", "trajectory", "frame"), zip(*NAMES))}
    draw = torch.Generator().manual_seed(0)
    grid, frames = config.cells, 3 + STEPS
    static = (torch.rand(2, 1, *grid, generator=draw) < 0.3).float()
    fields = torch.randn(2, frames, 5, *grid, generator=draw)
    if kind != "latents":
        return task, forecaster, to_device({"fields": fields, "static": static, **keys}, torch.device("cpu"))
    with torch.no_grad():
        rows = [forecaster.encode(fields[b, None], static[b, None], label) for b, label in enumerate((0, 1))]
    states, features = (torch.cat(parts) for parts in zip(*rows, strict=True))
    return task, forecaster, to_device({"latents": states, "static": features, **keys}, torch.device("cpu"))


def by_hand(task: OperatorTask, forecaster: Forecaster, batch: Batch, steps: int, detach: bool) -> Tensor:
    """The mean error of ``steps`` forecasts, each written out."""
    frames, static = task._windows(batch)
    window, total = frames[:, :3], torch.zeros(())
    told = router_arguments(task.operator.experts, batch["regime"])
    for number in range(steps):
        ahead = forecaster.operator(window, static, **told).latent  # type: ignore[misc]
        total = total + task._errors(ahead, frames[:, 3 + number], batch["regime"], static).mean() / steps
        following = ahead.detach() if detach else ahead
        if forecaster.tokenizer is None:
            following = forecaster.space.pad(following[:, None], static, batch["regime"])[0][:, 0]
        window = torch.stack((*window[:, 1:].unbind(1), following), 1)
    return total


def gradients(loss: Tensor, forecaster: Forecaster) -> list[Tensor]:
    parameters = list(forecaster.operator.parameters())  # type: ignore[union-attr]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def loss_of(task: OperatorTask, forecaster: Forecaster, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
    """The loss and what is reported."""
    task.start_step()
    outcome = task.loss(forecaster.operator, batch, 0)
    return outcome.loss, outcome.metrics


@pytest.mark.parametrize("gradient", ["full", "pushforward"])
@pytest.mark.parametrize("kind", ["latents", "fields", "oracle"])
def test_unrolled_loss_and_gradients_are_those_of_the_loop(kind: str, gradient: str) -> None:
    task, forecaster, batch = configured(kind, steps=STEPS, gradient=gradient)
    loss, metrics = loss_of(task, forecaster, batch)
    expected = by_hand(task, forecaster, batch, STEPS, gradient == "pushforward")
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(gradients(loss, forecaster), gradients(expected, forecaster), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    one = by_hand(task, forecaster, batch, 1, False)
    name = f"train/{task.space}_{task.measure}"
    torch.testing.assert_close(metrics[name][0], one.detach())  # Reported is the error of one step.
    last = STEPS * expected - (STEPS - 1) * by_hand(task, forecaster, batch, STEPS - 1, False)
    torch.testing.assert_close(metrics[f"{name}_step_{STEPS}"][0], last.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["latents", "fields"])
def test_pushforward_has_the_loss_of_the_full_gradient_and_another_gradient(kind: str) -> None:
    found = {}
    for gradient in ("full", "pushforward"):
        task, forecaster, batch = configured(kind, steps=STEPS, gradient=gradient)
        loss, _ = loss_of(task, forecaster, batch)
        found[gradient] = loss.item(), torch.cat([g.flatten() for g in gradients(loss, forecaster)])
    assert found["full"][0] == found["pushforward"][0]
    difference = (found["full"][1] - found["pushforward"][1]).norm() / found["full"][1].norm()
    assert float(difference) > 0.01


def test_decisions_of_forecasts_are_balanced_together() -> None:
    """Twice the same forecast has the balance terms of one; the counts are of both."""
    _, forecaster, batch = configured("oracle", steps=1)
    frames, static = forecaster.space.pad(batch["fields"], batch["static"], batch["regime"])
    (layer,) = forecaster.step(frames[:, :3], static, batch["regime"]).routing
    both = join_decisions([layer, layer])
    assert both.counts.tolist() == (2 * layer.counts).tolist() and both.counts.dtype == layer.counts.dtype
    assert torch.equal(both.probs, layer.probs.repeat(2, 1)) and join_decisions([layer]) is layer
    for ours, theirs in zip(GlobalBalance()([both]), GlobalBalance()([layer]), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["latents", "fields"])
def test_noise_relative_to_the_error_has_its_size_and_comes_again(kind: str) -> None:
    """By sample and channel; the same in another call, which is what a resumed run makes; none where nothing exists."""
    task, forecaster, batch = configured(kind)
    task.operator = task.operator.model_copy(update={"input_noise": 2.0, "noise_relative_to": "error"})
    frames, static = task._windows(batch)
    noisy = task._noise(forecaster.operator, frames, static, batch, 7)
    assert not noisy.requires_grad
    assert torch.equal(noisy, task._noise(forecaster.operator, frames, static, batch, 7))
    assert not torch.equal(noisy, task._noise(forecaster.operator, frames, static, batch, 8))
    ahead = forecaster.step(frames[:, :3], static, batch["regime"]).latent.detach()
    error = task._channel_means((ahead - frames[:, 3]).square(), batch["regime"], static).sqrt()
    found = (noisy - frames[:, :3]).square().flatten(3).mean((1, 3)).sqrt()
    torch.testing.assert_close(found, 2.0 * error, rtol=0.5 if kind == "latents" else 0.2, atol=0)
    if kind == "fields":
        assert error[0, 4] == found[0, 4] == 0 < error[1, 4]  # The dye of a regime that has none.
