"""Paired comparison of two models over seeds, and what a number of seeds can show."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import stats

Verdict = Literal["lower", "higher", "equal", "open"]

LEVEL = 0.05
MARGIN = 0.02  # differences of the mean error below 2 % are called none
MIN_SEEDS = 3  # fewer are no comparison, whatever a test says of them


@dataclass(frozen=True)
class Comparison:
    """``ratio`` is the geometric mean of error / other error; ``low`` to ``high`` its 95 % interval by paired t.

    ``p_t``: paired t on log errors. ``p_sign``: exact two-sided sign-flip permutation test of their mean; with n seeds
    it cannot be below ``2 / 2^n``. ``wins`` counts the seeds in which the first error is the lower one. ``p_holm`` is
    ``p_t``, adjusted where it is one of a family (`holm`).
    """

    seeds: int
    ratio: float
    low: float
    high: float
    p_t: float
    p_sign: float
    wins: int
    p_holm: float

    @property
    def verdict(self) -> Verdict:
        """lower, higher, equal (within `MARGIN`, with 95 % confidence), or open; of fewer than `MIN_SEEDS`, open."""
        if self.seeds < MIN_SEEDS:
            return "open"
        if self.p_holm < LEVEL and abs(math.log(self.ratio)) > math.log(1 + MARGIN):
            return "lower" if self.ratio < 1 else "higher"
        if 1 / (1 + MARGIN) < self.low and self.high < 1 + MARGIN:
            return "equal"
        return "open"


def compare(errors: Sequence[float], others: Sequence[float]) -> Comparison:
    """Paired over seeds; errors are positive, in the same order."""
    logs = np.log(np.asarray(errors)) - np.log(np.asarray(others))
    n, mean = len(logs), float(logs.mean())
    if n < 2:
        return Comparison(n, math.exp(mean), 0.0, math.inf, 1.0, 1.0, int((logs < 0).sum()), 1.0)
    error = float(logs.std(ddof=1)) / math.sqrt(n)
    half = float(stats.t.ppf(1 - LEVEL / 2, n - 1)) * error
    p_t = float(2 * stats.t.sf(abs(mean) / error, n - 1)) if error > 0 else float(mean == 0)
    bounds = (math.exp(mean - half), math.exp(mean + half))
    return Comparison(n, math.exp(mean), *bounds, p_t, sign_flip(logs.tolist()), int((logs < 0).sum()), p_t)


def holm(family: Sequence[Comparison]) -> list[Comparison]:
    """The same comparisons with p values that hold for all of them at once (Holm 1979), in the same order.

    Those with fewer than `MIN_SEEDS` are no tests, and are not counted.
    """
    tested = sorted((i for i, c in enumerate(family) if c.seeds >= MIN_SEEDS), key=lambda i: family[i].p_t)
    adjusted, least = list(family), 0.0
    for rank, i in enumerate(tested):
        least = max(least, min(1.0, (len(tested) - rank) * family[i].p_t))
        adjusted[i] = replace(family[i], p_holm=least)
    return adjusted


def sign_flip(differences: Sequence[float]) -> float:
    """Exact two-sided p of the mean under random signs: the share of all sign patterns with a mean as far from zero."""
    values = np.asarray(differences)
    observed = abs(values.sum())
    patterns = np.array(list(itertools.product((-1.0, 1.0), repeat=len(values))))
    return float((np.abs(patterns @ values) >= observed * (1 - 1e-12)).mean())


def brief(c: Comparison) -> str:
    """``2.1 % below``."""
    return f"{abs(c.ratio - 1):.1%} {'below' if c.ratio < 1 else 'above'}".replace("%", " %")


def describe(label: str, c: Comparison, other: str) -> str:
    """One clause with the difference, its interval and both p values."""
    first = f"The error of {label} is {brief(c)} that of {other}"
    if c.seeds < 2:
        return f"{first} (one seed)"
    interval = f"95 % interval of the ratio {c.low:.3f} to {c.high:.3f}"
    tests = f"p {c.p_t:.2g} by paired t, {c.p_sign:.2g} by sign flips"
    return f"{first} ({interval}; {tests}; lower in {c.wins} of {c.seeds} seeds)"


def what_seeds_can_show(n: int) -> str:
    """A few sentences about a number of seeds."""
    if n < MIN_SEEDS:
        return f"Fewer than {MIN_SEEDS} seeds ({n} here) are no comparison: nothing is called a difference."
    needed = float(stats.t.ppf(1 - LEVEL / 2, n - 1)) / math.sqrt(n)
    return (
        f"With {n} seeds the exact sign-flip test cannot give a p below {2 / 2**n:.3g}, and the paired t test, which "
        f"assumes normal differences, finds one only if its mean is above {needed:.2f} times its spread over seeds. "
        f"So {n} seeds can show differences that are large beside the spread, and cannot show that there is none. "
        "Seeds change initial weights and the order of batches; data, split and tokenizer are the same in all, so "
        "nothing is said of other data."
    )
