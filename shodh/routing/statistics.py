"""Statistics of routing as pure functions of counts; information in nats unless it is a ratio."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy

DEAD = 0.01  # an expert with less than this part of the even share is dead


class Load(NamedTuple):
    """How even the load of experts is; every field has the leading axes of the counts.

    Attributes
    ----------
    max_violation : ndarray
        ``max n / mean n - 1``: 0 when even, ``E - 1`` when one expert takes all.
    cv : ndarray
        Standard deviation over mean.
    gini : ndarray
        0 when even, ``1 - 1/E`` when one expert takes all.
    entropy : ndarray
        Over ``log E``: 1 when even; 1 for a single expert.
    effective : ndarray
        ``exp(H)``: number of evenly used experts with the same entropy.
    dead : ndarray
        Experts with less than ``DEAD / E`` of the assignments.
    """

    max_violation: np.ndarray
    cv: np.ndarray
    gini: np.ndarray
    entropy: np.ndarray
    effective: np.ndarray
    dead: np.ndarray


def load(counts: np.ndarray) -> Load:
    """Load statistics of counts ``[..., E]``; NaN where there are no counts."""
    share = shares(counts)
    experts = share.shape[-1]
    ranked = np.sort(share, -1)
    rank = np.arange(1, experts + 1)
    nats = entropy(share)
    return Load(
        max_violation=share.max(-1) * experts - 1,
        cv=share.std(-1) * experts,
        gini=(ranked * (2 * rank - experts - 1)).sum(-1) / experts,
        entropy=nats / np.log(experts) if experts > 1 else nats + 1.0,
        effective=np.exp(nats),
        dead=np.where(np.isnan(nats), np.nan, (share < DEAD / experts).sum(-1)),
    )


def shares(counts: np.ndarray) -> np.ndarray:
    """Counts over their sum along the last axis; NaN where the sum is 0."""
    counts = np.asarray(counts, dtype=np.float64)
    total = counts.sum(-1, keepdims=True)
    return np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0)


def entropy(share: np.ndarray) -> np.ndarray:
    """Shannon entropy along the last axis, nats."""
    return -scipy.special.xlogy(share, share).sum(-1)


class Information(NamedTuple):
    """What the expert tells about the regime, with the leading axes of the tables.

    Attributes
    ----------
    u : ndarray
        ``I(regime; expert) / H(regime)``: 1 when the expert names the regime, whatever the number of experts.
    nmi : ndarray
        ``I / sqrt(H(regime) H(expert))``: below 1 when several experts share one regime.
    """

    u: np.ndarray
    nmi: np.ndarray


def information(table: np.ndarray, bias: np.ndarray | float = 0.0) -> Information:
    """U and NMI of regime x expert counts ``[..., R, E]``; NaN where fewer than two regimes have counts.

    Parameters
    ----------
    bias : ndarray or float
        Information, in nats, that a table of this size shows by chance. What is left, ``I - bias``, is stretched by
        ``H / (H - bias)`` with the regime's entropy H, so that chance gives 0 and a perfect split keeps its value.
    """
    nats, regime, expert = _entropies(table)
    with np.errstate(invalid="ignore", divide="ignore"):
        room = np.where(regime - bias > 1e-9, regime - bias, np.nan)
        u = np.where(expert > 1e-12, (nats - bias) / room, 0.0)
        nmi = np.where(expert > 1e-12, u * np.sqrt(regime / expert), 0.0)
    known = regime > 1e-12
    return Information(np.where(known, u, np.nan), np.where(known, nmi, np.nan))


def mutual_information(table: np.ndarray) -> np.ndarray:
    """``I(regime; expert)`` of counts ``[..., R, E]``, nats, by the frequencies as they are (biased upwards)."""
    return _entropies(table)[0]


def miller_madow(table: np.ndarray) -> np.ndarray:
    """Information that independent tokens show by chance, ``(R - 1)(E - 1) / 2N`` over occupied rows and columns."""
    table = np.asarray(table, dtype=np.float64)
    rows = (table.sum(-1) > 0).sum(-1)
    columns = (table.sum(-2) > 0).sum(-1)
    total = table.sum((-1, -2))
    bias = np.maximum(rows - 1, 0) * np.maximum(columns - 1, 0) / (2 * np.maximum(total, 1))
    return np.minimum(bias, 0.5 * np.log(np.maximum(rows, 2)))


def purity(table: np.ndarray) -> np.ndarray:
    """Share of assignments that belong to the main regime of their expert, of counts ``[..., R, E]``."""
    table = np.asarray(table, dtype=np.float64)
    total = table.sum((-1, -2))
    return np.divide(table.max(-2).sum(-1), total, out=np.full_like(total, np.nan), where=total > 0)


def bifurcation_step(steps: np.ndarray, u: np.ndarray, threshold: float = 0.9) -> int | None:
    """First step from which U stays above the threshold to the end; None if it does not. NaN is passed over."""
    known = ~np.isnan(u)
    steps, above = np.asarray(steps)[known], u[known] > threshold
    if not above.size or not above[-1]:
        return None
    below = np.flatnonzero(~above)
    return int(steps[below[-1] + 1 if below.size else 0])


def joint_counts(first: np.ndarray, second: np.ndarray, num_first: int, num_second: int) -> np.ndarray:
    """Tokens by their experts in two layers or two runs, ``[E, E']``, from choices of equal shape."""
    cell = first.ravel().astype(np.int64) * num_second + second.ravel()
    return np.bincount(cell, minlength=num_first * num_second).reshape(num_first, num_second)


def co_activation(pairs: np.ndarray) -> np.ndarray:
    """``N(i, j) / N(i)``: part of the tokens of expert i that also go to j; NaN for unused experts."""
    pairs = np.asarray(pairs, dtype=np.float64)
    own = np.diag(pairs)[:, None]
    return np.divide(pairs, own, out=np.full_like(pairs, np.nan), where=own > 0)


def changed(before: np.ndarray, after: np.ndarray) -> float:
    """Share of tokens whose first choice differs between two looks at the same samples (the switch rate)."""
    return float(np.mean(before != after))


class Coherence(NamedTuple):
    """How much neighbours share an expert: ``equal``, by chance ``null``, and the difference over its deviation."""

    equal: float
    null: float
    z: float


def equal_neighbours(grids: np.ndarray) -> float:
    """Share of neighbouring tokens (along an axis of ``[N, *grid]``, not across the ends) with equal experts; NaN for
    a grid of one token."""
    same, pairs = 0, 0
    for axis in range(1, grids.ndim):
        left = np.take(grids, range(grids.shape[axis] - 1), axis)
        right = np.take(grids, range(1, grids.shape[axis]), axis)
        same += int((left == right).sum())
        pairs += left.size
    return same / pairs if pairs else float("nan")


def spatial_coherence(grids: np.ndarray, rng: np.random.Generator, permutations: int = 100) -> Coherence:
    """Equal neighbours of ``[N, *grid]`` against the same choices at permuted places of the same sample.

    The null keeps what every sample chose and how often, so that a sample that sends all tokens to one expert counts
    as chance; ``z`` is 0 then, and NaN for a grid of one token.
    """
    equal = equal_neighbours(grids)
    flat = grids.reshape(len(grids), -1)
    nulls = np.array([equal_neighbours(rng.permuted(flat, axis=1).reshape(grids.shape)) for _ in range(permutations)])
    spread = float(nulls.std(ddof=1))
    null = float(nulls.mean())
    z = (equal - null) / spread if spread > 0 else (float("nan") if np.isnan(equal) else 0.0)
    return Coherence(equal, null, z)


def _entropies(table: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Information, entropy of the regime and of the expert, nats, of counts ``[..., R, E]``."""
    table = np.asarray(table, dtype=np.float64)
    joint = shares(table.reshape(*table.shape[:-2], -1)).reshape(table.shape)
    regime, expert = entropy(joint.sum(-1)), entropy(joint.sum(-2))
    both = entropy(joint.reshape(*table.shape[:-2], -1))
    return np.maximum(regime + expert - both, 0.0), regime, expert
