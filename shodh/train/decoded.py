"""The error of decoded fields as a measure of the validation: VRMSE in model units, by sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shodh.config import RunConfig, TrainConfig
from shodh.data import LatentWindowDataset, Split, WindowDataset
from shodh.data.loader import SampleDataset
from shodh.models.forecaster import Forecaster
from shodh.schema.measures import measure
from shodh.schema.space import Space
from shodh.train.datasets import OpenSplit, Regimes
from shodh.train.trainer import Batch

DECODED, PERSISTENCE = "decoded_vrmse", "persistence_vrmse"
#: Of a batch of `DecodedWindows`: the last known frame and the next one, and the static fields.
FIELDS, STATIC_FIELDS = "fields", "static_fields"


def field_vrmse(space: Space, number: int, prediction: Tensor, truth: Tensor, static: Tensor) -> Tensor:
    """VRMSE (The Well) of samples of one regime, the mean over its fields: ``[B, C, *grid] -> [B]``.

    Over the cells where a field exists; ``static [B, S, *grid]`` holds the masks. Left out is what does not vary in
    space, by which the definition divides: NaN where that is all of a sample. Infinite of what is not finite.
    """
    masks, errors = space.masks(number), []
    for name, channels in space.channels(number).items():
        exists = static[:, masks[name], None] == 0 if name in masks else None
        errors.append(measure("vrmse", prediction[:, channels], truth[:, channels], exists=exists))
    return torch.stack(errors).nanmean(0)


def defined(errors: Tensor, regime: Tensor) -> tuple[Tensor, Tensor]:
    """The errors, and labels, of samples that a measure can judge."""
    there = ~errors.isnan()
    return errors[there], regime[there]


def by_regime(batch: Batch) -> list[tuple[int, Tensor]]:
    """(regime, rows of its samples) of a batch of `shodh.train.trainer.to_device`, whose labels are on the host too."""
    labels = batch["sample"][:, 0]
    device = batch["regime"].device
    return [(n, (labels == n).nonzero()[:, 0].to(device)) for n in labels.unique().tolist()]


def frame_errors(space: Space, batch: Batch, prediction: Tensor, truth: Tensor, static: Tensor) -> Tensor:
    """`field_vrmse` of every sample of a batch of several regimes: ``[B]``."""
    errors = prediction.new_zeros(len(prediction), dtype=torch.float32)
    for number, rows in by_regime(batch):
        parts = (values[rows].float() for values in (prediction, truth, static))
        errors[rows] = field_vrmse(space, number, *parts)
    return errors


def decode_batch(config: RunConfig, forecaster: Forecaster, batch: Batch, states: Tensor) -> Tensor:
    """Fields ``[B, C, *grid]`` of states ``[B, ...]``, at most ``evaluation.batch`` samples at once."""
    fields = torch.empty_like(batch[FIELDS][:, -1])
    for number, rows in by_regime(batch):
        for part in rows.split(config.evaluation.batch):
            frames, static = states[part].float().unsqueeze(1), batch[STATIC_FIELDS][part]
            fields[part] = forecaster.decode(frames, static, number)[:, 0]
    return fields


class DecodedWindows:
    """Windows of latents with the fields that they are of: the last known frame and the next one.

    Items are those of ``latents`` with ``fields [2, C, *grid]`` and ``static_fields [S, *grid]``, in model units.
    """

    def __init__(self, latents: LatentWindowDataset, fields: WindowDataset, history: int) -> None:
        self._latents, self._fields = latents, fields
        self.sample_shape = latents.sample_shape
        self._last = (history - 1) * latents.stride  # frames from the first of a window to the last known one

    def __len__(self) -> int:
        return len(self._latents)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self._latents[index]
        frames = self._fields[self._fields.index.number(item["trajectory"], item["frame"] + self._last)]
        return {**item, FIELDS: frames["fields"], STATIC_FIELDS: frames["static"]}


def decodes(train: TrainConfig) -> bool:
    """Whether a run on latents validates decoded fields: where they choose the best checkpoint."""
    return train.best is not None and train.best.measure.split("/")[1:2] == [DECODED]


def with_fields(config: RunConfig, regimes: Regimes, open_split: OpenSplit) -> OpenSplit:
    """The same windows of latents, those of the validation as `DecodedWindows`."""

    def opened(split: Split) -> Sequence[SampleDataset]:
        latents = open_split(split)
        if split != "valid":
            return latents
        normalizer, stride = regimes.space.normalizer, config.data.stride
        fields = [
            WindowDataset(source, split, history=1, horizon=1, stride=stride, normalizer=normalizer)
            for source in regimes.sources
        ]
        pairs = zip(latents, fields, strict=True)
        return [DecodedWindows(*pair, config.data.history) for pair in pairs]  # type: ignore[arg-type]

    return opened
