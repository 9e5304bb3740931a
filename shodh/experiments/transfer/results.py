"""Results of finished runs, and their errors at equal steps, equal work and equal time, as one tidy table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import scipy

from shodh.experiments.harness.results import ERROR, SEED, compare_by_seed, tidy
from shodh.report.statistics import Comparison, Interval, bootstrap_by_seed, holm

Reading = Literal["steps", "flops", "seconds"]
READINGS: tuple[Reading, ...] = ("steps", "flops", "seconds")
TEST = "test"
LAST = "last"  # as `TEST`, of the last weights, where the run is judged by its best checkpoint
ROLLOUT = "rollout"
SPECIALIST = "specialist"
SHARES = ("share", "batch")  # of a specialist: the steps, or the samples, that the mix gives its regime


@dataclass(frozen=True)
class Result:
    """One finished run; ``values`` is its ``result.json``.

    An *error* is of one step, in the space the operator works in, over persistence's on the same windows, and never a
    square: the root of a ratio of MSEs, or a ratio of relative L2 errors. 1 is persistence, infinity has diverged, and
    None was not measured.
    """

    values: dict[str, Any]

    @property
    def run(self) -> dict[str, Any]:
        """Its labels: `shodh.experiments.transfer.runs.expand`."""
        run: dict[str, Any] = self.values["run"]
        return run

    @property
    def label(self) -> str:
        return str(self.run["label"])

    @property
    def seed(self) -> int:
        return int(self.run["seed"])

    @property
    def regimes(self) -> list[str]:
        return list(self.run["regimes"])

    @property
    def is_specialist(self) -> bool:
        return str(self.run["model"]).startswith(SPECIALIST)

    def cost_per_step(self, reading: Reading) -> float | None:
        """What a step costs: 1, floating-point operations, or seconds."""
        if reading == "steps":
            return 1.0
        value = self.values["flops_per_step" if reading == "flops" else "seconds_per_step"]
        return None if value is None else float(value)

    def cost(self, reading: Reading) -> float | None:
        """Of the whole training."""
        each = self.cost_per_step(reading)
        return None if each is None else each * float(self.values["steps"])

    def curve(self, regime: str, reading: Reading) -> list[tuple[float, float]]:
        """(cost, validation error) before training and at each checkpoint; empty where the cost is not known."""
        each = self.cost_per_step(reading)
        if each is None:
            return []
        points = [(p["step"] * each, self.relative(p["errors"][regime])) for p in self.values["history"]]
        return [(cost, error) for cost, error in points if error is not None]

    def error(self, regime: str, reading: str, budget: float | None = None) -> float | None:
        """By a reading: ``test`` and ``rollout`` (`judged_checkpoint`), ``last``, or one of `READINGS` at a budget.

        Of these the logarithm of the validation error is interpolated between checkpoints, so that a model whose steps
        cost a percent more does not lose a whole interval. It is not the lowest so far: one model has to serve all
        regimes of a mix, and would have to be stopped at one step for all.
        """
        if reading == TEST:
            return self.relative(self.values["errors"][regime])
        if reading == LAST:
            return self.relative(self.values[LAST][regime]) if self.values.get(LAST) else None
        if reading == ROLLOUT:
            return self.rollout_error(regime)
        curve = self.curve(regime, next(r for r in READINGS if r == reading))
        if not curve or budget is None:
            return None
        costs, errors = zip(*curve, strict=True)
        with np.errstate(invalid="ignore"):
            found = math.exp(float(np.interp(budget, costs, np.log(errors))))
        return math.inf if math.isnan(found) else found

    def rollout_error(self, regime: str) -> float | None:
        """VRMSE of autoregressive rollouts on the test split, over that of persistence.

        Each the mean over steps; the geometric mean over fields.
        """
        fields = self.values["evaluation"]["regimes"][regime].get("rollout", {}).values()
        ratios = [over_persistence(kinds["model"], kinds["persistence"]) for kinds in fields]
        known = [ratio for ratio in ratios if ratio]
        return float(scipy.stats.gmean(known)) if known else None

    def relative(self, error: dict[str, float | None]) -> float | None:
        """An error of the result over persistence's, never a square."""
        model, persistence = error["model"], error["persistence"]
        if not persistence:
            return None
        ratio = math.inf if model is None else model / persistence
        return math.sqrt(ratio) if self.squared else ratio

    @property
    def squared(self) -> bool:
        """Whether errors are kept as squares."""
        return str(self.values["measure"]).endswith("mse")

    def routing(self, key: str) -> float | None:
        """Mean over layers of ``regime_information`` or ``nmi``; None for a dense model."""
        routing = self.values["evaluation"]["routing"]
        return None if routing is None else statistics.fmean(layer[key] for layer in routing["layers"])

    def dead_experts(self) -> int | None:
        """Experts, over all layers, with less than a hundredth of an equal share of the test tokens."""
        routing = self.values["evaluation"]["routing"]
        if routing is None:
            return None
        loads = [np.sum(list(layer["counts"].values()), 0) for layer in routing["layers"]]
        return sum(int((load < 0.01 * load.mean()).sum()) for load in loads)


def over_persistence(model: Sequence[float | None], persistence: Sequence[float | None]) -> float | None:
    """Mean over autoregressive steps of a model's error, over that of persistence; infinite where one is not finite."""
    if None in persistence or not sum(p for p in persistence if p is not None):
        return None
    known = [m for m in model if m is not None]
    return math.inf if len(known) < len(model) else sum(known) / sum(p for p in persistence if p is not None)


class Claim(NamedTuple):
    """One model's error against another's in a mix: by a reading, over all its regimes or in one."""

    mix: str
    label: str
    other: str
    reading: str = TEST
    regime: str | None = None


class Results:
    """The finished runs of a study; seconds a step are the median over a model's seeds.

    What ran beside a run is no property of its model, and the same model with another seed does the same work.
    """

    def __init__(self, results: Sequence[Result]) -> None:
        clocks: dict[tuple[str, str], list[float]] = {}
        for r in results:
            if r.values["seconds_per_step"] is not None:
                clocks.setdefault((r.run["mix"], r.label), []).append(float(r.values["seconds_per_step"]))
        medians = {key: statistics.median(times) for key, times in clocks.items()}
        self.all = [Result({**r.values, "seconds_per_step": medians.get((r.run["mix"], r.label))}) for r in results]

    @property
    def mixed(self) -> list[Result]:
        return [r for r in self.all if not r.is_specialist]

    @property
    def mixes(self) -> list[str]:
        """Mixes in the order of the study."""
        return list(dict.fromkeys(r.run["mix"] for r in self.mixed))

    def labels(self, mix: str) -> list[str]:
        """Models of a mix in the order of the study."""
        return list(dict.fromkeys(r.label for r in self.mixed if r.run["mix"] == mix))

    def regimes(self, mix: str) -> list[str]:
        return next(r.regimes for r in self.mixed if r.run["mix"] == mix)

    def of(self, mix: str, label: str) -> list[Result]:
        """Results over seeds. The dense model of a mix of one regime is its specialist, and is not trained twice."""
        found = [r for r in self.mixed if r.run["mix"] == mix and r.label == label]
        if label == "dense_active" and not found and len(self.regimes(mix)) == 1:
            label = SPECIALIST
        return found or [r for r in self.specialists(mix) if r.label == label]

    def specialists(self, mix: str) -> list[Result]:
        """Of the regimes of a mix: with all steps, and with the steps, or samples, that the mix gives a regime."""
        regimes = self.regimes(mix)
        alone = [r for r in self.all if r.is_specialist and r.regimes[0] in regimes]
        return [r for r in alone if r.run["share"] in (1, len(regimes))]

    def whole_specialists(self, mix: str) -> list[Result]:
        """Those of them that have all steps."""
        return [r for r in self.specialists(mix) if r.run["model"] != f"{SPECIALIST}_{SHARES[0]}"]

    def dense(self, mix: str) -> str:
        """The dense model of equal active size that sparse ones are compared with: with the router's size, if run."""
        return "dense_router" if "dense_router" in self.labels(mix) else "dense_active"

    def budget(self, mix: str, seed: int, reading: Reading) -> float | None:
        """What the cheapest model of a mix and seed spent, its specialists with all steps included."""
        group = [r for r in self.mixed if r.run["mix"] == mix] + [
            r for r in self.specialists(mix) if r.run["share"] == 1
        ]
        return min((c for r in group if r.seed == seed and (c := r.cost(reading)) is not None), default=None)

    @cached_property
    def frame(self) -> pd.DataFrame:
        """Columns mix, label, seed, regime, reading, error: of every model of a mix and of its specialists."""
        return tidy(self._rows())

    def _rows(self) -> Iterator[dict[str, Any]]:
        for mix in self.mixes:
            members = [r for r in self.mixed if r.run["mix"] == mix] + self.specialists(mix)
            for r in members:
                budgets: dict[str, float | None] = {way: self.budget(mix, r.seed, way) for way in READINGS}
                for regime in r.regimes:
                    for reading in (TEST, LAST, ROLLOUT, *READINGS):
                        error = r.error(regime, reading, budgets.get(reading))
                        if error is not None:
                            place = {"mix": mix, "label": r.label, SEED: r.seed, "regime": regime}
                            yield {**place, "reading": reading, ERROR: error}

    def errors(self, mix: str, label: str, reading: str = TEST, regime: str | None = None) -> pd.Series:
        """Of a model by seed: in one regime, or the geometric mean over those of the mix.

        Of specialists together a seed is left out until all its regimes are there.
        """
        names = {r.label for r in self.of(mix, label)}
        frame = self.frame
        if frame.empty:
            return pd.Series(dtype=float)
        chosen = frame[(frame["mix"] == mix) & frame["label"].isin(names) & (frame["reading"] == reading)]
        if regime is not None:
            chosen = chosen[chosen["regime"] == regime]
        elif label.startswith(SPECIALIST):
            chosen = chosen.groupby(SEED).filter(lambda rows: len(rows) == len(self.regimes(mix)))
        return chosen.groupby(SEED)[ERROR].agg(lambda e: float(scipy.stats.gmean(e)))

    def paired(self, claim: Claim) -> Comparison | None:
        """Over the seeds that both have finished; p is of this comparison alone."""
        sides = [self.errors(claim.mix, name, claim.reading, claim.regime) for name in (claim.label, claim.other)]
        return compare_by_seed(*sides)

    def compared_sparse(self, mix: str) -> str | None:
        """The learned router that is compared: ``sparse``, or the first of its variants in the order of the study."""
        return next((label for label in self.labels(mix) if label.split("-")[0] == "sparse"), None)

    @cached_property
    def claims(self) -> dict[Claim, Comparison]:
        """Everything that the page calls lower, higher or equal, with p adjusted for all of it."""
        found = {claim: self.paired(claim) for mix in self.mixes for claim in self._asked(mix)}
        return holm({claim: c for claim, c in found.items() if c is not None})

    def _asked(self, mix: str) -> Iterator[Claim]:
        sparse, dense = self.compared_sparse(mix), self.dense(mix)
        if sparse is None:
            return
        yield from (Claim(mix, sparse, dense, reading) for reading in (TEST, "flops", "seconds", ROLLOUT))
        yield from (Claim(mix, sparse, other) for other in ("dense_total", "sparse_hash", "sparse_oracle"))
        yield Claim(mix, "sparse_oracle", dense)
        labels = (dense, sparse) if len(self.regimes(mix)) > 1 or dense in self.labels(mix) else (sparse,)
        yield from (Claim(mix, label, SPECIALIST, TEST, regime) for label in labels for regime in self.regimes(mix))
        yield from (Claim(mix, label, self.equal_samples(mix)) for label in labels)

    def equal_samples(self, mix: str) -> str:
        """Label of the specialists with all steps and the samples that the mix has of their regimes."""
        return f"{SPECIALIST}_batch{len(self.regimes(mix))}"

    def bootstrap(self, claim: Claim) -> Interval | None:
        """Interval of a claim's ratio on the test split over seeds and trajectories.

        None where these are not known, and of other readings.
        """
        if claim.reading != TEST:
            return None
        regimes = self.regimes(claim.mix) if claim.regime is None else [claim.regime]
        runs = [self.of(claim.mix, name) for name in claim[1:3]]
        sides = []
        for some in runs:  # One run has all regimes, or one each.
            errors = {(r.seed, g): r.values["errors"].get(g, {}).get("by_trajectory") for r in some for g in r.regimes}
            seeds = [s for s in dict.fromkeys(r.seed for r in some) if all((s, g) in errors for g in regimes)]
            sides.append({s: [errors[s, g] for g in regimes] for s in seeds})
        return bootstrap_by_seed(*sides, squared=any(r.squared for some in runs for r in some))

    @cached_property
    def transfers(self) -> pd.DataFrame:
        """Transfer indices, error of the mixed model over the specialist's: above 1, mixing has done harm.

        Columns mix, label, seed, regime, reading, error; ``reading`` is one of the readings, or of `SHARES`: against
        the specialist with as many steps, or samples, as the mix gives its regime, on the test split.
        """
        keys = ["mix", SEED, "regime", "reading"]
        frame = self.frame
        if frame.empty:
            return frame
        mixed = frame[~frame["label"].str.startswith(SPECIALIST)]
        test = frame[frame["reading"] == TEST]
        fewer = [test[test["label"].str.startswith(f"{SPECIALIST}_{share}")].assign(reading=share) for share in SHARES]
        against = pd.concat([frame[frame["label"] == SPECIALIST], *fewer]).drop(columns="label")
        again = [mixed[mixed["reading"] == TEST].assign(reading=share) for share in SHARES]
        joined = pd.concat([mixed, *again]).merge(against, on=keys, suffixes=("", "_alone"))
        joined[ERROR] = joined[ERROR] / joined.pop(f"{ERROR}_alone")
        return joined


def rank_pairs(results: Iterable[Result], results_of: Results) -> list[tuple[Result, float, float]]:
    """(result, U, mean error) of every sparse run whose error is finite."""
    found = []
    for r in results:
        u, errors = r.routing("regime_information"), results_of.errors(r.run["mix"], r.label)
        if u is not None and math.isfinite(errors.get(r.seed, math.inf)):
            found.append((r, u, float(errors[r.seed])))
    return found
