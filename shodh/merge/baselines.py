"""What composition is compared with: plain average, task arithmetic, TIES, DARE, a random direction.

All start from the anchor and the updates ``D_i = expert_i - anchor``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from shodh.core.errors import ConfigError
from shodh.core.seeding import Key, generator
from shodh.core.weights import LazyTensor, LazyWeights
from shodh.merge.lazy import BLOCK, ComputedTensor, blocks, check_alike
from shodh.merge.span import Update, difference

# Factors that the papers recommend where none is chosen on validation.
TASK_ARITHMETIC_SCALING = 0.4
TIES_SCALING = 1.0
TIES_DENSITY = 0.2
DARE_DENSITY = 0.1
_LOW_BITS = 15


def average(experts: Sequence[LazyWeights]) -> LazyWeights:
    """The mean of the experts (model soup, arXiv 2203.05482); of two, composition at alpha 0."""
    check_alike({f"expert {number}": weights for number, weights in enumerate(experts, 1)})
    return Update(tuple((weights, 1.0 / len(experts)) for weights in experts)).weights()


def task_arithmetic(
    anchor: LazyWeights, experts: Sequence[LazyWeights], scaling: float = TASK_ARITHMETIC_SCALING
) -> LazyWeights:
    """``anchor + scaling sum_i D_i`` (arXiv 2212.04089)."""
    update = Update(((anchor, 1.0),))
    for expert in experts:
        update = update + scaling * difference(anchor, expert)
    return update.weights()


def ties(
    anchor: LazyWeights,
    experts: Sequence[LazyWeights],
    density: float = TIES_DENSITY,
    scaling: float = TIES_SCALING,
) -> LazyWeights:
    """Trim, elect sign, merge (arXiv 2306.01708).

    Of each update the ``density`` largest values of the *whole* model are kept, ties with the smallest of them
    included; each weight takes the sign of their sum, and the mean of those that have it. Where the sum is exactly
    zero the anchor stays.
    """
    _check_density(density)
    updates = [_wide(difference(anchor, expert)) for expert in experts]
    thresholds = [_threshold(update, density) for update in updates]
    return {
        name: _Ties(name, tensor, [u[name] for u in updates], thresholds, scaling) for name, tensor in anchor.items()
    }


def dare(
    anchor: LazyWeights,
    experts: Sequence[LazyWeights],
    density: float = DARE_DENSITY,
    scaling: float = TASK_ARITHMETIC_SCALING,
    seed: int = 0,
) -> LazyWeights:
    """Drop values of the updates at random, rescale the rest by ``1 / density``, add (arXiv 2311.03099)."""
    _check_density(density)
    thinned = [
        {
            name: _Thinned(name, tensor, density, (seed, "dare", number))
            for name, tensor in _wide(difference(anchor, e)).items()
        }
        for number, e in enumerate(experts)
    ]
    return Update(((anchor, 1.0), *((update, scaling) for update in thinned))).weights()


def random_direction(direction: Update, seed: int = 0) -> Update:
    """A direction of normal random numbers whose norm is that of ``direction``, tensor by tensor."""
    return Update((({n: _Random(n, t, (seed, "direction")) for n, t in _wide(direction).items()}, 1.0),))


def _check_density(density: float) -> None:
    if not 0.0 < density <= 1.0:
        raise ConfigError(f"density {density:g}: expected a share of the weights, above 0 and at most 1")


class _Wide(ComputedTensor):
    """An update in float64: in bf16 it would lose most of what a fine-tuning changed."""

    def __init__(self, name: str, source: ComputedTensor) -> None:
        super().__init__(name, source)
        self.source = source
        self.dtype = torch.float64

    def values(self, start: int, stop: int) -> Tensor:
        return self.source.values(start, stop)


def _wide(update: Update) -> dict[str, _Wide]:
    return {name: _Wide(name, tensor) for name, tensor in update.weights().items()}


class _Ties(ComputedTensor):
    def __init__(
        self, name: str, anchor: LazyTensor, updates: list[_Wide], thresholds: list[float], scaling: float
    ) -> None:
        super().__init__(name, anchor)
        self.anchor, self.updates, self.thresholds, self.scaling = anchor, updates, thresholds, scaling

    def values(self, start: int, stop: int) -> Tensor:
        parts = [u.values(start, stop) for u in self.updates]
        trimmed = torch.stack(
            [torch.where(p.float().abs() >= t, p, 0.0) for p, t in zip(parts, self.thresholds, strict=True)]
        )
        elected = trimmed.sum(0).sign()
        agree = (trimmed.sign() == elected) & (elected != 0)
        mean = (trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)
        return self.anchor.part(start, stop).double() + self.scaling * mean


class _Drawn(ComputedTensor):
    """A tensor that uses random numbers; they belong to whole blocks, whatever part is asked for."""

    def __init__(self, name: str, source: _Wide, key: tuple[Key, ...]) -> None:
        super().__init__(name, source)
        self.source, self.key = source, key

    def draw(self, start: int, stop: int, normal: bool) -> Tensor:
        pieces = []
        for number in range(start // BLOCK, -(-stop // BLOCK)):
            first = number * BLOCK
            values = torch.empty(min(BLOCK, self.numel - first))
            source = generator(*self.key, self.name, number)
            values = values.normal_(generator=source) if normal else values.uniform_(generator=source)
            pieces.append(values[max(0, start - first) : stop - first])
        return torch.cat(pieces) if pieces else torch.empty(0)


class _Thinned(_Drawn):
    def __init__(self, name: str, source: _Wide, density: float, key: tuple[Key, ...]) -> None:
        super().__init__(name, source, key)
        self.density = density

    def values(self, start: int, stop: int) -> Tensor:
        kept = self.draw(start, stop, normal=False) < self.density
        return torch.where(kept, self.source.values(start, stop) / self.density, 0.0)


class _Random(_Drawn):
    @cached_property
    def factor(self) -> float:
        """Norm of the direction over that of the numbers drawn."""
        wanted = drawn = 0.0
        for start, stop in blocks(self.numel):
            wanted += float(self.source.values(start, stop).square().sum())
            drawn += float(self.draw(start, stop, normal=True).double().square().sum())
        return math.sqrt(wanted / drawn) if drawn else 0.0

    def values(self, start: int, stop: int) -> Tensor:
        return self.factor * self.draw(start, stop, normal=True).double()


def _threshold(update: dict[str, _Wide], density: float) -> float:
    """Absolute value of the ``density``-th largest value of an update in float32: exact, in two passes.

    Non-negative floats are ordered as their bits are; the first pass counts the upper bits and the second one, among
    those in question, the lower bits.
    """
    wanted = max(1, round(density * sum(t.numel for t in update.values())))
    upper = torch.zeros(2 ** (31 - _LOW_BITS), dtype=torch.int64)
    for bits in _bits(update):
        upper += torch.bincount(bits >> _LOW_BITS, minlength=len(upper))
    bucket, wanted = _find(upper, wanted)
    lower = torch.zeros(2**_LOW_BITS, dtype=torch.int64)
    for bits in _bits(update):
        inside = bits[bits >> _LOW_BITS == bucket] & (2**_LOW_BITS - 1)
        lower += torch.bincount(inside, minlength=len(lower))
    last, _ = _find(lower, wanted)
    return float(torch.tensor(bucket << _LOW_BITS | last, dtype=torch.int32).view(torch.float32))


def _bits(update: dict[str, _Wide]) -> Iterator[Tensor]:
    """Bits of the absolute values in float32, as integers."""
    for tensor in update.values():
        for start, stop in blocks(tensor.numel):
            yield tensor.values(start, stop).float().abs().view(torch.int32).long()


def _find(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The bucket that holds the ``wanted``-th value from the top, and its place from the top of that bucket."""
    above = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(above, wanted))
    before = int(above[position - 1]) if position else 0
    return len(counts) - 1 - position, wanted - before
