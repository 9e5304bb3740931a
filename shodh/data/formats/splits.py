"""From a path to the files of three splits: folders and pairs are respected, everything else is split by one rule.

1. ``train``, ``valid`` (or ``val``) and ``test`` folders, directly or below ``data``; or files whose names end in
   ``_train``, ``_valid`` and ``_test``. The Well's folders are taken as they are; in other formats a split that is not
   there gets its share of the training trajectories.
2. Otherwise all trajectories, in the order of the files' names, are dealt out: the first three go to train, valid and
   test, and each further one to the split that lags behind its share most. So it depends on nothing but the
   trajectory's number, and more trajectories change no former choice.
3. A single trajectory is split in time: three blocks of frames in that order, 5 % of the frames (at least one)
   left out between two of them, so that held-out frames do not continue what was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from shodh.data.formats import SUFFIXES, FileHints, TrajectoryFile, open_file
from shodh.errors import DataError
from shodh.fields import Boundary, Field

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
GAP = 0.05

_ALIASES: dict[str, Split] = {"train": "train", "valid": "valid", "val": "valid", "test": "test"}


class FileView:
    """Some trajectories, or some frames, of a file, as a `TrajectoryFile`."""

    def __init__(self, file: TrajectoryFile, trajectories: Sequence[int], frames: range) -> None:
        self.path = file.path
        self._file, self._trajectories, self._frames = file, tuple(trajectories), frames

    @property
    def format(self) -> str:
        return self._file.format

    @property
    def fields(self) -> dict[str, Field]:
        return self._file.fields

    @property
    def grid(self) -> tuple[int, ...]:
        return self._file.grid

    @property
    def lengths(self) -> tuple[float, ...]:
        return self._file.lengths

    @property
    def spacing(self) -> tuple[float, ...]:
        return self._file.spacing

    @property
    def boundary(self) -> tuple[Boundary, ...]:
        return self._file.boundary

    @property
    def num_trajectories(self) -> int:
        return len(self._trajectories)

    @property
    def num_frames(self) -> int:
        return len(self._frames)

    @property
    def time(self) -> np.ndarray:
        time = self._file.time
        return (time if time.ndim == 1 else time[list(self._trajectories)])[..., self._frames]

    @property
    def parameters(self) -> Mapping[str, float | np.ndarray]:
        chosen = list(self._trajectories)
        return {n: v if np.ndim(v) == 0 else np.asarray(v)[chosen] for n, v in self._file.parameters.items()}

    @property
    def notes(self) -> tuple[str, ...]:
        return self._file.notes

    def field(self, name: str) -> Field:
        """One field of the file."""
        return self._file.field(name)

    def read(
        self,
        name: str,
        trajectory: int,
        frames: range,
        out: np.ndarray,
        *,
        finite: bool = True,
        shift: float = 0.0,
        scale: float = 1.0,
    ) -> None:
        """Read frames of the view; see `TrajectoryFile.read`."""
        if frames and not (0 <= min(frames) and max(frames) < self.num_frames):
            raise IndexError(f"frames {frames} of {self.num_frames} in a part of {self.path}")
        first, step = self._frames.start, frames.step
        shifted = range(first + frames.start, first + frames.stop, step)
        local = self._trajectories[trajectory]
        self._file.read(name, local, shifted, out, finite=finite, shift=shift, scale=scale)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def open_splits(
    path: Path,
    *,
    format: str = "auto",
    hints: FileHints | None = None,
    shares: Sequence[float] = (0.8, 0.1, 0.1),
) -> dict[Split, list[TrajectoryFile]]:
    """Open all files of a regime, by split; see the module's docstring.

    Parameters
    ----------
    path : Path
        A folder, or one file.
    format, hints
        As in `open_file`, for every file.
    shares : 3 numbers
        Of train, valid and test.

    Raises
    ------
    DataError
        If there are no files to train on, or one of them cannot be used.
    """
    paths = find_files(path)
    opened: dict[Split | None, list[TrajectoryFile]] = {
        split: [open_file(p, format, hints) for p in found] for split, found in paths.items()
    }
    loose = opened.pop(None, [])
    given: dict[Split, list[TrajectoryFile]] = {s: opened.get(s, []) for s in SPLITS}
    if loose:
        return _deal(loose, dict(zip(SPLITS, shares)))
    train = given["train"]
    lacking = [s for s in SPLITS if not given[s]]
    if not train or not lacking or train[0].format == "well":
        return given
    wanted = {s: share for s, share in zip(SPLITS, shares) if s in ("train", *lacking)}
    return given | _deal(train, wanted)


def find_files(path: Path) -> dict[Split | None, list[Path]]:
    """Data files below ``path`` by split; under None those that are not split yet."""
    if path.is_file():
        return {None: [path]}
    folder = path / "data" if (path / "data").is_dir() else path
    by_folder: dict[Split | None, list[Path]] = {}
    for name, split in _ALIASES.items():
        if (folder / name).is_dir():
            by_folder[split] = by_folder.get(split, []) + _data_files(folder / name)
    if by_folder:
        return by_folder
    loose = _data_files(folder) if folder.is_dir() else []
    by_name: dict[Split | None, list[Path]] = {}
    for file in loose:
        by_name.setdefault(_ALIASES.get(file.stem.lower().rsplit("_", 1)[-1]), []).append(file)
    return by_name if "train" in by_name and None not in by_name else {None: loose} if loose else {}


def deal(count: int, shares: Mapping[Split, float]) -> list[Split]:
    """The split of each of ``count`` trajectories; a longer list begins like a shorter one."""
    wanted = [s for s in SPLITS if shares.get(s, 0.0) > 0]
    total = sum(shares[s] for s in wanted)
    dealt: list[Split] = []
    counts = dict.fromkeys(wanted, 0)
    for number in range(count):
        behind = {s: shares[s] / total * (number + 1) - counts[s] for s in wanted}
        chosen = wanted[number] if number < len(wanted) else max(wanted, key=lambda s: behind[s])
        counts[chosen] += 1
        dealt.append(chosen)
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


def _deal(files: Sequence[TrajectoryFile], shares: Mapping[Split, float]) -> dict[Split, list[TrajectoryFile]]:
    counts = [f.num_trajectories for f in files]
    if sum(counts) == 1 and files[0].num_frames > 1 and sum(s > 0 for s in shares.values()) > 1:
        blocks = time_blocks(files[0].num_frames, shares)
        return {split: [FileView(files[0], (0,), block)] for split, block in blocks.items()}
    dealt = deal(sum(counts), shares)
    result: dict[Split, list[TrajectoryFile]] = {split: [] for split in shares}
    start = 0
    for file, count in zip(files, counts):
        part = dealt[start : start + count]
        start += count
        for split in shares:
            chosen = [i for i, s in enumerate(part) if s == split]
            if len(chosen) == count:
                result[split].append(file)
            elif chosen:
                result[split].append(FileView(file, chosen, range(file.num_frames)))
    return result


def _data_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
