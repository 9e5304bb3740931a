"""Energy by wave number, on any boundary: shells of equal width, and octaves of them.

Along periodic axes the basis is that of Fourier; along walls and open ends it is the cosines (DCT-II), the periodic
series of the field continued evenly across the boundary, which has no jump there. Both are orthonormal, so that shells
sum to the mean square of the field whatever its boundary (Parseval). A wave number is ``2 pi / wave length`` in both;
shells are isotropic, one fundamental of the longest axis wide: mode ``k`` is in shell ``round(|k| / (2 pi / L))``, and
shell 0 holds the mean alone: the half wave between walls of the longest axis is in shell 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from shodh.core.devices import resident
from shodh.schema.fields import Boundary


class Shells:
    """Shells of the wave numbers of a grid.

    Parameters
    ----------
    grid : sequence of int
    boundary, lengths : sequence
        Of each axis.
    """

    def __init__(self, grid: Sequence[int], boundary: Sequence[Boundary], lengths: Sequence[float]) -> None:
        self.grid, self.boundary = tuple(grid), tuple(boundary)
        fundamental = 2 * math.pi / max(lengths)
        self._periodic = [axis for axis, kind in enumerate(self.boundary, 2) if kind == "periodic"]
        square, weight = torch.zeros((), dtype=torch.float64), torch.ones(())
        for axis, (cells, kind, length) in enumerate(zip(self.grid, self.boundary, lengths, strict=True), 2):
            waves, count = torch.arange(cells) / 2, torch.ones(cells)
            if kind == "periodic":
                waves = torch.fft.fftfreq(cells, 1 / cells).abs()
            if self._periodic and axis == self._periodic[-1]:  # of a real field: the other half is its mirror image
                waves = waves[: cells // 2 + 1]
                count = torch.where((waves == 0) | (2 * waves == cells), 1.0, 2.0)
            square = square.unsqueeze(-1) + (waves.double() * (2 * math.pi / length / fundamental)).square()
            weight = weight.unsqueeze(-1) * count
        nearest = (square.sqrt() + 0.5).floor().long()
        self._shell = torch.where(square > 0, nearest.clamp(min=1), 0).flatten()
        self._weight = weight.flatten() / math.prod(self.grid)
        self.count = int(self._shell.max()) + 1

    def transform(self, values: Tensor) -> Tensor:
        """Orthonormal coefficients of ``[B, C, *grid]``; complex with a periodic axis, and half of the last one."""
        for axis, (cells, kind) in enumerate(zip(self.grid, self.boundary, strict=True), 2):
            if kind != "periodic":
                values = (values.movedim(axis, -1) @ resident(_cosine(cells), values.device)).movedim(-1, axis)
        return torch.fft.rfftn(values, dim=self._periodic, norm="ortho") if self._periodic else values

    def energy(self, coefficients: Tensor) -> Tensor:
        """Mean square by shell, ``[B, C, *grid] -> [B, shells]``: sums to the mean square over components and cells."""
        parts = (
            torch.view_as_real(coefficients).square().sum(-1) if coefficients.is_complex() else coefficients.square()
        )
        power = parts.mean(1).flatten(1)
        shell, weight = (resident(table, power.device) for table in (self._shell, self._weight))
        return power.new_zeros(len(power), self.count).index_add_(1, shell, power * weight)


@cache
def _cosine(cells: int) -> Tensor:
    """Orthonormal DCT-II as a matrix ``[cells, modes]``."""
    places, modes = torch.arange(cells).double() + 0.5, torch.arange(cells).double()
    matrix = (math.pi / cells * places[:, None] * modes).cos() * math.sqrt(2 / cells)
    matrix[:, 0] = math.sqrt(1 / cells)
    return matrix.float()


def octaves(count: int) -> list[tuple[str, slice]]:
    """Bands of shells: the mean over space, and 1, 2-3, 4-7, 8-15 and so on up to ``count`` shells."""
    found, start = [("mean", slice(0, 1))], 1
    while start < count:
        stop = min(2 * start, count)
        found.append((str(start) if stop == start + 1 else f"{start}-{stop - 1}", slice(start, stop)))
        start = stop
    return found
