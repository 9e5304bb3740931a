"""What a file holds and what is wrong with it: fields, storage, ranges, divergence, assumptions, advice."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from pydantic import BaseModel, FiniteFloat, TypeAdapter

from shodh.data import hdf5
from shodh.data.checks import looks_inverted, mask_problem
from shodh.data.formats import SUFFIXES, FileHints, TrajectoryFile, open_file
from shodh.data.formats.agreement import differences
from shodh.data.formats.arrays import ArrayFile
from shodh.data.formats.probe import probe
from shodh.data.formats.splits import SPLITS, Split, find_files
from shodh.data.stats import Moments
from shodh.data.well_reader import WellFile
from shodh.core.errors import DataError, ShodhError
from shodh.schema.fields import Boundary

# A field whose divergence is below this part of its gradient is taken as solenoidal: float32 gives 1e-6 and less,
# compressible or differently discretised ones 1e-2 and more.
SOLENOIDAL = 1e-3
FRAMES_EACH = 8
MASK_NAMES = ("solid", "mask")

# Root attribute of files of `shodh.generation`: JSON, for each trajectory what `Solved` says.
DIAGNOSTICS = "solution_diagnostics"

Progress = Callable[[float], None]


class Solved(BaseModel):
    """What the generator measured of one trajectory, all frames, before it stored it.

    Attributes
    ----------
    ranges : {field: (minima, maxima)}
        One a component.
    energy : {name: (first, last)}
    divergence : {field: largest divergence over gradient}
    solver : {name: value}
        Diagnostics of the solver.
    """

    ranges: dict[str, tuple[list[FiniteFloat], list[FiniteFloat]]]
    energy: dict[str, tuple[FiniteFloat, FiniteFloat]]
    divergence: dict[str, FiniteFloat]
    solver: dict[str, FiniteFloat]


@dataclass
class FieldReport:
    """One field. Ranges are over the finite values of the frames that were read; vectors have one per component."""

    name: str
    kind: str
    units: str
    static: bool
    placement: str
    dtype: str
    chunks: list[int] | None
    compression: str | None
    minimum: list[float] = field(default_factory=list)
    maximum: list[float] = field(default_factory=list)
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    not_finite: int = 0
    divergence: dict[str, float] | None = None
    solenoidal: str | None = None


@dataclass
class FileReport:
    """One file: what it is, its fields, what was assumed, and its problems with what to do."""

    path: str
    format: str
    bytes: int
    grid: list[int]
    lengths: list[float]
    spacing: list[float]
    boundary: list[str]
    trajectories: int
    frames: int
    time_first: float
    time_last: float
    time_step: float | None
    parameters: dict[str, Any]
    fields: list[FieldReport]
    assumed: list[str]
    problems: list[str]
    frames_read: int
    solved: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class FolderReport:
    """A folder: its files by split, the first one in full, and problems of the others with the files' names.

    `frames_read` of all `frames` of all trajectories: those whose values were read.
    """

    path: str
    files: dict[str, int]
    trajectories: dict[str, int]
    first: FileReport | None
    problems: list[str]
    frames_read: int
    frames: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect_file(
    path: Path,
    format: str = "auto",
    hints: FileHints | None = None,
    *,
    every_frame: bool = False,
    progress: Progress = lambda _: None,
) -> FileReport:
    """Describe one file; one snapshot is in memory at a time.

    Parameters
    ----------
    path, format, hints
        See `shodh.data.formats.open_file`.
    every_frame : bool
        Read everything; otherwise up to 8 frames, evenly spaced, of up to 8 trajectories.
    progress : callable, optional
        Called with the fraction done.

    Raises
    ------
    DataError
        If the file cannot be opened. What can be opened but not read becomes a problem in the report.
    """
    probe(path, format, hints)
    file = open_file(path, format, hints)
    return _report(file, _sample(file, 10**9 if every_frame else FRAMES_EACH), progress)


def _report(file: TrajectoryFile, sampled: list[tuple[int, int]], progress: Progress) -> FileReport:
    """The report of an open file from the snapshots ``(trajectory, frame)``."""
    path, times = file.path, np.atleast_2d(file.time)
    time, steps = times[0], np.diff(times)
    uniform = steps.size > 0 and np.allclose(steps, steps[:, :1], rtol=1e-3)
    report = FileReport(
        path=str(path),
        format=file.format,
        bytes=path.stat().st_size,
        grid=list(file.grid),
        lengths=list(file.lengths),
        spacing=list(file.spacing),
        boundary=list(file.boundary),
        trajectories=file.num_trajectories,
        frames=file.num_frames,
        time_first=float(time[0]),
        time_last=float(time[-1]),
        time_step=float(steps[0, 0]) if uniform else None,
        parameters={n: np.asarray(v).tolist() for n, v in file.parameters.items()},
        fields=[],
        assumed=list(file.header.notes),
        problems=list(file.header.doubts),
        frames_read=len(sampled),
    )
    if steps.size and not (steps > 0).all():
        report.problems.append("times do not increase; correct them or state time_step")
    elif steps.size and not uniform:
        report.problems.append("times are not evenly spaced: a model that steps in frames sees different steps")
    names = list(file.fields)
    for number, name in enumerate(names):
        report.fields.append(
            _inspect_field(file, name, sampled, report.problems, lambda f, n=number: progress((n + f) / len(names)))  # type: ignore[misc]
        )
    report.solved = _solved(file, report.problems)
    _advise(file, report)
    _check_masks(file, report)
    file.close()
    return report


def inspect_folder(
    path: Path,
    format: str = "auto",
    hints: FileHints | None = None,
    *,
    every_frame: bool = False,
    progress: Progress = lambda _: None,
) -> FolderReport:
    """Describe a folder of files: the first one as `inspect_file`; of all others the problems that it does not have.

    Values of the others are read in the first and last frame of their first and last trajectory, or in every frame.
    """
    found = find_files(path)
    if not any(found.values()):
        raise DataError(f"{path}: there are no data files ({', '.join(SUFFIXES)}), directly or in train, valid, test")
    files: dict[str, int] = {}
    trajectories: dict[str, int] = {}
    first: TrajectoryFile | None = None
    report: FileReport | None = None
    problems: list[str] = []
    read = frames = 0
    everything = [(split, file) for split, group in found.items() for file in group]
    for number, (split, file_path) in enumerate(everything):
        key = split or "not split"
        files[key] = files.get(key, 0) + 1
        try:
            probe(file_path, format, hints)
            file = open_file(file_path, format, hints)
        except ShodhError as error:
            problems.append(str(error))
            continue
        trajectories[key] = trajectories.get(key, 0) + file.num_trajectories
        each = 10**9 if every_frame else FRAMES_EACH if first is None else 2
        own = _report(file, _sample(file, each), lambda f, n=number: progress((n + f) / len(everything)))  # type: ignore[misc]
        read, frames = read + own.frames_read, frames + file.num_trajectories * file.num_frames
        if first is None or report is None:
            first, report = file, own
        else:
            named = (p if str(file_path) in p else f"{file_path}: {p}" for p in own.problems if p not in report.problems)
            problems += [*_differences(file, first), *named]
    problems += _lacking(found)
    return FolderReport(str(path), files, trajectories, report, problems, read, frames)


def _lacking(found: dict[Split | None, list[Path]]) -> list[str]:
    lacking = [] if None in found else [s for s in SPLITS if not found.get(s)]
    if "train" in lacking:
        return ["there is no split 'train', and nothing to learn from"]
    return [f"there is no split {s!r}; it gets its share of the training trajectories" for s in lacking]


def _differences(file: TrajectoryFile, first: TrajectoryFile) -> list[str]:
    found = differences(file, first) + [f"{file.path}: has no field {n!r}" for n in first.fields if n not in file.fields]
    if file.num_frames != first.num_frames:
        found.append(f"{file.path}: has {file.num_frames} frames a trajectory, and {first.path} {first.num_frames}")
    return found


def _sample(file: TrajectoryFile, limit: int) -> list[tuple[int, int]]:
    """``(trajectory, frame)`` to read, the first and last among them."""

    def spread(count: int) -> list[int]:
        return sorted({round(i) for i in np.linspace(0, count - 1, min(count, limit))})

    return [(n, t) for n in spread(file.num_trajectories) for t in spread(file.num_frames)]


def _inspect_field(
    file: TrajectoryFile, name: str, sampled: list[tuple[int, int]], problems: list[str], progress: Progress
) -> FieldReport:
    field = file.field(name)
    dtype, chunks, compression = _storage(file, name)
    report = FieldReport(name, field.kind, field.units, field.static, field.placement, dtype, chunks, compression)
    components = field.num_components(len(file.grid))
    low, high = np.full(components, np.inf), np.full(components, -np.inf)
    moments, meters = Moments(components), _Divergence(file.spacing, file.boundary)
    places = list(dict.fromkeys((n, 0) for n, _ in sampled)) if field.static else sampled
    out = np.empty((components, *file.grid), dtype=np.float32)
    for number, (trajectory, frame) in enumerate(places):
        try:
            file.read(name, trajectory, range(frame, frame + 1), out if field.static else out[None], finite=False)
        except DataError as error:
            problems.append(str(error))
            break
        values = out.reshape(components, -1)
        good = np.isfinite(values)
        report.not_finite += int(values.size - good.sum())
        low = np.minimum(low, values.min(axis=1, where=good, initial=np.inf))
        high = np.maximum(high, values.max(axis=1, where=good, initial=-np.inf))
        if good.all():
            moments.add(values)
            if field.kind == "vector" and components == len(file.grid) > 1:
                meters.add(out.astype(np.float64))
        progress((number + 1) / len(places))
    finite = [float(v) for v in (*low, *high) if math.isfinite(v)]
    if len(finite) == 2 * components:
        report.minimum, report.maximum = low.tolist(), high.tolist()
    if moments.count:
        report.mean, report.std = moments.mean.tolist(), moments.std.tolist()
    if meters.used:
        report.divergence = meters.result()
        report.solenoidal = _solenoidal(report.divergence)
    if report.not_finite:
        problems.append(f"field {name!r} holds {report.not_finite} values that are NaN or infinite; remove the samples")
    if moments.count and not any(report.std) and not field.static:
        problems.append(f"field {name!r} is constant; leave it out")
    return report


class _Divergence:
    """Divergence over gradient, both root mean squares, of the same values read as collocated and as staggered."""

    def __init__(self, spacing: tuple[float, ...], boundary: tuple[Boundary, ...]) -> None:
        self._spacing, self._boundary = spacing, boundary
        self._squares = np.zeros(4)
        self.used = False

    def add(self, vector: np.ndarray) -> None:
        """A snapshot [D, *grid]; cells at the ends of axes that are not periodic are left out."""
        grid = vector.shape[1:]
        if min(grid) < 3:
            return
        self.used = True
        inner = tuple(slice(None) if b == "periodic" else slice(1, -1) for b in self._boundary)
        for position, central in ((0, True), (2, False)):
            total, gradient = np.zeros(grid), np.zeros(grid)
            for axis, h in enumerate(self._spacing):
                below = np.roll(vector[axis], 1, axis)
                above = np.roll(vector[axis], -1, axis) if central else vector[axis]
                slope = (above - below) / (2 * h if central else h)
                total += slope
                gradient += np.square(slope)
            self._squares[position] += np.square(total[inner]).sum()
            self._squares[position + 1] += gradient[inner].sum()

    def result(self) -> dict[str, float]:
        pairs = {"collocated": self._squares[:2], "staggered": self._squares[2:]}
        return {name: float(np.sqrt(d / g)) if g > 0 else 0.0 for name, (d, g) in pairs.items()}


def _solenoidal(divergence: dict[str, float]) -> str:
    best = min(divergence, key=lambda name: divergence[name])
    return best if divergence[best] < SOLENOIDAL else "no"


def _solved(file: TrajectoryFile, problems: list[str]) -> dict[str, Any] | None:
    """What the generator measured, over all trajectories: `Solved` with least and largest values; None if unsaid."""
    if not isinstance(file, WellFile):
        return None
    try:
        with hdf5.open_hdf5(file.path) as opened:
            stored = hdf5.text(hdf5.attribute(opened, DIAGNOSTICS, str(file.path), ""))
        found = TypeAdapter(list[Solved]).validate_json(stored) if stored else []
        if not found:
            return None
        ranges = {name: np.array([one.ranges[name] for one in found]) for name in found[0].ranges}
        energies = {name: np.array([one.energy[name] for one in found]) for name in found[0].energy}
        solver = {name: [one.solver[name] for one in found] for name in found[0].solver}
        return {
            "ranges": {n: [v[:, 0].min(0).tolist(), v[:, 1].max(0).tolist()] for n, v in ranges.items()},
            "energy": {n: {"first": v[:, 0].tolist(), "last": v[:, 1].tolist()} for n, v in energies.items()},
            "divergence": {n: max(one.divergence[n] for one in found) for n in found[0].divergence},
            "solver": {n: [min(v), max(v)] for n, v in solver.items()},
        }
    except (DataError, KeyError, ValueError):
        problems.append(f"the attribute {DIAGNOSTICS!r} is damaged; what the solver measured is not shown")
        return None


def _storage(file: TrajectoryFile, name: str) -> tuple[str, list[int] | None, str | None]:
    """Type, chunks and compression of the (first) dataset of a field."""
    if isinstance(file, WellFile):
        dataset = file.stored(name).dataset
    elif isinstance(file, ArrayFile):
        dataset = file.header.fields[name].arrays[0][0]
    else:
        return "float32", None, None
    if not h5py.is_hdf5(file.path):
        return "as stored", None, None
    with hdf5.open_hdf5(file.path) as opened:
        stored = hdf5.dataset(opened, dataset, str(file.path))
        filters = [w for w in (stored.compression, "shuffle" if stored.shuffle else None) if w]
        return str(stored.dtype), list(stored.chunks) if stored.chunks else None, "+".join(filters) or None


def _advise(file: TrajectoryFile, report: FileReport) -> None:
    """Problems that are no damage: what would be slow, or cannot be trained on as it is."""
    interleaved = isinstance(file, ArrayFile) and any(
        f.time_is_inner or "n" in f.axes[1:] for f in file.header.fields.values()
    )
    if interleaved:
        report.problems.append("frames are interleaved in the file and slow to read; run tools/convert_data.py on it")
    elif any(f.compression not in (None, "shuffle") for f in report.fields):
        report.problems.append("fields are compressed, which reads 4-10x slower; run tools/convert_data.py on it")
    elif any(f.chunks and not f.static and _is_not_a_snapshot(file, f) for f in report.fields):
        report.problems.append("chunks are no whole snapshots, which reads slower; run tools/convert_data.py on it")
    if len(file.grid) == 1:
        report.problems.append("one space dimension; models need two or three")
    bad = [n for n in file.grid if n % 8]
    if bad and len(file.grid) > 1:
        report.problems.append(f"the tokenizer divides axes by 8, and {bad} of the grid {list(file.grid)} do not fit")
    if file.num_frames < 2:
        report.problems.append("a single frame: there is no next one to predict")
    for f in report.fields:
        if f.divergence and f.solenoidal == "collocated":
            report.problems.append(
                f"field {f.name!r} is solenoidal by central differences; averaged onto faces it stays so off walls"
            )


def _check_masks(file: TrajectoryFile, report: FileReport) -> None:
    """Problems of static scalars that are masks by their name, or by holding 0 and one other value."""
    for f in report.fields:
        if f.static and f.kind == "scalar" and not f.not_finite and file.format != "rock":
            try:
                report.problems += _mask_problems(file, f.name)
            except DataError as error:
                if str(error) not in report.problems:
                    report.problems.append(str(error))


def _mask_problems(file: TrajectoryFile, name: str) -> list[str]:
    """The first problem of a mask over the first trajectories; or that it looks inverted beside the first's vectors."""
    mask = np.empty((1, *file.grid), dtype=np.float32)
    problems: list[str] = []
    for trajectory in range(min(file.num_trajectories, FRAMES_EACH)):
        file.read(name, trajectory, range(1), mask)
        values = set(np.unique(mask).tolist())
        problem = mask_problem(mask) if name in MASK_NAMES or (0.0 in values and len(values) == 2) else None
        if problem:
            return [f"static field {name!r} of trajectory {trajectory} {problem}"]
        if trajectory == 0 and values == {0.0, 1.0}:
            problems = [
                f"static field {name!r} looks inverted as a mask, which is 1 in solids: {other.name!r} is zero where it "
                "is 0 and not where it is 1"
                for other in file.fields.values()
                if other.kind == "vector" and not other.static and looks_inverted(mask[0], other, _last(file, other.name))
            ]
    return problems


def _last(file: TrajectoryFile, name: str) -> np.ndarray:
    """The last frame of a vector in the first trajectory, ``[D, *grid]``."""
    out = np.empty((1, len(file.grid), *file.grid), dtype=np.float32)
    file.read(name, 0, range(file.num_frames - 1, file.num_frames), out, finite=False)
    return out[0]


def _is_not_a_snapshot(file: TrajectoryFile, report: FieldReport) -> bool:
    values = math.prod(file.grid)
    return math.prod(report.chunks or [0]) not in (values, values * len(file.grid))
