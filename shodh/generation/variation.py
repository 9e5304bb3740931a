"""Parameters drawn for each trajectory from an interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shodh.core.errors import ConfigError
from shodh.core.seeding import generator
from shodh.schema.fields import Trajectories

# Intervals that span more than this factor are drawn from uniformly in the logarithm.
LOGARITHMIC_FROM = 10.0


@dataclass(frozen=True)
class Interval:
    """Interval of a parameter, ``low < high``."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ConfigError(f"interval {self.low}:{self.high}: expected two finite numbers, the smaller first")

    @property
    def logarithmic(self) -> bool:
        """Whether it spans more than a decade and excludes zero."""
        return self.low > 0 and self.high > LOGARITHMIC_FROM * self.low

    def draw(self, seed: int, key: str) -> float:
        """Value of the parameter ``key`` of the trajectory ``seed``: uniform, or log-uniform if `logarithmic`."""
        share = float(torch.rand(1, generator=generator(seed, "vary", key), dtype=torch.float64))
        if self.logarithmic:
            return self.low * (self.high / self.low) ** share
        return self.low + (self.high - self.low) * share


def join(parts: Sequence[Trajectories], varied: Mapping[str, Sequence[float]]) -> Trajectories:
    """Trajectories solved one by one with parameters of their own, as one batch.

    Parameters
    ----------
    parts : sequence of Trajectories
        Of the same regime, box and times.
    varied : mapping
        Values of the parameters that were varied, one for each part; stored as arrays ``[B]``.

    Raises
    ------
    ConfigError
        If a varied parameter changes the box or the times: such trajectories cannot share a file.
    """
    first = parts[0]
    for part in parts[1:]:
        if part.lengths != first.lengths or not np.array_equal(part.time, first.time):
            raise ConfigError(
                f"{first.schema.name}: {', '.join(varied)} changes the box or the times of the frames and cannot be "
                "varied within a data set; use one data set for each value"
            )

    def merged(values: Sequence[float | np.ndarray]) -> float | np.ndarray:
        if all(np.ndim(v) == 0 and v == values[0] for v in values):
            return values[0]
        return np.concatenate([np.broadcast_to(v, len(part)) for v, part in zip(values, parts)])

    own = {key: merged([part.parameters[key] for part in parts]) for key in first.parameters}
    return Trajectories(
        schema=first.schema,
        lengths=first.lengths,
        time=first.time,
        values={name: np.concatenate([part.values[name] for part in parts]) for name in first.values},
        parameters=own | {key: np.asarray(values, dtype=np.float64) for key, values in varied.items()},
        diagnostics={key: np.concatenate([part.diagnostics[key] for part in parts]) for key in first.diagnostics},
    )
