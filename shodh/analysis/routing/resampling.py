"""What chance and few samples do to the statistics: intervals by the bootstrap, bias by permuted labels.

Tokens of one sample are not independent, nor are frames of one trajectory; what is drawn anew is therefore a *unit*: a
trajectory where a trace names enough of them, else a sample, else a stretch of steps.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from shodh.analysis.routing.statistics import information, miller_madow, mutual_information, shares

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
    """U and NMI without what chance gives, with intervals, and how chance was found."""

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


def chance_information(units: Units, rng: np.random.Generator, draws: int = DRAWS) -> float:
    """Information, nats, that these units show when their regime labels are permuted."""
    assert units.single_regime
    counts = units.counts.sum(1).astype(np.float64)
    label = units.counts.sum(-1).argmax(-1)
    regimes = units.counts.shape[1]
    drawn = np.empty(draws)
    for draw in range(draws):
        member = rng.permutation(label)[None] == np.arange(regimes)[:, None]
        drawn[draw] = mutual_information(member.astype(np.float64) @ counts)
    return float(drawn.mean())


def estimate_information(units: Units, rng: np.random.Generator, draws: int = DRAWS) -> Estimate:
    """U and NMI, corrected for chance, with basic bootstrap intervals.

    Units of one regime: chance is what permuted labels give. Mixed units (steps of a trace without samples): the
    Miller-Madow term, which takes tokens for independent. The interval is the basic one, ``2 x - quantile``, because
    resampling adds to a table the same upward bias that sampling has added before.
    """
    table = units.table
    if units.single_regime and len(units.counts) > 1:
        bias, method = chance_information(units, rng, draws), f"permuted labels of {units.kind}"
    else:
        bias, method = float(miller_madow(table)), "Miller-Madow, tokens taken for independent"
    raw, corrected = information(table), information(table, bias)
    drawn = information(bootstrap_tables(units, rng, draws))
    u = _basic(float(raw.u), float(corrected.u), drawn.u)
    return Estimate(u, _basic(float(raw.nmi), float(corrected.nmi), drawn.nmi), method)


def _basic(raw: float, corrected: float, drawn: np.ndarray) -> Interval:
    drawn = drawn[~np.isnan(drawn)]
    if np.isnan(raw) or not drawn.size:
        return Interval(corrected, float("nan"), float("nan"))
    high, low = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    ends = np.clip([2 * raw - low, 2 * raw - high], 0.0, 1.0)
    return Interval(corrected, float(ends[0]), float(ends[1]))
