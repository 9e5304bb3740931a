"""Files that hold the same trajectories one after the other in time: they may not be in different splits."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from shodh.data.formats.base import TrajectoryFile
from shodh.data.formats.names import natural_key, words

# Before a number, where the files do not say their times.
PART_WORDS = frozenset({"part", "slab", "segment", "seg", "piece", "chunk"})


def leaders(files: Sequence[TrajectoryFile]) -> list[int]:
    """For each file the number of the one that its trajectories begin in: its own, unless it is a later part.

    Parts have as many trajectories and frames that follow each other, overlapping by less than half, and their names
    differ in one number (``run3_part0``, ``run3_part1``), or in numbers that go with the times (``t1_50``,
    ``t51_100``); names of JHTDB cutouts are free. In files without times the number after a word like part tells.
    """
    order = sorted(range(len(files)), key=lambda i: (_span(files[i])[0], natural_key(files[i].path.name)))
    leader = list(range(len(files)))
    for group in _candidates(files, order):
        last = group[0]
        for i in group[1:]:
            if _follows(files[i], files[last]):
                first, second = sorted((leader[i], leader[last]), key=order.index)
                leader = [first if n == second else n for n in leader]
            last = i
    return leader


def _span(file: TrajectoryFile) -> tuple[float, float]:
    return float(np.min(file.time[..., 0])), float(np.max(file.time[..., -1]))


def _follows(file: TrajectoryFile, former: TrajectoryFile) -> bool:
    if file.header.timeless:
        return True
    (a, b), (c, d) = _span(former), _span(file)
    return c > a and b - c < 0.5 * min(b - a, d - c) + 1e-9 * (d - a)


def _candidates(files: Sequence[TrajectoryFile], order: Sequence[int]) -> list[list[int]]:
    """Files, in the order of their times, that may be parts of the same trajectories."""
    alike: dict[object, list[int]] = {}
    for i in order:
        pieces = tuple(re.split(r"\d+", files[i].path.stem))
        kind = "jhtdb" if files[i].format == "jhtdb" else (files[i].header.timeless, pieces)
        alike.setdefault((kind, files[i].num_trajectories), []).append(i)
    found = []
    for members in alike.values():
        starts = {i: _span(files[i])[0] for i in members}
        timeless = files[members[0]].header.timeless
        if len(members) == 1 or (len(set(starts.values())) == 1 and not timeless):
            continue
        if files[members[0]].format == "jhtdb":
            found.append(members)
            continue
        numbers = {i: re.findall(r"\d+", files[i].path.stem) for i in members}
        for dropped in _drops(files[members[0]], numbers, starts):
            groups: dict[tuple[str, ...], list[int]] = {}
            for i in members:
                kept = tuple(n for j, n in enumerate(numbers[i]) if j not in dropped)
                groups.setdefault(kept, []).append(i)
            found += [g for g in groups.values() if len(g) > 1]
    return found


def _drops(file: TrajectoryFile, numbers: dict[int, list[str]], starts: dict[int, float]) -> list[set[int]]:
    """Numbers of a name, by their positions, that may count parts in time."""
    positions = range(len(next(iter(numbers.values()))))
    if file.header.timeless:
        pieces = re.split(r"\d+", file.path.stem)
        return [{j} for j in positions if (words(pieces[j]) or [""])[-1] in PART_WORDS]
    timed = {j for j in positions if len({(n[j], starts[i]) for i, n in numbers.items()})
             == len({n[j] for n in numbers.values()})}  # fmt: skip
    return [timed, *({j} for j in positions if {j} != timed)]
