"""The memory of this process while something runs, for the benchmarks of conversion and merging."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

COUNTERS = ("RssAnon", "RssFile", "VmRSS")
INTERVAL = 0.005


def read_counters() -> dict[str, int]:
    """Bytes, from ``/proc/self/status``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    table = {name.rstrip(":"): value for name, value, *_ in (line.split() for line in lines if len(line.split()) > 2)}
    return {name: 1024 * int(table[name]) for name in COUNTERS}


@contextmanager
def peak_memory() -> Iterator[dict[str, int]]:
    """The peaks of the counters, sampled every `INTERVAL` seconds; final when the block is left."""
    peaks, done = read_counters(), threading.Event()

    def sample() -> None:
        while not done.wait(INTERVAL):
            for name, value in read_counters().items():
                peaks[name] = max(peaks[name], value)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()
