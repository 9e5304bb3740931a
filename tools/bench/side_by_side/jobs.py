"""Jobs side by side: each a fork, on one thread, with memory of its own."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from pathlib import Path

import torch

from shodh.core.files import atomic_path
from shodh.core.precision import ieee_float32


def _child(failure: Path, job: Callable[[], None]) -> None:
    """A job in a process of its own, on one thread; what it says of an error is kept."""
    torch.set_num_threads(1)
    try:
        with open(os.devnull, "w") as nothing, redirect_stderr(nothing), ieee_float32():
            job()
    except BaseException:
        with atomic_path(failure) as path:
            path.write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)


def run_jobs(what: str, jobs: Mapping[str, Callable[[], None]], folder: Path, at_once: int) -> list[str]:
    """Run jobs by name, ``at_once`` at a time, with a line each.

    Returns
    -------
    list of str
        Names of those that failed; what they said is in ``folder/NAME.txt``.
    """

    def failure_of(name: str) -> Path:
        return folder / f"{name}.txt"

    context = multiprocessing.get_context("fork")
    waiting, active, failed = list(jobs.items()), {}, []
    started, done = time.monotonic(), 0
    try:
        while waiting or active:
            while waiting and len(active) < at_once:
                name, job = waiting.pop(0)
                failure_of(name).unlink(missing_ok=True)
                process = context.Process(target=_child, args=(failure_of(name), job), daemon=True)
                process.start()
                active[process.sentinel] = (name, process)
            for sentinel in multiprocessing.connection.wait(list(active)):
                name, process = active.pop(sentinel)  # type: ignore[call-overload]
                process.join()
                done += 1
                passed = time.monotonic() - started
                left = passed / done * (len(jobs) - done)
                state = "" if process.exitcode == 0 else f" FAILED, see {failure_of(name)}"
                sys.stderr.write(f"{what} {done}/{len(jobs)} {name}{state} ({left / 60:.0f} min left)\n")
                sys.stderr.flush()
                if process.exitcode:
                    failed.append(name)
    finally:
        for _, process in active.values():
            process.terminate()
    return failed
