"""From a configuration to sources, normalisation and domains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shodh.config import DataConfig, RegimeConfig, RunConfig
from shodh.data import FieldNormalizer, MixtureLoader, MixtureSampler, RegimeSource, Split
from shodh.data.formats import FileHints
from shodh.data.loader import SampleDataset
from shodh.errors import DataError
from shodh.fields import Field
from shodh.models.domain import Domain
from shodh.topology import Topology
from shodh.train.runtime import rank


@dataclass(frozen=True)
class Regimes:
    """The regimes of a run, in the order of their labels."""

    sources: list[RegimeSource]
    normalizer: FieldNormalizer
    domains: list[Domain]

    @property
    def names(self) -> list[str]:
        return [source.name for source in self.sources]

    @property
    def dynamic(self) -> tuple[Field, ...]:
        return self.sources[0].schema.dynamic

    @property
    def num_static(self) -> int:
        return self.sources[0].num_static_channels


def opening(regime: RegimeConfig) -> dict[str, Any]:
    """How the files of a regime are opened and split: arguments of `RegimeSource`."""
    hints = FileHints(regime.boundary, regime.lengths, regime.time_step, regime.channels, regime.axes)
    return {"format": regime.format, "hints": hints, "split": regime.split}


def open_regimes(config: DataConfig, normalizer: FieldNormalizer | None = None) -> Regimes:
    """Open the data of every regime and check that it fits the configuration.

    Parameters
    ----------
    normalizer : FieldNormalizer, optional
        The one a tokenizer was trained with; by default it is made from the training statistics.

    Raises
    ------
    DataError
        Data is missing, damaged, or of another grid or other fields; names the file or folder.
    """
    fields = [f.build() for f in config.fields]
    sources = []
    for regime in config.regimes:
        placement = {}
        if regime.placement is not None:
            placement = {f.name: regime.placement for f in fields if f.kind == "vector"}
        source = RegimeSource(
            regime.name, regime.path, fields, mapping=regime.fields, placement=placement, **opening(regime)
        )
        if tuple(source.grid) != config.grid:
            raise DataError(
                f"{regime.path}: the fields are {list(source.grid)}, and data.grid is {list(config.grid)}; use "
                f"--set data.grid={list(source.grid)} or other data"
            )
        sources.append(source)
    if normalizer is None:
        normalizer = FieldNormalizer.from_sources(sources)
    domains = [Domain(tuple(s.boundary), tuple(s.lengths)) for s in sources]  # type: ignore[arg-type]
    return Regimes(sources, normalizer, domains)


def training_splits(config: RunConfig) -> tuple[tuple[Split, int], ...]:
    """The splits a training job reads, each with the seed of its order; validation always sees the same batches."""
    return ("train", config.seed), ("valid", 0)


def mixture_loader(
    datasets: Sequence[SampleDataset], config: RunConfig, topology: Topology, seed: int
) -> MixtureLoader:
    """This rank's micro-batches of a mixture with the configured shares of the regimes."""
    sampler = MixtureSampler(
        seed, [len(d) for d in datasets], [r.share for r in config.data.regimes], topology.global_batch
    )
    return MixtureLoader(
        datasets,
        sampler,
        rank=rank(),
        world=topology.world_size,
        num_micro=topology.accumulation,
        num_workers=config.data.workers,
        pin_memory=torch.cuda.is_available(),
    )
