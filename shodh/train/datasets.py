"""From a configuration to sources, normalisation and domains."""

from __future__ import annotations

import hashlib
import logging
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from shodh.config import RegimeConfig, RunConfig
from shodh.core.devices import uses_cuda
from shodh.core.distributed import divide, each, from_first, rank, together
from shodh.core.errors import DataError, ShodhError
from shodh.core.strict_json import dumps
from shodh.core.topology import Topology
from shodh.data import MixtureLoader, MixtureSampler, RegimeSource, Split
from shodh.data.checks import check_masks
from shodh.data.conditions import condition_table, fit_conditions
from shodh.data.formats import FileHints, TrajectoryFile, open_file
from shodh.data.formats.fingerprints import identify, remember
from shodh.data.formats.splits import list_files
from shodh.data.identity import Choose, describe_source
from shodh.data.loader import SampleDataset
from shodh.data.mixture import temperature_shares
from shodh.data.normalize import fit_normalizer
from shodh.data.stats import Statistics, read_stats, write_stats
from shodh.data.windows import WindowIndex, require_windows
from shodh.schema.conditions import Condition
from shodh.schema.domain import Domain
from shodh.schema.fields import Boundary
from shodh.schema.normalize import FieldNormalizer
from shodh.schema.space import Space

log = logging.getLogger("shodh")

STATISTICS = ".statistics"  # in the folder of all runs: what was computed of data that have no stats.yaml
STATISTICS_VERSION = 1
OpenSplit = Callable[[Split], Sequence[SampleDataset]]  # the samples of a split, a data set a regime


@dataclass(frozen=True)
class Regimes:
    """The regimes of a run: their data, and what its numbers mean; both in the order of the labels."""

    sources: list[RegimeSource]
    space: Space

    @property
    def names(self) -> list[str]:
        return list(self.space.names)

    def told(self, split: Split, stride: int) -> list[Tensor | None]:
        """`condition_table` of each regime for windows of a stride."""
        return [condition_table(source, split, self.space.conditions, stride) for source in self.sources]

    def close(self) -> None:
        """Close all files."""
        for source in self.sources:
            source.close()


def opening(regime: RegimeConfig) -> dict[str, Any]:
    """How the files of a regime are opened and split: arguments of `RegimeSource`."""
    hints = FileHints(regime.boundary, regime.lengths, regime.time_step, regime.channels, regime.axes)
    return {"format": regime.format, "hints": hints, "split": regime.split}


def open_regimes(
    config: RunConfig,
    space: Space | FieldNormalizer | None = None,
    *,
    choose: Choose | None = None,
    conditions: Sequence[Condition] | None = None,
    shared: bool = False,
) -> Regimes:
    """Open the data of every regime and check that it fits the configuration.

    Parameters
    ----------
    space : Space or FieldNormalizer, optional
        What the run's numbers mean, which its data must agree with; or the constants that a new run takes over from a
        tokenizer or an anchor. By default it is made from the training statistics.
    choose : callable, optional
        The splits that files keep; see `shodh.train.data_identity`.
    conditions : sequence of Condition, optional
        Those of the weights that a new run starts from, whose constants it keeps; by default they are made from the
        training data, and those of a Space are its own.
    shared : bool
        All ranks open the data together: each file is opened, and each trajectory read for statistics, by one of them.

    Raises
    ------
    DataError
        Data is missing, damaged, or of another grid, other fields or another domain, or has no such parameters; names
        the file or folder.
    SharedError
        The same, where all ranks open the data together.
    """
    sources = open_together(config, choose) if shared else open_checked(config, choose)
    if isinstance(space, Space):
        normalizer = space.normalizer
    else:
        kept = partial(kept_statistics, config.out / STATISTICS) if shared else None
        normalizer = space or fit_normalizer(sources, divide if shared else each, kept)
    with together(shared):
        for source in sources:
            _check_constants(source, normalizer)
        opened, names = space_of(sources, normalizer), config.operator.conditions
        if names and isinstance(space, Space) and space.condition_names == names:
            opened = replace(opened, conditions=space.only(opened.names).conditions)
        elif names:
            fitted = fit_conditions(sources, names, config.data.training_strides, conditions or ())
            opened = replace(opened, conditions=fitted)
        if isinstance(space, Space):
            for name, now, then in zip(opened.names, opened.domains, space.only(opened.names).domains, strict=True):
                _check_domain(name, now, then)
    return Regimes(sources, opened)


def open_checked(
    config: RunConfig, choose: Choose | None, opened: Mapping[Path, TrajectoryFile] | None = None
) -> list[RegimeSource]:
    """`open_sources`, with a look at their masks."""
    sources = open_sources(config, choose=choose, opened=opened)
    for source in sources:
        check_masks(source)
    return sources


def open_together(config: RunConfig, choose: Choose | None) -> list[RegimeSource]:
    """As `open_checked`, by all ranks: each opens its share of the files, and the first one makes sources of them."""
    regimes = config.data.regimes
    files = from_first(lambda: [(n, path) for n, r in enumerate(regimes) for path in list_files(r.path)])

    def look(item: tuple[int, Path]) -> bytes:
        number, path = item
        given = opening(regimes[number])
        try:
            return pickle.dumps((open_file(path, given["format"], given["hints"]), identify(path)))
        except ShodhError:
            return pickle.dumps((None, {}))  # Whoever needs this file will say what is wrong with it.

    found = divide(files, look)

    def make() -> list[RegimeSource]:
        opened: dict[Path, TrajectoryFile] = {}
        for (_, path), stored in zip(files, found, strict=True):
            file, known = pickle.loads(stored)
            remember(known)
            if file is not None:
                opened[path] = file
        sources = open_checked(config, choose, opened)
        for source in sources:
            source.described = describe_source(source)
        return sources

    return from_first(make)


def kept_statistics(
    folder: Path, source: RegimeSource, names: Sequence[str], compute: Callable[[], Statistics]
) -> Statistics:
    """Statistics that an earlier run computed of the same data, or that this one computes and keeps. Collective."""
    what = [STATISTICS_VERSION, sorted(names), source.trajectories, describe_source(source)]
    path = folder / f"{hashlib.sha256(dumps(what, sort_keys=True).encode()).hexdigest()[:16]}.yaml"
    kept = from_first(lambda: read_stats(path) if path.is_file() else None)
    if kept is not None:
        log.info("regime %s: statistics of %s", source.name, path)
        return kept
    computed = compute()
    from_first(lambda: write_stats(path, computed))
    return computed


def space_of(sources: Sequence[RegimeSource], normalizer: FieldNormalizer) -> Space:
    """What the numbers of sources mean, with constants that may be of more regimes."""
    domains = {source.name: domain_of(source, normalizer) for source in sources}
    constants = FieldNormalizer(sources[0].fields, len(sources[0].grid), normalizer.constants)
    return Space.of(constants, sources[0].fields, domains)


def open_sources(
    config: RunConfig, *, choose: Choose | None = None, opened: Mapping[Path, TrajectoryFile] | None = None
) -> list[RegimeSource]:
    """The data of every regime, without its statistics; arguments and errors as `open_regimes`.

    A tokenizer reads two space dimensions as equal layers of three; operators on fields do not.
    """
    data = config.data
    fields = [f.build() for f in data.fields]
    sources = []
    for regime in data.regimes:
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
            only=data.present(regime),
            layers=config.cells[2] if len(config.cells) == 3 else None,
            trajectories=regime.trajectories,
            parameters=regime.parameters,
            former=former,
            leave_out=leave_out,
            opened=opened,
            **opening(regime),
        )
        if source.grid != config.cells:
            found = list(source.grid[:2] if source.flat else source.grid)
            raise DataError(
                f"{regime.path}: the fields are {found}, and data.grid is {list(data.grid)}; all regimes of a run "
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
    presence = tuple((f.name, f.name in present) for f in optional)
    units = tuple(normalizer.units[source.name].items())
    return Domain((bx, by, bz), (x, y, z), presence, tuple(floors), flat, source.time_step, units)


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


def _check_domain(name: str, now: Domain, then: Domain) -> None:
    """The box of the data is the one that the run was made with; older versions kept no time step."""
    pairs = [(now.boundary, then.boundary), (now.presence, then.presence), (now.flat, then.flat)]
    near = all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(now.lengths, then.lengths, strict=True))
    if then.time_step is not None:
        pairs.append((now.time_step, then.time_step))
    if not near or any(a != b for a, b in pairs):
        raise DataError(f"regime {name!r} is now {now}, and the run was made with {then}; give it the data it had")


def training_splits(config: RunConfig) -> tuple[tuple[Split, int], ...]:
    """The splits a training job reads, each with the seed of its order; validation always sees the same batches."""
    return ("train", config.seed), ("valid", 0)


def training_horizon(config: RunConfig, split: Split) -> int:
    """Frames of an operator's windows that are to be predicted; the errors of a validation are of one step."""
    return config.operator.unroll.steps if split == "train" else 1


def training_strides(config: RunConfig, split: Split) -> tuple[int, ...]:
    """Strides of an operator's windows; those of a validation have that of the evaluation."""
    return config.data.training_strides if split == "train" else (config.data.stride,)


def name_short(config: RunConfig, regimes: Regimes, split: Split, horizon: int, stride: int) -> None:
    """Name in the log the trajectories that are too short for a window."""
    for source in regimes.sources:
        source.name_short(split, (config.data.history + horizon - 1) * stride + 1, "a window")


def mixture_loader(
    datasets: Sequence[SampleDataset],
    config: RunConfig,
    topology: Topology,
    seed: int,
    workers_of: MixtureLoader | None = None,
) -> MixtureLoader:
    """This rank's micro-batches of a mixture with the configured shares of the regimes; see `MixtureLoader`."""
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
        workers_of=workers_of,
    )


def require_history(config: RunConfig, regimes: Regimes) -> None:
    """Raise DataError, before a tokenizer is trained or encodes, where no trajectory is as long as a window."""
    for split, _ in training_splits(config):
        for source in regimes.sources:
            frames = source.num_frames(split)
            horizon = training_horizon(config, split)
            asked = f"data.history={config.data.history}"
            asked += f", operator.unroll.steps={horizon}" if horizon > 1 else ""
            for stride in training_strides(config, split):
                index = WindowIndex(frames, config.data.history + horizon, stride)
                require_windows(index, f"regime {source.name!r}, {split}, {asked}, stride {stride}", frames)


def open_loaders(config: RunConfig, open_split: OpenSplit, topology: Topology) -> dict[Split, MixtureLoader]:
    """The loaders of the splits that a training job reads; all have the workers of the first."""
    loaders: dict[Split, MixtureLoader] = {}
    for split, seed in training_splits(config):
        first = next(iter(loaders.values()), None)
        loaders[split] = mixture_loader(open_split(split), config, topology, seed, first)
    return loaders
