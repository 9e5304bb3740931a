"""From a path to the files of three splits, by one rule for all formats.

1. *Names.* A word of a file's name, or of the folder it lies in, states its split: ``train``, ``valid``, ``test`` and
   their kin (`shodh.data.formats.names`), in any place of the name. If some files state a split, all must. A split
   that nobody states gets its share of the training trajectories; without training files there is nothing to learn
   from, and the set is refused.
2. *Otherwise by trajectory.* What decides is the name of its file and its number in it, nothing else: a hash of the
   name without its last number is a point on a circle, each further trajectory, or file number, lies a golden angle on,
   and the splits are arcs as long as their shares. So neither the order of a listing nor other trajectories matter,
   and more of them change no former choice. From 13 trajectories of a file, or files of a numbered series, on each
   share of 10 % has some.
3. *Small sets.* No rule that looks at a trajectory alone can promise a held-out one among a few. A split that is left
   empty is given the trajectory next to its arc; that choice may change in a *new* run on more data, and in no other:
   a run keeps its record (`shodh.data.identity`), and ``former`` choices are never changed.
4. *Parts.* Files that continue each other in time (`shodh.data.formats.parts`) are in one split.
5. *A single trajectory* is split in time: three blocks of frames in that order, 5 % of the frames (at least one) left
   out between two of them, so that held-out frames do not continue what was trained on.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path

import numpy as np

from shodh.data.formats import SUFFIXES, FileHints, TrajectoryFile, open_file
from shodh.data.formats.names import SPLITS as SPLITS
from shodh.data.formats.names import Split as Split
from shodh.data.formats.names import natural_key, stated_split
from shodh.data.formats.parts import leaders
from shodh.data.formats.views import FileView
from shodh.core.errors import DataError

GAP = 0.05
# 2^64 over the golden ratio: multiples of it fill a circle of 2^64 points evenly, however many there are.
GOLDEN_ANGLE = 0x9E3779B97F4A7C15

# Stem of a file, and the number of a trajectory in it.
Key = tuple[str, int]
# By file: the split of each trajectory, or the frames of each split.
Former = Mapping[Path, Sequence[Split] | Mapping[Split, range]]


def find_files(*paths: Path, leave_out: Collection[Path] = ()) -> dict[Split | None, list[Path]]:
    """Data files of a set, but those left out, by the split that their names state, in natural order.

    Under None are those that state none. Files lie in a path or its folder ``data``, directly or one folder deeper if that folder's name states a split.

    Raises
    ------
    DataError
        Some names state a split and others do not, or a name states two.
    """
    names = {f: f.relative_to(data_folder(path)) for path in paths for f in list_files(path) if f not in leave_out}
    by_split: dict[Split | None, list[Path]] = {}
    for file in sorted(names, key=lambda f: (natural_key(names[f].as_posix()), f)):
        by_split.setdefault(stated_split(names[file]), []).append(file)
    if None in by_split and len(by_split) > 1:
        silent, others = by_split.pop(None), [found[0] for found in by_split.values()]
        raise DataError(
            f"{', '.join(map(str, paths))}: the names {_shown(silent)} state no split, and others do, such as "
            f"{_shown(others)}; put train, valid or test into each name, or move the files elsewhere"
        )
    return by_split


def list_files(path: Path) -> list[Path]:
    """Data files of a path: itself, those of its folder, and those of inner folders if one of these states a split."""
    if path.is_file():
        return [path]
    folder = data_folder(path)
    with os.scandir(folder) if folder.is_dir() else nullcontext(()) as entries:
        inner = {f: _data_files(f) for f in (folder / e.name for e in entries if e.is_dir())}
    states = any(found and stated_split(f.relative_to(folder) / "x") for f, found in inner.items())
    return [*_data_files(folder), *(file for found in inner.values() for file in found if states)]


def data_folder(path: Path) -> Path:
    """Where the files of a set lie: ``path``, its folder ``data`` if it has one, or the folder of a single file."""
    return path.parent if path.is_file() else path / "data" if (path / "data").is_dir() else path


def position(stem: str, number: int) -> float:
    """Place of a trajectory on the circle, in [0, 1)."""
    series, digits, rest = re.fullmatch(r"(.*?)(\d*)(\D*)", stem, re.DOTALL).groups()  # type: ignore[union-attr]
    start = int.from_bytes(hashlib.blake2b(f"{series}#{rest}".encode(), digest_size=8).digest(), "little")
    return (start + (int(digits or 0) + number) * GOLDEN_ANGLE) % 2**64 / 2**64


def deal(
    keys: Iterable[Key], shares: Mapping[Split, float], former: Mapping[Key, Split] | None = None
) -> dict[Key, Split]:
    """The split of each trajectory; see the module's docstring. What ``former`` holds is never changed."""
    wanted = [s for s in SPLITS if shares.get(s, 0.0) > 0]
    total = sum(shares[s] for s in wanted)
    ends = list(accumulate(shares[s] / total for s in wanted))
    places = {key: position(*key) for key in keys}
    former = former or {}

    def at(place: float) -> Split:
        return next((s for s, end in zip(wanted, ends) if place < end), wanted[-1])

    dealt = {key: former.get(key) or at(place) for key, place in places.items()}
    for split, end in zip(wanted, ends):
        held = Counter(dealt.values())
        if split not in held:
            middle = end - 0.5 * shares[split] / total
            free = [k for k in dealt if k not in former and (held[dealt[k]] > 1 or split == "train")]
            for key in sorted(free, key=lambda k: (_apart(places[k], middle), k))[:1]:
                dealt[key] = split
    return dealt


def time_blocks(frames: int, shares: Mapping[Split, float]) -> dict[Split, range]:
    """Blocks of frames of one trajectory, in the order of the splits, with gaps between them."""
    wanted = [s for s in SPLITS if shares.get(s, 0.0) > 0]
    gap = max(1, round(GAP * frames))
    usable = frames - gap * (len(wanted) - 1)
    total = sum(shares[s] for s in wanted)
    sizes = {s: max(1, round(usable * shares[s] / total)) for s in wanted}
    sizes[wanted[0]] = usable - sum(sizes[s] for s in wanted[1:])
    if sizes[wanted[0]] < 1:
        raise DataError(f"one trajectory of {frames} frames cannot be split into {wanted}; give the files in folders")
    blocks, start = {}, 0
    for split in wanted:
        blocks[split] = range(start, start + sizes[split])
        start += sizes[split] + gap
    return blocks


def open_splits(
    *paths: Path,
    format: str = "auto",
    hints: FileHints | None = None,
    shares: Sequence[float] = (0.8, 0.1, 0.1),
    former: Former | None = None,
    leave_out: Collection[Path] = (),
    opened: Mapping[Path, TrajectoryFile] | None = None,
) -> dict[Split, list[TrajectoryFile]]:
    """Open all files of a regime, by split; see the module's docstring.

    Parameters
    ----------
    paths : Path
        A folder, or one file; or several of them.
    format, hints
        As in `open_file`, for every file.
    shares : 3 numbers
        Of train, valid and test.
    former : mapping, optional
        Splits that files were given before, which they keep.
    leave_out : paths, optional
        Files that are not opened.
    opened : mapping, optional
        Files that are open already.

    Raises
    ------
    DataError
        If there are no files to train on, names contradict each other, or a file cannot be used.
    """
    found = find_files(*paths, leave_out=leave_out)
    if found and not found.get("train") and None not in found:
        raise DataError(
            f"{', '.join(map(str, paths))}: no training files; the names state {' and '.join(map(str, found))} alone: "
            f"{_shown([file for files in found.values() for file in files])}"
        )
    ready = opened or {}
    files = {s: [ready.get(p) or open_file(p, format, hints) for p in paths] for s, paths in found.items()}
    by_split = dict(zip(SPLITS, shares))
    stated: dict[Split, list[TrajectoryFile]] = {s: files.get(s, []) for s in SPLITS}
    if None not in files:
        by_split = {s: v for s, v in by_split.items() if s == "train" or (v > 0 and not stated[s])}
        if len(by_split) == 1 or not files:
            return stated
    dealt = _deal(files.get(None, stated.pop("train")), by_split, former or {})
    return {s: dealt.get(s, []) + stated.get(s, []) for s in SPLITS}


def _deal(
    files: Sequence[TrajectoryFile], shares: Mapping[Split, float], former: Former
) -> dict[Split, list[TrajectoryFile]]:
    result: dict[Split, list[TrajectoryFile]] = {split: [] for split in SPLITS}
    blocks = {path: kept for path, kept in former.items() if isinstance(kept, Mapping)}
    lists = {path: kept for path, kept in former.items() if not isinstance(kept, Mapping)}
    if blocks:
        files = [f for f in files if _add_blocks(f, blocks.get(f.path, {}), result)]
    first = leaders(files)
    keys = [[(files[first[i]].path.stem, n) for n in range(f.num_trajectories)] for i, f in enumerate(files)]
    known: dict[Key, Split] = {}
    for file, own in zip(files, keys):
        kept = lists.get(file.path, ())
        if kept and len(kept) != len(own):
            raise DataError(
                f"{file.path}: is read as {len(own)} trajectories, and was as {len(kept)} before; correct format or axes"
            )
        known |= dict(zip(own, kept))
    distinct = {key for own in keys for key in own}
    if len(distinct) == 1 and not (known or blocks) and _can_be_cut(files, shares):
        for file, block in _blocks_of_files(files, shares):
            _add_blocks(file, block, result)
        return result
    dealt = deal(distinct, shares, known)
    for file, own in zip(files, keys):
        splits = lists.get(file.path) or [dealt[key] for key in own]
        for split in SPLITS:
            chosen = [n for n, s in enumerate(splits) if s == split]
            if len(chosen) == len(own):
                result[split].append(file)
            elif chosen:
                result[split].append(FileView(file, chosen, range(file.num_frames)))
    return result


def _can_be_cut(files: Sequence[TrajectoryFile], shares: Mapping[Split, float]) -> bool:
    return sum(f.num_frames for f in files) > 1 and sum(share > 0 for share in shares.values()) > 1


def _add_blocks(
    file: TrajectoryFile, blocks: Mapping[Split, range], result: Mapping[Split, list[TrajectoryFile]]
) -> bool:
    """Add the blocks of frames of one trajectory to the splits; True if there are none."""
    for split, block in blocks.items():
        if len(block):
            result[split].append(FileView(file, (0,), block))
    return not blocks


def _blocks_of_files(
    files: Sequence[TrajectoryFile], shares: Mapping[Split, float]
) -> list[tuple[TrajectoryFile, dict[Split, range]]]:
    """The blocks of a trajectory that goes over several files; frames that two of them have are used once."""
    parts: list[tuple[TrajectoryFile, range]] = []
    last = -np.inf
    for file in sorted(files, key=lambda f: (float(np.min(f.time)), natural_key(f.path.name))):
        repeated = 0 if file.header.timeless else int((file.time <= last).sum())
        parts.append((file, range(repeated, file.num_frames)))
        last = max(last, float(np.max(file.time)))
    blocks = time_blocks(sum(len(frames) for _, frames in parts), shares)
    found, start = [], 0
    for file, frames in parts:
        own = {s: frames[max(0, b.start - start) : max(0, b.stop - start)] for s, b in blocks.items()}
        found.append((file, own))
        start += len(frames)
    return found


def _apart(a: float, b: float) -> float:
    return min((a - b) % 1.0, (b - a) % 1.0)


def _data_files(folder: Path) -> list[Path]:
    files = folder.iterdir() if folder.is_dir() and not folder.name.startswith(".") else ()
    return [p for p in files if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]


def _shown(files: Sequence[Path]) -> str:
    names = ["/".join(f.parts[-2:]) for f in files]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
