"""Mixing in Fourier space, in two or three dimensions: AFNO's heads, and the spectral convolution of FNO.

Complex weights are kept as real pairs: ZeRO flattens parameters into real buffers. Transforms are orthonormal and
computed in float32 at least, whatever the model's precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shodh.core.seeding import Key, generator


def kept_frequencies(grid: Sequence[int], modes: int | None) -> list[Tensor]:
    """Indices of the kept frequencies of a real transform along each axis; the last one has no negative ones.

    ``modes`` of them on either side of zero (``0 .. modes - 1`` and ``-modes .. -1``), all where there are no more.
    """
    kept = [torch.arange(n) for n in (*grid[:-1], grid[-1] // 2 + 1)]
    if modes is None:
        return kept
    *full, half = kept
    return [k if 2 * modes >= len(k) else torch.cat((k[:modes], k[-modes:])) for k in full] + [half[:modes]]


class Spectrum:
    """The kept part of the spectrum of fields ``[B, *grid, D]``, there and back."""

    def __init__(self, grid: Sequence[int], modes: int | None) -> None:
        self.grid = tuple(grid)
        self.axes = tuple(range(1, 1 + len(self.grid)))
        self._sizes = (*self.grid[:-1], self.grid[-1] // 2 + 1)
        self._kept = kept_frequencies(grid, modes)
        self._on: dict[torch.device, list[Tensor]] = {}

    def _indices(self, device: torch.device) -> list[Tensor]:
        """The kept frequencies on a device, copied there once."""
        if device not in self._on:
            self._on[device] = [kept.to(device) for kept in self._kept]
        return self._on[device]

    @property
    def num_modes(self) -> int:
        return math.prod(len(k) for k in self._kept)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, *grid, D] -> [B, num_modes, D]``, complex."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        modes = torch.fft.rfftn(x, dim=self.axes, norm="ortho")
        for axis, kept in zip(self.axes, self._indices(x.device), strict=True):
            if len(kept) < modes.shape[axis]:
                modes = modes.index_select(axis, kept)
        return modes.flatten(1, -2)

    def inverse(self, modes: Tensor) -> Tensor:
        """``[B, num_modes, D] -> [B, *grid, D]``, real; frequencies that are not kept are zero."""
        modes = modes.unflatten(1, [len(k) for k in self._kept])
        for axis, kept, size in zip(self.axes, self._indices(modes.device), self._sizes, strict=True):
            if len(kept) < size:
                shape = (*modes.shape[:axis], size, *modes.shape[axis + 1 :])
                modes = modes.new_zeros(shape).index_copy(axis, kept, modes)
        out: Tensor = torch.fft.irfftn(modes, s=self.grid, dim=self.axes, norm="ortho")
        return out


class FourierMixing(nn.Module):
    """Two complex linear maps a head in Fourier space, GELU on real and imaginary parts between (AFNO, DPOT).

    ``forward(x [B, S, D]) -> [B, S, D]``, tokens of ``grid`` with its first axis outermost; the input is not added. The
    maps are the same for all frequencies, so the grid may have any size and two or three axes. Sources: arXiv
    2111.13587, 2403.03542. Where ``modes`` is smaller than the grid, published code drops the negative frequencies of
    the first axis; here both signs are kept. Where all are kept there is no difference.
    """

    output_parameters = ("w2", "b2")
    undecayed = ("b1", "b2")

    def __init__(self, dim: int, heads: int, grid: Sequence[int], modes: int | None) -> None:
        super().__init__()
        self.heads = heads
        self.spectrum = Spectrum(grid, modes)
        size = dim // heads
        self.w1, self.w2 = (nn.Parameter(torch.empty(2, heads, size, size)) for _ in range(2))
        self.b1, self.b2 = (nn.Parameter(torch.empty(2 * dim)) for _ in range(2))

    def seeded_reset(self, *key: Key) -> None:
        """Uniform between 0 and the inverse of a map's entries, as published: mixing starts as a small correction."""
        size = self.w1.shape[-1]
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                draw = torch.empty(parameter.shape).uniform_(0.0, size**-2.0, generator=generator(*key, name))
                parameter.copy_(draw)

    def _map(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """``(a + ib)(v + iw) + bias`` on rows ``[..., heads, (a, b)]``, as one real product."""
        real, imaginary = weight.to(x.dtype)
        pair = torch.cat((torch.cat((real, imaginary), -1), torch.cat((-imaginary, real), -1)), -2)
        return torch.einsum("...hi,hio->...ho", x, pair) + bias.to(x.dtype).view(self.heads, -1)

    def forward(self, x: Tensor) -> Tensor:
        modes = self.spectrum.forward(x.unflatten(1, self.spectrum.grid)).unflatten(-1, (self.heads, -1))
        rows = torch.cat((modes.real, modes.imag), -1)
        rows = self._map(F.gelu(self._map(rows, self.w1, self.b1)), self.w2, self.b2)
        real, imaginary = rows.chunk(2, -1)
        mixed = self.spectrum.inverse(torch.complex(real.contiguous(), imaginary.contiguous()).flatten(2))
        return mixed.flatten(1, -2).to(x.dtype)


class SpectralConvolution(nn.Module):
    """A complex linear map of the channels for each kept frequency (FNO, arXiv 2010.08895).

    ``forward(x [B, *grid, D]) -> [B, *grid, D]``.
    """

    def __init__(self, dim: int, grid: Sequence[int], modes: int) -> None:
        super().__init__()
        self.spectrum = Spectrum(grid, modes)
        self.weight = nn.Parameter(torch.empty(2, self.spectrum.num_modes, dim, dim))

    def seeded_reset(self, *key: Key) -> None:
        """Normal, so that a mode keeps its mean square."""
        with torch.no_grad():
            std = (2 * self.weight.shape[-1]) ** -0.5
            self.weight.copy_(torch.empty(self.weight.shape).normal_(0.0, std, generator=generator(*key, "weight")))

    def forward(self, x: Tensor) -> Tensor:
        modes = self.spectrum.forward(x)
        weight = torch.complex(*self.weight.to(modes.real.dtype))
        out = self.spectrum.inverse(torch.einsum("bmi,mio->bmo", modes, weight))
        return out.to(x.dtype)
