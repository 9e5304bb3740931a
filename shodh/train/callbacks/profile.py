"""A profile of some steps: a trace for chrome://tracing or Perfetto, and a table of the largest kernels."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from shodh.core.devices import uses_cuda
from shodh.core.distributed import rank
from shodh.core.files import write_atomically
from shodh.train.trainer import Callback, Trainer

log = logging.getLogger("shodh")

ROWS = 40


class Profile(Callback):
    """Profile ``steps`` steps of rank 0 after `WARM_UP` ones; writes ``profile/trace.json`` and ``kernels.txt``."""

    WARM_UP = 5

    def __init__(self, run: Path, steps: int) -> None:
        self._folder, self._steps = run / "profile", steps
        self._first = 0
        self._profile: Any = None

    def start(self, trainer: Trainer) -> None:
        self._first = trainer.step + self.WARM_UP
        if trainer.step + self.WARM_UP >= trainer.train.steps:
            log.warning(
                "--profile: after %d steps to warm up none is left of the %d of this run; nothing is profiled",
                self.WARM_UP,
                trainer.train.steps - trainer.step,
            )

    def after_step(self, trainer: Trainer) -> None:
        if self._profile is not None and trainer.step == self._first + self._steps:
            self._write(trainer.step)
        if rank() == 0 and trainer.step == self._first and not trainer.finished:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if uses_cuda() else [])]
            self._profile = profile(activities=activities)
            self._profile.start()

    def finish(self, trainer: Trainer) -> None:
        if self._profile is not None:  # The run was shorter.
            self._write(trainer.step)

    def _write(self, step: int) -> None:
        self._profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self._folder / "trace.json"))
        events, steps = self._profile.key_averages(), step - self._first
        by = "self_device_time_total" if uses_cuda() else "self_cpu_time_total"
        table = events.table(sort_by=by, row_limit=ROWS, max_name_column_width=80)
        write_atomically(self._folder / "kernels.txt", f"{steps} steps up to step {step}\n{table}\n")
        total = sum(getattr(event, by) for event in events) or 1
        largest = sorted(events, key=lambda event: -getattr(event, by))[:3]
        shares = ", ".join(f"{event.key[:40]} {getattr(event, by) / total:.0%}" for event in largest)
        log.info("profile of %d steps in %s: %.1f ms a step; %s", steps, self._folder, total / 1e3 / steps, shares)
        self._profile = None
