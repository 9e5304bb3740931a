"""A rank's own share of a run at one step, copied to host memory, and how it is written while the run goes on."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shodh.checkpoint.average import WeightAverage
from shodh.checkpoint.optimizer_state import MOMENTS
from shodh.checkpoint.shares import flat_tensors, places, shares
from shodh.core.distributed import rank
from shodh.core.files import sync_to_disk
from shodh.core.progress import get_on
from shodh.core.strict_json import dumps
from shodh.core.weights import AVERAGED, Layout, StoredTensor, persistent_buffers, plan_file, write_file

Range = tuple[str, int, Tensor]
Ranges = list[tuple[int, int, int]]  # of a file that all ranks write to: first byte, bytes, CRC-32


@dataclass(frozen=True)
class Snapshot:
    """What one rank writes of a checkpoint.

    Attributes
    ----------
    layout : Layout
        Of a file of weights; the same on every rank.
    buffers : dict, optional
        The persistent ones by name; rank 0 writes them, and the header.
    weights : list
        (name, start, float32 numbers) of the ranges of flat parameters that this rank keeps.
    averages : list, optional
        The same of the weights' average, where the run keeps one.
    moments : dict
        Both moments by ``<moment>/<name>``, flat; ``starts`` says where those of a name begin.
    updates : list of int
        Updates that the optimiser has made, once.
    """

    layout: Layout
    buffers: dict[str, Tensor] | None
    weights: list[Range]
    averages: list[Range] | None
    moments: dict[str, Tensor]
    starts: dict[str, int]
    updates: list[int]

    @classmethod
    def take(cls, engine: Any, average: WeightAverage | None = None) -> Snapshot:
        """Copy what this rank keeps to host memory: whole flat tensors at once, whatever lies in them."""
        optimizer = engine.optimizer.optimizer
        hosted: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}
        for flat in flat_tensors(engine):
            state = optimizer.state.get(flat, {})
            # Before the first update there are no moments: they are zeros.
            moments = {key: _to_host(state[key]) if key in state else torch.zeros(flat.shape) for key in MOMENTS}
            hosted[id(flat)] = (_to_host(flat), moments)
        weights, moments_of, starts = [], {}, {}
        averages = None
        if average is not None:
            averages = [(share.name, share.start, _to_host(average.of(share))) for share in shares(engine)]
        for share in shares(engine):
            if share.flat is None:
                weights.append((share.name, share.start, _to_host(share.model)))
                continue
            master, moments = hosted[id(share.flat)]
            weights.append((share.name, share.start, master[share.own]))
            starts[share.name] = share.start
            moments_of.update({f"{key}/{share.name}": moment[share.own] for key, moment in moments.items()})
        buffers = {name: _to_host(b) for name, b in persistent_buffers(engine.module)} if rank() == 0 else None
        updates = sorted({_updates(optimizer, flat) for flat in flat_tensors(engine)})
        return cls(_layout(engine), buffers, weights, averages, moments_of, starts, updates)

    @property
    def size(self) -> int:
        """Bytes of the whole checkpoint, of all ranks, but for headers and what describes it."""
        return self.layout.size * (1 if self.averages is None else 2) + len(MOMENTS) * self.layout.size

    def write(self, weights: Path, fragments: Path) -> dict[str, Ranges]:
        """Write into ``weights``, which all ranks write to, and ``fragments``, this rank's own; both reach the disk.

        An average of the weights has a file as ``weights``, beside it, with the same buffers. Returns what this rank
        has written of these two, by name.
        """
        written = {weights.name: self._write_ranges(weights, self.weights)}
        if self.averages is not None:
            written[AVERAGED] = self._write_ranges(weights.with_name(AVERAGED), self.averages)
        stored = {name: StoredTensor.of(moment, fragments) for name, moment in self.moments.items()}
        metadata = {"starts": dumps(self.starts), "updates": dumps(self.updates)}
        write_file(fragments, stored, dict.fromkeys(stored, torch.float32), metadata, progress=lambda done: get_on())
        return written

    def _write_ranges(self, path: Path, ranges: list[Range]) -> Ranges:
        offsets, written = self.layout.offsets, []
        buffers = self.buffers or {}
        parts = chain(
            [(0, self.layout.header)] if self.buffers is not None else [],
            ((offsets[name], _bytes(buffer)) for name, buffer in buffers.items()),
            ((offsets[name] + 4 * start, _bytes(numbers.float())) for name, start, numbers in ranges),
        )
        # Whoever comes first makes the file; nobody cuts it off.
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666), "wb") as file:
            if self.buffers is not None:
                file.truncate(self.layout.size)
            for offset, content in parts:
                file.seek(offset)
                file.write(content)
                written.append((offset, len(content), zlib.crc32(content)))
                get_on()
        sync_to_disk(path)
        return written


def _to_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _layout(engine: Any) -> Layout:
    """The file of this engine's model; the same on every rank."""
    shapes = {place.name: place.shape for place in places(engine.module)}
    dtypes = dict.fromkeys(shapes, torch.float32)
    for name, buffer in persistent_buffers(engine.module):
        shapes[name], dtypes[name] = tuple(buffer.shape), buffer.dtype
    return plan_file(shapes, dtypes)


def _bytes(tensor: Tensor) -> Any:
    return tensor.reshape(-1).contiguous().view(torch.uint8).numpy().data


def _updates(optimizer: Any, flat: Tensor) -> int:
    """Steps that a flat tensor has seen: torch counts them in its state, apex in its group."""
    state = optimizer.state.get(flat, {})
    if "step" in state:
        return int(state["step"])
    groups = [group for group in optimizer.param_groups if any(p is flat for p in group["params"])]
    return int(groups[0].get("step", 0)) if groups else 0
