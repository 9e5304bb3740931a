"""Counts of a trace of any length in bounded memory: one regime x expert table a split, layer and stretch of steps."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from shodh.core.errors import DataError
from shodh.moe.trace import RawRecord

MAX_BUCKETS = 512
MAX_CELLS = 1 << 26  # 512 MB of counts

NUMBERS = bytes(range(256)).translate(None, b"0123456789,")
DIGITS = b"0123456789"
Counts = dict[str, list[int]]
COUNTS = msgspec.json.Decoder(Counts)


class Series(NamedTuple):
    """Counts of one split and layer over time: ``counts [buckets, R, E]`` of the steps from ``steps [buckets]`` on.

    Only stretches with counts are there.
    """

    steps: np.ndarray
    counts: np.ndarray


class CountTables:
    """Adds up counts by (split, layer, stretch of steps).

    Stretches are ``width`` steps long. The width doubles, and neighbours are added up, whenever there would be more
    than `MAX_BUCKETS` of them or more than `MAX_CELLS` numbers; so memory does not depend on the number of records.
    Regimes and experts may appear at any time, and layers may have different numbers of experts.
    """

    def __init__(self) -> None:
        self.width = 1
        self.regimes: list[str] = []
        self.records = 0
        self.last_step = -1
        self._tables: dict[tuple[str, int], np.ndarray] = {}

    @property
    def splits(self) -> list[str]:
        """Splits with counts."""
        return sorted({split for (split, _), table in self._tables.items() if table.any()})

    def layers(self, split: str) -> list[int]:
        """Layers with counts."""
        return sorted(layer for (s, layer), table in self._tables.items() if s == split and table.any())

    def series(self, split: str, layer: int) -> Series:
        """Counts of a split and layer over time."""
        table = self._tables[split, layer]
        full = np.zeros((len(table), len(self.regimes), table.shape[2]), dtype=np.int64)
        full[:, : table.shape[1]] = table
        buckets = np.flatnonzero(full.any(axis=(1, 2)))
        return Series(buckets * self.width, full[buckets])

    def add(self, key: tuple[str, int], regimes: Sequence[str], steps: np.ndarray, counts: np.ndarray) -> None:
        """Add ``counts [N, R, E]`` of N records at ``steps [N]`` with these regimes."""
        if not len(steps):
            return
        last = int(steps.max())
        self.last_step = max(self.last_step, last)
        rows = self._rows(regimes)
        self._make_room(key, last, counts.shape[2])
        buckets = steps // self.width
        if (np.diff(buckets) < 0).any():
            order = np.argsort(buckets, kind="stable")
            buckets, counts = buckets[order], counts[order]
        starts = np.flatnonzero(np.diff(buckets, prepend=-1))
        sums = np.add.reduceat(counts, starts, axis=0)
        self._tables[key][np.ix_(buckets[starts], np.array(rows, dtype=np.int64), np.arange(counts.shape[2]))] += sums
        self.records += len(steps)

    def _rows(self, regimes: Sequence[str]) -> list[int]:
        for name in regimes:
            if name not in self.regimes:
                self.regimes.append(name)
        return [self.regimes.index(name) for name in regimes]

    def _make_room(self, key: tuple[str, int], step: int, experts: int) -> None:
        """Grow the table of ``key``, and widen the stretches of all as far as necessary."""
        while True:
            bucket = step // self.width
            old = self._tables.get(key, np.zeros((0, 0, 0), dtype=np.int64))
            needed = (bucket + 1, len(self.regimes), experts)
            shape = tuple(max(a, b) for a, b in zip(old.shape, needed, strict=True))
            others = sum(table.size for table in self._tables.values()) - old.size
            if bucket < MAX_BUCKETS and (others + np.prod(shape) <= MAX_CELLS or self.width > step):
                break
            self.width *= 2
            self._tables = {k: _halve(table) for k, table in self._tables.items()}
        if shape != old.shape:
            # Room for as many stretches again, so that a growing run is not copied at every step.
            spare = min(MAX_BUCKETS, 2 * shape[0]) if shape[0] > old.shape[0] else shape[0]
            grown = np.zeros((spare, *shape[1:]), dtype=np.int64)
            grown[tuple(slice(n) for n in old.shape)] = old
            self._tables[key] = grown


def _halve(table: np.ndarray) -> np.ndarray:
    """Neighbouring stretches added up."""
    if len(table) % 2:
        table = np.concatenate((table, np.zeros_like(table[:1])))
    return table[0::2] + table[1::2]


class _Shape(NamedTuple):
    """What records whose counts look alike but for the digits have in common."""

    regimes: list[str]
    experts: int
    plain: bool  # whether all digits in the text are those of counts


class RecordCounter:
    """Adds the counts of blocks of records to tables.

    Parsing every record's counts by itself would take most of the time. The counts of a block are instead parsed as
    one long line of numbers, and then told apart by their templates: the texts without digits, which are the same for
    records with the same regimes and number of experts.
    """

    def __init__(self, tables: CountTables) -> None:
        self._tables = tables
        self._shapes: dict[tuple[bytes, int], _Shape] = {}
        self._splits: dict[str, int] = defaultdict(itertools.count().__next__)

    def add(self, records: Sequence[RawRecord]) -> None:
        """Add records that are no sample records; raises `DataError` for counts of wrong length."""
        if not records:
            return
        raws = [bytes(r.counts) for r in records]
        templates = b"\n".join(raws).translate(None, DIGITS).split(b"\n")
        if len(templates) != len(raws):  # a line's end in a record; JSON allows it, nobody writes it
            templates = [raw.translate(None, DIGITS) for raw in raws]
        steps = np.array([r.step for r in records], dtype=np.int64)
        numbered: dict[bytes, int] = defaultdict(itertools.count().__next__)
        ids = (
            np.array([numbered[template] for template in templates]),
            np.array([r.num_experts for r in records]),
            np.array([r.layer for r in records]),
            np.array([self._splits[r.split] for r in records]),
        )
        # One number a group: tuples as keys would cost more than all the rest.
        sizes = [int(column.max()) + 1 for column in ids]
        groups, first, group = np.unique(np.ravel_multi_index(ids, sizes), return_index=True, return_inverse=True)
        shapes = [self._shape(templates[i], records[i].num_experts, raws[i]) for i in first]
        lengths = np.array([len(s.regimes) * s.experts * s.plain for s in shapes])[group]
        numbers, starts = _parse(raws, lengths)
        for number, (i, shape) in enumerate(zip(first, shapes)):
            members = np.flatnonzero(group == number)
            key = (records[i].split, records[i].layer)
            if not shape.plain:
                self._add_slowly(key, [raws[m] for m in members], shape.experts, steps[members])
                continue
            size = len(shape.regimes) * shape.experts
            rows = numbers[starts[members, None] + np.arange(size)]
            self._tables.add(key, shape.regimes, steps[members], rows.reshape(-1, len(shape.regimes), shape.experts))

    def _add_slowly(self, key: tuple[str, int], raws: Sequence[bytes], experts: int, steps: np.ndarray) -> None:
        for raw, step in zip(raws, steps):
            counts = decode_counts(raw, experts)
            rows = np.array(list(counts.values()), dtype=np.int64).reshape(1, len(counts), experts)
            self._tables.add(key, list(counts), step[None], rows)

    def _shape(self, template: bytes, experts: int, raw: bytes) -> _Shape:
        known = self._shapes.get((template, experts))
        if known is None:
            counts = decode_counts(raw, experts)
            known = _Shape(list(counts), experts, template == _template(counts, experts))
            self._shapes[template, experts] = known
        return known


def _parse(raws: Sequence[bytes], lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All numbers of the records that have a length, one after another, and where each record's numbers start."""
    texts = raws if lengths.all() else [raw for raw, length in zip(raws, lengths) if length]
    line = b",".join(texts).translate(None, NUMBERS)
    numbers = np.fromstring(line.decode(), dtype=np.int64, sep=",") if line else np.zeros(0, dtype=np.int64)
    assert len(numbers) == lengths.sum()
    return numbers, np.cumsum(lengths) - lengths


def decode_counts(raw: bytes | msgspec.Raw, experts: int) -> Counts:
    """Counts by regime; raises `DataError` if they are not counts of so many experts."""
    try:
        counts = COUNTS.decode(raw)
    except msgspec.MsgspecError as error:
        raise DataError(f"counts {bytes(raw)[:80]!r} are not lists of numbers by regime ({error})") from None
    for name, row in counts.items():
        if len(row) != experts or min(row, default=0) < 0:
            raise DataError(f"counts of {name!r} are {row[:8]}, expected {experts} numbers, none below 0")
    return counts


def _template(counts: Mapping[str, Sequence[int]], experts: int) -> bytes | None:
    """How such counts are written, without digits; None if names have characters that would be taken for numbers."""
    if not counts or any(re.search(r'[0-9,"\\]', name) or not name.isascii() for name in counts):
        return None
    commas = "," * (experts - 1)
    return ("{" + ",".join(f'"{name}":[{commas}]' for name in counts) + "}").encode()
