"""What the operator learns, on cached latents; `FieldTask` puts fields in their place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shodh.config import RunConfig
from shodh.core.devices import send
from shodh.core.errors import DataError
from shodh.core.noise import normal
from shodh.core.seeding import generator, stable_seed
from shodh.data.loader import SampleDataset
from shodh.models.forecaster import Forecaster
from shodh.models.operator import OperatorOutput
from shodh.moe.balance import GlobalBalance
from shodh.moe.step import router_arguments
from shodh.train.datasets import Regimes
from shodh.train.metrics import Metrics
from shodh.train.trainer import Batch, Measured, Outcome, sample_names

_STILL = 1e-13  # mean square of changes over that of values that float32 makes of equal frames


class OperatorTask:
    """Predict the next latent; balance the experts over the global batch.

    Regime labels are used for metrics alone; the model gets latents and static features.

    Parameters
    ----------
    training : sequence
        The windows that are learned from, a dataset a regime: how much changes in them is what errors may be relative
        to.
    """

    space, measure = "latent", "mse"

    def __init__(self, config: RunConfig, regimes: Regimes, training: Sequence[SampleDataset]) -> None:
        self.config, self.regimes = config, regimes
        self.operator = config.operator
        self.history = config.data.history
        relative = config.operator.loss == "over_persistence"
        self._change = mean_changes(training, self._labels()) if relative else None
        self.balance = GlobalBalance()

    def _labels(self) -> list[str]:
        """Each regime with its fields, for messages."""
        fields = (", ".join(f.name for f in self.regimes.fields_of(n)) for n in range(len(self.regimes.names)))
        return [f"regime {name!r} (fields {of})" for name, of in zip(self.regimes.names, fields, strict=True)]

    def _windows(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Frames ``[B, T + 1, C, ...]``, the last one to be predicted, and static inputs of a batch."""
        return batch["latents"], batch["static"]

    def _errors(self, prediction: Tensor, target: Tensor, regime: Tensor, static: Tensor) -> Tensor:
        """Error of each sample, ``[B]``; ``static`` as the model is given it."""
        return (prediction - target).square().flatten(1).mean(1)

    def _noise_scale(self, history: Tensor) -> Tensor | float:
        """What the standard deviation of the input noise is relative to."""
        return 1.0

    def _noise(self, history: Tensor, batch: Batch, step: int) -> Tensor:
        """Input noise drawn by (seed, step, sample): the same on any number of ranks, and in a resumed run."""
        std = self.operator.input_noise
        if std == 0:
            return history
        seeds = [stable_seed(self.config.seed, "noise", step, *name) for name in sample_names(batch)]
        drawn = normal(send(seeds, history.device), history.shape[1:])
        return history + std * self._noise_scale(history) * drawn.to(history.dtype)

    def _shift(self, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        """Latents and static features, each sample rolled along the periodic axes of its domain.

        The tokenizer commutes with shifts by whole latent cells, so a shifted sample is as true as the stored one.
        """
        latents, static = self._windows(batch)
        if not self.operator.random_shifts:
            return latents, static
        shifts: list[int] = []
        for key in sample_names(batch):
            draw = torch.rand(3, generator=generator(self.config.seed, "shift", step, *key)).tolist()
            boundary, sizes = self.regimes.domains[key[0]].boundary, latents.shape[-3:]
            shifts += [int(u * n) if b == "periodic" else 0 for u, n, b in zip(draw, sizes, boundary, strict=True)]
        by_sample = send(shifts, latents.device).view(-1, 3)
        return roll_samples(latents, by_sample), roll_samples(static, by_sample)

    def predict(self, model: Any, batch: Batch) -> tuple[OperatorOutput, Tensor, Tensor]:
        """Output without noise or shifts, and the errors ``[B]`` of it and of persistence."""
        frames, static = self._windows(batch)
        history, target = frames[:, : self.history], frames[:, self.history]
        output = Forecaster.of(self.config, self.regimes.space, model).step(history, static, batch["regime"])
        errors = (self._errors(frame, target, batch["regime"], static) for frame in (output.latent, history[:, -1]))
        error, persistence = errors
        return output, error, persistence

    def measured(self, model: Any, batch: Batch) -> Measured:
        """Held-out errors of the model and of persistence."""
        output, error, persistence = self.predict(model, batch)
        pairs = {f"{self.space}_{self.measure}": error, f"persistence_{self.measure}": persistence}
        return Measured({name: (values, batch["regime"]) for name, values in pairs.items()}, output.routing)

    def start_step(self) -> None:
        self.balance.start_step()

    def loss(self, model: Any, batch: Batch, step: int) -> Outcome:
        regime = batch["regime"]
        latents, static = self._shift(batch, step)
        history, target = latents[:, : self.history], latents[:, self.history]
        given = self._noise(history, batch, step)
        forecaster = Forecaster.of(self.config, self.regimes.space, model)
        told = router_arguments(
            self.operator.experts,
            regime,
            sample_names(batch),
            self.config.seed,
            step,
            look=lambda: forecaster.look(given, regime),
        )
        output = model(given, static, **told)
        error = self._errors(output.latent, target, regime, static)
        persistence = self._errors(history[:, -1], target, regime, static)
        mean = error.mean()
        metrics: Metrics = {
            f"train/{self.space}_{self.measure}": (mean.detach(), "mean"),
            "train/over_persistence": (mean.detach() / persistence.mean(), "mean"),
        }
        if self._change is not None:
            self._change = self._change.to(error.device)  # Once.
        loss = mean if self._change is None else (error / self._change[regime]).mean()
        if output.routing:
            config, terms = self.operator.experts.balance, self.balance(output.routing)
            balance = terms.weighted(config)
            loss = loss + balance
            metrics["train/balance_loss"] = (balance.detach(), "mean")
            metrics |= {f"moe/{name}": (value.detach(), "mean") for name, value in terms.reported(config).items()}
        return Outcome(loss, error.detach(), metrics, output.routing, told.get("fingerprint"))


def roll_samples(values: Tensor, shifts: Tensor) -> Tensor:
    """Each sample of ``values [B, ..., x, y, z]`` rolled by its ``shifts [B, 3]``, in one copy for all of them."""
    sizes = values.shape[-3:]
    x, y, z = ((torch.arange(n, device=values.device) - shifts[:, a, None]) % n for a, n in enumerate(sizes))
    place = (x[:, :, None, None] * sizes[1] + y[:, None, :, None]) * sizes[2] + z[:, None, None, :]
    flat = values.flatten(-3)
    where = place.view(len(values), *(1,) * (flat.ndim - 2), -1).expand(flat.shape)
    return flat.gather(-1, where).view(values.shape)


def mean_changes(datasets: Sequence[SampleDataset], labels: Sequence[str], windows: int = 64) -> Tensor:
    """Mean square of the last change in windows of each dataset, ``[R]``: what persistence would lose.

    From at most ``windows`` windows of each, spread evenly; at least a hundredth of the largest, so that a regime that
    hardly moves does not decide alone.

    Raises
    ------
    DataError
        A dataset does not change at all, to rounding; ``labels`` name them.
    """
    changes = []
    for data, label in zip(datasets, labels, strict=True):
        rows = torch.linspace(0, len(data) - 1, min(windows, len(data))).long().tolist()
        latents = [data[row]["latents"][-2:] for row in rows]
        changes.append(torch.stack([(z[-1] - z[-2]).square().mean() for z in latents]).mean())
        if changes[-1] <= _STILL * torch.stack(latents).square().mean():
            raise DataError(
                f"{label}: nothing changes from one frame to the next in the training data, so persistence makes no "
                "error and operator.loss=over_persistence has nothing to divide by; use operator.loss=mse, a larger "
                "data.stride, or leave it out"
            )
    change = torch.stack(changes)
    return change.clamp(min=0.01 * float(change.max()))
