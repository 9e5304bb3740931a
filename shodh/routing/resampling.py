"""What few samples do to the statistics: bias and intervals, both by the bootstrap.

Tokens of one sample are not independent, nor are frames of one trajectory; what is drawn anew is therefore a *unit*: a
trajectory where a trace names enough of them, else a sample, else a stretch of steps.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from shodh.routing.statistics import information, miller_madow, shares

DRAWS = 400
LEVEL = 0.95


class Interval(NamedTuple):
    """An estimate and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


class Units(NamedTuple):
    """Counts of independent units, ``[N, R, E]``, and what a unit is."""

    counts: np.ndarray
    kind: str

    @property
    def table(self) -> np.ndarray:
        return self.counts.sum(0)

    @property
    def single_regime(self) -> bool:
        """Whether every unit is of one regime, so that labels can be permuted."""
        return bool(((self.counts.sum(-1) > 0).sum(-1) <= 1).all())


class Estimate(NamedTuple):
    """U and NMI without the bias of few samples, with intervals, and how the bias was found."""

    u: Interval
    nmi: Interval
    method: str


def bootstrap_tables(units: Units, rng: np.random.Generator, draws: int = DRAWS) -> np.ndarray:
    """Tables ``[draws, R, E]`` of units drawn with replacement; units of one regime are drawn within the regime."""
    counts = units.counts.astype(np.float64)
    flat = counts.reshape(len(counts), -1)
    if not units.single_regime:
        even = np.full(len(counts), 1 / len(counts))
        return (rng.multinomial(len(counts), even, draws) @ flat).reshape(draws, *counts.shape[1:])
    label = counts.sum(-1).argmax(-1)
    weights = np.zeros((draws, len(counts)))
    for regime in np.unique(label):
        members = np.flatnonzero(label == regime)
        weights[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), draws)
    return (weights @ flat).reshape(draws, *counts.shape[1:])


def share_intervals(units: Units, rng: np.random.Generator, draws: int = DRAWS) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the 95 % intervals of the regime x expert shares, ``[R, E]`` each (percentile bootstrap)."""
    drawn = shares(bootstrap_tables(units, rng, draws))
    with np.errstate(all="ignore"):
        low, high = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return low, high


def estimate_information(units: Units, rng: np.random.Generator, draws: int = DRAWS) -> Estimate:
    """U and NMI, corrected for the bias of few samples, with basic bootstrap intervals.

    Resampling adds to a table the same upward bias that sampling has added before. Units of one regime, drawn within
    their regimes, give the estimate ``2 x - mean`` therefore, and the ends ``2 x - quantile``. Permuted labels would
    not do: they mix what regimes truly differ in into the bias. Mixed units (steps of a trace without samples) say
    nothing of the bias; there it is the Miller-Madow term, which takes tokens for independent.
    """
    table = units.table
    raw, drawn = information(table), information(bootstrap_tables(units, rng, draws))
    if units.single_regime and len(units.counts) > 1:
        return Estimate(_basic(float(raw.u), drawn.u), _basic(float(raw.nmi), drawn.nmi), f"bootstrap of {units.kind}")
    corrected = information(table, float(miller_madow(table)))
    u = _basic(float(raw.u), drawn.u, float(corrected.u))
    nmi = _basic(float(raw.nmi), drawn.nmi, float(corrected.nmi))
    return Estimate(u, nmi, "Miller-Madow, tokens taken for independent")


def _basic(raw: float, drawn: np.ndarray, corrected: float | None = None) -> Interval:
    """The interval around a raw value; the estimate is ``corrected``, or what the draws correct it to."""
    drawn = drawn[~np.isnan(drawn)]
    if np.isnan(raw) or not drawn.size:
        return Interval(raw if corrected is None else corrected, float("nan"), float("nan"))
    high, low = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    value = 2 * raw - drawn.mean() if corrected is None else corrected
    ends = np.clip([2 * raw - low, 2 * raw - high], 0.0, 1.0)
    return Interval(float(min(value, 1.0)), float(ends[0]), float(ends[1]))
