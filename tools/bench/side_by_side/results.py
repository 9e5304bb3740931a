"""The cells of a run as arrays, and what they say."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shodh.core.reading import read_json
from shodh.report.statistics import Comparison, Interval, compare, mean_intervals, nested_bootstrap

from .models import MODELS
from .sets import SETS

PERSISTENCE = "persistence"
BUDGETS = {"seconds": "equal seconds", "steps": "equal steps"}
TASKS = {"one_step": "one step", "rollout": "rollout"}


def mean(values: np.ndarray, axis: int | None = None) -> Any:
    """Mean of what is defined; NaN where nothing is: of a truth that does not vary."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(values, axis)


@dataclass(frozen=True)
class Results:
    """Records of finished cells by (set, model, budget, seed)."""

    cells: Mapping[tuple[str, str, str, int], Mapping[str, Any]]

    @classmethod
    def read(cls, out: Path) -> Results:
        records = [read_json(path, "cell") for path in sorted((out / "cells").glob("*.json"))]
        return cls({(r["data"], r["model"], r["budget"], r["seed"]): r for r in records})

    def of(self, data: str, model: str, budget: str) -> list[Mapping[str, Any]]:
        """The seeds of a model on a set, in order."""
        return [r for key, r in sorted(self.cells.items()) if key[:3] == (data, model, budget)]

    def errors(
        self, data: str, model: str, budget: str, task: str, measure: str, split: str = "test", seeds: int | None = None
    ) -> np.ndarray:
        """Of each seed (the first ones) and trajectory, ``[seeds, N]``; of a rollout the mean over its steps."""
        found = self.of(data, model, budget)[:seeds]
        values = np.array([r[split][task][measure] for r in found], float)  # null is NaN: undefined
        return mean(values, 2) if task == "rollout" and len(found) else values

    def sets(self, budget: str) -> list[str]:
        """Sets with a finished cell, in the order of tables."""
        known = {key[0] for key in self.cells if key[2] == budget and key[1] in MODELS}
        return [name for name in SETS if name in known]

    def models(self, data: str, budget: str) -> list[str]:
        known = {key[1] for key in self.cells if key[0] == data and key[2] == budget}
        return [name for name in MODELS if name in known]


def chosen_rates(results: Results) -> dict[str, float]:
    """Of each model the rate with the least geometric mean of validation VRMSE in one step, over the sets tuned on."""
    scores: dict[str, dict[float, list[float]]] = {}
    for (_, model, budget, _), record in results.cells.items():
        if budget.startswith("tune-"):
            error = float(mean(np.array(record["valid"]["one_step"]["vrmse"], float)))
            scores.setdefault(model, {}).setdefault(record["rate"], []).append(math.log(max(error, 1e-12)))
    return {m: min(rates, key=lambda rate: float(np.mean(rates[rate]))) for m, rates in scores.items()}


@dataclass(frozen=True)
class Duel:
    """The best of ours against the best of the peers on one set, each chosen by its validation error."""

    data: str
    ours: str
    theirs: str
    error: float
    other: float
    first: str
    comparison: Comparison
    interval: Interval | None

    @property
    def ratio(self) -> float:
        """Mean error of ours over that of the peer."""
        return self.error / self.other


def duels(results: Results, budget: str, task: str, measure: str = "vrmse") -> Iterator[Duel]:
    """Of each set that has both sides; with seeds that both have."""
    for data in results.sets(budget):
        models = results.models(data, budget)
        sides = [[m for m in models if MODELS[m].ours == ours] for ours in (True, False)]
        if not all(sides):
            continue
        seeds = min(len(results.of(data, m, budget)) for m in models)

        def score(model: str, split: str, data: str = data, seeds: int = seeds) -> float:
            return float(mean(results.errors(data, model, budget, task, measure, split, seeds)))

        ours, theirs = (min(side, key=lambda m: score(m, "valid")) for side in sides)
        a, b = (results.errors(data, m, budget, task, measure, seeds=seeds) for m in (ours, theirs))
        defined = np.isfinite(a).all(0) & np.isfinite(b).all(0)
        a, b = a[:, defined], b[:, defined]
        yield Duel(
            data,
            ours,
            theirs,
            float(a.mean()),
            float(b.mean()),
            min(models, key=lambda m: score(m, "test")),
            compare(a.mean(1).tolist(), b.mean(1).tolist()),
            nested_bootstrap([a], [b]),
        )


def with_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean over seeds and trajectories, and its 95 % interval by the nested bootstrap."""
    low, high = mean_intervals(values)
    return float(mean(values)), float(low), float(high)
