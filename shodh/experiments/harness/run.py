"""One run of a study: what is trained and measured in a process of its own, and when two of them are the same.

*The same run* is one with the same identity: its resolved configuration, but for where it lies and how its ranks
compute (`FREE`), the contents of its data files, the weights it starts from or decodes with, and the settings of its
measurement. What lies in a run's place with another identity is never mixed in: it is refused, by the name of what
differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from shodh.checkpoint.description import Kind
from shodh.checkpoint.folder import BEST, best_checkpoint
from shodh.checkpoint.run_files import TOKENIZER_WEIGHTS
from shodh.checkpoint.weights import source_checksum
from shodh.config import RunConfig, config_from_dict, to_dict
from shodh.core.errors import ConfigError
from shodh.core.reading import read_object
from shodh.core.strict_json import to_json
from shodh.data.formats.splits import data_folder
from shodh.data.identity import DataRecord
from shodh.train.run_folder import RunFolder

#: Settings of a configuration that do not make it another run.
FREE = ("name", "out", "deepspeed", "kernels", "parallel", "routing_trace", "routing_samples")
Identity = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A plain training process with a resolved configuration, or a measurement of what others have trained.

    Attributes
    ----------
    name : str
        In messages, and of its job's file and log.
    result : Path
        What its measurement leaves behind, whole or not at all: the run is finished.
    measure : str
        ``module:function`` of ``(run, device) -> values of the result``, called on one rank after the training.
    labels : dict
        What tells this run from the others of its study; columns of the table of results.
    settings : dict
        What the measurement depends on beside the configuration; part of the identity.
    kind : {"ema", "raw"}, optional
        Which of the weights that it starts from: `shodh.checkpoint.description.read_pretrained`; part of the identity.
    told : dict
        What else the measurement is told: what its numbers do not depend on.
    weights : tuple of Path
        Weights that it starts from, or is made of.
    trains : bool
        False: nothing is trained, the measurement is all.
    after : tuple of str
        Names of the runs whose results it needs.
    """

    name: str
    config: RunConfig
    result: Path
    measure: str
    labels: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    told: Mapping[str, Any] = field(default_factory=dict)
    weights: tuple[Path, ...] = ()
    kind: Kind | None = None
    trains: bool = True
    after: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return self.config.operator.train.steps if self.trains else 0

    @property
    def finished(self) -> bool:
        return self.result.exists()

    def to_job(self) -> dict[str, Any]:
        """JSON-able: what its process is told."""
        paths = {"result": str(self.result), "weights": [str(path) for path in self.weights]}
        plain: dict[str, Any] = to_json({**vars(self), **paths, "config": to_dict(self.config)})
        return plain

    @classmethod
    def of_job(cls, job: Mapping[str, Any], source: str) -> Run:
        """The run of `to_job`; ``source`` is where it was read, for errors."""
        paths = {"result": Path(job["result"]), "weights": tuple(map(Path, job["weights"]))}
        return cls(**{**job, **paths, "config": config_from_dict(job["config"], source), "after": tuple(job["after"])})

    def identity(self) -> Identity:
        """JSON-able; contents of data files stand in the run folder (``data.json``), and are compared with that."""
        paths = list(self.weights)
        if self.config.has_tokenizer:
            paths.append(self.config.tokenizer_dir / TOKENIZER_WEIGHTS)
        kinds = [self.kind] * len(self.weights) + [None]
        times = [path.stat().st_mtime_ns if path.exists() else None for path in paths]
        known = zip(paths, times, kinds, strict=False)
        weights = [None if time is None else _checksum(path, time, kind) for path, time, kind in known]
        found: Identity = to_json({**_identity_of(self.config, recorded=True), "weights": weights, **self.settings})
        return found

    def check(self) -> None:
        """Refuse what lies in this run's place and is of another run.

        Raises
        ------
        ConfigError
            The folder holds a run, or the result is, of other settings.
        DataError
            The run's data files have changed since it learned from them; where some are gone, none is compared.
        """
        folder = self.config.run_dir
        record = DataRecord.load(folder)
        if (folder / "config.yaml").exists():
            there = (RunFolder(folder).config(), self.config)
            self._compare(folder, *(_identity_of(config, record is not None) for config in there))
        for regime in self.config.data.regimes:
            files = (
                [] if record is None else [data_folder(regime.path) / n for n in record.regimes.get(regime.name, ())]
            )
            if record is not None and all(file.is_file() for file in files):
                record.kept(regime.name, regime.path)
        if self.finished:
            self.read()

    def read(self) -> dict[str, Any]:
        """The result.

        Raises
        ------
        ConfigError
            It is of another run, or of an older version, which did not say of which.
        CheckpointError
            It is damaged.
        """
        values = read_object(self.result)
        self._compare(self.result, values.get("identity", {}), self.identity())
        return values

    def _compare(self, place: Path, old: Identity, new: Identity) -> None:
        changed = [key for key in new if key != "weights" and old.get(key) != new[key]]
        pairs = zip(old.get("weights", []), new.get("weights", []), strict=False)
        changed += ["weights"] * any(None not in pair and pair[0] != pair[1] for pair in pairs)
        refuse_changed(self.name, place, changed)


def refuse_changed(run: str, place: Path, changed: Sequence[str]) -> None:
    """Raise `ConfigError` where what lies in the place of a run is of other settings."""
    if changed:
        raise ConfigError(
            f"run {run}: {place} is of other settings of {' and '.join(changed)}; choose another --name or --out, or "
            "remove it to make it anew"
        )


@lru_cache(maxsize=1000)
def _checksum(path: Path, _: int, kind: Kind | None) -> str:
    """`source_checksum`, once for each time at which weights were written."""
    return source_checksum(path, kind)


def judged_checkpoint(folder: Path) -> str | None:
    """The checkpoint by which every study judges a run: its best one where its configuration keeps one, or the newest.

    What is reported of the newest beside it is called ``last``.
    """
    return None if best_checkpoint(folder) is None else BEST


def _identity_of(config: RunConfig, recorded: bool) -> Identity:
    """The settings that make a run; data files whose contents are ``recorded`` count by these, not by their place."""
    tree: Identity = to_json({key: value for key, value in to_dict(config).items() if key not in FREE})
    for regime in tree["data"]["regimes"] if recorded else ():
        del regime["path"]
    return tree
