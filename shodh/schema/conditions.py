"""Numbers that a model is told beside the fields of a sample: the time step, and physical parameters.

A value is *physical*, as the files have it, or in *model* units: standardised over the training data, of its logarithm
where the values span decades. NaN stands for a value that is not known, or of nothing in this regime.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from shodh.core.errors import DataError

#: The condition that no file names: time from one frame that a model sees to the next.
TIME_STEP = "time_step"
_DECADE = 10.0  # Values that span more are told by their logarithm.

Values = float | Sequence[float] | np.ndarray | Tensor | None  # of a condition: of all samples, or one each


@dataclass(frozen=True)
class Condition:
    """One such number.

    Parameters
    ----------
    log : bool
        Models are given the logarithm.
    mean, scale : float
        Of the values, or their logarithms, over the training data.
    ranges : tuple of (regime, lowest, highest)
        Of the training data, in physical units; other regimes do not have it.

    Raises
    ------
    DataError
        A number is not finite, or the scale not positive.
    """

    name: str
    log: bool
    mean: float
    scale: float
    ranges: tuple[tuple[str, float, float], ...] = ()

    def __post_init__(self) -> None:
        numbers = [self.mean, self.scale, *(v for _, *ends in self.ranges for v in ends)]
        if not all(map(math.isfinite, numbers)) or self.scale <= 0:
            raise DataError(f"condition {self.name!r}: constants must be finite and the scale positive, got {numbers}")

    @classmethod
    def fit(cls, name: str, values: Mapping[str, np.ndarray]) -> Self:
        """From the values of the training data by regime; the scale of equal ones is one."""
        every = np.concatenate([np.ravel(v) for v in values.values()]).astype(np.float64)
        log = bool(every.min() > 0 and every.max() > _DECADE * every.min())
        told = np.log(every) if log else every
        spread = float(told.std())
        scale = spread if spread > 1e-9 * float(np.abs(told).max()) else 1.0
        return cls(name, log, float(told.mean()), scale).over(values)

    def over(self, values: Mapping[str, np.ndarray]) -> Self:
        """The same units, with the ranges of other training data."""
        return replace(self, ranges=tuple((name, float(np.min(v)), float(np.max(v))) for name, v in values.items()))

    def to_model(self, values: np.ndarray, source: str) -> np.ndarray:
        """Physical -> model units, float32; NaN stays. DataError that names ``source`` for what cannot be."""
        values = np.asarray(values, dtype=np.float64)
        positive = self.log or self.name == TIME_STEP
        if (wrong := np.isinf(values) | (positive & (values <= 0))).any():
            bound = "finite and positive" + ", as models are told its logarithm" * self.log if positive else "finite"
            raise DataError(f"{source}: {self.name} must be {bound}, got {values[wrong][0]:g}")
        return (((np.log(values) if self.log else values) - self.mean) / self.scale).astype(np.float32)

    def within(self, regimes: Collection[str]) -> Self:
        """The same with the ranges of some regimes alone."""
        return replace(self, ranges=tuple(r for r in self.ranges if r[0] in regimes))

    def range_of(self, regime: str) -> tuple[float, float] | None:
        """Lowest and highest value in the training data of a regime; None where it has none."""
        return next(((low, high) for name, low, high in self.ranges if name == regime), None)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ranges": {regime: [low, high] for regime, low, high in self.ranges}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        ranges = tuple((str(regime), float(low), float(high)) for regime, (low, high) in values["ranges"].items())
        return cls(str(values["name"]), bool(values["log"]), float(values["mean"]), float(values["scale"]), ranges)


def condition_values(
    conditions: Sequence[Condition], regime: str, given: Mapping[str, Values] | None, samples: int
) -> Tensor:
    """What a model is told of samples of one regime, ``[samples, N]`` float32 in model units.

    Parameters
    ----------
    given : mapping, optional
        Physical values by name, a number or one a sample; None: not known, which a model has learned where some of its
        training data did not have it. What is left out has the value of the
        regime's training data, if that was one, and is absent where the regime has none.

    Raises
    ------
    DataError
        A name is not known, a value is no number or of another count, or one that varies is left out.
    """
    if not isinstance(given, Mapping | None):
        raise DataError(f"conditions must map names to values, as {{'viscosity': 1e-3}}, got {given!r:.60}")
    given = dict(given or {})
    if strangers := sorted(set(given) - {c.name for c in conditions}):
        takes = f"takes {', '.join(c.name for c in conditions)}" if conditions else "takes none"
        raise DataError(f"unknown conditions {', '.join(map(repr, strangers))}; this model {takes}")
    columns = []
    for condition in conditions:
        there = condition.range_of(regime)
        if condition.name in given:
            value = _numbers(condition.name, given[condition.name], samples)
        elif there is None or there[0] == there[1]:
            value = np.full(samples, math.nan if there is None else there[0])
        else:
            raise DataError(
                f"conditions lack {condition.name}, which was {there[0]:g} to {there[1]:g} in the training data of "
                f"{regime!r}; give conditions={{{condition.name!r}: ...}}, or None where it is not known"
            )
        columns.append(torch.from_numpy(condition.to_model(value, "conditions")))
    return torch.stack(columns, 1) if columns else torch.empty(samples, 0)


def _numbers(name: str, given: Values, samples: int) -> np.ndarray:
    """A value of each sample, float64, NaN for None."""
    if given is None:
        return np.full(samples, math.nan)
    try:
        values = np.asarray(given.detach().cpu() if isinstance(given, Tensor) else given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"conditions: {name} must be a number, or one a sample, got {given!r:.60}") from error
    if values.ndim == 0:
        values = np.full(samples, float(values))
    if values.shape != (samples,):
        raise DataError(f"conditions: {name} must be a number, or [{samples}], one a sample; got {list(values.shape)}")
    if np.isnan(values).any():
        raise DataError(f"conditions: {name} is NaN; give None where it is not known")
    return values
