"""The memory of this process while something runs, and made-up runs of several gigabytes: conversion and merging."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shodh.config import RunConfig, config_from_dict
from shodh.schema.domain import Domain
from shodh.schema.normalize import FieldNormalizer
from shodh.schema.space import Space

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


def large_run(depth: int, **settings: Any) -> RunConfig:
    """A run whose operator has ``depth`` layers of 16 experts, 0.87 GB each."""
    experts = {"num_experts": 16, "hidden": 4096}
    tree = {
        "name": "large",
        "data": {"grid": [16, 16, 16], "regimes": [{"name": "porous_media", "path": "nowhere"}]},
        "operator": {"dim": 1024, "heads": 16, "depth": depth, "experts": experts},
    }
    return config_from_dict({**tree, **settings})


def plain_space(config: RunConfig) -> Space:
    """Fields of a run in a periodic box, normalised already."""
    fields = [f.build() for f in config.data.fields]
    constants = {r.name: {f.name: (0.0, 1.0) for f in fields if not f.static} for r in config.data.regimes}
    domain = Domain(("periodic",) * 3, (1.0, 1.0, 1.0))
    return Space.of(FieldNormalizer(fields, 3, constants), fields, dict.fromkeys(constants, domain))
