"""Held-out windows for a probe, read and encoded as it goes: no field of full size outlives its batch."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from shodh.config import DataConfig, RegimeConfig
from shodh.core.errors import ConfigError, DataError
from shodh.data import RegimeSource, Split, WindowDataset
from shodh.data.formats.splits import open_splits
from shodh.evaluate.evaluation import Evaluator
from shodh.evaluate.windows import spread
from shodh.models.forecaster import Forecaster
from shodh.schema.domain import Domain
from shodh.train.datasets import Regimes, open_regimes


@dataclass(frozen=True)
class ProbeRegime:
    """One regime that is probed; ``left_out``: the model was not trained on it."""

    regimes: Regimes
    number: int
    left_out: bool = False

    @property
    def name(self) -> str:
        return self.regimes.names[self.number]

    @property
    def source(self) -> RegimeSource:
        return self.regimes.sources[self.number]

    @property
    def domain(self) -> Domain:
        return self.regimes.space.domains[self.number]

    def forecaster(self, evaluator: Evaluator) -> Forecaster:
        """The run's networks on this regime; raises `DataError` if their router has no experts for it."""
        experts = evaluator.config.operator.experts
        if self.left_out and experts.num_experts and experts.router.traits.labelled:
            raise DataError(f"{self.name} was not trained on, and a router that goes by labels has no experts for it")
        return evaluator.forecaster.on(self.regimes.space)

    def by_name(self, channels: Tensor, *, static: bool = False) -> dict[str, Tensor]:
        """The fields that exist in this regime, ``[B, components, *grid]``, of the channels of all of the run's."""
        schema = self.source.schema
        existing = {f.name for f in (schema.static if static else schema.dynamic)}
        fields = [f for f in self.source.fields if f.static == static]
        parts = channels.split([f.num_components(channels.ndim - 2) for f in fields], 1)
        return {f.name: part for f, part in zip(fields, parts, strict=True) if f.name in existing}


class ProbeBatch(NamedTuple):
    """Windows of one regime: ``B`` samples, ``T`` past frames and the one that follows.

    ``past [B, T, L, *latent grid]``, ``target [B, L, *latent grid]``, ``features [B, S', *latent grid]``, of operators
    on fields the padded fields in the place of latents; normalised ``fields [B, T + 1, C, *grid]``,
    ``static [B, S, *grid]``; ``trajectory`` and ``frame [B]`` name the samples; ``conditions [B, N]`` of an operator
    that is told some.
    """

    past: Tensor
    target: Tensor
    features: Tensor
    fields: Tensor
    static: Tensor
    trajectory: list[int]
    frame: list[int]
    conditions: Tensor | None = None


def trained_regimes(evaluator: Evaluator) -> list[ProbeRegime]:
    """The regimes that the run was trained on."""
    return [ProbeRegime(evaluator.regimes, number) for number in range(len(evaluator.regimes.names))]


def left_out_regimes(
    evaluator: Evaluator, paths: Mapping[str, Path], maps: Mapping[str, Mapping[str, str]] | None = None
) -> list[ProbeRegime]:
    """Regimes that the run never saw, normalised with their own training statistics; ``maps``: `describe_regime`.

    Raises
    ------
    ConfigError
        A name is that of a regime of the run.
    DataError
        A folder is missing or does not fit the run's fields and grid; names it.
    """
    known = set(evaluator.regimes.names) & set(paths)
    if known:
        raise ConfigError(f"the run was trained on the regimes {sorted(known)}; give left-out regimes other names")
    found = []
    for name, path in paths.items():
        regime = describe_regime(name, path, evaluator.config.data, (maps or {}).get(name))
        data = evaluator.config.data.model_copy(update={"regimes": (regime,)})
        config, conditions = evaluator.config.model_copy(update={"data": data}), evaluator.regimes.space.conditions
        regimes = open_regimes(config, conditions=conditions)
        found.append(ProbeRegime(regimes, 0, left_out=True))
    return found


def describe_regime(name: str, path: Path, data: DataConfig, mapping: Mapping[str, str] | None = None) -> RegimeConfig:
    """A regime with those of the run's fields that its files have; static ones that they lack are zeros, or absent.

    Parameters
    ----------
    mapping : mapping, optional
        ``{our field: field of the files}`` where they differ.

    Raises
    ------
    ConfigError
        A mapped field is not in the files, or not of the run.
    """
    files, renamed = open_splits(path)["train"], dict(mapping or {})
    known, stored = [f.name for f in data.fields], list(files[0].fields) if files else []
    for ours, theirs in renamed.items():
        if ours not in known or (files and theirs not in stored):
            raise ConfigError(f"regime {name!r}: {ours}={theirs}: the run has the fields {known}, {path} has {stored}")
    lacking = [f for f in data.fields if files and renamed.get(f.name, f.name) not in stored]
    absent = {f.name for f in lacking if f.optional}
    zeros: dict[str, str | None] = {f.name: None for f in lacking if f.static and not f.optional}
    only = tuple(f.name for f in data.fields if f.name not in absent) if absent else None
    return RegimeConfig(name=name, path=path, fields={**zeros, **renamed}, only=only)


def held_out_splits(regime: ProbeRegime, split: Split) -> tuple[Split, Split]:
    """``(fit, test)``: two splits that share no trajectory and that the model was not trained on.

    Every split of a left-out regime is held out, so that its training files may serve to fit a classifier.

    Raises
    ------
    DataError
        The regime has files in one held-out split only.
    """
    others: list[Split] = ["valid", "test", "train"] if regime.left_out else ["valid", "test"]
    for other in others:
        if other != split and regime.source.files[other]:
            return other, split
    raise DataError(
        f"regime {regime.name!r}: only the split {split!r} is held out; a classifier is fitted on other trajectories "
        f"than it is tested on, so {regime.source.path} needs a second one of {others}"
    )


@torch.no_grad()
def batches(
    evaluator: Evaluator, regime: ProbeRegime, split: Split, limit: int, description: str
) -> Iterator[ProbeBatch]:
    """Up to ``limit`` windows of a regime, spread over all trajectories, with a progress bar on a terminal."""
    data = evaluator.config.data
    windows = WindowDataset(
        regime.source,
        split,
        history=data.history,
        horizon=1,
        stride=data.stride,
        normalizer=regime.regimes.space.normalizer,
        conditions=regime.regimes.told(split, data.stride)[regime.number],
    )
    forecaster = regime.forecaster(evaluator)
    rows, size = spread(len(windows), limit), evaluator.config.evaluation.batch
    starts = range(0, len(rows), size)
    for start in tqdm(starts, f"{description}, {regime.name}", unit="batch", disable=not sys.stderr.isatty()):
        items = [windows[row] for row in rows[start : start + size]]
        fields, static = (torch.stack([item[name] for item in items]) for name in ("fields", "static"))
        fields, static = fields.to(evaluator.device), static.to(evaluator.device)
        states, features = forecaster.encode(fields, static, regime.number)
        yield ProbeBatch(
            past=states[:, : data.history],
            target=states[:, data.history],
            features=features,
            fields=fields,
            static=static,
            trajectory=[item["trajectory"] for item in items],
            frame=[item["frame"] for item in items],
            conditions=torch.stack([item["conditions"] for item in items]).to(evaluator.device)
            if "conditions" in items[0]
            else None,
        )
