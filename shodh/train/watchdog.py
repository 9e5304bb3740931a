"""A job that stands still ends, with the stacks of every rank that can show them, so that it can be started again.

A stopped or hung rank cannot act, and the others wait for it in a collective. So a thread of every rank counts signs of
work (`shodh.core.progress`); the job stands still if no rank gives one. Another thread tells them to rank 0 through the
store in which the ranks met, and learns what the job did; it may hang there without holding up the first.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import torch.distributed as dist

from shodh.core import signals
from shodh.core.cli import EXIT_FAULT
from shodh.core.devices import local_rank
from shodh.core.distributed import gather, rank, world_size
from shodh.core.progress import signs
from shodh.core.reading import parse_json
from shodh.core.strict_json import dumps
from shodh.train.events import record_event

log = logging.getLogger("shodh")

STACKS = "stacks"  # folder of a run: a file a rank
STDERR = 2  # not Python's stream, whose lock the thread that hangs may hold
ASKS = -1  # in the place of a number: a rank whose collective failed asks who is gone
PATIENCE = 10.0  # seconds that a dying rank waits for a disk


def limit_collectives(seconds: float) -> None:
    """Let every collective of every group fail after so many seconds: the last resort, where no thread can run."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


class Watchdog:
    """Watches from `start` until `stop`; one a process. ``limit``: seconds without a sign of work from any rank.

    Time counts only while the watching thread itself runs: a job that was suspended as a whole did not stand still.
    ``last`` is the one of this process that was started last, on several ranks.
    """

    last: ClassVar[Watchdog | None] = None

    def __init__(self, run: Path, limit: float, poll: float, step: Callable[[], int]) -> None:
        self.limit, self._run, self._poll, self._step = limit, run, poll, step
        self._ended = threading.Event()
        self._alarmed = False
        self._job: dict[str, Any] = {"signs": 0, "silent": [], "behind": [], "alarm": False}
        self._heard = 0.0  # when rank 0 was heard last, on the clock of `_watch`
        self._clock = 0.0
        self._places: list[str] = []
        self._threads: list[threading.Thread] = []
        self._store: Any = None

    def start(self) -> None:
        """Collective."""
        self._places = gather(f"rank {rank()} (process {os.getpid()} on {socket.gethostname()})")
        work: list[Callable[[], None]] = [self._watch]
        if world_size() > 1:
            self._store, Watchdog.last = dist.distributed_c10d._get_default_store(), self
            store = self._own_store()
            self._tell(store, 0)
            if rank() == 0:
                store.set("job", dumps(self._job))
            gather(None)  # Every key is there before anybody asks for it.
            work.append(lambda: self._talk(store))
        self._threads = [threading.Thread(target=target, name="watchdog", daemon=True) for target in work]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Waits for its threads, as long as they do not hang.

        One that ended later could be the last to hold the model, through ``step``, and where tensors die in a thread
        beside the exit of the interpreter, torch aborts the process.
        """
        self._ended.set()
        for thread in self._threads:
            thread.join(2 * self._poll + 1.0)
        faulthandler.cancel_dump_traceback_later()

    # What the ranks tell each other

    def _own_store(self) -> dist.Store:
        """The store in which the ranks met, for one thread: it may hang without holding up the groups."""
        return dist.PrefixStore("watchdog", self._store.clone())

    def _tell(self, store: dist.Store, number: int) -> None:
        store.set(str(rank()), dumps([number, signs()]))

    def _talk(self, store: dist.Store) -> None:
        keys, number = [str(other) for other in range(world_size())], 0
        known: list[int] = [-1] * len(keys)
        quiet = [0] * len(keys)
        with suppress(RuntimeError):  # The store is gone, with rank 0.
            while not self._ended.wait(self._poll):
                number += 1
                self._tell(store, number)
                if self._alarmed:
                    store.set("alarm", "")
                if rank() == 0:
                    told = [parse_json(text.decode(), "sign of life") for text in store.multi_get(keys)]
                    quiet = [0 if n != old else q + 1 for (n, _), old, q in zip(told, known, quiet, strict=True)]
                    known, done = [n for n, _ in told], [d for _, d in told]
                    self._job = {
                        "signs": sum(done),
                        "silent": [other for other, q in enumerate(quiet) if q > 5],
                        "behind": [other for other, d in enumerate(done) if d == min(done) < max(done)],
                        "alarm": store.check(["alarm"]),
                    }
                    store.set("job", dumps(self._job))
                else:
                    self._job = parse_json(store.get("job").decode(), "state of the job")
                self._heard = self._clock

    def name_lost(self) -> str | None:
        """Who neither gives a sign of life nor asks this, as a rank does whose collective failed; takes some seconds.

        None where another rank, the first of those that ask, is to say it.
        """
        self.stop()
        everyone = range(world_size())
        try:
            store, keys = self._own_store(), [str(other) for other in everyone]
            self._tell(store, ASKS)
            before = store.multi_get(keys)
            time.sleep(max(2.0, 1.5 * self._poll))
            after = store.multi_get(keys)
        except RuntimeError:  # Rank 0 holds the store.
            lost, speaks = [0], local_rank() == 0
        else:
            asks = [parse_json(text.decode(), "sign of life")[0] == ASKS for text in after]
            lost = [other for other in everyone if before[other] == after[other] and not asks[other]]
            speaks = asks.index(True) == rank()
        if not speaks:
            return None
        what = f"lost contact with {self._name(lost)}" if lost else "ranks that are there lost contact"
        self._within(PATIENCE, lambda: record_event(self._run, "lost contact", self._step(), why=what))
        return what

    # What a rank sees

    def _watch(self) -> None:
        seen, quiet, last = (0, 0), 0.0, time.monotonic()
        while not self._ended.wait(self._poll):
            now = time.monotonic()
            passed, last = min(now - last, 2 * self._poll), now
            quiet, self._clock = quiet + passed, self._clock + passed
            # Should Python itself stand still, a thread without Python shows where.
            faulthandler.dump_traceback_later(self.limit + 10 * self._poll, file=STDERR)
            if (found := (signs(), int(self._job["signs"]))) != seen:
                seen, quiet = found, 0.0
            if quiet > self.limit or self._job["alarm"]:
                self._end(quiet)

    def _end(self, quiet: float) -> None:
        """Show the stacks, name who is to blame, and end this process; whatever hangs is left hanging."""
        self._alarmed = True
        self._within(PATIENCE, lambda: faulthandler.dump_traceback(STDERR))
        self._within(PATIENCE, self._write_stacks)
        # A launcher ends all ranks at the first that ends: let the others come to this, too.
        self._ended.wait(min(PATIENCE, 3 * self._poll))
        silent, behind = set(self._job["silent"]), set(self._job["behind"])
        if rank() != 0 and self._clock - self._heard > 5 * self._poll:
            silent = {0}
        blamed = sorted(silent or behind)
        speaker = min(set(range(world_size())) - silent, default=rank())
        if rank() == speaker:
            self._within(PATIENCE, lambda: self._speak(quiet, blamed, bool(silent)))
        else:
            time.sleep(2.0)
        self._within(PATIENCE, lambda: signals.leave_code(EXIT_FAULT))
        os._exit(EXIT_FAULT)

    def _speak(self, quiet: float, blamed: list[int], silent: bool) -> None:
        names = self._name(blamed)
        what = f"{names} behind the others" if blamed else "none is behind the others"
        what = f"no sign of life from {names}" if silent else what
        step = self._step()
        line = (
            f"error: the job stands still: {quiet:.0f} s without a sign of work in step {step}; {what}; stacks in "
            f"{self._run / STACKS}; --resume auto goes on from the last checkpoint\n"
        )
        os.write(STDERR, line.encode())
        record_event(self._run, "stood still", step, why=what, seconds=round(quiet, 1))

    def _name(self, ranks: list[int]) -> str:
        return ", ".join(self._places[other] for other in ranks[:4]) + (" and more" if len(ranks) > 4 else "")

    def _write_stacks(self) -> None:
        folder = self._run / STACKS
        folder.mkdir(exist_ok=True)
        with (folder / f"rank_{rank():05d}.txt").open("w") as file:
            file.write(f"{self._places[rank()]}, step {self._step()}, {time.strftime('%Y-%m-%dT%H:%M:%S%z')}\n")
            file.flush()
            faulthandler.dump_traceback(file)

    @staticmethod
    def _within(seconds: float, work: Callable[[], None]) -> None:
        """Do what may hang on a dead disk, for a time."""

        def try_work() -> None:
            with suppress(OSError):
                work()

        thread = threading.Thread(target=try_work, daemon=True)
        thread.start()
        thread.join(seconds)
