"""From a configuration to sources, normalisation and domains."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shodh.config import DataConfig, RegimeConfig, RunConfig
from shodh.core.devices import uses_cuda
from shodh.core.distributed import rank
from shodh.core.errors import DataError
from shodh.core.topology import Topology
from shodh.data import FieldNormalizer, MixtureLoader, MixtureSampler, RegimeSource, Split
from shodh.data.checks import check_masks
from shodh.data.formats import FileHints
from shodh.data.identity import Choose
from shodh.data.loader import SampleDataset
from shodh.data.mixture import temperature_shares
from shodh.models.tokenizer import existing_channels, field_slices
from shodh.schema.domain import Domain
from shodh.schema.fields import Boundary, Field

OpenSplit = Callable[[Split], Sequence[SampleDataset]]  # the samples of a split, a data set a regime


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
    def ndim(self) -> int:
        """Space dimensions of the samples."""
        return len(self.sources[0].grid)

    @property
    def dynamic(self) -> tuple[Field, ...]:
        """Fields of the vocabulary that change in time, in the order of the channels."""
        return self.sources[0].dynamic

    def fields_of(self, number: int) -> tuple[Field, ...]:
        """Fields that change in time and exist in one regime."""
        return self.sources[number].schema.dynamic

    def channels(self, number: int) -> dict[str, slice]:
        """Channels of the fields that exist in one regime; of vectors, the components that do."""
        return existing_channels(self.dynamic, self.domains[number], self.ndim)

    def channel_numbers(self, number: int) -> list[int]:
        """The channels of `channels`, one by one."""
        return [c for s in self.channels(number).values() for c in range(s.start, s.stop)]

    def solid_channel(self, number: int) -> int | None:
        """Static channel of the field ``solid``, None where the regime has none."""
        source = self.sources[number]
        slices = field_slices(source.static, self.ndim)
        return slices["solid"].start if "solid" in {f.name for f in source.schema.static} else None

    def masks(self, number: int) -> dict[str, int]:
        """Static channel of the mask of each masked field that exists in one regime."""
        source = self.sources[number]
        there = {f.name for f in source.present}
        slices = field_slices(source.static, self.ndim)
        return {f.name: slices[f.masked_by].start for f in source.schema.dynamic if f.masked_by in there}

    def constants(self, number: int) -> dict[str, tuple[float, float]]:
        """Mean and scale of the fields of one regime."""
        return self.normalizer.constants[self.names[number]]

    def close(self) -> None:
        """Close the files."""
        for source in self.sources:
            source.close()

    def presence(self, index: Tensor) -> Tensor:
        """1 where a dynamic field exists in the regime of a sample: ``[B] -> [B, F]``."""
        table = [[float(f.name not in domain.absent) for f in self.dynamic] for domain in self.domains]
        return torch.tensor(table, device=index.device)[index]


def opening(regime: RegimeConfig) -> dict[str, Any]:
    """How the files of a regime are opened and split: arguments of `RegimeSource`."""
    hints = FileHints(regime.boundary, regime.lengths, regime.time_step, regime.channels, regime.axes)
    return {"format": regime.format, "hints": hints, "split": regime.split}


def open_regimes(
    config: DataConfig,
    normalizer: FieldNormalizer | None = None,
    *,
    extrude: bool = True,
    choose: Choose | None = None,
) -> Regimes:
    """Open the data of every regime and check that it fits the configuration.

    Parameters
    ----------
    normalizer : FieldNormalizer, optional
        The one a tokenizer was trained with; by default it is made from the training statistics.
    extrude : bool
        Whether two space dimensions are read as equal layers of three; not so for operators on the fields themselves.
    choose : callable, optional
        The splits that files keep; see `shodh.train.data_identity`.

    Raises
    ------
    DataError
        Data is missing, damaged, or of another grid or other fields; names the file or folder.
    """
    sources = open_sources(config, extrude=extrude, choose=choose)
    for source in sources:
        check_masks(source)
    if normalizer is None:
        normalizer = FieldNormalizer.from_sources(sources)
    # Constants of a former version do not say which fields are masked.
    normalizer = FieldNormalizer(sources[0].fields, len(sources[0].grid), normalizer.constants)
    for source in sources:
        _check_constants(source, normalizer)
    return Regimes(sources, normalizer, [domain_of(source, normalizer) for source in sources])


def open_sources(config: DataConfig, *, extrude: bool = True, choose: Choose | None = None) -> list[RegimeSource]:
    """The data of every regime, without its statistics; arguments and errors as `open_regimes`."""
    fields = [f.build() for f in config.fields]
    sources = []
    for regime in config.regimes:
        placement = {}
        if regime.placement is not None:
            placement = {f.name: regime.placement for f in fields if f.kind == "vector"}
        former, leave_out = choose(regime.name, regime.path) if choose is not None else ({}, ())
        source = RegimeSource(
            regime.name,
            regime.path,
            fields,
            mapping=regime.fields,
            placement=placement,
            only=config.present(regime),
            layers=config.cells[2] if extrude else None,
            trajectories=regime.trajectories,
            former=former,
            leave_out=leave_out,
            **opening(regime),
        )
        if source.grid != (config.cells if extrude else config.grid):
            found = list(source.grid[:2] if source.flat else source.grid)
            raise DataError(
                f"{regime.path}: the fields are {found}, and data.grid is {list(config.grid)}; all regimes of a run "
                f"have one grid: use --set data.grid={found} or other data"
            )
        sources.append(source)
    return sources


def domain_of(source: RegimeSource, normalizer: FieldNormalizer) -> Domain:
    """What the models are told of a regime's samples beside their fields."""
    (bx, by, bz), (x, y, z) = _box(source)
    flat = source.flat or len(source.grid) == 2
    present = {f.name for f in source.present}
    optional = sorted((f for f in source.fields if f.optional), key=lambda f: f.static)
    constants = normalizer.constants[source.name]
    scaled = {name: (mean, scale) for name, (mean, scale) in constants.items() if scale > 0}
    floors = [
        (f.name, -scaled[f.name][0] / scaled[f.name][1])
        for f in source.schema.dynamic
        if f.positive and f.name in scaled
    ]
    return Domain((bx, by, bz), (x, y, z), tuple((f.name, f.name in present) for f in optional), tuple(floors), flat)


def _box(source: RegimeSource) -> tuple[tuple[Boundary, ...], tuple[float, ...]]:
    """Boundary and lengths of three axes; two dimensions are a periodic layer of near-cubic cells."""
    if len(source.grid) == 2:
        return (*source.boundary, "periodic"), (*source.lengths, math.prod(source.spacing) ** 0.5)
    return source.boundary, source.lengths


def _check_constants(source: RegimeSource, normalizer: FieldNormalizer) -> None:
    """The fields of a regime are those that it was normalised with."""
    needed = {f.name for f in source.present if not f.static or f.static_scale != "none"}
    known = set(normalizer.constants[source.name])
    if needed != known:
        raise DataError(
            f"regime {source.name!r} has the fields {sorted(needed)}, and the tokenizer was trained on {sorted(known)} "
            "of it; make data.regimes[..].only agree, or train the tokenizer anew"
        )


def training_splits(config: RunConfig) -> tuple[tuple[Split, int], ...]:
    """The splits a training job reads, each with the seed of its order; validation always sees the same batches."""
    return ("train", config.seed), ("valid", 0)


def mixture_loader(
    datasets: Sequence[SampleDataset], config: RunConfig, topology: Topology, seed: int
) -> MixtureLoader:
    """This rank's micro-batches of a mixture with the configured shares of the regimes."""
    sizes = [len(d) for d in datasets]
    shares = temperature_shares(sizes, [r.share for r in config.data.regimes], config.data.mixture_temperature)
    sampler = MixtureSampler(seed, sizes, shares, topology.global_batch)
    return MixtureLoader(
        datasets,
        sampler,
        rank=rank(),
        world=topology.world_size,
        num_micro=topology.accumulation,
        num_workers=config.data.workers,
        pin_memory=uses_cuda(),
    )


def open_loaders(config: RunConfig, open_split: OpenSplit, topology: Topology) -> dict[Split, MixtureLoader]:
    """The loaders of the splits that a training job reads."""
    return {split: mixture_loader(open_split(split), config, topology, seed) for split, seed in training_splits(config)}
