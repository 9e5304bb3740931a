"""Solve trajectories of the built-in regimes and write them as The Well HDF5 files."""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import h5py
import torch
from tqdm import tqdm

from shodh.cli import run_main
from shodh.data import (
    SPLITS,
    Split,
    WellFile,
    compute_statistics,
    remove_partial_files,
    write_stats,
    write_trajectories,
)
from shodh.errors import ConfigError, DataError
from shodh.physics import REGIMES, get_regime, parse_parameter
from shodh.seeding import stable_seed

SETTINGS = "generation_settings"

EPILOG = """\
examples:
  python tools/generate_data.py --regime open_channel porous_media --grid 32 --trajectories 16 --frames 12 \\
      --out data/demo
  python tools/generate_data.py --regime open_channel --grid 128 64 128 --trajectories 64 --frames 32 \\
      --out data/channel --device cuda --set open_channel.re_tau=360 open_channel.spin_up=5
  python tools/generate_data.py --regime porous_media --grid 64 --trajectories 32 --frames 16 --out data/rock \\
      --image berea.raw --image-shape 400 400 400 --image-dtype uint8 --pore-value 0

Run the same command again to go on after an interruption: finished files are kept.
Files: OUT/REGIME/data/{train,valid,test}/REGIME_<first trajectory>.hdf5 and OUT/REGIME/stats.yaml.

parameters for --set and their defaults:
"""


class OneLineParser(argparse.ArgumentParser):
    """Reports wrong usage like all other bad input: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")


@dataclass(frozen=True)
class Part:
    """The trajectories ``first .. first + count - 1`` of one regime, which share a file."""

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

    @property
    def files(self) -> set[Path]:
        return {part.path for part in self.parts}

    def existing(self) -> list[Path]:
        """Data files of the regime that are there, ours or not."""
        return sorted((self.folder / "data").glob(f"*/{self.regime.name}_*.hdf5"))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    lines = [f"  {name}.{key}={value}" for name, kind in REGIMES.items() for key, value in vars(kind()).items()]
    epilog, layout = EPILOG + "\n".join(lines), argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(description=__doc__, epilog=epilog, formatter_class=layout)
    parser.add_argument("--regime", nargs="+", required=True, metavar="NAME", help=f"of {', '.join(REGIMES)}")
    parser.add_argument("--grid", type=int, nargs="+", required=True, metavar="N", help="cells: one number, or x y z")
    parser.add_argument("--trajectories", type=int, required=True, help="of each regime, all splits together")
    parser.add_argument("--frames", type=int, required=True, help="snapshots of a trajectory")
    parser.add_argument("--out", type=Path, required=True, help="folder for the regimes' folders")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--split", type=float, nargs=3, default=(0.75, 0.125, 0.125), metavar=("TRAIN", "VALID", "TEST"),
        help="shares of the trajectories; each split gets at least one (default: 0.75 0.125 0.125)",
    )  # fmt: skip
    parser.add_argument(
        "--trajectories-per-file", type=int, default=4, metavar="N", help="solved together as one batch (default: 4)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="files solved side by side on a CPU (default: all cores)"
    )
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="REGIME.KEY=VALUE")
    parser.add_argument("--overwrite", action="store_true", help="replace files that were made with other settings")
    image = parser.add_argument_group("a voxel image as the geometry of porous_media")
    image.add_argument("--image", help=".npy, .raw or .tif file")
    image.add_argument("--image-shape", type=int, nargs=3, metavar=("X", "Y", "Z"), help="required for .raw")
    image.add_argument("--image-dtype", help="required for .raw, for example uint8, <u2 or >u2")
    image.add_argument("--pore-value", type=float, help="value of the pore voxels")
    return parser.parse_args(argv)


def regime_parameters(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Parameters by regime from ``--set`` and the options for images."""
    parameters: dict[str, dict[str, Any]] = {name: {} for name in args.regime}
    for setting in args.set:
        key, equals, text = setting.partition("=")
        name, dot, key = key.partition(".")
        if not (equals and dot):
            raise ConfigError(f"--set {setting!r}: expected REGIME.KEY=VALUE")
        if name not in parameters:
            raise ConfigError(f"--set {setting!r}: regime {name!r} is not among {', '.join(args.regime)}")
        parameters[name][key] = parse_parameter(name, key, text)
    options = {
        "image": args.image,
        "image_shape": tuple(args.image_shape) if args.image_shape else None,
        "image_dtype": args.image_dtype,
        "pore_value": args.pore_value,
    }
    given = {key: value for key, value in options.items() if value is not None}
    if given:
        if "porous_media" not in parameters:
            raise ConfigError("--image and its options need --regime porous_media")
        parameters["porous_media"] |= given
    return parameters


def split_sizes(trajectories: int, shares: Sequence[float]) -> dict[Split, int]:
    """Trajectories of each split: rounded shares, at least one each."""
    if trajectories < len(SPLITS):
        raise ConfigError(f"--trajectories {trajectories}: need at least 3, one for each of train, valid and test")
    if min(shares) < 0 or not 0.999 <= sum(shares) <= 1.001:
        raise ConfigError(f"--split {' '.join(map(str, shares))}: shares must be >= 0 and sum to 1")
    valid, test = (max(1, round(trajectories * share)) for share in shares[1:])
    train = trajectories - valid - test
    if train < 1:
        raise ConfigError(f"--split {' '.join(map(str, shares))} leaves no trajectory for training")
    return {"train": train, "valid": valid, "test": test}


def plan(args: argparse.Namespace) -> list[Job]:
    """All files to be made."""
    grid = tuple(args.grid * 3 if len(args.grid) == 1 else args.grid)
    if len(grid) != 3 or min(grid) < 4:
        raise ConfigError(f"--grid {' '.join(map(str, args.grid))}: expected one number or three, each at least 4")
    if args.frames < 1 or args.trajectories_per_file < 1:
        raise ConfigError("--frames and --trajectories-per-file must be at least 1")
    for name in args.regime:
        get_regime(name)
    if len(set(args.regime)) < len(args.regime):
        raise ConfigError(f"--regime {' '.join(args.regime)}: a regime is named twice")
    sizes = split_sizes(args.trajectories, args.split)
    parameters = regime_parameters(args)
    jobs = []
    for name in args.regime:
        regime = get_regime(name, **parameters[name])
        folder = args.out / name
        settings = {
            "regime": name,
            "grid": list(grid),
            "frames": args.frames,
            "trajectories": args.trajectories,
            "split": list(sizes.values()),
            "trajectories_per_file": args.trajectories_per_file,
            "seed": args.seed,
            "parameters": json.loads(json.dumps({k: v for k, v in vars(regime).items() if not k.startswith("_")})),
        }
        if getattr(regime, "image", ""):
            settings["image_sha256"] = checksum(regime.image)
        jobs.append(Job(regime, folder, settings, list(parts(name, folder, sizes, args.trajectories_per_file))))
    return jobs


def parts(name: str, folder: Path, sizes: dict[Split, int], per_file: int) -> Iterator[Part]:
    """Cut each split into files."""
    start = 0
    for split, size in sizes.items():
        for first in range(start, start + size, per_file):
            path = folder / "data" / split / f"{name}_{first:05d}.hdf5"
            yield Part(path, split, first, min(per_file, start + size - first))
        start += size


def checksum(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot read the image: {error.strerror}") from error


def clear(job: Job) -> None:
    """Remove files that this tool wrote for the regime with other settings."""
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
            found = json.loads(file.attrs.get(SETTINGS, "{}"))
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


def check_leftovers(job: Job) -> None:
    """Refuse data files that would be read together with ours although they are none."""
    strangers = [path for path in job.existing() if path not in job.files]
    if strangers:
        raise ConfigError(f"{strangers[0]}: was made with other settings; choose another --out, or --overwrite")


def check_space(jobs: Sequence[Job], pending: Sequence[Part], out: Path) -> None:
    """Refuse to start what cannot be stored."""
    nx, ny, nz = jobs[0].settings["grid"]
    frame = nx * ny * nz * 4 * (3 + 1)
    needed = sum(part.count for part in pending) * (jobs[0].settings["frames"] * frame + nx * ny * nz)
    free = shutil.disk_usage(out).free
    if needed > free:
        raise DataError(
            f"{out}: the data need {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; choose another --out"
        )


def solve(job: Job, part: Part, device: str, progress: Callable[[float], None]) -> None:
    """Solve the trajectories of one file and write it."""
    indices = range(part.first, part.first + part.count)
    seeds = [stable_seed(job.settings["seed"], job.regime.name, index) for index in indices]
    grid = tuple(job.settings["grid"])
    trajectories = job.regime.simulate(seeds, grid, job.settings["frames"], device=device, progress=progress)
    write_trajectories(part.path, trajectories, attributes={SETTINGS: json.dumps(job.settings)})


class Stopped(Exception):
    """The run was interrupted; raised inside a worker, which then tidies up."""


_channel: tuple[Any, Any, int]  # in a worker: its progress queue, the event that stops it, and its parent


def start_worker(queue: Any, stop: Any, parent: int) -> None:
    """Prepare a worker process."""
    global _channel
    _channel = (queue, stop, parent)
    queue.cancel_join_thread()  # unread progress must not hold up the end


def solve_in_worker(job: Job, part: Part) -> None:
    """`solve` on the CPU of a worker, reporting to the parent and ending with it."""
    queue, stop, parent = _channel

    def report(fraction: float) -> None:
        if stop.is_set() or os.getppid() != parent:
            raise Stopped
        queue.put((str(part.path), fraction))

    with one_thread():
        solve(job, part, "cpu", report)


@contextmanager
def one_thread() -> Iterator[None]:
    """Solve a file on one thread: sums then do not depend on the number of cores or workers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def solve_all(tasks: Sequence[tuple[Job, Part]], device: str, workers: int, bar: Bar) -> None:
    """Solve all files, several at once on the CPU."""
    if workers == 1 or len(tasks) < 2:
        with one_thread():
            for job, part in tasks:
                solve(job, part, device, functools.partial(bar.report, str(part.path)))
        return
    context = multiprocessing.get_context("spawn")
    queue, stop = context.Queue(), context.Event()
    pool = ProcessPoolExecutor(workers, context, start_worker, (queue, stop, os.getpid()))
    try:
        # Workers inherit that Ctrl-C is ignored: it is the parent's business, which then stops them.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        futures = {pool.submit(solve_in_worker, job, part) for job, part in tasks}
        signal.signal(signal.SIGINT, handler)
        while futures:
            finished, futures = wait(futures, timeout=0.2, return_when=FIRST_EXCEPTION)
            while not queue.empty():
                bar.report(*queue.get())
            for future in finished:
                future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed, perhaps for want of memory; use fewer --workers or "
            "--trajectories-per-file and run the same command again"
        ) from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


class Bar:
    """Progress over all trajectories, whatever the order in which files are solved."""

    def __init__(self, tasks: Sequence[tuple[Job, Part]]) -> None:
        self._weight = {str(part.path): part.count for _, part in tasks}
        self._done: dict[str, float] = {}
        total = sum(self._weight.values())
        bar_format = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        self._bar = tqdm(total=total, desc="trajectories", disable=None if total else True, bar_format=bar_format)

    def report(self, path: str, fraction: float) -> None:
        self._done[path] = fraction * self._weight[path]
        self._bar.update(sum(self._done.values()) - self._bar.n)

    def close(self) -> None:
        self._bar.close()


def pick_device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: no CUDA device was found; use --device cpu")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def cpu_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pick_workers(wanted: int | None, device: str, files: int) -> int:
    """Processes that solve files side by side: one on a GPU, as many as cores or files otherwise."""
    if wanted is not None and wanted < 1:
        raise ConfigError(f"--workers {wanted}: must be at least 1")
    if device != "cpu":
        return 1
    return max(1, min(wanted or cpu_cores(), files))


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    device = pick_device(args.device)
    jobs = plan(args)
    args.out.mkdir(parents=True, exist_ok=True)
    for job in jobs:
        remove_partial_files(job.folder)
        if args.overwrite:
            clear(job)
        check_leftovers(job)
    pending = [(job, part) for job in jobs for part in job.parts if not is_finished(part.path, job)]
    check_space(jobs, [part for _, part in pending], args.out)
    for job, _ in pending:
        (job.folder / "stats.yaml").unlink(missing_ok=True)
    bar = Bar(pending)
    try:
        solve_all(pending, device, pick_workers(args.workers, device, len(pending)), bar)
    finally:
        bar.close()
    for job in jobs:
        if not (job.folder / "stats.yaml").exists():
            train = sorted(part.path for part in job.parts if part.split == "train")
            write_stats(job.folder / "stats.yaml", compute_statistics(train, job.regime.schema))
        train, valid, test = job.settings["split"]
        made = sum(1 for other, _ in pending if other is job)
        sys.stdout.write(
            f"{job.folder}: {train} train, {valid} valid, {test} test trajectories of {args.frames} frames; "
            f"{made} of {len(job.parts)} files made now\n"
        )
    return 0


if __name__ == "__main__":
    run_main(main)
