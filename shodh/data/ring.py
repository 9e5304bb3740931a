"""Shared memory that worker processes write batches into and the main process hands out: the same again and again.

Fresh memory costs a page fault for every 4 KB, in both processes, which is more than reading the file. The main process
lends a slot together with the order for a batch; the slot is free again once the batch has come back and nobody holds a
tensor of it.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import multiprocessing
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

Tensors = dict[str, torch.Tensor]
_ALIGNMENT = 64
_numbers = itertools.count()


class SharedRing:
    """Slots for float32 tensors of given shapes, in memory that forked and spawned workers share.

    Parameters
    ----------
    shapes : mapping
        Of the tensors of a batch, by name.
    slots : int
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], slots: int) -> None:
        self._number, self._shapes = next(_numbers), dict(shapes)
        # Freed with its last user, even one that is killed; taken from a disk where /dev/shm is too small.
        self._memory = multiprocessing.RawArray(ctypes.c_byte, slots * self._slot_bytes() + _ALIGNMENT)
        self._lent: dict[int, Tensors] = {}
        self._used: list[list[weakref.ref[np.ndarray]]] = [[] for _ in range(slots)]
        _rings[self._number] = self

    def lend(self) -> int | None:
        """A free slot, in the main process; None if there is none."""
        for slot, arrays in enumerate(self._used):
            if all(array() is None for array in arrays):
                self._lent[slot] = self.tensors(slot)
                return slot
        return None

    def tensors(self, slot: int) -> Tensors:
        """The tensors of a slot, which is taken for as long as one of them, or a view of one, lives."""
        # Every process finds the memory at the same distance from a page.
        start = -ctypes.addressof(self._memory) % _ALIGNMENT + slot * self._slot_bytes()
        tensors = {}
        self._used[slot] = []
        for name, shape in self._shapes.items():
            array = np.frombuffer(memoryview(self._memory), np.float32, math.prod(shape), start).reshape(shape)
            self._used[slot].append(weakref.ref(array))
            tensors[name] = torch.from_numpy(array)  # its storage holds the array
            start += _aligned(array.nbytes)
        return tensors

    def take_back(self, slot: int) -> Tensors:
        """The tensors of a lent slot that has been filled."""
        return self._lent.pop(slot)

    def reset(self) -> None:
        """Forget what is lent; nobody may be writing."""
        self._lent.clear()

    def filled(self, slot: int, rest: list[dict[str, Any]]) -> Filled:
        """What a worker sends when it has filled a slot; arrives as a batch."""
        return Filled(self._number, slot, rest)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lent": {}, "_used": [[] for _ in self._used]}

    def _slot_bytes(self) -> int:
        return sum(_aligned(4 * math.prod(shape)) for shape in self._shapes.values())


class Filled:
    """A note on its way from a worker that a slot is filled; unpickled, it is the batch."""

    def __init__(self, ring: int, slot: int, rest: list[dict[str, Any]]) -> None:
        self._arguments = ring, slot, rest

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, self._arguments


_rings: weakref.WeakValueDictionary[int, SharedRing] = weakref.WeakValueDictionary()


def _arrived(ring: int, slot: int, rest: list[dict[str, Any]]) -> Tensors:
    collated: Tensors = torch.utils.data.default_collate(rest)
    return _rings[ring].take_back(slot) | collated


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
