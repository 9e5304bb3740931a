"""Solving the files of a data set, on one device or in several processes side by side."""

from __future__ import annotations

import functools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from shodh.core.errors import ConfigError, DataError
from shodh.core.seeding import stable_seed
from shodh.core.strict_json import dumps
from shodh.data import compute_statistics, write_stats, write_trajectories
from shodh.data.formats.inspection import DIAGNOSTICS
from shodh.generation.checking import Report, check
from shodh.generation.plan import SETTINGS, Job, Part, trajectory_name
from shodh.generation.variation import join
from shodh.schema.fields import Trajectories

Progress = Callable[[str, float], None]


def solve(job: Job, part: Part, device: str, progress: Callable[[float], None]) -> None:
    """Solve the trajectories of one file and write it."""
    indices = range(part.first, part.first + part.count)
    trajectories, reports = simulate(job, indices, device, progress)
    write_trajectories(
        part.path,
        trajectories,
        attributes={SETTINGS: dumps(job.settings), DIAGNOSTICS: dumps(reports)},
    )


def simulate(
    job: Job, indices: Sequence[int], device: str, progress: Callable[[float], None]
) -> tuple[Trajectories, list[Report]]:
    """These trajectories, one batch or one by one where parameters vary, and what they span; see `check`."""
    seeds = [stable_seed(job.settings["seed"], job.regime.name, index) for index in indices]
    grid, frames = tuple(job.settings["grid"]), job.settings["frames"]
    if not job.vary:
        trajectories = job.regime.simulate(seeds, grid, frames, device=device, progress=progress)
        return trajectories, check(job.regime, trajectories, [trajectory_name(i) for i in indices])
    varied = {key: [interval.draw(seed, key) for seed in seeds] for key, interval in job.vary.items()}
    solved: list[Trajectories] = []
    reports: list[Report] = []
    for index, seed in enumerate(seeds):
        regime = replace(job.regime, **{key: values[index] for key, values in varied.items()})

        def report(fraction: float, done: int = index) -> None:
            progress((done + fraction) / len(seeds))

        solved.append(regime.simulate([seed], grid, frames, device=device, progress=report))
        reports += check(regime, solved[-1], [trajectory_name(indices[index])])
    return join(solved, varied), reports


class Stopped(Exception):
    """The run was interrupted; raised inside a worker, which then tidies up."""


_channel: tuple[Any, Any]  # in a worker: its progress queue, and the event that stops it


def start_worker(queue: Any, stop: Any) -> None:
    """Prepare a worker process."""
    global _channel
    _channel = (queue, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # also of a server that was started elsewhere
    queue.cancel_join_thread()  # unread progress must not hold up the end
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent is gone, killed without a chance to say so; the next run removes its rest."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def solve_in_worker(job: Job, part: Part) -> None:
    """`solve` on the CPU of a worker, reporting to the parent."""
    queue, stop = _channel

    def report(fraction: float) -> None:
        if stop.is_set():
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


def solve_all(tasks: Sequence[tuple[Job, Part]], device: str, workers: int, report: Progress) -> None:
    """Solve all files, several at once on the CPU; ``report(path, fraction)`` is told of the progress of each."""
    for job, _ in tasks:
        (job.folder / "stats.yaml").unlink(missing_ok=True)
    if workers == 1 or len(tasks) < 2:
        with one_thread():
            for job, part in tasks:
                solve(job, part, device, functools.partial(report, str(part.path)))
        return
    # Workers are forks of a server that imports torch once, not of this process, whose threads may hold locks.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    queue, stop = context.Queue(), context.Event()
    pool = ProcessPoolExecutor(workers, context, start_worker, (queue, stop))
    try:
        # The server and its workers inherit that Ctrl-C is ignored: it is the parent's business, which then stops them.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        futures = {pool.submit(solve_in_worker, job, part) for job, part in tasks}
        signal.signal(signal.SIGINT, handler)
        while futures:
            finished, futures = wait(futures, timeout=0.2, return_when=FIRST_EXCEPTION)
            while not queue.empty():
                report(*queue.get())
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


def write_missing_statistics(jobs: Sequence[Job]) -> None:
    """Write ``stats.yaml`` of the training split where it is missing."""
    for job in jobs:
        if not (job.folder / "stats.yaml").exists():
            train = sorted(part.path for part in job.parts if part.split == "train")
            write_stats(job.folder / "stats.yaml", compute_statistics(train, job.regime.schema))


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
