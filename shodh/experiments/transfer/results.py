"""Results of finished cells, and their errors at equal steps, equal work and equal time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Reading = Literal["steps", "flops", "seconds"]
READINGS: tuple[Reading, ...] = ("steps", "flops", "seconds")
TEST = "test"
ROLLOUT = "rollout"


@dataclass(frozen=True)
class Result:
    """One finished cell; ``values`` is its ``result.json``.

    An *error* is of one step, in the space the operator works in, over persistence's on the same windows, and never a
    square: the root of a ratio of MSEs, or a ratio of relative L2 errors. 1 is persistence.
    """

    values: dict[str, Any]

    @property
    def cell(self) -> dict[str, Any]:
        cell: dict[str, Any] = self.values["cell"]
        return cell

    @property
    def label(self) -> str:
        """Model and variant; specialists of different shares are different models."""
        share = int(self.cell["share"])
        return f"{self.cell['label']}{share if share > 1 else ''}"

    @property
    def seed(self) -> int:
        return int(self.cell["seed"])

    @property
    def regimes(self) -> list[str]:
        return list(self.cell["regimes"])

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

    def test_error(self, regime: str) -> float | None:
        """On the test split, with the last weights."""
        return self.relative(self.values["errors"][regime])

    def curve(self, regime: str, reading: Reading) -> list[tuple[float, float]]:
        """(cost, validation error) before training and at each checkpoint; empty where the cost is not known."""
        each = self.cost_per_step(reading)
        if each is None:
            return []
        points = [(p["step"] * each, self.relative(p["errors"][regime])) for p in self.values["history"]]
        return [(cost, error) for cost, error in points if error is not None]

    def error(self, regime: str, reading: Reading, budget: float) -> float | None:
        """The validation error when a budget was spent.

        The logarithm of the error is interpolated between checkpoints, so that a model whose steps cost a percent more
        does not lose a whole interval. It is not the lowest so far: one model has to serve all regimes of a mix, and
        would have to be stopped at one step for all.
        """
        curve = self.curve(regime, reading)
        if not curve:
            return None
        costs, errors = zip(*curve, strict=True)
        return math.exp(float(np.interp(budget, costs, np.log(errors))))

    def rollout_error(self, regime: str) -> float | None:
        """VRMSE of autoregressive rollouts on the test split, over that of persistence.

        Each the mean over steps; the geometric mean over fields. None without rollouts, or where one is not finite.
        """
        fields = self.values["evaluation"]["regimes"][regime].get("rollout", {}).values()
        ratios = [over_persistence(kinds["model"], kinds["persistence"]) for kinds in fields]
        known = [ratio for ratio in ratios if ratio is not None and ratio > 0]
        return geometric_mean(known) if known and len(known) == len(ratios) else None

    def relative(self, error: dict[str, float | None]) -> float | None:
        """An error of the result over persistence's, never a square; None where it is not finite."""
        model, persistence = error["model"], error["persistence"]
        if model is None or not persistence:
            return None
        ratio = model / persistence
        return math.sqrt(ratio) if self.values["measure"].endswith("mse") else ratio

    def routing(self, key: str) -> float | None:
        """Mean over layers of ``regime_information`` or ``nmi``; None for a dense model."""
        routing = self.values["evaluation"]["routing"]
        if routing is None:
            return None
        return sum(layer[key] for layer in routing["layers"]) / len(routing["layers"])

    def dead_experts(self) -> int | None:
        """Experts, over all layers, with less than a hundredth of an equal share of the test tokens."""
        routing = self.values["evaluation"]["routing"]
        if routing is None:
            return None
        dead = 0
        for layer in routing["layers"]:
            load = [sum(counts) for counts in zip(*layer["counts"].values(), strict=True)]
            dead += sum(n < 0.01 * sum(load) / len(load) for n in load)
        return dead


def over_persistence(model: Sequence[float | None], persistence: Sequence[float | None]) -> float | None:
    """Mean over autoregressive steps of a model's error, over that of persistence; None where one is not finite."""
    known = [(m, p) for m, p in zip(model, persistence, strict=True) if m is not None and p is not None]
    total = sum(p for _, p in known)
    return sum(m for m, _ in known) / total if len(known) == len(model) and total > 0 else None


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs))


class Results:
    """The finished cells of a study; seconds a step are the median over a model's seeds.

    What ran beside a cell is no property of its model, and the same model with another seed does the same work.
    """

    def __init__(self, results: Sequence[Result]) -> None:
        clocks: dict[tuple[str, str], list[float]] = {}
        for r in results:
            if r.values["seconds_per_step"] is not None:
                clocks.setdefault((r.cell["mix"], r.label), []).append(float(r.values["seconds_per_step"]))
        medians = {key: statistics.median(times) for key, times in clocks.items()}
        self.all = [Result({**r.values, "seconds_per_step": medians.get((r.cell["mix"], r.label))}) for r in results]

    @property
    def mixed(self) -> list[Result]:
        return [r for r in self.all if not r.cell["model"].startswith("specialist")]

    @property
    def mixes(self) -> list[str]:
        """Mixes in the order of the study."""
        return list(dict.fromkeys(r.cell["mix"] for r in self.mixed))

    def labels(self, mix: str) -> list[str]:
        """Models of a mix in the order of the study."""
        return list(dict.fromkeys(r.label for r in self.mixed if r.cell["mix"] == mix))

    def of(self, mix: str, label: str) -> dict[int, Result]:
        """Results by seed. The dense model of a mix of one regime is its specialist, and is not trained twice."""
        found = {r.seed: r for r in self.mixed if r.cell["mix"] == mix and r.label == label}
        regimes = {name for r in self.mixed if r.cell["mix"] == mix for name in r.regimes}
        if label == "dense_active" and not found and len(regimes) == 1:
            (alone,) = regimes
            return {r.seed: r for r in self.all if r.cell["model"] == "specialist" and r.regimes == [alone]}
        return found

    def dense(self, mix: str) -> str:
        """The dense model of equal active size that sparse ones are compared with: with the router's size, if run."""
        return "dense_router" if self.of(mix, "dense_router") else "dense_active"

    def specialist(self, regime: str, seed: int, share: int = 1) -> Result | None:
        """The specialist of a regime with all steps (share 1), or with the steps that a mix of ``share`` gives it."""
        name = "specialist" if share == 1 else "specialist_share"
        for r in self.all:
            if r.cell["model"] == name and r.regimes == [regime] and r.seed == seed and r.cell["share"] == share:
                return r
        return None

    def budget(self, mix: str, seed: int, reading: Reading) -> float | None:
        """What the cheapest model of a mix and seed spent, its specialists with all steps included."""
        group = [r for r in self.mixed if r.cell["mix"] == mix and r.seed == seed]
        regimes = group[0].regimes if group else []
        group += [s for s in (self.specialist(regime, seed) for regime in regimes) if s is not None]
        costs = [c for c in (r.cost(reading) for r in group) if c is not None]
        return min(costs) if costs else None

    def error(self, result: Result, regime: str, reading: str, mix: str) -> float | None:
        """Error by a reading: ``test``, ``rollout``, or one of `READINGS` at the mix's budget."""
        if reading == TEST:
            return result.test_error(regime)
        if reading == ROLLOUT:
            return result.rollout_error(regime)
        chosen: Reading = next(r for r in READINGS if r == reading)
        budget = self.budget(mix, result.seed, chosen)
        return None if budget is None else result.error(regime, chosen, budget)

    def mean_error(self, result: Result, reading: str = TEST, mix: str | None = None) -> float | None:
        """Geometric mean over the regimes of a model, by default in its own mix."""
        errors = [self.error(result, regime, reading, mix or result.cell["mix"]) for regime in result.regimes]
        known = [e for e in errors if e is not None and e > 0]
        return geometric_mean(known) if len(known) == len(errors) else None

    def transfer(self, result: Result, regime: str, reading: str, share: int = 1) -> float | None:
        """Transfer index: error of the mixed model over the specialist's; above 1, mixing has done harm."""
        other = self.specialist(regime, result.seed, share)
        if other is None:
            return None
        mix = result.cell["mix"]
        mixed, alone = self.error(result, regime, reading, mix), self.error(other, regime, reading, mix)
        return mixed / alone if mixed is not None and alone else None
