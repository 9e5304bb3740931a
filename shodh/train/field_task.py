"""Operators on the fields themselves: their windows, and what the loop trains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shodh.config import RunConfig
from shodh.data import Split, WindowDataset
from shodh.data.loader import SampleDataset
from shodh.models.tokenizer import Tokenizer
from shodh.schema.measures import mean_over
from shodh.train.datasets import Regimes, name_short, training_horizon
from shodh.train.decoded import frame_errors
from shodh.train.latent_metric import ReadStatic
from shodh.train.losses import relative_l2_by_channel
from shodh.train.operator_task import OperatorTask
from shodh.train.trainer import Batch


def open_windows(
    config: RunConfig, regimes: Regimes, split: Split, horizon: int = 1, stride: int | None = None
) -> list[WindowDataset]:
    """Windows of ``history`` frames and the ``horizon`` next ones, a dataset a regime, at a stride."""
    stride = stride or config.data.stride
    if 1 < horizon == training_horizon(config, split):  # Windows of one step name those that are too short.
        name_short(config, regimes, split, horizon, stride)
    return [
        WindowDataset(
            source,
            split,
            history=config.data.history,
            horizon=horizon,
            stride=stride,
            normalizer=regimes.space.normalizer,
            conditions=told,
        )
        for source, told in zip(regimes.sources, regimes.told(split, stride), strict=True)
    ]


class FieldTask(OperatorTask):
    """Predict the next frame of normalised fields; channels that a regime lacks are given as ones and never counted."""

    space = "field"

    def __init__(self, config: RunConfig, regimes: Regimes, training: Sequence[SampleDataset]) -> None:
        super().__init__(config, regimes, training)
        self.measure = "l2re" if config.operator.loss == "relative_l2" else "mse"

    def _windows(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.regimes.space.pad(batch["fields"], batch["static"], batch["regime"])

    def _errors(self, prediction: Tensor, target: Tensor, regime: Tensor, static: Tensor) -> Tensor:
        exists = self.regimes.space.exists(regime)
        if self.measure == "l2re":
            cells = self.regimes.space.cells(static, regime)
            by_channel = torch.where(exists, relative_l2_by_channel(prediction, target, exists=cells), 0.0)
        else:
            by_channel = self._channel_means((prediction - target).square(), regime, static)
        return by_channel.sum(1) / exists.sum(1)

    def _channel_means(self, values: Tensor, regime: Tensor, static: Tensor) -> Tensor:
        """Mean over the cells that exist, zero in channels that do not: ``[B, C, *grid] -> [B, C]``."""
        means = mean_over(values, self.regimes.space.cells(static, regime), 2)
        return torch.where(self.regimes.space.exists(regime), means, 0.0)

    def _reach(self, sizes: Sequence[int]) -> Sequence[int] | None:
        """Less than a patch: the model meets every place of a patch, and a force fixed in space stays about there."""
        return [self.operator.patch] * len(sizes) if self.operator.patch_jitter else None

    def _field_errors(self, latent: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        last, truth = batch["fields"][:, self.history - 1 : self.history + 1].unbind(1)
        space, static = self.regimes.space, batch["static"]
        return tuple(frame_errors(space, batch, frame, truth, static) for frame in (latent, last))

    def _noise_scale(self, history: Tensor) -> Tensor:
        """Root mean square of each channel of each sample, as DPOT and MoE-POT scale their noise."""
        axes = (1, *range(3, history.ndim))
        return history.square().mean(axes, keepdim=True).sqrt()


def operator_task(
    config: RunConfig,
    regimes: Regimes,
    training: Sequence[SampleDataset],
    tokenizer: Tokenizer | None = None,
    read_static: ReadStatic | None = None,
) -> OperatorTask:
    """What an operator learns, on fields or on latents; arguments as `OperatorTask`."""
    if not config.has_tokenizer:
        return FieldTask(config, regimes, training)
    return OperatorTask(config, regimes, training, tokenizer, read_static)
