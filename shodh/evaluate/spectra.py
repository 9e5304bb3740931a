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
from functools import cached_property

import torch
from torch import Tensor

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
        square = torch.zeros(())
        for cells, kind, length in zip(self.grid, self.boundary, lengths, strict=True):
            waves = (torch.fft.fftfreq(cells, 1 / cells).abs() if kind == "periodic" else torch.arange(cells) / 2) * (
                2 * math.pi / length / fundamental
            )
            square = square.unsqueeze(-1) + waves.double().square()
        nearest = (square.sqrt() + 0.5).floor().long()
        self._shell = torch.where(square > 0, nearest.clamp(min=1), 0).flatten()
        self.count = int(self._shell.max()) + 1

    @cached_property
    def _cosines(self) -> dict[tuple[int, torch.device], Tensor]:
        return {}

    def _cosine(self, cells: int, device: torch.device) -> Tensor:
        """Orthonormal DCT-II as a matrix ``[cells, modes]``."""
        if (cells, device) not in self._cosines:
            places, modes = torch.arange(cells).double() + 0.5, torch.arange(cells).double()
            matrix = (math.pi / cells * places[:, None] * modes).cos() * math.sqrt(2 / cells)
            matrix[:, 0] = math.sqrt(1 / cells)
            self._cosines[cells, device] = matrix.float().to(device)
        return self._cosines[cells, device]

    def transform(self, values: Tensor) -> Tensor:
        """Coefficients of ``[B, C, *grid]``, orthonormal; complex where an axis is periodic."""
        for axis, (cells, kind) in enumerate(zip(self.grid, self.boundary, strict=True), 2):
            if kind != "periodic":
                values = (values.movedim(axis, -1) @ self._cosine(cells, values.device)).movedim(-1, axis)
        periodic = [axis for axis, kind in enumerate(self.boundary, 2) if kind == "periodic"]
        return torch.fft.fftn(values, dim=periodic, norm="ortho") if periodic else values

    def energy(self, coefficients: Tensor) -> Tensor:
        """Mean square by shell, ``[B, C, *grid] -> [B, shells]``: sums to the mean square over components and cells."""
        power = coefficients.abs().square().mean(1).flatten(1) / self._shell.numel()
        if self._shell.device != power.device:
            self._shell = self._shell.to(power.device)
        return power.new_zeros(len(power), self.count).index_add_(1, self._shell, power)


def octaves(count: int) -> list[tuple[str, slice]]:
    """Bands of shells: the mean over space, and 1, 2-3, 4-7, 8-15 and so on up to ``count`` shells."""
    found, start = [("mean", slice(0, 1))], 1
    while start < count:
        stop = min(2 * start, count)
        found.append((str(start) if stop == start + 1 else f"{start}-{stop - 1}", slice(start, stop)))
        start = stop
    return found
