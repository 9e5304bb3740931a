"""Sample records of a trace, kept in bounded memory: which expert each token of the same samples chose, over time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

MAX_BYTES = 256 << 20


class Sample(NamedTuple):
    """One validation sample: its regime and trajectory (-1: unknown), and by layer choices and counts.

    ``top1 {layer: [*grid]}``, ``counts {layer: [E]}``.
    """

    regime: str
    trajectory: int
    top1: dict[int, np.ndarray]
    counts: dict[int, np.ndarray]


Look = dict[str, Sample]  # by the name of the sample: all samples of one validation


@dataclass
class SampleStore:
    """Looks at the samples by split and step; when they take too much memory, every second look is forgotten.

    The first and the newest look are always kept.
    """

    max_bytes: int = MAX_BYTES
    thinned: bool = False
    _looks: dict[tuple[str, int], Look] = field(default_factory=dict)
    _forgotten: set[tuple[str, int]] = field(default_factory=set)
    _bytes: int = 0

    def add(
        self, split: str, step: int, layer: int, name: str, regime: str, trajectory: int,
        top1: np.ndarray, counts: np.ndarray,
    ) -> None:  # fmt: skip
        """Keep one record; a sample that a validation met twice counts once."""
        if (split, step) in self._forgotten:
            return
        look = self._looks.setdefault((split, step), {})
        sample = look.setdefault(name, Sample(regime, trajectory, {}, {}))
        if layer in sample.top1:
            return
        sample.top1[layer], sample.counts[layer] = top1, counts
        self._bytes += top1.nbytes + counts.nbytes
        if self._bytes > self.max_bytes:
            self._thin(split)

    def steps(self, split: str) -> list[int]:
        return sorted(step for s, step in self._looks if s == split)

    def look(self, split: str, step: int) -> Look:
        return self._looks[split, step]

    def newest(self, split: str) -> Look:
        """Samples of the last validation; empty if there are none."""
        steps = self.steps(split)
        return self.look(split, steps[-1]) if steps else {}

    def forget_before(self, split: str, step: int) -> None:
        """Forget all earlier looks (where they are of other samples, and cannot be compared)."""
        for old in self.steps(split):
            if old < step:
                self._forget((split, old))

    def _thin(self, split: str) -> None:
        steps = self.steps(split)
        if len(steps) > 2:
            self.thinned = True
        for step in steps[1:-1:2]:
            self._forget((split, step))

    def _forget(self, key: tuple[str, int]) -> None:
        for sample in self._looks.pop(key).values():
            self._bytes -= sum(a.nbytes for part in (sample.top1, sample.counts) for a in part.values())
        self._forgotten.add(key)


def layers_of(look: Look) -> list[int]:
    """Layers that every sample of a look has."""
    common = set.intersection(*(set(s.top1) for s in look.values())) if look else set()
    return sorted(common)
