"""The data of a family: a folder of trajectories for every value, and one that joins those of the support."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from shodh.core.errors import ConfigError
from shodh.core.files import link_or_copy
from shodh.core.seeding import stable_seed
from shodh.data import SPLITS, compute_statistics, write_stats
from shodh.experiments.composition.settings import CCMConfig
from shodh.generation import Job, Part, Request, generate, pending_parts, plan
from shodh.physics import REGIMES, get_regime


def requests(study: CCMConfig) -> list[Request]:
    """What is to be solved for every value; each has initial states of its own.

    Values that nothing is trained on get one training trajectory, which no one reads, and validation trajectories only
    where factors are chosen on them.

    Raises
    ------
    ConfigError
        The regime, or its parameter, does not exist.
    """
    family, grid = study.family, study.base_config().data.grid
    kind = REGIMES.get(family.regime)
    if kind is None:
        raise ConfigError(f"family.regime {family.regime!r}: expected one of {', '.join(sorted(REGIMES))}")
    known = vars(kind())
    if unknown := sorted({family.parameter, *family.fixed} - set(known)):
        raise ConfigError(f"{family.regime} has no parameter {unknown[0]!r}; it has {', '.join(known)}")
    return [_request(study, value, grid) for value in family.values]


def _request(study: CCMConfig, value: float, grid: Sequence[int]) -> Request:
    family = study.family
    support = value in family.support
    train = family.train if support else 1
    valid = family.valid if support or value in family.validation else 1
    total = train + valid + family.test
    return Request(
        regimes=[family.regime],
        grid=grid,
        trajectories=total,
        frames=family.frames,
        out=study.value_folder(value).parent,
        seed=stable_seed(family.seed, family.parameter, repr(value)),
        split=(train / total, valid / total, family.test / total),
        per_file=family.per_file,
        parameters={family.regime: {**family.fixed, family.parameter: value}},
    )


def missing_files(study: CCMConfig) -> list[tuple[Job, Part]]:
    """Files that are still to be solved.

    Raises
    ------
    ConfigError
        The data folder has files that were made with other settings.
    """
    jobs = [job for request in requests(study) for job in plan(request)]
    try:
        return pending_parts(jobs)
    except ConfigError as error:
        raise ConfigError(
            f"{str(error).partition(';')[0]}; choose another folder with --set study.data=FOLDER, or remove this one"
        ) from error


def make_data(study: CCMConfig, device: str, workers: int | None = None) -> int:
    """Solve what is missing, and join the support; the number of files made now. Errors as `missing_files`."""
    missing = missing_files(study)
    if missing:
        generate(requests(study), device, workers)
    join_support(study)
    return len(missing)


def join_support(study: CCMConfig) -> None:
    """Make the anchor's folder: the files of every value of the support, as hard links, under their values' names."""
    wanted: dict[Path, Path] = {}
    for value in study.family.support:
        for split in SPLITS:
            for source in sorted((study.value_folder(value) / "data" / split).glob("*.hdf5")):
                wanted[study.anchor_folder / "data" / split / f"{value!r}_{source.name}"] = source
    strangers = [old for old in study.anchor_folder.glob("data/*/*.hdf5") if old not in wanted]
    missing = [link for link, source in wanted.items() if not _is_same(link, source)]
    statistics = study.anchor_folder / "stats.yaml"
    if not (strangers or missing) and statistics.exists():
        return
    statistics.unlink(missing_ok=True)
    for old in strangers:  # Of a value that the support had before.
        old.unlink()
    for link in missing:
        link.parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(wanted[link], link)
    train = sorted(link for link in wanted if link.parent.name == "train")
    write_stats(statistics, compute_statistics(train, get_regime(study.family.regime).schema))


def _is_same(link: Path, source: Path) -> bool:
    """Whether ``link`` is a link to ``source``, or a copy of it, made where the file system has no hard links."""
    if not link.exists():
        return False
    ours, theirs = link.stat(), source.stat()
    return os.path.samestat(ours, theirs) or (ours.st_size, ours.st_mtime_ns) == (theirs.st_size, theirs.st_mtime_ns)
