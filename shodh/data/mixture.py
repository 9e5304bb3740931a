"""The mixture of regimes: which samples make up the global batch of a step, and which of them a rank loads."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from shodh.core.errors import ConfigError, DataError, TopologyError

Sample = tuple[int, int]  # (number of the regime, index in its dataset)


class MixtureSampler:
    """Global batches as a pure function of ``(seed, step)``.

    Every batch has the same number of samples of each regime. Within a regime the n-th draw of the run takes entry
    ``n mod size`` of the permutation of epoch ``n div size``, so no sample comes back before the pool is used up.
    There is no other state: a checkpoint holds the seed and the step, and a resumed run, on any number of ranks and
    workers, goes on with the batches the uninterrupted one would have had.

    Parameters
    ----------
    seed : int
        Not negative.
    sizes : sequence of int
        Samples in each regime's pool.
    shares : sequence of float
        Wanted shares, positive, in any unit.
    global_batch : int
        Samples in a batch over all ranks and micro-batches.

    Raises
    ------
    ConfigError
        If the numbers make no sense, or the batch is so small that a regime would get no sample.
    DataError
        If a pool is empty.
    """

    def __init__(self, seed: int, sizes: Sequence[int], shares: Sequence[float], global_batch: int) -> None:
        if seed < 0:
            raise ConfigError(f"seed={seed}; must not be negative")
        if not sizes or len(sizes) != len(shares):
            raise ConfigError(f"{len(sizes)} regimes with {len(shares)} shares; every regime needs one")
        for regime, size in enumerate(sizes):
            if size < 1:
                raise DataError(f"regime {regime} of the mixture has no samples")
        self.seed = seed
        self.sizes = tuple(int(s) for s in sizes)
        self.counts = batch_counts(shares, global_batch)
        self.global_batch = global_batch
        self._pattern = _interleave(self.counts)
        self._orders: list[dict[int, np.ndarray]] = [{} for _ in self.sizes]

    def batch(self, step: int) -> list[Sample]:
        """The global batch of a step (from 0), regimes evenly interleaved."""
        if step < 0:
            raise ValueError(f"step={step}; must not be negative")
        draws = [self._draws(regime, step) for regime in range(len(self.sizes))]
        return [(regime, int(draws[regime][number])) for regime, number in self._pattern]

    def local_batch(self, step: int, rank: int = 0, world: int = 1, micro: int = 0, num_micro: int = 1) -> list[Sample]:
        """The part of the batch of ``step`` that ``rank`` of ``world`` takes as micro-batch ``micro`` of ``num_micro``.

        Together the parts are the global batch, in its order (micro-batch by micro-batch, rank by rank). Each part
        has the global shares where ``world * num_micro`` divides the counts, and as nearly as possible otherwise.

        Raises
        ------
        TopologyError
            If the batch does not divide evenly.
        """
        if not (0 <= rank < world and 0 <= micro < num_micro):
            raise ValueError(f"rank {rank} of {world}, micro-batch {micro} of {num_micro}")
        parts = world * num_micro
        if self.global_batch % parts:
            raise TopologyError(
                f"global batch {self.global_batch} is not divisible by {world} data-parallel ranks x {num_micro} "
                f"micro-batches; use a multiple of {parts}"
            )
        length = self.global_batch // parts
        start = (micro * world + rank) * length
        return self.batch(step)[start : start + length]

    def _draws(self, regime: int, step: int) -> np.ndarray:
        """Indices of this regime's samples in the batch of a step."""
        count, size = self.counts[regime], self.sizes[regime]
        numbers = np.arange(step * count, (step + 1) * count)
        epochs, positions = np.divmod(numbers, size)
        parts = [self._order(regime, epoch)[positions[epochs == epoch]] for epoch in range(epochs[0], epochs[-1] + 1)]
        return np.concatenate(parts)

    def _order(self, regime: int, epoch: int) -> np.ndarray:
        """Permutation of a regime's pool in an epoch; the last two of each regime are kept."""
        kept = self._orders[regime]
        if epoch not in kept:
            if len(kept) > 1:
                del kept[min(kept)]
            kept[epoch] = _permutation(self.seed, regime, epoch, self.sizes[regime])
        return kept[epoch]


def batch_counts(shares: Sequence[float], global_batch: int) -> tuple[int, ...]:
    """Samples of each regime in a batch: shares rounded by the largest remainder (the first one wins a tie).

    Raises
    ------
    ConfigError
        If a share is not a positive number, or a regime would get no sample; says which batch would do.
    """
    if not all(math.isfinite(s) and s > 0 for s in shares):
        raise ConfigError(f"shares {list(shares)}: every one must be a positive number; leave out unwanted regimes")
    total = sum(shares)
    exact = [global_batch * s / total for s in shares]
    counts = [math.floor(e) for e in exact]
    by_remainder = sorted(range(len(shares)), key=lambda r: (counts[r] - exact[r], r))
    for regime in by_remainder[: global_batch - sum(counts)]:
        counts[regime] += 1
    if min(counts) < 1:
        enough = math.ceil(total / min(shares) - 1e-9)
        raise ConfigError(
            f"global batch {global_batch} with shares {list(shares)} leaves regime {counts.index(min(counts))} of the "
            f"mixture without samples; use a global batch of at least {enough}"
        )
    return tuple(counts)


def temperature_shares(sizes: Sequence[int], shares: Sequence[float], temperature: float | None) -> list[float]:
    """Shares times ``size^(1 / temperature)``; as they are without a temperature.

    At 1 every sample is drawn equally often, towards infinity every regime is.
    """
    if temperature is None:
        return list(shares)
    if not (math.isfinite(temperature) and temperature > 0):
        raise ConfigError(f"mixture_temperature={temperature}; must be a positive number")
    largest = max(sizes)
    return [share * (size / largest) ** (1.0 / temperature) for size, share in zip(sizes, shares, strict=True)]


def _interleave(counts: Sequence[int]) -> list[tuple[int, int]]:
    """``(regime, number)`` ordered so that every stretch of the batch has nearly the shares of the whole.

    Sample ``j`` of a regime sits at ``(j + 1/2) / count`` of the way; whoever cuts the batch into equal parts that
    divide all counts gets the same counts in each.
    """
    return sorted(
        ((regime, j) for regime, count in enumerate(counts) for j in range(count)),
        key=lambda s: ((s[1] + 0.5) / counts[s[0]], s[0]),
    )


def _permutation(seed: int, regime: int, epoch: int, size: int) -> np.ndarray:
    """Permutation of ``range(size)``; from raw random bits, whose stream numpy promises never to change."""
    bits = np.random.Philox(np.random.SeedSequence([seed, regime, epoch])).random_raw(size)
    return np.argsort(bits, kind="stable")
