"""The runs of a map: what each of them learns, how large it is, and what makes two of them the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from shodh.config import OperatorConfig, to_dict
from shodh.core.reading import read_object
from shodh.core.strict_json import to_json
from shodh.experiments.harness.results import RESULT
from shodh.experiments.harness.run import refuse_changed
from shodh.experiments.transfer.map.settings import SPECIALIST, MapConfig

#: Settings that every result depends on.
DATA = ("grid", "unfold", "history", "noise", "samples", "held_out", "gradient_samples")


@dataclass(frozen=True, eq=False)
class MapRun:
    """One model that learns some regimes.

    Attributes
    ----------
    arm : str
        ``specialist``, ``dense`` or another control of `settings`, or a name of ``apart`` or ``routers``.
    regimes : tuple of str
    dim, seed : int
    fields : str
        ``normalised`` or ``raw``.
    """

    study: MapConfig
    arm: str
    regimes: tuple[str, ...]
    dim: int
    fields: str
    seed: int

    @property
    def name(self) -> str:
        what = self.regimes[0] if self.arm == SPECIALIST else f"{self.arm}-k{len(self.regimes)}"
        return f"{what}-d{self.dim}-{self.fields}-s{self.seed}"

    @property
    def group(self) -> tuple[int, str, int]:
        """Runs that learn from one stream of data, side by side."""
        return self.dim, self.fields, self.seed

    @cached_property
    def operator(self) -> OperatorConfig:
        return self.study.operator_config(self.arm, len(self.regimes), self.dim)

    @property
    def result(self) -> Path:
        return self.study.folder / "runs" / self.name / RESULT

    @property
    def finished(self) -> bool:
        return self.result.exists()

    @property
    def labels(self) -> dict[str, Any]:
        """What tells this run from the others."""
        return {"name": self.name, "arm": self.arm, "regimes": list(self.regimes), "dim": self.dim,
                "fields": self.fields, "seed": self.seed}  # fmt: skip

    def identity(self) -> dict[str, Any]:
        """Settings that its numbers depend on."""
        data = {name: getattr(self.study, name) for name in DATA}
        if self.arm in self.study.apart:
            data["apart"] = self.study.apart[self.arm]
        if self.arm != SPECIALIST and self.study.plasticity:
            data["plasticity"] = self.study.plasticity
        found: dict[str, Any] = to_json({**data, "operator": to_dict(self.operator), **self.labels})
        return found

    def check(self) -> None:
        """Refuse a result of other settings, as `read` does."""
        if self.finished:
            self.read()

    def read(self) -> dict[str, Any]:
        """The result; raises `ConfigError` where it is of other settings."""
        values, own = read_object(self.result), self.identity()
        there = values.get("identity", {})
        refuse_changed(self.name, self.result, [key for key in own if there.get(key) != own[key]])
        return values


def expand(study: MapConfig) -> list[MapRun]:
    """Every run, group by group: specialists of all regimes of the largest mix, then the mixes, small ones first."""
    study.checked()
    runs = []
    for seed in range(study.seeds):
        for fields in study.fields:
            for dim in study.dims:
                most = study.regimes[: max(study.counts)]
                runs += [MapRun(study, SPECIALIST, (name,), dim, fields, seed) for name in most]
                for count in sorted(set(study.counts) - {1}):
                    mix = study.regimes[:count]
                    runs += [MapRun(study, arm, mix, dim, fields, seed) for arm in study.arms]
    return sorted(runs, key=lambda run: study.dims.index(run.dim))


def by_group(runs: Sequence[MapRun]) -> dict[str, list[MapRun]]:
    """Runs by the name of their group, in order."""
    groups: dict[str, list[MapRun]] = {}
    for run in runs:
        dim, fields, seed = run.group
        groups.setdefault(f"d{dim}-{fields}-s{seed}", []).append(run)
    return groups
