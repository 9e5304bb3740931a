"""Read-outs: which coordinate a new member of the family has, from its parameter or from a few observed steps.

A read-out knows nothing of models or data: ``evaluate(alpha)`` is the loss of the model at a coordinate, on validation
trajectories or on the observed prefix. Errors are to be counted on later frames only.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import scipy

from shodh.core.errors import ConfigError, DataError
from shodh.merge.coordinates import LIMIT, ParameterMap, clip, coordinate, extrapolation, mapped

log = logging.getLogger("shodh")

Evaluate = Callable[[float], float]
#: Coordinates that the prefix read-out tries (arXiv 2605.14546).
BANK = tuple(0.25 * i for i in range(-6, 7))
_WALL = 1e30
_GAMMAS = tuple(0.125 * i for i in range(0, 17))


@dataclass(frozen=True)
class Readout:
    """A coordinate, and how it was found.

    Attributes
    ----------
    alpha : float or tuple of float
    loss : float, optional
        Of the model there, on what the read-out saw.
    trace : tuple of (alpha, loss)
        Every evaluation, in order: the cost of the read-out is their number.
    """

    alpha: float | tuple[float, ...]
    loss: float | None = None
    trace: tuple[tuple[float | tuple[float, ...], float], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Range:
    """Range of a physical parameter that experts and anchor cover: the metadata of a family."""

    name: str
    low: float
    high: float
    scale: ParameterMap = "linear"

    def __post_init__(self) -> None:
        if mapped(self.low, self.scale) == mapped(self.high, self.scale):
            raise ConfigError(f"{self.name}: both experts were trained at {self.low:g}; they span no direction")

    def coordinate(self, value: float) -> float:
        """See `shodh.merge.coordinates.coordinate`; warns outside the range, with the distance."""
        outside = extrapolation(value, self.low, self.high, self.scale)
        if outside:
            log.warning(
                "%s = %g lies outside %g to %g, %.3g of the range's length (%s) away: this extrapolates",
                self.name,
                value,
                self.low,
                self.high,
                outside,
                self.scale,
            )
        return coordinate(value, self.low, self.high, self.scale)


class _Recorder:
    """Evaluates each coordinate once, and remembers."""

    def __init__(self, evaluate: Evaluate) -> None:
        self.evaluate = evaluate
        self.losses: dict[float, float] = {}

    def __call__(self, alpha: float) -> float:
        alpha = float(alpha)
        if alpha not in self.losses:
            loss = float(self.evaluate(alpha))
            # A rollout that blew up is a bad coordinate, not an error.
            self.losses[alpha] = loss if math.isfinite(loss) else math.inf
        return self.losses[alpha]

    def best_alpha(self) -> float:
        alpha = min(self.losses, key=lambda a: self.losses[a])
        if math.isinf(self.losses[alpha]):
            raise DataError(f"the loss is not finite at any of the coordinates {sorted(self.losses)}")
        return alpha

    def best(self) -> Readout:
        alpha = self.best_alpha()
        return Readout(alpha, self.losses[alpha], tuple(self.losses.items()))


def _try(evaluate: Evaluate, bank: Sequence[float]) -> _Recorder:
    if not bank:
        raise ConfigError("the bank of coordinates is empty")
    recorder = _Recorder(evaluate)
    for alpha in bank:
        recorder(alpha)
    return recorder


def read_coord(value: float, family: Range, gamma: float = 1.0, limit: float = LIMIT) -> Readout:
    """``clip(gamma s(value))``: from metadata alone (gamma 1), or calibrated by `fit_scale`."""
    return Readout(clip(gamma * family.coordinate(value), limit))


def check_prefix(frames: int, history: int) -> None:
    """Refuse a prefix that leaves no step to compare: the model needs ``history`` frames before it predicts one."""
    if frames <= history:
        raise DataError(
            f"the prefix has {frames} frames, and the model reads {history} before it predicts one; "
            f"give at least {history + 1}"
        )


def read_prefix(evaluate: Evaluate, bank: Sequence[float] = BANK) -> Readout:
    """The coordinate of the bank with the least loss on the observed steps; each is evaluated once."""
    return _try(evaluate, bank).best()


def read_line_search(evaluate: Evaluate, bank: Sequence[float] = BANK, tolerance: float = 0.01) -> Readout:
    """Continuous prefix read-out: the best of the bank, then Brent's bounded search between its neighbours.

    Never worse than the bank, by construction; never outside it.
    """
    recorder = _try(evaluate, bank)
    nodes = sorted(recorder.losses)
    place = nodes.index(recorder.best_alpha())
    bounds = (nodes[max(0, place - 1)], nodes[min(len(nodes) - 1, place + 1)])
    # Finite, because the search fits parabolas.
    scipy.optimize.minimize_scalar(
        lambda alpha: min(recorder(alpha), _WALL), bounds=bounds, method="bounded", options={"xatol": tolerance}
    )
    return recorder.best()


def read_gradient(
    evaluate: Callable[[np.ndarray], tuple[float, np.ndarray]],
    start: float | Sequence[float] = 0.0,
    limit: float = LIMIT,
    max_evaluations: int = 12,
) -> Readout:
    """Descend the prefix loss from its value and gradient in alpha (L-BFGS-B in the box ``[-limit, limit]``).

    Parameters
    ----------
    evaluate : callable
        ``alpha [d] -> (loss, gradient [d])``; `shodh.merge.slider.Slider.loss_and_gradient` makes one. ``d`` is 1 for
        one coordinate, or the number of layers or experts that have their own.
    start : float or sequence of float
        Where to begin: 0, or what metadata says.
    """
    x0 = np.atleast_1d(np.asarray(start, dtype=np.float64))
    trace: list[tuple[tuple[float, ...], float]] = []

    def value(x: np.ndarray) -> tuple[float, np.ndarray]:
        loss, gradient = evaluate(x)
        trace.append((tuple(float(a) for a in x), float(loss)))
        if math.isfinite(loss):
            return float(loss), np.asarray(gradient, dtype=np.float64)
        return _wall(x, trace)

    bounds = [(-limit, limit)] * len(x0)
    # Beyond this many evaluations L-BFGS-B ends its line search and stops.
    options = {"maxfun": max_evaluations}
    scipy.optimize.minimize(
        value, np.clip(x0, -limit, limit), jac=True, method="L-BFGS-B", bounds=bounds, options=options
    )
    alpha, loss = min(trace, key=lambda entry: entry[1] if math.isfinite(entry[1]) else math.inf)
    if not math.isfinite(loss):
        raise DataError(f"the loss is not finite at any of the coordinates {[a for a, _ in trace]}")
    if np.ndim(start) == 0:
        return Readout(alpha[0], loss, tuple((a[0], value) for a, value in trace))
    return Readout(alpha, loss, tuple(trace))


def _wall(x: np.ndarray, trace: Sequence[tuple[tuple[float, ...], float]]) -> tuple[float, np.ndarray]:
    """Value and gradient of a parabola above all that was found, around the best of it: a search turns back there."""
    finite = [entry for entry in trace if math.isfinite(entry[1])]
    if not finite:
        return _WALL, np.zeros_like(x)
    best = min(finite, key=lambda entry: entry[1])
    worst = max(abs(loss) for _, loss in finite)
    away = x - np.asarray(best[0])
    return float(best[1] + (1.0 + worst) * (1.0 + away @ away)), 2.0 * (1.0 + worst) * away


# Chosen once, on validation


@dataclass(frozen=True)
class Calibration:
    """Factor and map of the coordinate with the least mean loss on validation.

    Attributes
    ----------
    gamma : float
    scale : {"linear", "log"}
    loss : float
        Mean over the validation members.
    losses : dict
        Best loss by map.
    """

    gamma: float
    scale: ParameterMap
    loss: float
    losses: dict[ParameterMap, float]


def fit_scale(
    members: Mapping[float, Evaluate], low: float, high: float, scale: ParameterMap = "linear", limit: float = LIMIT
) -> Readout:
    """The factor ``gamma`` in [0, 2] whose ``clip(gamma s)`` has the least mean loss over validation members.

    Parameters
    ----------
    members : mapping
        Parameter of a validation member -> the loss of a coordinate there.
    """
    if not members:
        raise ConfigError("no validation members to choose gamma on")
    places = {value: coordinate(value, low, high, scale) for value in members}
    recorders = {value: _Recorder(evaluate) for value, evaluate in members.items()}

    def mean(gamma: float) -> float:
        losses = [recorders[value](clip(gamma * place, limit)) for value, place in places.items()]
        return float(np.mean(losses))

    return read_line_search(mean, _GAMMAS)


def calibrate(
    members: Mapping[float, Evaluate],
    low: float,
    high: float,
    scales: Sequence[ParameterMap] = ("linear", "log"),
    limit: float = LIMIT,
) -> Calibration:
    """Choose the map of the parameter and its factor together; maps that a value does not lie on are left out."""
    possible = [s for s in scales if s != "log" or min(low, high, *members) > 0]
    found = {s: fit_scale(members, low, high, s, limit) for s in possible}
    if not found:
        raise ConfigError(f"none of the maps {list(scales)} fits the parameters {sorted([low, high, *members])}")
    losses = {s: float(r.loss or 0.0) for s, r in found.items()}
    best = min(possible, key=lambda s: losses[s])
    return Calibration(float(np.asarray(found[best].alpha)), best, losses[best], losses)
