"""Operators on the fields themselves: their data, their space in the run folder, and what the loop trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from shodh.checkpoint.description import METADATA_KEY, is_pretrained, read_description
from shodh.config import RunConfig
from shodh.core.errors import CheckpointError, DataError
from shodh.core.strict_json import write_json
from shodh.core.weights import read_json, read_metadata
from shodh.data import FieldNormalizer, Split, WindowDataset
from shodh.data.identity import Choose
from shodh.data.loader import SampleDataset
from shodh.models.field_space import channel_mask, existing_cells, pad_absent
from shodh.train.datasets import Regimes, open_regimes
from shodh.train.losses import mean_over, relative_l2_by_channel
from shodh.train.operator_task import OperatorTask
from shodh.train.run_folder import RunFolder
from shodh.train.trainer import Batch

SPACE_FILE = "space.json"


def open_fields(config: RunConfig, normalizer: FieldNormalizer | None = None, choose: Choose | None = None) -> Regimes:
    """The regimes of a run on fields: two dimensions stay two. Arguments and errors as `open_regimes`."""
    return open_regimes(config.data, normalizer, extrude=False, choose=choose)


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


def write_space(folder: RunFolder, regimes: Regimes) -> None:
    """Keep what the numbers of a run mean beside it: normalisation and domains, as a tokenizer does (rank 0)."""
    content = {
        "normalizer": regimes.normalizer.to_dict(),
        "regimes": regimes.names,
        "domains": {name: d.to_dict() for name, d in zip(regimes.names, regimes.domains, strict=True)},
    }
    write_json(folder.path / SPACE_FILE, content)


def read_normalizer(folder: Path, name: str = SPACE_FILE) -> FieldNormalizer:
    """The normalisation that a run on fields, or a tokenizer, was trained with.

    Raises
    ------
    CheckpointError
        The file is missing or damaged.
    """
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{folder} is no run of an operator on fields: it has no {name}")
    try:
        return FieldNormalizer.from_dict(read_json(path)["normalizer"])
    except (KeyError, TypeError, DataError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def inherited_normalizer(config: RunConfig, init_from: Path) -> FieldNormalizer:
    """The normalisation that an expert of a family takes from its anchor, so that their weights mean the same.

    Parameters
    ----------
    init_from : Path
        What the expert starts from: a checkpoint folder in its run folder, or a converted folder.

    Raises
    ------
    CheckpointError
        The anchor's normalisation does not lie beside its weights, or lacks a regime of the expert or its fields.
    """
    if is_pretrained(init_from) or (init_from.is_file() and METADATA_KEY in read_metadata(init_from)):
        normalizer = read_description(init_from).build_normalizer()
    elif (init_from.absolute().parents[1] / SPACE_FILE).is_file():
        normalizer = read_normalizer(init_from.absolute().parents[1])
    else:
        raise CheckpointError(
            f"{init_from} does not say its normalisation, which a run with a `family` takes from its anchor; start "
            "from a checkpoint folder of the anchor's run, or from a converted folder"
        )
    names = [r.name for r in config.data.regimes]
    if unknown := [name for name in names if name not in normalizer.regimes]:
        raise CheckpointError(f"{init_from} was not trained on {unknown}; an anchor has all regimes of its experts")
    ours, theirs = [f.name for f in config.data.fields if not f.static], [f.name for f in normalizer.fields]
    if ours != theirs:
        raise CheckpointError(f"{init_from} was trained on the fields {theirs}, and this run has {ours}")
    constants = {name: normalizer.constants[name] for name in names}
    return FieldNormalizer([f.build() for f in config.data.fields], normalizer.ndim, constants)


class Presence:
    """Which channels exist in the regimes of a batch, ones where they do not, and zeros in the cells of masks."""

    def __init__(self, regimes: Regimes) -> None:
        def table(static: bool) -> Tensor:
            fields = regimes.sources[0].static if static else regimes.dynamic
            return torch.stack([channel_mask(fields, domain, regimes.ndim) for domain in regimes.domains]).bool()

        self._dynamic, self._static = table(False), table(True)
        self._masked = regimes.normalizer.masked

    def dynamic(self, regime: Tensor) -> Tensor:
        """``[B] -> [B, C]``, bool."""
        return self._dynamic.to(regime.device)[regime]

    def cells(self, static: Tensor, regime: Tensor) -> Tensor | None:
        """In which cells each channel exists: ``[B, S, *grid] -> [B, C, *grid]``, bool; None: in all."""
        return existing_cells(static, self._static.to(regime.device)[regime], self._masked, self._dynamic.shape[1])

    def pad(self, frames: Tensor, static: Tensor, regime: Tensor) -> tuple[Tensor, Tensor]:
        """Frames ``[B, T, C, *grid]`` and static fields ``[B, S, *grid]`` as operators are given them."""
        cells = self.cells(static, regime)
        frames = frames if cells is None else torch.where(cells.unsqueeze(1), frames, 0.0)
        exists = self.dynamic(regime).repeat_interleave(frames.shape[1], 0)
        padded = pad_absent(frames.flatten(0, 1), exists).unflatten(0, frames.shape[:2])
        return padded, pad_absent(static, self._static.to(regime.device)[regime])


class FieldTask(OperatorTask):
    """Predict the next frame of normalised fields; channels that a regime lacks are given as ones and never counted."""

    space = "field"

    def __init__(self, config: RunConfig, regimes: Regimes, training: Sequence[SampleDataset]) -> None:
        super().__init__(config, regimes, training)
        self.measure = "l2re" if config.operator.loss == "relative_l2" else "mse"
        self._presence = Presence(regimes)

    def _windows(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self._presence.pad(batch["fields"], batch["static"], batch["regime"])

    def _errors(self, prediction: Tensor, target: Tensor, regime: Tensor, static: Tensor) -> Tensor:
        exists, cells = self._presence.dynamic(regime), self._presence.cells(static, regime)
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
    return (FieldTask if config.operator.in_field_space else OperatorTask)(config, regimes, training)
