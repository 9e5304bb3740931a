"""What a page may claim of errors over seeds: paired tests, intervals, and Holm's adjustment over all its claims.

*Diverged seeds.* An error that is missing or not finite has diverged, and counts as infinite: it is the higher one of
its pair, no mean over seeds exists with it, and ratio, interval and p are of the pairs without. A model with a diverged
seed is never called lower or equal, and one is never called higher than a model with a diverged seed. So leaving such
seeds out can favour nobody.

*Claims.* Whatever a page calls lower, higher or equal is a claim, and the claims of a page are one family: `holm`
adjusts their p for the number of all of them. Other comparisons are shown as estimates with intervals, without such
words.

`shodh.routing.resampling` answers another question, how far few samples bias the information in one routing table, and
has a bootstrap of its own.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import scipy

from shodh.core.seeding import stable_seed

Verdict = Literal["lower", "higher", "equal", "open"]
#: Diverged where None or not finite.
Errors = Sequence[float | None]

LEVEL = 0.05
MARGIN = 0.02  # differences of the mean error below 2 % are called none
MIN_SEEDS = 3  # fewer are no comparison, whatever a test says of them
DRAWS = 4000  # of the bootstrap


@dataclass(frozen=True)
class Comparison:
    """Errors of one model against those of another, paired over seeds.

    Attributes
    ----------
    seeds, wins : int
        Pairs, and those in which the first error is the lower one.
    diverged, others_diverged : int
        Seeds of each side that diverged.
    ratio, low, high : float
        Geometric mean of error / other error, and its 95 % interval by paired t; NaN where every pair has diverged.
    p_differs : float
        Of no difference: paired t on logarithms.
    p_equal : float
        Of a difference of `MARGIN` or more: both one-sided t tests; below `LEVEL` where the 95 % interval lies within
        the margin.
    p_holm : float
        `p`, adjusted where it is one of several claims (`holm`).
    logs : tuple of float
        Logarithms of the ratios of the pairs without a diverged seed.
    """

    seeds: int
    wins: int
    diverged: int
    others_diverged: int
    ratio: float
    low: float
    high: float
    p_differs: float
    p_equal: float
    p_holm: float
    logs: tuple[float, ...] = ()

    @property
    def p_sign(self) -> float:
        """Of no difference: exact sign flips of the mean logarithm; with n seeds not below ``2 / 2^n``."""
        return sign_flip(self.logs) if len(self.logs) > 1 else 1.0

    @property
    def ends(self) -> tuple[float | None, float | None]:
        """Of the t interval over seeds; one seed has none."""
        return (self.low, self.high) if len(self.logs) > 1 else (None, None)

    @property
    def p(self) -> float:
        """Of the one thing that can be claimed: a difference where the ratio is outside the margin, equality inside."""
        return self.p_differs if self.is_outside else self.p_equal

    @property
    def is_outside(self) -> bool:
        """Whether the ratio differs from 1 by more than `MARGIN`."""
        return abs(math.log(self.ratio)) > math.log(1 + MARGIN)

    @property
    def is_tested(self) -> bool:
        """Whether there are enough pairs for a claim."""
        return self.seeds - max(self.diverged, self.others_diverged) >= MIN_SEEDS and math.isfinite(self.ratio)

    @property
    def verdict(self) -> Verdict:
        """lower, higher, or equal, as far as p after Holm and diverged seeds allow; else open."""
        if not self.is_tested or self.p_holm >= LEVEL:
            return "open"
        if not self.is_outside:
            return "open" if self.diverged or self.others_diverged else "equal"
        if self.ratio < 1:
            return "open" if self.diverged else "lower"
        return "open" if self.others_diverged else "higher"


def compare(errors: Errors, others: Errors) -> Comparison:
    """Pairs in the same order of seeds; errors are not negative, or diverged."""
    ours, theirs = (np.array([math.inf if e is None else e for e in side], float) for side in (errors, others))
    tiny = np.finfo(float).tiny  # an error of zero has no logarithm
    ours, theirs = (np.where(np.isfinite(side), np.maximum(side, tiny), math.inf) for side in (ours, theirs))
    finite = np.isfinite(ours) & np.isfinite(theirs)
    logs = np.log(ours[finite]) - np.log(theirs[finite])
    counts = (len(ours), int((ours < theirs).sum()), int(np.isinf(ours).sum()), int(np.isinf(theirs).sum()))
    if len(logs) == 0:
        return Comparison(*counts, math.nan, math.nan, math.nan, 1.0, 1.0, 1.0)
    mean = float(logs.mean())
    if len(logs) == 1:
        return Comparison(*counts, math.exp(mean), 0.0, math.inf, 1.0, 1.0, 1.0, tuple(logs))
    low, high, p_differs, p_equal = _t_tests(logs)
    ends = (math.exp(mean), math.exp(low), math.exp(high))
    found = Comparison(*counts, *ends, p_differs, p_equal, 1.0, tuple(logs.tolist()))
    return replace(found, p_holm=found.p)


def _t_tests(logs: np.ndarray) -> tuple[float, float, float, float]:
    """Ends of the 95 % interval of the mean, p of no difference, p of one of `MARGIN` or more."""
    margin = math.log(1 + MARGIN)
    if logs.std() == 0:
        mean = float(logs[0])
        return mean, mean, float(mean == 0), float(abs(mean) >= margin)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of nearly equal differences, whose p is as good as 0
        test = scipy.stats.ttest_1samp(logs, 0.0)
        sides = ((margin, "less"), (-margin, "greater"))
        inside = [scipy.stats.ttest_1samp(logs, end, alternative=side).pvalue for end, side in sides]
    interval = test.confidence_interval(1 - LEVEL)
    return float(interval.low), float(interval.high), float(test.pvalue), min(1.0, 2 * float(max(inside)))


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p of the mean under random signs; exact up to 14 seeds."""
    test = scipy.stats.permutation_test(
        (np.asarray(differences),),
        np.mean,
        permutation_type="samples",
        n_resamples=2 ** min(len(differences), 14),
        rng=np.random.default_rng(stable_seed("sign flips")),
    )
    return float(test.pvalue)


Key = TypeVar("Key", bound=Hashable)


def holm(claims: Mapping[Key, Comparison]) -> dict[Key, Comparison]:
    """The claims of a page with p values that hold for all of them at once (Holm 1979).

    Of a comparison either "no difference" or "a difference of the margin or more" can be true, never both, so each
    counts once. Those with fewer than `MIN_SEEDS` pairs are no tests, and are not counted.
    """
    tested = sorted((key for key, c in claims.items() if c.is_tested), key=lambda key: claims[key].p)
    adjusted, least = dict(claims), 0.0
    for rank, key in enumerate(tested):
        least = max(least, min(1.0, (len(tested) - rank) * claims[key].p))
        adjusted[key] = replace(claims[key], p_holm=least)
    return adjusted


class Interval(NamedTuple):
    """The ends of a 95 % interval."""

    low: float
    high: float


def nested_bootstrap(
    errors: Sequence[np.ndarray], others: Sequence[np.ndarray], *, joint: bool = False, draws: int = DRAWS
) -> Interval | None:
    """95 % percentile interval of the ratio of errors over seeds *and* trajectories.

    A paired t test over seeds says nothing of other trajectories, which all seeds share. Here a draw takes seeds with
    replacement, and within each group trajectories with replacement, the same for both models and for all its seeds.
    With few seeds it is too narrow, as every bootstrap is; read it beside the t interval, not in its place.

    Parameters
    ----------
    errors, others : sequence of ndarray [seeds, trajectories]
        One a group (a regime, a value of a parameter), the same trajectories in both.
    joint : bool
        Errors are means over all groups; by default the ratio is a geometric mean over groups.

    Returns
    -------
    Interval, optional
        None with one seed, one trajectory in every group, or a diverged error.
    """
    seeds = len(errors[0])
    if seeds < 2 or max(a.shape[1] for a in errors) < 2 or not all(np.isfinite(a).all() for a in (*errors, *others)):
        return None
    rng = np.random.default_rng(stable_seed("nested bootstrap"))
    weights = _weights(rng, seeds, draws)
    ours, theirs = [], []
    for a, b in zip(errors, others, strict=True):
        drawn = _weights(rng, a.shape[1], draws)
        ours.append(drawn @ a.T)
        theirs.append(drawn @ b.T)
    means = [np.mean(side, 0) if joint else np.exp(np.mean(np.log(side), 0)) for side in (ours, theirs)]
    ratios = np.exp((weights * np.log(means[0] / means[1])).sum(1))
    low, high = np.quantile(ratios, [LEVEL / 2, 1 - LEVEL / 2])
    return Interval(float(low), float(high))


def bootstrap_by_seed(
    errors: Mapping[int, Sequence[Sequence[float] | None]],
    others: Mapping[int, Sequence[Sequence[float] | None]],
    *,
    joint: bool = False,
    squared: bool = False,
) -> Interval | None:
    """`nested_bootstrap` over the seeds that both models have.

    Parameters
    ----------
    errors, others : mapping
        Seed -> for each group the errors of its trajectories, or None where these are not known.
    squared : bool
        Errors are squares; the interval is that of their roots.

    Returns
    -------
    Interval, optional
        None also without a seed in common, or with a group that is not known.
    """
    seeds = sorted(errors.keys() & others.keys())
    groups = [list(zip(*(side[seed] for seed in seeds), strict=True)) for side in (errors, others)]
    if not all(groups) or any(found is None for side in groups for group in side for found in group):
        return None
    found = nested_bootstrap(*([np.array(group, float) for group in side] for side in groups), joint=joint)
    return found if found is None or not squared else Interval(found.low**0.5, found.high**0.5)


def _weights(rng: np.random.Generator, size: int, draws: int) -> np.ndarray:
    """Shares ``[draws, size]`` of what is drawn with replacement, as often as there is something to draw."""
    return rng.multinomial(size, np.full(size, 1 / size), draws) / size


def mean_intervals(values: np.ndarray, draws: int = DRAWS // 2) -> np.ndarray:
    """95 % intervals of means over trajectories, and over seeds where there are several; nested as `nested_bootstrap`.

    Windows of one trajectory depend on each other, so a value is the mean of a trajectory, and trajectories are drawn.
    Of n trajectories (or seeds, if they are fewer) the percentiles are those at which a normal mean has the interval
    of Student's t ("expanded percentiles", Hesterberg 2015): plain ones are too narrow by a quarter with eight.

    Parameters
    ----------
    values : ndarray [seeds, trajectories, *measures]
        NaN: undefined, left out of the mean; infinite: diverged.

    Returns
    -------
    ndarray [2, *measures]
        Lower and upper ends; NaN where fewer than two trajectories have a value, infinite above where one diverged.
    """
    seeds, trajectories, *shape = values.shape
    flat = np.asarray(values, float).reshape(seeds, trajectories, -1)
    known = ~np.isnan(flat)
    enough = known.any(0).sum(0) > 1
    rng = np.random.default_rng(stable_seed("mean intervals"))
    by_trajectory = _weights(rng, trajectories, draws)
    by_seed = _weights(rng, seeds, draws)
    diverged = np.isinf(flat).any((0, 1))
    finite = np.where(np.isfinite(flat), flat, 0.0)

    def drawn(part: np.ndarray) -> np.ndarray:
        sums = (by_trajectory @ part.transpose(1, 0, 2).reshape(trajectories, -1)).reshape(draws, seeds, -1)
        return np.einsum("ds,dsm->dm", by_seed, sums)

    with np.errstate(invalid="ignore", divide="ignore"):
        means = drawn(finite) / drawn(known.astype(float))
    size = min(trajectories, seeds) if seeds > 1 else trajectories
    ends = np.full((2, flat.shape[2]), np.nan)
    if size > 1 and enough.any():
        # scipy.special: scipy.stats takes seconds to import.
        tail = scipy.special.ndtr(math.sqrt(size / (size - 1)) * scipy.special.stdtrit(size - 1, LEVEL / 2))
        quantile = np.quantile if np.isfinite(means[:, enough]).all() else np.nanquantile
        ends[:, enough] = quantile(means[:, enough], [tail, 1 - tail], axis=0)
    ends[:, diverged & enough] = [[-np.inf], [np.inf]]
    return ends.reshape(2, *shape)


MIN_TRAJECTORIES = 8  # fewer carry no interval that holds what it promises


def what_trajectories_can_show(counts: Mapping[str, int]) -> list[str]:
    """What an evaluation on so many trajectories of each regime cannot conclude; empty where there are enough."""
    few = {name: n for name, n in counts.items() if n < MIN_TRAJECTORIES}
    if not few:
        return []
    listed = ", ".join(f"{name} {n}" for name, n in few.items())
    found = [
        f"Fewer than {MIN_TRAJECTORIES} test trajectories ({listed}): the intervals of these regimes are too narrow, "
        "and no model can be called better than another by these numbers, nor than its own errors elsewhere."
    ]
    if lone := [name for name, n in few.items() if n < 2]:
        found.append(f"One trajectory tells nothing of others: {', '.join(lone)} has no intervals.")
    return found


def brief(c: Comparison) -> str:
    """``2.1 % below``."""
    return f"{abs(c.ratio - 1):.1%} {'below' if c.ratio < 1 else 'above'}".replace("%", " %")


def describe(label: str, c: Comparison, other: str) -> str:
    """One clause with the difference, its interval, its p values and the seeds that diverged."""
    if not math.isfinite(c.ratio):
        return f"Of {label} and {other} no seed has two finite errors"
    lost = [f"{n} of {name} diverged" for n, name in ((c.diverged, label), (c.others_diverged, other)) if n]
    first = f"The error of {label} is {brief(c)} that of {other}"
    if c.seeds - max(c.diverged, c.others_diverged) < 2:
        return f"{first} ({'; '.join(['one seed', *lost])})"
    interval = f"95 % interval of the ratio {c.low:.3f} to {c.high:.3f}"
    tests = f"p {c.p_differs:.2g} by paired t, {c.p_sign:.2g} by sign flips"
    return f"{first} ({'; '.join([interval, tests, f'lower in {c.wins} of {c.seeds} seeds', *lost])})"


RULE = (
    f"A model has a lower error if the paired t test over seeds gives p < {LEVEL} and the errors differ by more than "
    f"{MARGIN:.0%}; the errors are equal if both one-sided tests do, so that the interval of their ratio lies within "
    f"{MARGIN:.0%} of 1; all else, and all with fewer than {MIN_SEEDS} seeds, is undecided. p is adjusted for the "
    "number of all claims of this page (Holm). A seed that diverged counts as infinitely high: a model with one is "
    "never lower or equal."
)


SEEDS_CHANGE = (
    "Seeds change initial weights and the order of batches; data, split and tokenizer are the same in all, so nothing "
    "is said of other data."
)


def what_seeds_can_show(n: int, seeds_change: str = SEEDS_CHANGE) -> str:
    """A few sentences about a number of seeds."""
    if n < MIN_SEEDS:
        return f"Fewer than {MIN_SEEDS} seeds ({n} here) are no comparison: nothing is called a difference."
    needed = float(scipy.stats.t.ppf(1 - LEVEL / 2, n - 1)) / math.sqrt(n)
    return (
        f"With {n} seeds the exact sign-flip test cannot give a p below {2 / 2**n:.3g}, and the paired t test, which "
        f"assumes normal differences, finds one only if its mean is above {needed:.2f} times its spread over seeds. "
        f"So {n} seeds can show differences that are large beside the spread, and cannot show that there is none. "
        + seeds_change
    )
