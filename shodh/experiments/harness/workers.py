"""Jobs of a study in processes of their own: on all ranks one after another, or several side by side on one rank each.

A process a job: one that runs out of memory, diverges or crashes takes nothing else with it.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

import shodh
from shodh.core import signals
from shodh.core.devices import card_environment, check_ranks, threads_of_rank
from shodh.core.errors import ConfigError
from shodh.core.launcher import without_launcher
from shodh.core.reading import read_object
from shodh.core.signals import STOPPED
from shodh.core.strict_json import write_json
from shodh.experiments.harness.ranks import Ranks
from shodh.train.runtime import quiet_logs

ROOT = Path(shodh.__file__).resolve().parents[1]
FAILURES = "failures.json"


@dataclass(frozen=True)
class Job:
    """``content`` is what the worker is told, JSON-able; it starts when all of ``after`` have succeeded."""

    content: Mapping[str, Any]
    after: tuple[str, ...] = ()


@dataclass
class Progress:
    """How a study stands: names of finished jobs, the last line of those that failed, whether a signal ended it."""

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    stopped: bool = False

    @property
    def exit_code(self) -> int:
        """0; 1 where jobs failed; `STOPPED` where a signal came."""
        return STOPPED if self.stopped else 1 if self.failed else 0

    def complaints(self) -> str:
        """A line for every job that failed, and one if a signal came; for people."""
        lines = [f"failed: {name}: {line}\n" for name, line in self.failed.items()]
        return "".join([*lines, "stopped by a signal; the same command goes on\n" * self.stopped])

    def keep_failures(self, folder: Path) -> None:
        """Add those that failed to the file that `read_failures` reads."""
        failed = {**read_failures(folder), **self.failed}
        write_json(folder / FAILURES, failed)


def read_failures(folder: Path) -> dict[str, str]:
    """Jobs of a study's folder that have failed, and why, when they last did; some may be finished by now."""
    path = folder / FAILURES
    return {str(name): str(why) for name, why in read_object(path).items()} if path.exists() else {}


class Workers:
    """Starts ``python -m MODULE JOB.json`` for every job; files and logs of the jobs lie in ``folder / "jobs"``.

    SIGTERM, SIGUSR1 and Ctrl-C are handed on as SIGTERM: every job at work saves and ends, and no other is started.

    Parameters
    ----------
    module : str
        Its process ends with 0, or `STOPPED`, or with an error line and any other code.
    jobs : int
        Side by side, each on one rank and, where there are cards, on one card: cards in turn.

    Raises
    ------
    ConfigError
        Side by side and on several ranks at once.
    CardsError
        This machine has fewer cards than ranks.
    """

    def __init__(self, module: str, folder: Path, jobs: int, ranks: Ranks) -> None:
        if jobs > 1 and ranks.world > 1:
            raise ConfigError(f"--jobs {jobs} is for jobs on one rank each; on {ranks.world} ranks they run one by one")
        check_ranks()
        self.module, self.folder, self.jobs, self.ranks = module, folder, jobs, ranks
        self.stopped = threading.Event()
        self._places = queue.SimpleQueue[int]()
        for place in range(jobs):
            self._places.put(place)
        self._children: set[subprocess.Popen[str]] = set()
        signals.hold()
        for number in (*signals.STOPS, signal.SIGINT):
            signal.signal(number, self._stop)

    def _stop(self, *_: object) -> None:
        self.stopped.set()
        for child in list(self._children):
            child.terminate()

    def run_all(self, jobs: Mapping[str, Job]) -> Iterator[tuple[str, str | None]]:
        """Yield (name, None or the last line of the error) of each job as it ends; earlier ones are started first.

        A job whose forerunner fails is not started and not yielded; ``after`` may name jobs that are not given, which
        are taken to be done.
        """
        waiting = {name: {other for other in job.after if other in jobs} for name, job in jobs.items()}
        running: dict[Future[str | None], str] = {}
        with ThreadPoolExecutor(self.jobs) as pool:
            while True:
                # No more than can run: those that wait are started in the order given, not in that of readiness.
                ready = [name for name, forerunners in waiting.items() if not forerunners][: self.jobs - len(running)]
                for name in ready:
                    del waiting[name]
                    running[pool.submit(self.run, name, jobs[name].content)] = name
                if not running:
                    return
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    name, line = running.pop(done), done.result()
                    if line is None:
                        for forerunners in waiting.values():
                            forerunners.discard(name)
                    yield name, line

    def follow(self, jobs: Mapping[str, Job], progress: Progress) -> Iterator[tuple[str, bool]]:
        """`run_all` of (name, whether it succeeded); what failed, and whether a signal came, is noted and kept."""
        for name, line in self.run_all(jobs):
            yield name, line is None
            if line is not None and not self.stopped.is_set():
                progress.failed[name] = line
        progress.stopped = self.stopped.is_set()
        if self.ranks.rank == 0:
            progress.keep_failures(self.folder)

    def run(self, name: str, content: Mapping[str, Any]) -> str | None:
        """Run one job on this rank, with the others on theirs; None, or one line that says what went wrong."""
        if self.stopped.is_set():
            return "not started"
        path = self.folder / "jobs" / f"{name}.json"
        if self.ranks.rank == 0:
            write_json(path, content)
        log = path.with_suffix(f".rank{self.ranks.rank}.log" if self.ranks.world > 1 else ".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        place = self._places.get()
        with log.open("w") as stderr:
            command = [sys.executable, "-m", self.module, str(path)]
            environment = self._environment(name, place)
            child = subprocess.Popen(command, env=environment, stdout=stderr, stderr=stderr, text=True)
            self._children.add(child)
            if self.stopped.is_set():  # The signal came while it was started.
                child.terminate()
            code = _wait(child, lambda: self.ranks.failed(name))
            self._children.discard(child)
        self._places.put(place)
        if code == -signal.SIGTERM and self.stopped.is_set():
            code = STOPPED  # It had not begun to listen.
        if code == STOPPED:
            self.stopped.set()
        line = None if code == 0 else f"{what_ended(code, log)}; see {log}"
        return self.ranks.finish(name, line)

    def _environment(self, name: str, place: int) -> dict[str, str]:
        environment = {**os.environ, **self.ranks.environment(name)}
        if self.ranks.world == 1:
            environment |= card_environment(place)
        environment.setdefault("OMP_NUM_THREADS", str(threads_of_rank(self.jobs)))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
        return environment


def begin_worker() -> dict[str, Any]:
    """What the process of a job does first; returns what it is told.

    A terminal sends Ctrl-C to the whole group; the study hands it on as SIGTERM, so that a checkpoint is saved.
    """
    signals.catch()
    signals.end_with_parent()
    quiet_logs()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return read_object(Path(sys.argv[1]))


def leave_ranks() -> None:
    """From here on, this process is alone: what follows must not wait for, or share work with, other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()
    alone = without_launcher(os.environ)
    os.environ.clear()
    os.environ.update(alone)


def _wait(child: subprocess.Popen[str], failed_elsewhere: Callable[[], bool], patience: float = 5.0) -> int:
    """The exit code of a child; it is ended some seconds after another rank's has failed, for which it would wait."""
    deadline: float | None = None
    while child.poll() is None:
        if deadline is None and failed_elsewhere():
            deadline = time.monotonic() + patience
        if deadline is not None and time.monotonic() > deadline:
            child.kill()
        time.sleep(0.1)
    return child.wait()


def what_ended(code: int, log: Path) -> str:
    """The error of a job that ended with this code; one that a signal ended had no time to say why."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"{last_error(log)} (exit code {code})"


def last_error(log: Path) -> str:
    """What a log says that went wrong: its last ``error:`` line without that word, or its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error: " in line.lower()]
    return (errors or lines or ["no output"])[-1].removeprefix("error: ")
