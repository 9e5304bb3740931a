"""Random numbers that follow from a key and a place alone, drawn on the device that needs them.

A counter-based generator: value ``i`` of the stream ``seed`` is a hash of both, so it is the same on any rank and
device, in a batch of any size, and nothing is kept from one call to the next. The hash is SplitMix64 (Steele, Lea and
Flood, OOPSLA 2014, https://doi.org/10.1145/2660193.2660195) in wrapping 64-bit integers; its two halves are two uniform
numbers, and by Box and Muller two normal ones. These are computed in float64 and rounded to float32: what logarithms
and cosines of two devices differ by is lost in the rounding, but for about one number in 10^8.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_STEP, _FOLD = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03  # between places of a stream; between streams of a key
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = 2**64 - 1


def _signed(word: int) -> int:
    """The int64 with the bits of a 64-bit word."""
    return (word & _MASK) - ((word & 1 << 63) << 1)


def _right(word: Tensor, bits: int) -> Tensor:
    """Shift right, zeros from the left: torch's shift of an int64 repeats the sign."""
    return (word >> bits) & (2 ** (64 - bits) - 1)


def _mix(word: Tensor) -> Tensor:
    word = (word ^ _right(word, 30)) * _signed(_FIRST)
    word = (word ^ _right(word, 27)) * _signed(_SECOND)
    return word ^ _right(word, 31)


def fold(seeds: Tensor, number: int) -> Tensor:
    """New seeds ``[B]`` of seeds ``[B]`` and a number: streams of their own for the layers of a model."""
    return _mix(seeds + _signed((number + 1) * _FOLD))


def normal(seeds: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers ``[B, *shape]``, float32, of the streams ``seeds [B]``, int64."""
    count = math.prod(shape)
    place = torch.arange(1, (count + 1) // 2 + 1, device=seeds.device)
    word = _mix(seeds.unsqueeze(1) + place * _signed(_STEP))
    length, angle = ((half.double() + 0.5) * 2.0**-32 for half in (_right(word, 32), word & 0xFFFFFFFF))
    radius, angle = (-2 * length.log()).sqrt(), 2 * math.pi * angle
    pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), -1).float()
    return pairs.flatten(1)[:, :count].unflatten(1, tuple(shape)) if shape else pairs[:, 0, 0]


def normal_reference(seed: int, count: int) -> list[float]:
    """`normal` of one stream in whole numbers of any size and Python's floats, not rounded to float32."""
    values: list[float] = []
    for place in range(1, (count + 1) // 2 + 1):
        word = (seed + place * _STEP) & _MASK
        word = (word ^ word >> 30) * _FIRST & _MASK
        word = (word ^ word >> 27) * _SECOND & _MASK
        word ^= word >> 31
        length, angle = ((half + 0.5) * 2.0**-32 for half in (word >> 32, word & 0xFFFFFFFF))
        radius, angle = math.sqrt(-2 * math.log(length)), 2 * math.pi * angle
        values += [radius * math.cos(angle), radius * math.sin(angle)]
    return values[:count]
