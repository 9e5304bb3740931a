"""Signs of work of a training, and how long it may be without one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from shodh.config import WatchdogConfig
from shodh.core.progress import get_on
from shodh.moe.routing import Routing
from shodh.train.trainer import Batch, Callback, Outcome, Trainer
from shodh.train.watchdog import Watchdog, limit_collectives


class Watching(Callback):
    """Let a `Watchdog` end the job when it stands still; stands first, so that its steps hold all that is done in one.

    Collectives fail after twice the watchdog's limit: a rank in which it cannot run ends, too, with exit code 1.
    """

    FEW = 3  # steps, which connect and compile, before there is a median

    def __init__(self, config: WatchdogConfig, run: Path) -> None:
        self._config, self._run = config, run
        self._seconds: deque[float] = deque(maxlen=33)
        self._last, self._limited, self._validated = 0.0, 0.0, False
        self._dog: Watchdog | None = None

    def start(self, trainer: Trainer) -> None:
        poll = min(5.0, self._config.least / 20)
        self._seconds.clear()
        self._last, self._limited, self._validated = time.perf_counter(), 0.0, False
        self._dog = Watchdog(self._run, self._config.startup, poll, lambda: trainer.step)
        self._dog.start()
        self._set(self._config.startup)

    def after_loss(self, trainer: Trainer, batch: Batch, outcome: Outcome) -> None:
        get_on()

    def after_validation(self, trainer: Trainer, batch: Batch, routing: Sequence[Routing]) -> None:
        get_on()
        self._validated = True

    def after_step(self, trainer: Trainer) -> None:
        get_on()
        now = time.perf_counter()
        self._seconds.append(now - self._last)
        self._last = now
        first = not self._validated and trainer.due(trainer.train.valid_every)
        if len(self._seconds) < self.FEW or first:
            self._set(self._config.startup)
        else:
            self._set(max(self._config.least, self._config.steps * median(self._seconds)))

    def _set(self, limit: float) -> None:
        assert self._dog is not None
        self._dog.limit = limit
        if not limit <= self._limited <= 3 * limit:
            self._limited = 2 * limit
            limit_collectives(self._limited)

    def close(self) -> None:
        if self._dog is not None:
            self._dog.stop()
            limit_collectives(self._config.startup)
            self._dog = None
