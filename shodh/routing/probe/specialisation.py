"""Do experts follow local physics, beyond the regime? Information between expert and bins, against a shifted null."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from shodh.core.seeding import stable_seed
from shodh.routing.statistics import entropy, mutual_information, shares

BINS = 4
NULL_DRAWS = 100


class ConditionalInformation(NamedTuple):
    """Information of a binned quantity about the expert within regimes, in nats.

    ``information`` is ``I(expert; bin | regime)`` as counted; ``null`` its draws where place is decoupled; ``entropy``
    is ``H(expert | regime)``, the most that there can be.
    """

    information: float
    null: np.ndarray
    entropy: float

    @property
    def corrected(self) -> float:
        """Information beyond what finite samples and smooth fields give by chance; about 0, of either sign, if none."""
        return self.information - float(self.null.mean())

    @property
    def p_value(self) -> float:
        return float((1 + (self.null >= self.information - 1e-12).sum()) / (1 + len(self.null)))

    @property
    def explained(self) -> float | None:
        """Share of the routing within regimes that the bins explain; None where routing is settled by the regime."""
        return self.corrected / self.entropy if self.entropy > 1e-3 else None


def quantile_bins(values: np.ndarray, bins: int = BINS) -> tuple[np.ndarray, np.ndarray] | None:
    """Bin numbers of ``values`` and the edges ``[b + 1]`` by quantiles; ties share a bin; None for a constant."""
    edges = np.unique(np.quantile(values, np.linspace(0, 1, bins + 1)))
    if len(edges) < 2 or edges[-1] - edges[0] <= 1e-9 * np.abs(edges).max():
        return None
    inner = edges[1:-1] if len(edges) > 2 else np.array([edges.mean()])
    return np.searchsorted(inner, values, side="left"), edges


def count_bins(bins: np.ndarray, selected: np.ndarray, num_bins: int, num_experts: int) -> np.ndarray:
    """Assignments by bin and expert, ``[bins, E]``, of ``bins [N, S]`` and ``selected [N, S, K]``."""
    cells = bins[..., None] * num_experts + selected
    return np.bincount(cells.ravel(), minlength=num_bins * num_experts).reshape(num_bins, num_experts)


def shift_bins(bins: np.ndarray, token_grid: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """Each sample's ``bins [N, S]`` rolled around its token grid by a random shift: as smooth as before, elsewhere."""
    shifts = [rng.integers(0, n, len(bins)) for n in token_grid]
    axes = np.meshgrid(*(np.arange(n) for n in token_grid), indexing="ij")
    moved = [(a.ravel() + s[:, None]) % n for a, s, n in zip(axes, shifts, token_grid, strict=True)]
    return np.take_along_axis(bins, np.ravel_multi_index(moved, tuple(token_grid)), axis=1)


def conditional_information(
    bins: Sequence[np.ndarray],
    selected: Sequence[np.ndarray],
    num_experts: int,
    token_grids: Sequence[Sequence[int]],
    *,
    draws: int = NULL_DRAWS,
) -> ConditionalInformation:
    """``I(expert; bin | regime)``, one entry of each sequence a regime.

    Tokens of a sample are not independent, so shuffling tokens would call any smooth routing significant. The null
    rolls every sample's bins around the token grid instead: exact on periodic axes, an approximation between walls.

    Parameters
    ----------
    bins : sequence of ndarray [N, S]
    selected : sequence of ndarray [N, S, K]
    token_grids : sequence of grids of S tokens
    """
    total = sum(s.size for s in selected)
    num_bins = [int(b.max()) + 1 for b in bins]
    rng = np.random.default_rng(stable_seed("probe null"))

    def mean(current: Sequence[np.ndarray]) -> float:
        parts = zip(current, selected, num_bins, strict=True)
        return sum(s.size / total * float(mutual_information(count_bins(b, s, n, num_experts))) for b, s, n in parts)

    null = [mean([shift_bins(b, g, rng) for b, g in zip(bins, token_grids, strict=True)]) for _ in range(draws)]
    usage = [np.bincount(s.ravel(), minlength=num_experts) for s in selected]
    usage_entropy = sum(s.size / total * float(entropy(shares(u))) for s, u in zip(selected, usage, strict=True))
    return ConditionalInformation(mean(bins), np.array(null), usage_entropy)
