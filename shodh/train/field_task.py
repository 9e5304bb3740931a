"""Operators on the fields themselves: their windows, and what the loop trains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shodh.config import RunConfig
from shodh.data import Split, WindowDataset
from shodh.data.loader import SampleDataset
from shodh.schema.measures import mean_over
from shodh.train.datasets import Regimes
from shodh.train.losses import relative_l2_by_channel
from shodh.train.operator_task import OperatorTask
from shodh.train.trainer import Batch


def open_windows(config: RunConfig, regimes: Regimes, split: Split, horizon: int = 1) -> list[WindowDataset]:
    """Windows of ``history`` frames and the ``horizon`` next ones, a dataset a regime."""
    return [
        WindowDataset(
            source,
            split,
            history=config.data.history,
            horizon=horizon,
            stride=config.data.stride,
            normalizer=regimes.normalizer,
        )
        for source in regimes.sources
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
        exists, cells = self.regimes.space.exists(regime), self.regimes.space.cells(static, regime)
        if self.measure == "l2re":
            by_channel = relative_l2_by_channel(prediction, target, exists=cells)
        else:
            by_channel = mean_over((prediction - target).square(), cells, 2)
        return torch.where(exists, by_channel, 0.0).sum(1) / exists.sum(1)

    def _noise_scale(self, history: Tensor) -> Tensor:
        """Root mean square of each channel of each sample, as DPOT and MoE-POT scale their noise."""
        axes = (1, *range(3, history.ndim))
        return history.square().mean(axes, keepdim=True).sqrt()


def operator_task(config: RunConfig, regimes: Regimes, training: Sequence[SampleDataset]) -> OperatorTask:
    """What an operator learns, on fields or on latents."""
    return (OperatorTask if config.has_tokenizer else FieldTask)(config, regimes, training)
