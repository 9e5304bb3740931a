"""What the finished runs of a map say: errors, transfer indices with intervals, and effective parameters.

The error of a regime is the root of the mean square over its held-out samples, over that of persistence. The *transfer
index* of a model is its error over that of a specialist: a dense model of the same width that learned this regime
alone, from the same samples. Of several regimes it is the geometric mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import gmean

from shodh.experiments.transfer.map.runs import MapRun
from shodh.experiments.transfer.map.settings import DENSE, DENSE_LONGER, DENSE_ROUTER, SPECIALIST, MapConfig
from shodh.report.statistics import Comparison, Interval, bootstrap_by_seed, compare, holm


class Point(NamedTuple):
    """A place of the map: scale of fields, number of regimes, width."""

    fields: str
    number: int
    dim: int


class Claim(NamedTuple):
    """A comparison that the page draws a conclusion from."""

    point: Point
    arm: str
    other: str


@dataclass(frozen=True)
class Law:
    """``error = exp(level) * parameters^-slope`` of the specialists of one regime, least squares in logarithms."""

    level: float
    slope: float
    spread: float

    def error(self, parameters: float) -> float:
        return math.exp(self.level - self.slope * math.log(parameters))

    def parameters(self, error: float) -> float | None:
        """How many a specialist needs for this error; None where errors do not fall with size."""
        exponent = (self.level - math.log(error)) / self.slope if self.slope > 0 else math.inf
        return math.exp(exponent) if exponent < 100 else None


def root_mean(squares: Sequence[float | None]) -> float:
    """Root of the mean; infinite where a sample has diverged."""
    values = [math.inf if v is None or not math.isfinite(v) else v for v in squares]
    return math.sqrt(sum(values) / len(values))


class MapResults:
    """The finished runs of a study by place, arm and seed."""

    def __init__(self, study: MapConfig, runs: Sequence[MapRun]) -> None:
        self.study = study
        self.values = {run: run.read() for run in runs if run.finished}
        self._mixed: dict[tuple[Point, str], dict[int, dict[str, Any]]] = {}
        self._alone: dict[tuple[str, int, str], dict[int, dict[str, Any]]] = {}
        for run, values in self.values.items():
            if run.arm == SPECIALIST:
                self._alone.setdefault((run.fields, run.dim, run.regimes[0]), {})[run.seed] = values
            else:
                point = Point(run.fields, len(run.regimes), run.dim)
                self._mixed.setdefault((point, run.arm), {})[run.seed] = values

    @property
    def points(self) -> list[Point]:
        """Places with a finished run of a mix, in order."""
        return sorted({point for point, _ in self._mixed})

    def arms(self, point: Point) -> list[str]:
        return [arm for arm in self.study.arms if (point, arm) in self._mixed]

    def regimes(self, point: Point) -> tuple[str, ...]:
        return self.study.regimes[: point.number]

    def of(self, point: Point, arm: str) -> dict[int, dict[str, Any]]:
        """Results by seed."""
        return self._mixed.get((point, arm), {})

    def alone(self, point: Point, regime: str) -> dict[int, dict[str, Any]]:
        """Results of the specialist of this width by seed."""
        return self._alone.get((point.fields, point.dim, regime), {})

    def squares(self, point: Point, arm: str, regime: str) -> dict[int, list[float]]:
        """Held-out errors of a regime by seed, a sample each; of the arm ``specialist`` those of its own."""
        found = self.alone(point, regime) if arm == SPECIALIST else self.of(point, arm)
        return {seed: values["errors"][regime] for seed, values in found.items()}

    def pairs(self, point: Point, arm: str, other: str, regimes: Sequence[str]) -> list[int]:
        """Seeds that both have for all of these regimes."""
        every = [set(self.squares(point, side, regime)) for side in (arm, other) for regime in regimes]
        return sorted(set.intersection(*every)) if every else []

    def comparison(self, point: Point, arm: str, other: str, regimes: Sequence[str] | None = None) -> Comparison | None:
        """Errors of an arm over another's, geometric means over regimes, paired by seed."""
        regimes = regimes or self.regimes(point)
        seeds = self.pairs(point, arm, other, regimes)
        if not seeds:
            return None
        sides = [
            [gmean([root_mean(self.squares(point, side, regime)[seed]) for regime in regimes]) for seed in seeds]
            for side in (arm, other)
        ]
        return compare(*sides)

    def bootstrap(self, point: Point, arm: str, other: str) -> Interval | None:
        """Interval of `comparison` over seeds *and* held-out samples."""
        regimes = self.regimes(point)
        seeds = self.pairs(point, arm, other, regimes)
        groups = [[self.squares(point, side, regime) for regime in regimes] for side in (arm, other)]
        sides = ({seed: [squares[seed] for squares in side] for seed in seeds} for side in groups)
        return bootstrap_by_seed(*sides, squared=True)

    def baseline(self, point: Point, arm: str) -> str:
        """The dense model of an arm's active size: of a router with parameters, one that is widened by a router's."""
        own, dense = (max((v["active"] for v in self.of(point, a).values()), default=0) for a in (arm, DENSE))
        return DENSE_ROUTER if own > dense and self.of(point, DENSE_ROUTER) else DENSE

    @cached_property
    def claims(self) -> dict[Claim, Comparison]:
        """Models against specialists, but for one with more steps; sparse ones against their `baseline` and a dense one
        with more steps; parted ones against the dense one: one family, adjusted together."""
        found = {}
        for point in self.points:
            for arm in self.arms(point):
                others = [] if arm == DENSE_LONGER else [SPECIALIST]
                if arm in (*self.study.routers, *self.study.apart):
                    others.append(self.baseline(point, arm))
                if arm in self.study.routers:
                    others.append(DENSE_LONGER)
                for other in others:
                    if (c := self.comparison(point, arm, other)) is not None:
                        found[Claim(point, arm, other)] = c
        return holm(found)

    def time(self, point: Point, arm: str) -> float | None:
        """Seconds of an arm's steps over those of the dense model of its seed, which took turns with it: the median.

        Of a dense model with more steps the ratio of these: the last of them had nothing beside them.
        """
        dense, key = self.of(point, DENSE), "steps" if arm == DENSE_LONGER else "seconds"
        shares = [values[key] / dense[seed][key] for seed, values in self.of(point, arm).items() if seed in dense]
        return float(np.median(shares)) if shares else None

    def information(self, point: Point, arm: str) -> float | None:
        """U of regime and expert, mean over layers and seeds."""
        every = [u for values in self.of(point, arm).values() for u in values.get("information", [])]
        return sum(every) / len(every) if every else None

    def law(self, fields: str, regime: str) -> Law | None:
        """Error of specialists by parameters; None with fewer than two sizes."""
        places: dict[int, list[float]] = {}
        for (scale, _, name), seeds in self._alone.items():
            if (scale, name) == (fields, regime):
                for values in seeds.values():
                    places.setdefault(values["parameters"], []).append(root_mean(values["errors"][regime]))
        points = [(math.log(size), math.log(gmean(errors))) for size, errors in sorted(places.items())
                  if math.isfinite(gmean(errors))]  # fmt: skip
        if len(points) < 2:
            return None
        x, y = np.array(points).T
        slope, level = np.polyfit(x, y, 1)
        return Law(float(level), -float(slope), float(np.std(y - slope * x - level)))

    def effective(self, point: Point, arm: str, regime: str) -> tuple[float, float | None] | None:
        """Error over that of a specialist of N / K parameters, and effective parameters over N; by the fitted law.

        ``N`` are the parameters of the dense model of this width.
        """
        law, found = self.law(point.fields, regime), self.squares(point, arm, regime)
        sizes = [values["parameters"] for values in self.alone(point, regime).values()]
        if law is None or not found or not sizes:
            return None
        error = gmean([root_mean(values) for values in found.values()])
        if not math.isfinite(error):
            return None
        needed = law.parameters(error)
        return error / law.error(sizes[0] / point.number), None if needed is None else needed / sizes[0]
