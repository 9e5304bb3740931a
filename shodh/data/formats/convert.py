"""Files of any format to shards of The Well, streaming: one block of snapshots is in memory at a time.

A conversion is a plan of shards, made from the headers alone; each shard is written whole or not at all, and carries
the digest of its plan, so that a second run of the same command goes on where the first one stopped.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from shodh.data import hdf5
from shodh.data.formats import FileHints, TrajectoryFile
from shodh.data.formats.agreement import require_agreement
from shodh.data.formats.fingerprints import fingerprint
from shodh.data.formats.probe import probe
from shodh.data.formats.splits import SPLITS, Split, find_files, open_splits
from shodh.data.stats import compute_statistics, write_stats
from shodh.data.well import create_layout
from shodh.data.well_reader import WellFile
from shodh.core.errors import ConfigError, DataError
from shodh.schema.fields import Field, RegimeSchema, Trajectories
from shodh.core.files import atomic_path, remove_partial_files

SHARD_BYTES = 1 << 30
BLOCK_BYTES = 64 << 20
DIGEST = "conversion"

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Shard:
    """Trajectories ``(file, number in it)`` of one split that go into one file."""

    path: Path
    split: Split
    trajectories: tuple[tuple[TrajectoryFile, int], ...]
    fields: tuple[Field, ...]
    name: str

    @property
    def num_bytes(self) -> int:
        return sum(trajectory_bytes(file, self.fields) for file, _ in self.trajectories)

    def digest(self) -> str:
        """Of the sources' names and contents, and of everything that decides the shard's content."""
        parts: list[object] = [self.name, self.fields]
        for file, number in self.trajectories:
            what = (file.grid, file.lengths, file.boundary, file.time.tobytes())
            parts.append((file.path.name, *fingerprint(file.path).values(), number, *what))
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def is_finished(self) -> bool:
        """Whether the file is there; DataError if it is another one's."""
        if not self.path.exists():
            return False
        with hdf5.open_hdf5(self.path) as file:
            found = hdf5.single(file, DIGEST, str(self.path), None)
        if found != self.digest():
            raise DataError(f"{self.path}: is from other files or settings; remove it or choose another folder")
        return True


def trajectory_bytes(file: TrajectoryFile, fields: Sequence[Field]) -> int:
    """Size of one trajectory as float32."""
    channels = sum(f.num_components(len(file.grid)) * (1 if f.static else file.num_frames) for f in fields)
    return 4 * channels * math.prod(file.grid)


def plan_conversion(
    sources: Sequence[Path],
    out: Path,
    *,
    name: str | None = None,
    format: str = "auto",
    hints: FileHints | None = None,
    shares: Sequence[float] = (0.8, 0.1, 0.1),
    fields: Sequence[str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[Shard]:
    """The shards that make up ``out/data/{train,valid,test}``.

    Parameters
    ----------
    sources : paths
        Files or folders of one regime.
    out : Path
        Folder of the regime.
    name : str, optional
        Name of the data set; by default that of the first source.
    format, hints, shares
        See `shodh.data.formats.splits.open_splits`.
    fields : names, optional
        Fields to keep; all that the first file has if omitted.
    shard_bytes : int
        A shard holds at most this much, but at least one trajectory.

    Raises
    ------
    ConfigError
        If the name is none for a file.
    DataError
        If a source cannot be used, differs from the first (`shodh.data.formats.agreement`), lacks a field, or nothing
        in it changes in time; if the axes of an array are a guess that could as well be another.
    """
    for path in (p for found in find_files(*sources).values() for p in found):
        probe(path, format, hints)
    files = open_splits(*sources, format=format, hints=hints, shares=shares)
    every = [file for split in SPLITS for file in files[split]]
    if not every:
        absent = [f"{p} does not exist" for p in sources if not p.exists()]
        raise DataError(f"{', '.join(map(str, sources))}: there are no data files{': ' * bool(absent)}{', '.join(absent)}")
    first = every[0]
    kept = tuple(first.field(n) for n in fields) if fields else tuple(first.fields.values())
    if all(f.static for f in kept):
        raise DataError(f"{first.path}: nothing in it changes in time; there is nothing to write (geometry alone?)")
    for file in every:
        _check_agreement(file, first, kept)
        if file.header.doubts:
            raise DataError(file.header.doubts[0])
    stem = name or sources[0].resolve().stem
    if stem != Path(stem).name:
        raise ConfigError(f"name={stem!r} is part of the names of files; leave out slashes")
    shards = []
    for split in SPLITS:
        for number, group in enumerate(_groups(files[split], kept, shard_bytes)):
            path = out / "data" / split / f"{stem}_{number:05d}.hdf5"
            shards.append(Shard(path, split, tuple(group), kept, stem))
    return shards


def assumptions(shards: Sequence[Shard]) -> list[str]:
    """What the sources do not say and the shards will state as facts, each once."""
    return list(dict.fromkeys(note for shard in shards for file, _ in shard.trajectories for note in file.header.notes))


def convert(shards: Sequence[Shard], out: Path, progress: Progress = lambda _: None) -> int:
    """Write the shards that are not there yet, then ``stats.yaml``; return how many were written.

    Raises
    ------
    DataError
        If a value is not finite, a shard of other settings is in the way, or the disk is too small.
    """
    remove_partial_files(out)
    pending = []
    for shard in shards:
        if shard.is_finished():
            progress(shard.num_bytes)
        else:
            pending.append(shard)
    strangers = {p for split in SPLITS for p in (out / "data" / split).glob("*")} - {s.path for s in shards}
    if strangers:
        raise DataError(f"{sorted(strangers)[0]}: does not belong to this conversion; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    needed, free = sum(s.num_bytes for s in pending), shutil.disk_usage(out).free
    if needed > free:
        raise DataError(f"{out}: the shards need {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free")
    for shard in pending:
        write_shard(shard, progress)
    if pending or not (out / "stats.yaml").exists():
        train = [WellFile(s.path) for s in shards if s.split == "train"]
        write_stats(out / "stats.yaml", compute_statistics(train))
    return len(pending)


def write_shard(shard: Shard, progress: Progress = lambda _: None) -> None:
    """Write one shard, atomically."""
    first = shard.trajectories[0][0]
    layout = _layout(shard)
    attributes = {DIGEST: shard.digest(), "source_format": first.format}
    with atomic_path(shard.path) as temporary, h5py.File(temporary, "w", locking=False) as target:
        datasets = create_layout(target, layout, attributes)
        for position, (file, number) in enumerate(shard.trajectories):
            for field in shard.fields:
                _copy(file, number, field, datasets[field.name], position, progress)
            file.close()


def _copy(
    file: TrajectoryFile, number: int, field: Field, target: h5py.Dataset, position: int, progress: Progress
) -> None:
    components = field.num_components(len(file.grid))
    frame_bytes = 4 * components * math.prod(file.grid)
    step = max(1, BLOCK_BYTES // frame_bytes)
    for start in range(0, 1 if field.static else file.num_frames, step):
        frames = range(start, min(start + step, file.num_frames))
        block = np.empty((1 if field.static else len(frames), components, *file.grid), dtype=np.float32)
        file.read(field.name, number, frames, block[0] if field.static else block)
        values = np.moveaxis(block, 1, -1) if field.kind == "vector" else block[:, 0]
        if field.static:
            target[position] = values[0]
        else:
            target[position, frames.start : frames.stop] = values
        progress(block.nbytes)


def _layout(shard: Shard) -> Trajectories:
    """The shard without its values: arrays that have the right shape and no memory."""
    first = shard.trajectories[0][0]
    count, frames, ndim = len(shard.trajectories), first.num_frames, len(first.grid)
    values = {}
    for field in shard.fields:
        shape = (count, *(() if field.static else (frames,)), *first.grid, *((ndim,) * (field.kind == "vector")))
        values[field.name] = np.broadcast_to(np.float32(0), shape)
    times = np.stack([f.time if f.time.ndim == 1 else f.time[n] for f, n in shard.trajectories])
    time = times[0] if (times == times[0]).all() else times
    schema = RegimeSchema(shard.name, shard.fields, first.boundary)
    return Trajectories(schema, first.lengths, time, values, _parameters(shard))


def _parameters(shard: Shard) -> dict[str, float | np.ndarray]:
    """Parameters that every source has: a number where all agree."""
    first = shard.trajectories[0][0]
    found: dict[str, float | np.ndarray] = {}
    for name in first.parameters:
        if all(name in f.parameters for f, _ in shard.trajectories):
            values = np.array([np.ravel(f.parameters[name])[n if np.ndim(f.parameters[name]) else 0]
                               for f, n in shard.trajectories])  # fmt: skip
            found[name] = float(values[0]) if (values == values[0]).all() else values
    return found


def _groups(
    files: Sequence[TrajectoryFile], fields: Sequence[Field], shard_bytes: int
) -> list[list[tuple[TrajectoryFile, int]]]:
    """Consecutive trajectories of the same number of frames, as many as fit into a shard."""
    groups: list[list[tuple[TrajectoryFile, int]]] = []
    filled = 0
    for file in files:
        size = trajectory_bytes(file, fields)
        for number in range(file.num_trajectories):
            if not groups or filled + size > shard_bytes or groups[-1][0][0].num_frames != file.num_frames:
                groups.append([])
                filled = 0
            groups[-1].append((file, number))
            filled += size
    return groups


def _check_agreement(file: TrajectoryFile, first: TrajectoryFile, fields: Sequence[Field]) -> None:
    require_agreement(file, first, [f.name for f in fields])
    for field in fields:
        if file.field(field.name) != field:
            raise DataError(f"{file.path}: field {field.name!r} is of another kind than in {first.path}")
