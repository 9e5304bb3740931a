"""Every way to a model for a value of the parameter: experts, merges, read-outs, controls and an ensemble.

A method is a function of a `Trial`; it is given the observed steps of the value's test trajectories, all together, and
its error is counted on the later ones. Oracle and persistence are marks to read the others by, and no methods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shodh.core.weights import LazyWeights
from shodh.experiments.composition.bench import Bench, Line
from shodh.experiments.composition.calibrate import Chosen, TaskVectors, fine_tune
from shodh.experiments.composition.members import Case
from shodh.experiments.composition.settings import MethodName
from shodh.merge import (
    Readout,
    average,
    compose,
    random_direction,
    read_gradient,
    read_line_search,
    read_prefix,
)
from shodh.merge.coordinates import LIMIT, ParameterMap, clip
from shodh.merge.readout import BANK
from shodh.merge.slider import Grouping
from shodh.models.operator import OperatorOutput

#: Random directions that are drawn; their errors are averaged.
DRAWS = 3
#: Twice as far as the published bank: for values that lie far outside.
WIDE_BANK = tuple(0.25 * i for i in range(-12, 13))


@dataclass(frozen=True)
class Outcome:
    """What a method gives at one value.

    Attributes
    ----------
    errors : Tensor [N, rollout]
        Relative L2 error of each trajectory and counted step; infinite where a rollout is not finite.
    alpha : float or list of float, optional
        Coordinate; one a layer, expert or trajectory where there are several.
    forward, backward : int
        Passes of the rollout over the observed steps, what adapting costs.
    networks : int
        That are run at every step of the deployed model.
    """

    errors: Tensor
    alpha: float | list[float] | None = None
    forward: int = 0
    backward: int = 0
    networks: int = 1

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; infinite errors are to become null."""
        return {
            "error": float(self.errors.mean()),
            "by_step": self.errors.mean(0).tolist(),
            "by_trajectory": self.errors.mean(1).tolist(),
            "alpha": self.alpha,
            "forward": self.forward,
            "backward": self.backward,
            "networks": self.networks,
        }


class Trial:
    """One value of the parameter, and what its methods share: the bank's rollouts, and each other's outcomes."""

    def __init__(self, bench: Bench, chosen: Chosen, vectors: TaskVectors, case: Case, seed: int) -> None:
        bench.check(case)
        self.bench, self.chosen, self.vectors, self.case, self.seed = bench, chosen, vectors, case, seed
        self.family = bench.family
        self.line = Line(bench, case)
        self._outcomes: dict[str, Outcome] = {}
        self._coordinates: dict[ParameterMap, float] = {}

    def outcome(self, method: MethodName) -> Outcome:
        """Of a method; found once."""
        if method not in self._outcomes:
            self._outcomes[method] = METHODS[method](self)
        return self._outcomes[method]

    def coordinate(self, scale: ParameterMap) -> float:
        """Where the value lies in the metadata's range, not clipped; warns outside."""
        if scale not in self._coordinates:
            self._coordinates[scale] = replace(self.family.range, scale=scale).coordinate(self.case.value)
        return self._coordinates[scale]

    def calibrated_within(self, limit: float) -> float:
        """The coordinate from the parameter with the factor and the map that validation chose, at most ``limit``."""
        return clip(self.chosen.line.gamma * self.coordinate(self.chosen.line.scale), limit)

    @property
    def calibrated(self) -> float:
        """The coordinate that `scale` deploys."""
        return self.calibrated_within(LIMIT)

    def with_weights(self, weights: LazyWeights) -> Outcome:
        """The outcome of a network that is the same at every value."""
        return Outcome(self.bench.later(self.bench.model_of(weights), self.case))

    def at(self, alpha: float, forward: int = 0, backward: int = 0) -> Outcome:
        """The outcome of composition at a coordinate."""
        return Outcome(self.line.later(alpha), alpha, forward, backward)


def _persistence(trial: Trial) -> Outcome:
    return Outcome(trial.bench.later(trial.bench.persistence, trial.case), networks=0)


def _arithmetic(name: str) -> Callable[[Trial], Outcome]:
    return lambda trial: trial.with_weights(trial.vectors.at(name, trial.chosen.scalings[name]))


def _coord(scale: ParameterMap) -> Callable[[Trial], Outcome]:
    # As `shodh.merge.read_coord`, with one warning a value however many methods ask.
    return lambda trial: trial.at(clip(trial.coordinate(scale)))


def _prefix(bank: Sequence[float]) -> Callable[[Trial], Outcome]:
    def method(trial: Trial) -> Outcome:
        found = read_prefix(trial.line.observed_mean, bank)
        return trial.at(_number(found), forward=len(found.trace))

    return method


def _prefix_each(trial: Trial) -> Outcome:
    """The bank, with a coordinate for each trajectory."""
    observed = torch.stack([trial.line.observed(a) for a in BANK])
    later = torch.stack([trial.line.later(a) for a in BANK])
    best = observed.argmin(0)
    errors = later[best, torch.arange(len(best))]
    return Outcome(errors, [BANK[i] for i in best.tolist()], forward=len(BANK))


def _line_search(trial: Trial) -> Outcome:
    found = read_line_search(trial.line.observed_mean)
    return trial.at(_number(found), forward=len(found.trace))


def _gradient(trial: Trial) -> Outcome:
    """From the middle of the line: metadata are not used."""
    slider = trial.family.slider()
    found = read_gradient(trial.bench.loss_and_gradient(slider, trial.case), 0.0)
    return trial.at(_number(found), len(found.trace), len(found.trace))


def _gradient_by(by: Grouping) -> Callable[[Trial], Outcome]:
    """Each layer's, or expert's, coordinate, from the one that `gradient` found; its cost is added."""

    def method(trial: Trial) -> Outcome:
        first = trial.outcome("gradient")
        slider = trial.family.slider(by)
        start = [float(np.asarray(first.alpha))] * len(slider.groups)
        found = read_gradient(trial.bench.loss_and_gradient(slider, trial.case), start)
        alpha = [float(a) for a in np.atleast_1d(np.asarray(found.alpha))]
        slider.set(alpha)
        errors = trial.bench.later(trial.family.model.forecaster, trial.case)
        passes = first.forward + len(found.trace)
        return Outcome(errors, alpha, passes, passes)

    return method


def _oracle(trial: Trial) -> Outcome:
    """The best of the bank on the counted steps themselves, in hindsight."""
    return trial.at(_number(read_prefix(trial.line.later_mean)))


def _random_direction(trial: Trial) -> Outcome:
    """Directions of random numbers with the norm of the real one, tensor by tensor, at the coordinate of `scale`."""
    shared, direction = trial.family.decompose()
    errors = []
    for draw in range(DRAWS):
        # A seed for each pair of study seed and draw.
        drawn = random_direction(direction, DRAWS * trial.seed + draw)
        weights = compose(trial.family.anchor, shared, drawn, trial.calibrated)
        errors.append(trial.with_weights(weights).errors)
    return Outcome(torch.stack(errors).mean(0), trial.calibrated)


def _ensemble(trial: Trial) -> Outcome:
    """Outputs of both experts at every step, with the factors that `scale` gives their weights."""
    alpha = trial.calibrated
    low, high = (trial.family.copy_of(weights).forecaster for weights in trial.family.experts)

    def mixed(*given: Tensor, **told: Any) -> OperatorOutput:
        first, second = (model.operator(*given, **told).latent for model in (low, high) if model.operator is not None)
        return OperatorOutput((1 - alpha) / 2 * first + (1 + alpha) / 2 * second, [])

    return Outcome(trial.bench.later(replace(low, operator=mixed), trial.case), alpha, networks=2)


def _prefix_finetune(trial: Trial) -> Outcome:
    """All weights of the anchor, with as many forward and backward passes as `gradient` took."""
    assert trial.chosen.rate is not None
    passes = trial.outcome("gradient").forward
    model = fine_tune(trial.bench, trial.case, trial.chosen.rate, passes).forecaster
    return Outcome(trial.bench.later(model, trial.case), None, passes, passes)


def _number(found: Readout) -> float:
    return float(np.asarray(found.alpha))


#: In the order of the report.
METHODS: dict[MethodName, Callable[[Trial], Outcome]] = {
    "persistence": _persistence,
    "anchor": lambda trial: trial.with_weights(trial.family.anchor),
    "low": lambda trial: trial.with_weights(trial.family.low),
    "high": lambda trial: trial.with_weights(trial.family.high),
    "average": lambda trial: trial.with_weights(average(trial.family.experts)),
    "task_arithmetic": _arithmetic("task_arithmetic"),
    "ties": _arithmetic("ties"),
    "dare": _arithmetic("dare"),
    "coord": _coord("linear"),
    "coord_log": _coord("log"),
    "scale": lambda trial: trial.at(trial.calibrated),
    "scale_wide": lambda trial: trial.at(trial.calibrated_within(max(WIDE_BANK))),
    "prefix": _prefix(BANK),
    "prefix_each": _prefix_each,
    "prefix_wide": _prefix(WIDE_BANK),
    "line_search": _line_search,
    "gradient": _gradient,
    "gradient_by_layer": _gradient_by("layer"),
    "gradient_by_expert": _gradient_by("expert"),
    "oracle": _oracle,
    "wrong_sign": lambda trial: trial.at(-trial.calibrated),
    "random_direction": _random_direction,
    "ensemble": _ensemble,
    "prefix_finetune": _prefix_finetune,
}


def possible(method: MethodName, trial: Trial) -> bool:
    """Whether a method makes sense for a family: coordinates by expert need experts, a logarithm positive values."""
    if method == "gradient_by_expert":
        return trial.family.sparse
    if method == "coord_log":
        return min(trial.family.range.low, trial.case.value) > 0
    return True
