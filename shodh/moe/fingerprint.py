"""What identifies the operator that moves a sample, and forgets its state: the cross-spectrum of consecutive frames.

A linear operator with constant coefficients multiplies each wave ``F u0`` by a factor of its own. The phase of that
factor is transport and dispersion, its modulus growth and decay; the state, which it is a factor of, cancels::

    2 conj(F u0) F u1 / (|F u0|^2 + |F u1|^2)      and      (|F u1|^2 - |F u0|^2) / (|F u0|^2 + |F u1|^2)

A quadratic term drives waves by other waves, which cancels on average over states: two Burgers equations of opposite
flux have one cross-spectrum. What tells them apart is the cross-spectrum of the square of a state with the part of the
next one that is not linear in it::

    conj(F u0^2) (F u1 - h F u0) / sqrt(|F u0^2|^2 |F u1|^2)      with      h = conj(F u0) F u1 / |F u0|^2

Its imaginary part is of fluxes, its real part of sources. Numerators and denominators are summed over pairs of frames
and over waves of like length and direction, so that the size depends on neither grid nor history. All features have one
scale, and need no statistics to be compared.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import torch
from torch import Tensor

WAVES = 4  # Largest wave number along an axis.
BANDS = (1, 2, 4)  # Largest wave number of each band, by the largest component of a wave.
CHANNELS = 8  # Of more channels, runs of consecutive ones are taken together.
FLOOR = 1e-3  # Of the mean energy of a bin, added to the energy of each: weaker ones say nothing.
STILL = 1e-10  # Mean square of a fluctuation or a change over that of values which rounding leaves of equal ones.
_TINY = 1e-30


def fingerprint_size(channels: int, ndim: int) -> int:
    """Features of `fingerprint`."""
    return min(channels, CHANNELS) * (5 * num_bins(ndim) + 3)


def fingerprint(frames: Tensor, periodic: Tensor, exists: Tensor | None = None) -> Tensor:
    """Features of each sample, all between -1 and 1: ``[B, T, C, *grid] -> [B, F]``, float32.

    They do not change when a channel is multiplied by a positive number or, along periodic axes, the sample is moved.
    Of each channel: real and imaginary part of the cross-spectrum, the growth, and real and imaginary part of what the
    square has, by direction and band; the mean over its root mean square, by half, because it is of the state; the mean
    change over the root mean square of the change; and the change over the fluctuation.

    Parameters
    ----------
    frames : Tensor [B, T, C, *grid]
        At least two, oldest first, in two or three dimensions.
    periodic : Tensor [B, axes], bool
        Other axes end: there a Hann window takes the ends away, where what enters and leaves is not the operator's.
    exists : Tensor [B, C], bool, optional
        Channels that a sample has (all); others, and constant ones, have zeros.
    """
    x = frames.detach().float()
    axes = tuple(range(3, x.ndim))
    if exists is not None:
        x = torch.where(exists.reshape(len(x), 1, -1, *(1,) * len(axes)), x, 0.0)
    x = x / x.abs().amax((1, *axes), keepdim=True).clamp(min=_TINY)  # Squares are then of a size that float32 has.
    square, mean = x.square().mean(axes), x.mean(axes)
    x = x - mean.view(*mean.shape, *(1,) * len(axes))
    varies, changes = x.square().mean(axes), x.diff(dim=1).square().mean(axes)
    total, moved = varies.sum(1), mean.diff(dim=1)
    there = (total > STILL * square.sum(1)).float()

    x = x * (there / total.clamp(min=_TINY)).sqrt().view(len(x), 1, -1, *(1,) * len(axes))
    square_of_x = x.square() - x.square().mean(axes, keepdim=True)
    spectrum, of_square = _spectrum(x, periodic), _spectrum(square_of_x, periodic)[:, :-1]
    old, new = spectrum[:, :-1], spectrum[:, 1:]
    bins = _bins_of_waves(x.shape[3:], x.device)[1]
    linear, known, found = (_binned(a.conj() * b, bins) for a, b in ((old, new), (of_square, old), (of_square, new)))
    before, after, energy = (_binned(part.real.square() + part.imag.square(), bins) for part in (old, new, of_square))
    quadratic = found - linear / _raised(before) * known
    quadratic = quadratic / (_raised(energy).sqrt() * _raised(after).sqrt())
    linear = 2 * linear / _raised(before + after)
    growth = (after - before) / _raised(before + after)
    parts = (linear.real, linear.imag, growth, quadratic.real, quadratic.imag)
    rates = (
        0.5 * mean.mean(1) / square.mean(1).clamp(min=_TINY).sqrt(),
        moved.mean(1) / (changes + moved.square() + STILL * square[:, 1:]).mean(1).clamp(min=_TINY).sqrt(),
        (changes.mean(1) / (2 * (varies[:, 1:] + varies[:, :-1])).mean(1).clamp(min=_TINY)).sqrt(),
    )
    means = _grouped(torch.stack(rates, 2) * there.unsqueeze(2)) / _grouped(there.unsqueeze(2)).clamp(min=1.0)
    return torch.cat((*parts, means), 2).flatten(1)


def _spectrum(x: Tensor, periodic: Tensor) -> Tensor:
    """The waves of ``[B, T, C, *grid]`` that are of a bin: ``[B, T, C, W]``, complex.

    So few of them that a product with their cosines and sines, axis by axis, is less work than a whole transform.
    """
    out = x.flatten(1, 2)
    for axis in reversed(range(x.ndim - 3)):
        whole, tapered = _waves(x.shape[3 + axis], x.device)
        waves = torch.where(periodic[:, axis, None, None], whole, tapered)
        out = out.movedim(2 + axis, -1)
        shape, rows = out.shape[:-1], out.flatten(1, -2)
        if rows.is_complex():
            rows = rows @ waves
        else:
            rows = torch.complex(rows @ waves.real, rows @ waves.imag)
        out = rows.view(*shape, -1).movedim(-1, 2 + axis)
    return out.flatten(2)[..., _bins_of_waves(x.shape[3:], x.device)[0]].unflatten(1, x.shape[1:3])


def _binned(waves: Tensor, bins: Tensor) -> Tensor:
    """Sums over pairs of frames, the waves of a bin and grouped channels: ``[B, T, C, W] -> [B, G, bins]``."""
    return _grouped(waves.sum(1) @ bins.to(waves.dtype))


def _raised(energy: Tensor) -> Tensor:
    return energy + FLOOR * energy.mean(-1, keepdim=True) + _TINY


def _grouped(values: Tensor) -> Tensor:
    """Sums over the runs of channels that are taken together: ``[B, C, ...] -> [B, G, ...]``."""
    channels = values.shape[1]
    if channels <= CHANNELS:
        return values
    groups = torch.tensor_split(values, CHANNELS, 1)
    return torch.stack([group.sum(1) for group in groups], 1)


def _numbers(cells: int) -> range:
    """Wave numbers along an axis: those that the grid resolves."""
    most = min(WAVES, cells // 2)
    return range(-most, most + 1)


@lru_cache
def _waves(cells: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``exp(-2 pi i k x / n) / sqrt(n)`` by cell and wave number, ``[n, numbers]``, without and with a Hann window."""
    number, cell = torch.tensor(_numbers(cells)), torch.arange(cells).double().unsqueeze(1)
    wave = torch.exp(-2j * math.pi * number * cell / cells) / cells**0.5
    window = torch.sin(math.pi * (cell + 0.5) / cells).square()
    return wave.to(device, torch.complex64), (wave * window).to(device, torch.complex64)


@lru_cache
def _bins(ndim: int) -> dict[tuple[int, ...], int]:
    """Bin of each wave, one of two opposite ones, by band and nearest direction: along an axis, or a diagonal.

    There are four directions in two dimensions, thirteen in three.
    """
    keys: dict[tuple[int, ...], tuple[int, ...]] = {}
    for wave in itertools.product(range(-WAVES, WAVES + 1), repeat=ndim):
        size = max(map(abs, wave))
        direction = tuple((k > 0) - (k < 0) if 2 * abs(k) >= size else 0 for k in wave)
        if any(wave) and direction > (0,) * ndim:
            keys[wave] = (next(n for n, last in enumerate(BANDS) if size <= last), *direction)
    numbers = {key: n for n, key in enumerate(sorted(set(keys.values())))}
    return {wave: numbers[key] for wave, key in keys.items()}


def num_bins(ndim: int) -> int:
    """Bands times directions."""
    return len(set(_bins(ndim).values()))


@lru_cache
def _bins_of_waves(grid: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Which of all waves are of a bin, ``[W]``, and 1 where one is of which, ``[W, bins]``.

    Of two opposite waves, which say the same, one is. A bin may have none on a small grid; one cell has none at all.
    """
    bins = _bins(len(grid))
    waves = [(row, bins[k]) for row, k in enumerate(itertools.product(*map(_numbers, grid))) if k in bins]
    rows, numbers = torch.tensor(waves, dtype=torch.long).view(-1, 2).unbind(1)
    table = torch.nn.functional.one_hot(numbers, num_bins(len(grid))).float()
    return rows.to(device), table.to(device)
