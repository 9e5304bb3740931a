"""What the operator learns, on cached latents; `FieldTask` puts fields in their place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from shodh.config import RunConfig
from shodh.core.devices import resident, send
from shodh.core.errors import DataError
from shodh.core.noise import normal
from shodh.core.seeding import generator, stable_seed
from shodh.data.loader import SampleDataset
from shodh.models.forecaster import Forecaster
from shodh.models.operator import OperatorOutput
from shodh.models.tokenizer import PATCH, Tokenizer
from shodh.moe.balance import GlobalBalance
from shodh.moe.routing import join_decisions
from shodh.moe.step import router_arguments
from shodh.train.datasets import Regimes
from shodh.train.decoded import DECODED, FIELDS, PERSISTENCE, STATIC_FIELDS, decode_batch, defined, frame_errors
from shodh.train.latent_metric import DecodedError, ReadStatic, channel_weights, static_reader, weighted_square
from shodh.train.metrics import Metrics
from shodh.train.trainer import Batch, Measured, Outcome, sample_names, to_device

CONDITIONS = "conditions"  # of a batch: what the operator is told, ``[B, N]``
_STILL = 1e-13  # mean square of changes over that of values that float32 makes of equal frames
Errors = Callable[[Tensor, Tensor], Tensor]  # of a prediction and its target, a sample each


class OperatorTask:
    """Predict the next latent; balance the experts over the global batch.

    Regime labels are used for metrics alone, and to find the tokenizer's statistics; the model gets latents and static
    features.

    Parameters
    ----------
    training : sequence
        The windows that are learned from, a dataset a regime: how much changes in them is what errors may be relative
        to.
    tokenizer : Tokenizer, optional
        Of operators on latents: its statistics, and its decoder, are what errors are measured by.
    read_static : callable, optional
        Static fields at full resolution of training samples; by default they are read from the sources.
    """

    space = "latent"

    def __init__(
        self,
        config: RunConfig,
        regimes: Regimes,
        training: Sequence[SampleDataset],
        tokenizer: Tokenizer | None = None,
        read_static: ReadStatic | None = None,
    ) -> None:
        self.config, self.regimes, self.tokenizer = config, regimes, tokenizer
        self.operator = config.operator
        self.history = config.data.history
        self.balance = GlobalBalance()
        self.measure = "mse"
        self._weights: Tensor | None = None  # of the channels in each regime
        self._decoded: DecodedError | None = None
        assert (tokenizer is None) == (self.space == "field")
        if tokenizer is not None and self.operator.metric != "whitened":
            self.measure, self._weights = "nmse", channel_weights(tokenizer, regimes.space.domains)
        if tokenizer is not None and self.operator.metric == "decoded":
            self._decoded = DecodedError(regimes.space, tokenizer, read_static or static_reader(regimes, "train"))
        #: What persistence loses in each regime, by whether the loss is of decoded fields.
        self._changes: dict[bool, Tensor] = {}
        if self.operator.loss == "over_persistence":
            for decoded in (False,) if self._decoded is None else (False, True):
                changes = mean_changes(training, self._labels(), partial(self._change, decoded=decoded))
                self._changes[decoded] = changes

    def _labels(self) -> list[str]:
        """Each regime with its fields, for messages."""
        fields = (", ".join(f.name for f in self.regimes.space.fields_of(n)) for n in range(len(self.regimes.names)))
        return [f"regime {name!r} (fields {of})" for name, of in zip(self.regimes.names, fields, strict=True)]

    def _windows(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Frames ``[B, T + K, C, ...]``, the last ``K`` to be predicted, and static inputs of a batch."""
        return batch["latents"], batch["static"]

    def _errors(self, prediction: Tensor, target: Tensor, regime: Tensor, static: Tensor) -> Tensor:
        """Error of each sample, ``[B]``; ``static`` as the model is given it.

        Of latents ``mse``, or ``nmse`` where channels count by their variance: the mean square of the error before
        whitening over the mean variance.
        """
        weights = None if self._weights is None else resident(self._weights, regime.device)[regime]
        return weighted_square(prediction, target, weights)

    @torch.no_grad()
    def _change(self, item: dict[str, Any], decoded: bool) -> Tensor:
        """What persistence loses in the last step of a window."""
        assert self.tokenizer is not None
        batch = to_device(default_collate([item]), self.tokenizer.latent_std.device)
        frames, static = self._windows(batch)
        errors = self._error_of(batch, static, None, decoded)
        return errors(frames[:, -2], frames[:, -1]).mean().cpu()

    def _error_of(self, batch: Batch, static: Tensor, shifts: Tensor | None, decoded: bool) -> Errors:
        """The error that the loss is made of; of decoded fields, their static ones are rolled as the latents were."""
        regime = batch["regime"]
        if not decoded:
            return lambda prediction, target: self._errors(prediction, target, regime, static)
        assert self._decoded is not None
        fields = self._decoded.static(sample_names(batch), regime.device)
        if shifts is not None:
            fields = roll_samples(fields, PATCH * shifts)
        return partial(self._decoded, static=fields, regime=regime, index=batch["sample"][:, 0])

    def _noise_scale(self, history: Tensor) -> Tensor | float:
        """What the standard deviation of the input noise is relative to."""
        return 1.0

    @torch.no_grad()
    def _error_scale(self, model: Any, frames: Tensor, static: Tensor, batch: Batch) -> Tensor:
        """Root mean square of the model's own error in one step by sample and channel, ``[B, 1, C, ...]``.

        Taken anew in every step, not kept as a running mean: a resumed run has nothing to remember.
        """
        forecaster = Forecaster.of(self.config, self.regimes.space, model, self.tokenizer)
        regime, conditions = batch["regime"], batch.get(CONDITIONS)
        ahead = forecaster.step(frames[:, : self.history], static, regime, conditions=conditions)
        error = ahead.latent - frames[:, self.history]
        square = self._channel_means(error.square(), regime, static)
        return square.sqrt().view(len(error), 1, -1, *(1,) * (error.ndim - 2)).to(frames.dtype)

    def _channel_means(self, values: Tensor, regime: Tensor, static: Tensor) -> Tensor:
        """Mean over space, ``[B, C, ...] -> [B, C]``."""
        return values.flatten(2).mean(2)

    def _noise(self, model: Any, frames: Tensor, static: Tensor, batch: Batch, step: int) -> Tensor:
        """The history with noise drawn by (seed, step, sample): the same on any ranks, and in a resumed run."""
        std, history = self.operator.input_noise, frames[:, : self.history]
        if std == 0:
            return history
        if self.operator.noise_relative_to == "error":
            scale: Tensor | float = self._error_scale(model, frames, static, batch)
        else:
            scale = self._noise_scale(history)
        seeds = [stable_seed(self.config.seed, "noise", step, *name) for name in sample_names(batch)]
        drawn = normal(send(seeds, history.device), history.shape[1:])
        return history + std * scale * drawn.to(history.dtype)

    def _reach(self, sizes: Sequence[int]) -> Sequence[int] | None:
        """Shifts along each axis are drawn from so many; None: nothing is shifted.

        The tokenizer commutes with shifts by whole latent cells, so a shifted sample is as true as the stored one.
        """
        return sizes if self.operator.random_shifts else None

    def _shift(self, batch: Batch, step: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Frames and static inputs, each sample rolled along the periodic axes of its domain, and by how much."""
        frames, static = self._windows(batch)
        reach = self._reach(frames.shape[3:])
        if reach is None:
            return frames, static, None
        shifts: list[int] = []
        for key in sample_names(batch):
            draw = torch.rand(len(reach), generator=generator(self.config.seed, "shift", step, *key)).tolist()
            boundary = self.regimes.space.domains[key[0]].boundary[: len(reach)]
            shifts += [int(u * n) if b == "periodic" else 0 for u, n, b in zip(draw, reach, boundary, strict=True)]
        by_sample = send(shifts, frames.device).view(-1, len(reach))
        return roll_samples(frames, by_sample), roll_samples(static, by_sample), by_sample

    def predict(self, model: Any, batch: Batch) -> tuple[OperatorOutput, Tensor, Tensor]:
        """Output without noise or shifts, and the errors ``[B]`` of it and of persistence."""
        frames, static = self._windows(batch)
        history, target = frames[:, : self.history], frames[:, self.history]
        forecaster, conditions = Forecaster.of(self.config, self.regimes.space, model), batch.get(CONDITIONS)
        output = forecaster.step(history, static, batch["regime"], conditions=conditions)
        errors = (self._errors(frame, target, batch["regime"], static) for frame in (output.latent, history[:, -1]))
        error, persistence = errors
        return output, error, persistence

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of `measured`; those of decoded fields are left out where nothing decodes."""
        return f"{self.space}_{self.measure}", f"persistence_{self.measure}", DECODED, PERSISTENCE

    def measured(self, model: Any, batch: Batch) -> Measured:
        """Held-out errors of the model and of persistence."""
        output, error, persistence = self.predict(model, batch)
        regime = batch["regime"]
        decoded = (defined(errors, regime) for errors in self._field_errors(output.latent, batch))
        values = zip(self.measures, ((error, regime), (persistence, regime), *decoded), strict=False)
        return Measured(dict(values), output.routing)

    def _field_errors(self, latent: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """VRMSE ``[B]`` of the decoded fields, and that of persistence, the last known frame; of `DecodedWindows`."""
        if STATIC_FIELDS not in batch:
            return ()
        space, static = self.regimes.space, batch[STATIC_FIELDS]
        last, truth = batch[FIELDS].unbind(1)
        decoder = Forecaster.of(self.config, space, None, self.tokenizer)
        prediction = decode_batch(self.config, decoder, batch, latent)
        return tuple(frame_errors(space, batch, frame, truth, static) for frame in (prediction, last))

    def start_step(self) -> None:
        self.balance.start_step()

    def loss(self, model: Any, batch: Batch, step: int) -> Outcome:
        regime = batch["regime"]
        frames, static, shifts = self._shift(batch, step)
        targets = frames[:, self.history : self.history + self.operator.unroll.steps].unbind(1)
        given = self._noise(model, frames, static, batch, step)
        outputs, fingerprint = self._unrolled(model, given, static, batch, step)
        # Logged steps are multiples: there the error of decoded fields is reported, too.
        decoded = self._decoded is not None and (step + 1) % self.operator.decoded_every == 0
        measure = self._error_of(batch, static, shifts, decoded)
        errors = [measure(o.latent, target) for o, target in zip(outputs, targets, strict=True)]
        error = torch.stack(errors).mean(0)
        metrics = self._reported(errors, outputs[0].latent, frames, regime, static, decoded)
        scale = resident(self._changes[decoded], error.device)[regime] if self._changes else 1.0
        loss = (error / scale).mean()
        routing = outputs[0].routing
        if routing:
            joined = [join_decisions(layer) for layer in zip(*(o.routing for o in outputs), strict=True)]
            config, terms = self.operator.experts.balance, self.balance(joined)
            balance = terms.weighted(config)
            loss = loss + balance
            metrics["train/balance_loss"] = (balance.detach(), "mean")
            metrics |= {f"moe/{name}": (value.detach(), "mean") for name, value in terms.reported(config).items()}
        return Outcome(loss, error.detach(), metrics, routing, fingerprint)

    def _unrolled(
        self, model: Any, history: Tensor, static: Tensor, batch: Batch, step: int
    ) -> tuple[list[OperatorOutput], Tensor | None]:
        """The forecasts that the loss is made of, one after the other, and the fingerprints that they all go by.

        Each draws router noise of its own.
        """
        regime, names, unroll = batch["regime"], sample_names(batch), self.operator.unroll
        forecaster = Forecaster.of(self.config, self.regimes.space, model, self.tokenizer)
        experts, look = self.operator.experts, cache(partial(forecaster.look, history, regime))

        def told(number: int) -> dict[str, Any]:
            key = (self.config.seed, step, number) if number else (self.config.seed, step)
            return router_arguments(experts, regime, names, *key, look=look)

        detach = unroll.gradient == "pushforward"
        conditions = batch.get(CONDITIONS)
        forecasts = forecaster.unroll(history, static, regime, told=told, conditions=conditions, detach=detach)
        fingerprints = router_arguments(experts, regime, look=look).get("fingerprint")
        return list(islice(forecasts, unroll.steps)), fingerprints

    @torch.no_grad()
    def _reported(
        self, errors: Sequence[Tensor], first: Tensor, frames: Tensor, regime: Tensor, static: Tensor, decoded: bool
    ) -> Metrics:
        """Errors of one step, in the cheap metric whatever the loss is made of; beside them what else the loss has."""
        target = frames[:, self.history]
        one = self._errors(first, target, regime, static).mean() if decoded else errors[0].mean()
        persistence = self._errors(frames[:, self.history - 1], target, regime, static).mean()
        metrics: Metrics = {
            f"train/{self.space}_{self.measure}": (one, "mean"),
            "train/over_persistence": (one / persistence, "mean"),
        }
        if decoded:
            metrics["train/decoded_mse"] = (errors[0].mean(), "mean")
        if len(errors) > 1:
            last = "decoded_mse" if decoded else f"{self.space}_{self.measure}"
            metrics[f"train/{last}_step_{len(errors)}"] = (errors[-1].mean(), "mean")
        return metrics


def roll_samples(values: Tensor, shifts: Tensor) -> Tensor:
    """Each sample of ``values [B, ..., *grid]`` rolled by its ``shifts [B, axes]``, in one copy for all of them."""
    axes = shifts.shape[1]
    place = shifts.new_zeros(len(values), *(1,) * axes)
    for axis, size in enumerate(values.shape[-axes:]):
        index = (torch.arange(size, device=values.device) - shifts[:, axis, None]) % size
        place = place * size + index.view(-1, *(size if a == axis else 1 for a in range(axes)))
    flat = values.flatten(-axes)
    where = place.view(len(values), *(1,) * (flat.ndim - 2), -1).expand(flat.shape)
    return flat.gather(-1, where).view(values.shape)


def square_change(item: dict[str, Any]) -> Tensor:
    """Mean square of the last change in a window of latents."""
    latents = item["latents"]
    return (latents[-1] - latents[-2]).square().mean()


def mean_changes(
    datasets: Sequence[SampleDataset],
    labels: Sequence[str],
    change: Callable[[dict[str, Any]], Tensor] = square_change,
    windows: int = 64,
) -> Tensor:
    """Mean of the last ``change`` in windows of each dataset, ``[R]``: what persistence would lose.

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
        items = [data[row] for row in rows]
        squares = torch.stack([item["latents"][-2:].square().mean() for item in items])
        if torch.stack([square_change(item) for item in items]).mean() <= _STILL * squares.mean():
            raise DataError(
                f"{label}: nothing changes from one frame to the next in the training data, so persistence makes no "
                "error and operator.loss=over_persistence has nothing to divide by; use operator.loss=mse, a larger "
                "data.stride, or leave it out"
            )
        changes.append(torch.stack([change(item) for item in items]).mean())
    every = torch.stack(changes)
    return every.clamp(min=0.01 * float(every.max()))
