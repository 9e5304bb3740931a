"""What part of a trace answers which question: the split, and the independent units of the end of the run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from shodh.core.errors import DataError
from shodh.core.seeding import stable_seed
from shodh.routing.reading import TRAIN, Trace
from shodh.routing.resampling import Estimate, Units, estimate_information
from shodh.routing.samples import Look
from shodh.routing.statistics import information, miller_madow
from shodh.routing.tables import Series

VALID = "valid"
MIN_TRAJECTORIES = 8  # of a regime: with fewer, samples are drawn instead of trajectories
END = 0.1  # part of the run that counts as its end, where there are no sample records
MIN_UNITS = 8


@dataclass
class View:
    """One split of a trace, as it is analysed.

    Attributes
    ----------
    split : str
        Where loads, shares and information at the end of the run are from.
    course : str
        The split that shows the course of training: the one with the finest steps.
    """

    trace: Trace
    split: str
    course: str
    look: Look
    layers: list[int]
    look_step: int = -1  # of the validation that `look` is of
    _estimates: dict[int, Estimate | None] = field(default_factory=dict)

    @property
    def regimes(self) -> list[str]:
        return self.trace.tables.regimes

    @property
    def labelled(self) -> bool:
        """Whether there are two regimes, so that information about them means something."""
        return self.trace.labelled and len(self.regimes) > 1

    def rng(self, *key: str | int) -> np.random.Generator:
        return np.random.default_rng(stable_seed("routing analysis", *key))

    def series(self, layer: int) -> Series:
        """Counts over the course of training."""
        return self.trace.tables.series(self.course, layer)

    def u_over_time(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Steps, and U there without the Miller-Madow term."""
        series = self.series(layer)
        return series.steps, information(series.counts, miller_madow(series.counts)).u

    def units(self, layer: int) -> Units:
        """Counts at the end of the run by trajectory, sample or stretch of steps."""
        if self.look:
            return _sample_units(self.look, self.regimes, layer)
        series = self.trace.tables.series(self.split, layer)
        number = min(len(series.steps), max(MIN_UNITS, round(END * len(series.steps))))
        width = self.trace.tables.width
        return Units(series.counts[-number:], "steps" if width == 1 else f"stretches of {width} steps")

    def estimate(self, layer: int) -> Estimate | None:
        """U and NMI at the end of the run; None without regimes."""
        if layer not in self._estimates:
            units = self.units(layer) if self.labelled else None
            self._estimates[layer] = None if units is None else estimate_information(units, self.rng("U", layer))
        return self._estimates[layer]

    @property
    def source(self) -> str:
        """Where the numbers at the end of the run are from, in words."""
        if self.look:
            return f"{len(self.look)} samples of the {self.split} split at step {self.look_step}"
        units = self.units(self.layers[0])
        return f"the last {len(units.counts)} {units.kind} of the {self.split} split"


def make_view(trace: Trace, split: str | None = None) -> View:
    """Choose what to analyse: held-out samples where they are traced, else the training batches.

    Raises
    ------
    DataError
        The trace has no such split.
    """
    tables = trace.tables
    if split is not None and split not in tables.splits:
        raise DataError(f"the trace has no split {split!r}; it has {', '.join(tables.splits)}")
    if split is None:
        held_out = VALID in tables.splits and (trace.samples.newest(VALID) or TRAIN not in tables.splits)
        split = VALID if held_out else TRAIN if TRAIN in tables.splits else tables.splits[0]
    layers = tables.layers(split)
    candidates = [s for s in (split, TRAIN) if set(layers) <= set(tables.layers(s))]
    course = max(candidates, key=lambda s: len(tables.series(s, layers[0]).steps))
    step, look = _newest_whole(trace, split, layers) if trace.labelled else (-1, {})
    return View(trace, split, course, look, layers, step)


def _newest_whole(trace: Trace, split: str, layers: list[int]) -> tuple[int, Look]:
    """The last validation with samples of every regime, without samples that lack a layer: traces may be cut off."""
    looks = {step: trace.samples.look(split, step) for step in trace.samples.steps(split)}
    regimes = {sample.regime for look in looks.values() for sample in look.values()}
    for step, look in reversed(looks.items()):
        whole = {name: sample for name, sample in look.items() if sorted(sample.top1) == layers}
        if {sample.regime for sample in whole.values()} != regimes:
            trace.notes.append(f"The validation at step {step} was cut off; an earlier one is analysed.")
            continue
        if len(whole) < len(look):
            trace.notes.append(
                f"At step {step}, {len(look) - len(whole)} of {len(look)} samples lack a layer: left out."
            )
        return step, whole
    return -1, {}


def _sample_units(look: Look, regimes: list[str], layer: int) -> Units:
    experts = max(len(s.counts[layer]) for s in look.values())
    members = Counter((s.regime, s.trajectory) for s in look.values())
    per_regime = Counter(regime for regime, _ in members)
    grouped = min(per_regime.values()) >= MIN_TRAJECTORIES and all(t >= 0 for _, t in members)
    number = {key: i for i, key in enumerate(members)}
    counts = np.zeros((len(number) if grouped else len(look), len(regimes), experts), dtype=np.int64)
    for row, sample in enumerate(look.values()):
        unit = number[sample.regime, sample.trajectory] if grouped else row
        counts[unit, regimes.index(sample.regime)] += sample.counts[layer]
    return Units(counts, "trajectories" if grouped else "samples")
