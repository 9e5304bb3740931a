"""A process without a sign of work ends itself with its stacks; one that works, or was suspended, goes on."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shodh.core.cli import EXIT_FAULT
from shodh.core.progress import get_on
from shodh.train.events import read_events
from shodh.train.watchdog import STACKS, Watchdog


def stand_still() -> None:
    time.sleep(20.0)


def work() -> None:
    for _ in range(30):
        time.sleep(0.05)
        get_on()


def be_suspended() -> None:
    """A child wakes this process after longer than it may stand still."""
    parent = os.getpid()
    if os.fork() == 0:
        time.sleep(1.5)
        os.kill(parent, signal.SIGCONT)
        os._exit(0)
    os.kill(parent, signal.SIGSTOP)


def watched(run: Path, task: Callable[[], None]) -> None:
    os.dup2(os.open(run / "stderr", os.O_WRONLY | os.O_CREAT), 2)
    dog = Watchdog(run, 0.6, 0.02, lambda: 17)
    dog.start()
    task()
    dog.stop()
    os._exit(0)


@pytest.mark.parametrize(("task", "code"), [(stand_still, EXIT_FAULT), (work, 0), (be_suspended, 0)])
def test_one_process(task: Callable[[], None], code: int, tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=watched, args=(tmp_path, task))
    process.start()
    process.join()
    assert process.exitcode == code
    if code:
        stacks = (tmp_path / STACKS / "rank_00000.txt").read_text()
        said = (tmp_path / "stderr").read_text()
        assert all("in stand_still" in text for text in (stacks, said)) and "step 17" in said
        assert [(e["kind"], e["step"]) for e in read_events(tmp_path)] == [("stood still", 17)]
        assert json.loads((tmp_path / "events.jsonl").read_text())["seconds"] >= 0.6
    else:
        assert not (tmp_path / STACKS).exists()


def test_no_thread_outlives_it(tmp_path: Path) -> None:
    """One that ends later may be the last to hold the model: torch aborts where tensors die beside an exit."""
    dog = Watchdog(tmp_path, 100.0, 50.0, lambda: 0)
    dog.start()
    assert any(thread.name == "watchdog" for thread in threading.enumerate())
    dog.stop()
    assert not any(thread.name == "watchdog" for thread in threading.enumerate())
