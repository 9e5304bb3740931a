"""Which windows of held-out trajectories are measured, and their batches on this rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from shodh.config import RunConfig
from shodh.core.distributed import rank, world_size
from shodh.evaluate.rows import Place

T = TypeVar("T")


def spread(count: int, limit: int) -> list[int]:
    """At most ``limit`` of ``count`` rows, evenly spread from the first to the last."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, limit)).round()})


def starts_of(frames: int, length: int, stride: int, count: int) -> list[int]:
    """First frames of at most ``count`` windows (0: of all), spread evenly from the first to the last that fits."""
    fitting = max(0, frames - (length - 1) * stride)
    return spread(fitting, count or fitting) if fitting else []


@dataclass(frozen=True)
class Schedule:
    """Windows of one regime: rollouts of ``steps``, and of trajectories too short for them single steps."""

    steps: int
    places: dict[int, list[Place]]

    @classmethod
    def of(cls, config: RunConfig, frames: Sequence[int]) -> Schedule:
        """For trajectories of so many frames; ``evaluation.rollout`` bounded by what the longest one allows."""
        data, wanted = config.data, config.evaluation
        longest = (max(frames, default=0) - 1) // data.stride + 1 - data.history
        steps = max(1, min(wanted.rollout, longest))
        places: dict[int, list[Place]] = {}
        for trajectory, count in enumerate(frames):
            for horizon in dict.fromkeys((steps, 1)):
                if starts := starts_of(count, data.history + horizon, data.stride, wanted.starts):
                    places.setdefault(horizon, []).extend(Place(trajectory, start) for start in starts)
                    break
        return cls(steps, places)

    @property
    def count(self) -> int:
        """Number of windows."""
        return sum(map(len, self.places.values()))

    def batches(self, size: int) -> list[tuple[int, Sequence[Place]]]:
        """Steps and windows of each batch of this rank; rank 0 has the first window."""
        own = [(horizon, places[rank() :: world_size()]) for horizon, places in self.places.items()]
        return [(horizon, part) for horizon, places in own for part in chunks(places, size)]


def chunks(rows: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """``rows`` in parts of at most ``size``."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
