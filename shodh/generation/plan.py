"""Which files a data set consists of, and which of them are there already."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py

from shodh.core.errors import ConfigError, DataError
from shodh.core.reading import parse_json
from shodh.core.strict_json import to_json
from shodh.data import SPLITS, Split, WellFile, remove_partial_files
from shodh.generation.variation import Interval
from shodh.physics import REGIMES, get_regime

# Root attribute of every file that holds the settings it was made with.
SETTINGS = "generation_settings"
# Number of the initial state of a split's first trajectory.
FIRST: dict[Split, int] = {"train": 0, "valid": 1_000_000, "test": 2_000_000}
# Names that stand for every regime of a dimension.
GROUPS = {"all2d": 2, "all3d": 3}


@dataclass(frozen=True)
class Request:
    """A data set that a user asks for.

    Parameters
    ----------
    regimes : names, or "all2d" and "all3d"
    grid : ints
        One number for all axes of every regime, or one an axis.
    trajectories : int
        Of each regime, all splits together.
    frames : int
    out : Path
        Folder of the regimes' folders.
    seed : int
    split : 3 numbers, optional
        Of train, valid and test: shares, each of at least one trajectory, or numbers of trajectories, which sum to all.
        By default `default_split`.
    per_file : int
        Trajectories that share a file.
    parameters : mapping
        ``{regime: {parameter: value}}``.
    vary : mapping
        ``{regime: {parameter: Interval}}``.
    """

    regimes: Sequence[str]
    grid: Sequence[int]
    trajectories: int
    frames: int
    out: Path
    seed: int = 0
    split: Sequence[float] | None = None
    per_file: int = 4
    parameters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    vary: Mapping[str, Mapping[str, Interval]] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """Trajectories of one regime that share a file; their initial states are ``first .. first + count - 1``."""

    path: Path
    split: Split
    first: int
    count: int


@dataclass(frozen=True)
class Job:
    """All files of one regime."""

    regime: Any
    folder: Path
    settings: dict[str, Any]
    parts: list[Part]
    vary: dict[str, Interval]

    @property
    def files(self) -> set[Path]:
        return {part.path for part in self.parts}

    def existing(self) -> list[Path]:
        """Data files of the regime that are there, ours or not."""
        return sorted((self.folder / "data").glob(f"*/{self.regime.name}_*.hdf5"))


def expand_regimes(names: Sequence[str]) -> list[str]:
    """Names of regimes, with "all2d" and "all3d" replaced by all regimes of that dimension."""
    if len(set(names)) < len(names):
        raise ConfigError(f"--regime {' '.join(names)}: a regime is named twice")
    found: list[str] = []
    for name in names:
        if name in GROUPS:
            found += [n for n in REGIMES if get_regime(n).schema.ndim == GROUPS[name]]
        else:
            found.append(get_regime(name).name)
    return list(dict.fromkeys(found))


def grid_for(name: str, grid: Sequence[int], ndim: int) -> tuple[int, ...]:
    """Cells along each axis of a regime of ``ndim`` dimensions."""
    shown = " ".join(map(str, grid))
    if min(grid) < 4:
        raise ConfigError(f"--grid {shown}: expected one number, or one an axis, each at least 4")
    if len(grid) not in (1, ndim):
        raise ConfigError(f"--grid {shown}: {name} has {ndim} dimensions; give one number, or {ndim}")
    return tuple(grid) * ndim if len(grid) == 1 else tuple(grid)


TEST = 8  # trajectories that carry an interval


def default_split(trajectories: int) -> dict[Split, int]:
    """An eighth for validation, and for the test, which has at least `TEST`, or a third of a small set."""
    valid, test = max(1, round(trajectories / 8)), max(1, round(trajectories / 8), min(TEST, trajectories // 3))
    return {"train": trajectories - valid - test, "valid": valid, "test": test}


def split_sizes(trajectories: int, split: Sequence[float] | None = None) -> dict[Split, int]:
    """Trajectories of each split; ``split`` as in `Request`."""
    if trajectories < len(SPLITS):
        raise ConfigError(f"--trajectories {trajectories}: need at least 3, one for each of train, valid and test")
    if split is None:
        return default_split(trajectories)
    shown = f"--split {' '.join(f'{share:g}' for share in split)}"
    if sum(split) == trajectories and all(float(share).is_integer() and share >= 1 for share in split):
        train, valid, test = (int(share) for share in split)
        return {"train": train, "valid": valid, "test": test}
    if min(split) < 0 or not 0.999 <= sum(split) <= 1.001:
        raise ConfigError(
            f"{shown}: expected shares, >= 0 and with the sum 1, or numbers of trajectories, >= 1 and with the sum "
            f"{trajectories} of --trajectories"
        )
    valid, test = (max(1, round(trajectories * share)) for share in split[1:])
    train = trajectories - valid - test
    if train < 1:
        raise ConfigError(f"{shown} leaves no trajectory for training")
    return {"train": train, "valid": valid, "test": test}


def plan(request: Request) -> list[Job]:
    """All files to be made, a job a regime."""
    if request.frames < 1 or request.per_file < 1:
        raise ConfigError("--frames and --trajectories-per-file must be at least 1")
    sizes = split_sizes(request.trajectories, request.split)
    jobs = []
    for name in expand_regimes(request.regimes):
        regime: Any = get_regime(name, **request.parameters.get(name, {}))
        vary = dict(request.vary.get(name, {}))
        for key, interval in vary.items():
            check_varied(name, key, interval, request.parameters.get(name, {}))
        settings = {
            "regime": name,
            "grid": list(grid_for(name, request.grid, regime.schema.ndim)),
            "frames": request.frames,
            "trajectories": request.trajectories,
            "split": list(sizes.values()),
            "trajectories_per_file": request.per_file,
            "seed": request.seed,
            "parameters": to_json({k: v for k, v in vars(regime).items() if not k.startswith("_")}),
        }
        if vary:
            settings["vary"] = {key: [interval.low, interval.high] for key, interval in vary.items()}
        if getattr(regime, "image", ""):
            settings["image_sha256"] = checksum(regime.image)
        folder = request.out / name
        jobs.append(Job(regime, folder, settings, list(cut(name, folder, sizes, request.per_file)), vary))
    return jobs


def check_varied(name: str, key: str, interval: Interval, fixed: Mapping[str, Any]) -> None:
    """Refuse to vary what is fixed too, is no number, or cannot take the ends of the interval."""
    if key in fixed:
        raise ConfigError(f"{name}.{key} is both set and varied; choose one")
    kinds = {f.name: f.type for f in dataclasses.fields(REGIMES[name])}
    if kinds.get(key, "float") != "float":
        raise ConfigError(f"{name}.{key} is of type {kinds[key]}; only numbers with a fraction can be varied")
    if key == "frame_interval" or key.startswith("length"):
        # Seen by `join` too, but not where every file holds a single trajectory.
        raise ConfigError(
            f"{name}: {key} changes the box or the times of the frames and cannot be varied within a data set; use one "
            "data set for each value"
        )
    for end in (interval.low, interval.high):
        get_regime(name, **{**fixed, key: end})


def cut(name: str, folder: Path, sizes: Mapping[Split, int], per_file: int) -> Iterator[Part]:
    """Cut each split into files, which are numbered through.

    Each split has initial states of its own, by `FIRST`: a larger set has those of a smaller one in the same splits.
    """
    start = 0
    for split, size in sizes.items():
        for number in range(0, size, per_file):
            path = folder / "data" / split / f"{name}_{start + number:05d}.hdf5"
            yield Part(path, split, FIRST[split] + number, min(per_file, size - number))
        start += size


def trajectory_name(index: int) -> str:
    """``"3 of test"``: a trajectory by its place in its split, from the number of its initial state."""
    split, first = max(((s, f) for s, f in FIRST.items() if f <= index), key=lambda item: item[1])
    return f"{index - first} of {split}"


def checksum(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot read the image: {error.strerror}") from error


def pending_parts(jobs: Sequence[Job], *, overwrite: bool = False) -> list[tuple[Job, Part]]:
    """Files that are still to be made; tidies up what killed runs left, and with ``overwrite`` other settings' files.

    Raises
    ------
    ConfigError
        If there are files that were made with other settings.
    """
    for job in jobs:
        remove_partial_files(job.folder)
        if overwrite:
            clear(job)
        strangers = [path for path in job.existing() if path not in job.files]
        if strangers:
            raise ConfigError(f"{strangers[0]}: was made with other settings; choose another --out, or --overwrite")
    return [(job, part) for job in jobs for part in job.parts if not is_finished(part.path, job)]


def clear(job: Job) -> None:
    """Remove files that were written for the regime with other settings."""
    for path in job.existing():
        if path not in job.files or not is_finished(path, job, refuse=False):
            path.unlink()
            (job.folder / "stats.yaml").unlink(missing_ok=True)


def is_finished(path: Path, job: Job, *, refuse: bool = True) -> bool:
    """Whether ``path`` is a good file with these settings; other settings are refused, a damaged file is not kept."""
    if not path.exists():
        return False
    try:
        WellFile(path)
        with h5py.File(path, "r", locking=False) as file:
            found = parse_json(str(file.attrs.get(SETTINGS, "{}")), str(path), DataError)
    except (DataError, OSError, ValueError):
        return False
    if found == job.settings:
        return True
    if not refuse:
        return False
    key = next(k for k in [*job.settings, *found] if found.get(k) != job.settings.get(k))
    raise ConfigError(
        f"{path}: was made with {key}={found.get(key)}, now asked for {key}={job.settings.get(key)}; "
        "choose another --out, or --overwrite"
    )


def check_space(pending: Sequence[tuple[Job, Part]], out: Path) -> None:
    """Refuse to start what cannot be stored."""
    needed = 0
    for job, part in pending:
        cells = 4
        for n in job.settings["grid"]:
            cells *= n
        schema, frames = job.regime.schema, job.settings["frames"]
        snapshots = sum(f.num_components(schema.ndim) * (1 if f.static else frames) for f in schema.fields)
        needed += part.count * cells * snapshots
    free = shutil.disk_usage(out).free
    if needed > free:
        raise DataError(
            f"{out}: the data need {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; choose another --out"
        )
