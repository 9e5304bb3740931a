r"""The span of expert checkpoints: decompose, compose, curves and planes (CCM, arXiv 2605.14546).

With anchor :math:`\theta_0` and experts :math:`\theta_-` (low) and :math:`\theta_+` (high),

.. math::
    D_\pm = \theta_\pm - \theta_0, \quad S = (D_- + D_+)/2, \quad D = (D_+ - D_-)/2, \quad
    \theta(\alpha) = \theta_0 + S + \alpha D .

Evaluated as written, in any precision, this does not return the experts: ``anchor + (low - anchor)`` loses what the
difference was rounded to. But everything here is a *linear combination of checkpoints*, so factors are added before
weights are. The anchor's cancel, :math:`1 - 1 = 0`, and what is left is

.. math:: \theta(\alpha) = \tfrac{1-\alpha}{2}\, \theta_- + \tfrac{1+\alpha}{2}\, \theta_+ ,

with factors that are exactly 0 and 1 at the experts. There the stored bits are passed on. Elsewhere the sum is formed
in float64 and rounded once to the dtype of the experts: half a unit in the last place, plus at most 2^-51 of the larger
term, from the exact value; hence continuous in alpha, also into the ends. The same holds for every other set of
factors: Lagrange polynomials, segments, bilinear patches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from shodh.core.errors import ConfigError
from shodh.core.weights import LazyTensor, LazyWeights
from shodh.merge.coordinates import Alpha, Coordinates, as_coordinates
from shodh.merge.lazy import ComputedTensor, check_alike

#: Coordinates ``[d, ...]`` -> factors of the checkpoints ``[m, ...]``.
Factors = Callable[[np.ndarray], np.ndarray]


class Combination(ComputedTensor):
    """``sum_i factors[i] tensors[i]``, with factors ``[m]``, or ``[m, E]`` for the rows of the first axis.

    Tensors with factor 0 are not read; a single one with factor 1 is passed on, bit by bit.
    """

    def __init__(self, name: str, tensors: Sequence[LazyTensor], factors: np.ndarray) -> None:
        super().__init__(name, tensors[0])
        self.tensors, self.factors = tuple(tensors), factors

    def part(self, start: int, stop: int) -> Tensor:
        pieces = [self._piece(*segment) for segment in self._segments(start, stop)]
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=self.dtype)

    def values(self, start: int, stop: int) -> Tensor:
        pieces = [self._sum(*segment) for segment in self._segments(start, stop)]
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.float64)

    def _segments(self, start: int, stop: int) -> Iterator[tuple[list[tuple[LazyTensor, float]], int, int]]:
        """Ranges with the same factors, and what is summed there."""
        row = self.numel if self.factors.ndim == 1 else self.numel // self.shape[0]
        while start < stop:
            number = start // row
            end = min(stop, (number + 1) * row)
            factors = self.factors if self.factors.ndim == 1 else self.factors[:, number]
            yield [(t, float(f)) for t, f in zip(self.tensors, factors, strict=True) if f != 0.0], start, end
            start = end

    def _piece(self, used: list[tuple[LazyTensor, float]], start: int, stop: int) -> Tensor:
        if len(used) == 1 and used[0][1] == 1.0:
            return used[0][0].part(start, stop)
        return self.rounded(self._sum(used, start, stop))

    @staticmethod
    def _sum(used: Sequence[tuple[LazyTensor, float]], start: int, stop: int) -> Tensor:
        total = torch.zeros(stop - start, dtype=torch.float64)
        for tensor, factor in used:
            total.add_(tensor.part(start, stop).double(), alpha=factor)
        return total


@dataclass(frozen=True)
class Update:
    """A change of weights as a linear combination of checkpoints: exact, because nothing is computed yet."""

    terms: tuple[tuple[LazyWeights, float], ...]

    def __mul__(self, factor: float) -> Update:
        return Update(tuple((weights, factor * f) for weights, f in self.terms))

    __rmul__ = __mul__

    def __add__(self, other: Update) -> Update:
        return Update(self.terms + other.terms)

    def points(self) -> list[LazyWeights]:
        """The checkpoints, each once."""
        found: list[LazyWeights] = []
        for weights, _ in self.terms:
            if not any(weights is p for p in found):
                found.append(weights)
        return found

    def factors(self, points: Sequence[LazyWeights]) -> np.ndarray:
        """The factor ``[m]`` of each of ``points``: those of the same checkpoint are added."""
        return np.array([sum(f for weights, f in self.terms if weights is p) for p in points])

    def weights(self) -> dict[str, Combination]:
        """What the sum gives, in the dtype of the checkpoints; computed when it is read."""
        points = self.points()
        return combine(points, lambda _: self.factors(points), 0.0)


def combine(points: Sequence[LazyWeights], factors: Factors, alpha: Alpha | Coordinates) -> dict[str, Combination]:
    """Weights ``sum_i factors(alpha)[i] points[i]``, computed when they are read."""
    coordinates = as_coordinates(alpha)
    coordinates.check(points[0])
    return {
        name: Combination(name, [p[name] for p in points], factors(coordinates.at(name, tensor.shape)))
        for name, tensor in points[0].items()
    }


def difference(anchor: LazyWeights, expert: LazyWeights) -> Update:
    """``expert - anchor``; raises `CheckpointError` for different architectures."""
    check_alike({"the anchor": anchor, "the expert": expert})
    return Update(((expert, 1.0), (anchor, -1.0)))


def decompose(anchor: LazyWeights, low: LazyWeights, high: LazyWeights) -> tuple[Update, Update]:
    """What two experts share, ``(D_low + D_high) / 2``, and the direction between them, ``(D_high - D_low) / 2``.

    Raises
    ------
    CheckpointError
        Names, shapes or dtypes of tensors differ.
    """
    check_alike({"the anchor": anchor, "the low expert": low, "the high expert": high})
    shared = Update(((low, 0.5), (high, 0.5), (anchor, -1.0)))
    direction = Update(((low, -0.5), (high, 0.5)))
    return shared, direction


def compose(anchor: LazyWeights, shared: Update, direction: Update, alpha: float | Coordinates) -> LazyWeights:
    """``anchor + shared + alpha direction``, computed when it is read; bit by bit the experts at alpha -1 and +1.

    Parameters
    ----------
    alpha : float or Coordinates
        One coordinate for all tensors, or one by layer or expert.
    """
    constant = Update(((anchor, 1.0),)) + shared
    points = (constant + direction).points()
    base, slope = constant.factors(points), direction.factors(points)

    def factors(at: np.ndarray) -> np.ndarray:
        return np.multiply.outer(slope, at[0]) + base.reshape(-1, *(1,) * (at.ndim - 1))

    return combine(points, factors, alpha)


# Curves and planes


def segments(positions: Sequence[float]) -> Factors:
    """Factors of the curve that goes straight from expert to expert; beyond the ends it goes on straight."""
    nodes = np.asarray(positions, dtype=np.float64)

    def factors(at: np.ndarray) -> np.ndarray:
        x = at[0]
        left = np.clip(np.searchsorted(nodes, x, side="right") - 1, 0, len(nodes) - 2)
        start, end = nodes[left], nodes[left + 1]
        result = np.zeros((len(nodes), *x.shape))
        # Each share from its own end, so that both are exact at both.
        np.put_along_axis(result, np.asarray(left)[None], ((end - x) / (end - start))[None], 0)
        np.put_along_axis(result, np.asarray(left + 1)[None], ((x - start) / (end - start))[None], 0)
        return result

    return factors


def polynomial(positions: Sequence[float]) -> Factors:
    """Factors of the polynomial of least degree through all experts (Lagrange); with two, the line."""
    nodes = np.asarray(positions, dtype=np.float64)

    def factors(at: np.ndarray) -> np.ndarray:
        x = at[0]
        return np.stack(
            [
                np.prod([(x - other) / (node - other) for other in np.delete(nodes, i)], axis=0)
                for i, node in enumerate(nodes)
            ]
        )

    return factors


def bilinear() -> Factors:
    """Factors of the four experts of a two-parameter family, in the order (low, low), (low, high), (high, low),
    (high, high), at coordinates ``(a, b)`` in units of their own half ranges."""

    def factors(at: np.ndarray) -> np.ndarray:
        (a_low, a_high), (b_low, b_high) = (((1.0 - x) / 2.0, (1.0 + x) / 2.0) for x in at)
        return np.stack([a_low * b_low, a_low * b_high, a_high * b_low, a_high * b_high])

    return factors


def barycentric(corners: Sequence[Sequence[float]]) -> Factors:
    """Factors of three experts at the corners ``[3, 2]`` of a triangle in the coordinates of a two-parameter family.

    Raises
    ------
    ConfigError
        The corners are not three points with an area between them.
    """
    points = np.asarray(corners, dtype=np.float64)
    if points.shape != (3, 2):
        raise ConfigError(f"a plane through three experts needs corners [3, 2], got {list(points.shape)}")

    def area(p: np.ndarray, q: np.ndarray, r: np.ndarray) -> np.ndarray:
        # A row that is equal to another gives exactly zero: the same two products are subtracted.
        (px, py), (qx, qy), (rx, ry) = p, q, r
        return np.asarray((qx - px) * (ry - py) - (rx - px) * (qy - py))

    whole = area(*points)
    if whole == 0:
        raise ConfigError(f"the corners {points.tolist()} lie on a line; three experts span a plane only off it")

    def factors(at: np.ndarray) -> np.ndarray:
        p, q, r = (point.reshape(2, *(1,) * (at.ndim - 1)) for point in points)
        areas = [area(at, q, r), area(p, at, r), area(p, q, at)]
        return np.stack([a / whole for a in areas])

    return factors


CurveKind = Literal["piecewise", "polynomial"]
CURVES: Mapping[str, Callable[[Sequence[float]], Factors]] = {"piecewise": segments, "polynomial": polynomial}


@dataclass(frozen=True)
class Span:
    """All models that factors of the coordinate make of the same experts.

    Attributes
    ----------
    points : sequence of weights
    factors : callable
        `segments`, `polynomial`, `bilinear` or `barycentric`.
    """

    points: tuple[LazyWeights, ...]
    factors: Factors

    def at(self, alpha: Alpha | Coordinates) -> LazyWeights:
        """The weights at a coordinate, computed when they are read; bit by bit an expert at its own."""
        return combine(self.points, self.factors, alpha)


def curve(experts: Sequence[LazyWeights], positions: Sequence[float], kind: CurveKind = "piecewise") -> Span:
    """The curve through two or more experts at increasing positions.

    Raises
    ------
    CheckpointError, ConfigError
        Architectures differ; or the positions are not one for each expert, increasing.
    """
    if kind not in CURVES:
        raise ConfigError(f"curve {kind!r}: expected one of {sorted(CURVES)}")
    if len(positions) != len(experts) or len(experts) < 2 or np.any(np.diff(positions) <= 0):
        raise ConfigError(f"{len(experts)} experts at {list(positions)}: expected as many positions, increasing, >= 2")
    return _span(experts, CURVES[kind](positions))


def plane(experts: Sequence[LazyWeights], corners: Sequence[Sequence[float]] | None = None) -> Span:
    """The plane through three experts at ``corners``, or the bilinear patch through four (see `bilinear`)."""
    if corners is None and len(experts) != 4:
        raise ConfigError(f"a bilinear patch needs 4 experts, got {len(experts)}; three need their corners")
    if corners is not None and len(experts) != 3:
        raise ConfigError(f"corners are for three experts, got {len(experts)}")
    return _span(experts, bilinear() if corners is None else barycentric(corners))


def _span(experts: Sequence[LazyWeights], factors: Factors) -> Span:
    check_alike({f"expert {number}": weights for number, weights in enumerate(experts, 1)})
    return Span(tuple(experts), factors)
