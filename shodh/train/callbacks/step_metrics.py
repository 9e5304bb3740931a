"""Metrics of steps: kept on the device, and written to ``metrics.jsonl``, the trackers and the terminal."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from shodh.core.devices import uses_cuda
from shodh.core.distributed import rank
from shodh.train.compiling import CompileCount
from shodh.train.metrics import Metrics, MetricWriter, StepRecord, mean_over_ranks, reduce_metrics
from shodh.train.throughput import Throughput, energy_counter
from shodh.train.trackers import Tracker
from shodh.train.trainer import Callback, Trainer

log = logging.getLogger("shodh")


class StepMetrics(Callback):
    """Loss, gradient norm, rate and skip of every step; of every ``log_every``-th also what tasks and callbacks report.

    Rank 0 writes. ``trackers`` gives the openers of `MetricWriter` for a run that goes on from a step.
    """

    def __init__(
        self,
        run: Path,
        log_every: int,
        throughput: Throughput | None = None,
        trackers: Callable[[int], Mapping[str, Callable[[], Tracker]]] | None = None,
    ) -> None:
        self._run, self._every, self._throughput, self._trackers = run, log_every, throughput, trackers
        self._record = StepRecord()
        self.writer: MetricWriter | None = None
        self._bar: tqdm[Any] | None = None
        self._clock: _Clock | None = None
        self._compiled = CompileCount()

    def start(self, trainer: Trainer) -> None:
        if rank() == 0:
            trackers = None if self._trackers is None else self._trackers(trainer.step)
            lenient = trainer.train.failed_save == "continue"
            self.writer = MetricWriter(self._run, trainer.step, trackers, lenient)
        hidden = rank() != 0 or not sys.stderr.isatty()
        self._bar = tqdm(total=trainer.train.steps, initial=trainer.step, unit="step", disable=hidden)
        self._clock = _Clock(trainer)

    def after_step(self, trainer: Trainer) -> None:
        values = {
            "train/loss": mean_over_ranks(trainer.metrics.pop("train/loss")[0], trainer.engine.device),
            "train/grad_norm": trainer.engine.get_global_grad_norm(),
            "train/lr": trainer.rate,
            "train/skipped": float(not trainer.applied),
        }
        if rank() == 0:
            self._record.add(trainer.step - 1, values)
        if self._bar is not None:
            self._bar.update()
        if trainer.due(self._every):
            self._log(trainer)
        elif self._record.full:
            self._write_record()

    def _log(self, trainer: Trainer) -> None:
        assert self._clock is not None and self._bar is not None
        metrics = {**trainer.metrics, **self._clock.read(trainer)}
        metrics |= {name: (value, "max") for name, value in self._compiled.read().items()}
        if uses_cuda():
            metrics["mem/peak_gib"] = (torch.cuda.max_memory_allocated() / 2**30, "max")
        reduced = reduce_metrics(metrics, trainer.engine.device)
        if math.isnan(reduced.get("perf/energy_j", 0.0)):  # A card did not tell.
            del reduced["perf/energy_j"], reduced["perf/power_w"]
        if self._throughput is not None and rank() == 0:
            reduced |= self._throughput.of(reduced["perf/samples_per_s"])
        values = self._write_record(reduced)
        if not values:
            return
        names = ("train/loss", "perf/samples_per_s", "perf/tflops", "perf/mfu")
        shown = {k.split("/")[-1]: f"{values[k]:.4g}" for k in names if k in values}
        self._bar.set_postfix(shown)
        if self._bar.disable:
            text = ", ".join(f"{k} {v}" for k, v in shown.items())
            log.info("step %d/%d: %s", trainer.step, trainer.train.steps, text)

    def _write_record(self, more: Mapping[str, float] | None = None) -> dict[str, float]:
        """Write the steps since the last call, the newest with ``more`` values; returns it (on rank 0)."""
        rows = self._record.take()
        if self.writer is None or not rows:
            return {}
        rows[-1][2].update(more or {})
        for step, when, values in rows:
            self.writer.write(step, values, when)
        self.writer.flush()
        return rows[-1][2]

    def write_validation(self, trainer: Trainer, values: Mapping[str, float]) -> None:
        """A line of its own, after those of the steps before it."""
        self._write_record()
        if self.writer is None or self._bar is None or not values:
            return
        self.writer.write(trainer.step - 1, values)
        self.writer.flush()
        self._bar.clear()
        text = ", ".join(f"{k.removeprefix('valid/')} {v:.4g}" for k, v in values.items())
        log.info("validation at step %d: %s", trainer.step, text)

    def flush(self, trainer: Trainer) -> None:
        self._write_record()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self.writer is not None:
            with suppress(RuntimeError):  # A device that has failed keeps what it has.
                self._write_record()
            self.writer.close()
            self.writer = None


class _Clock:
    """Samples a second, the share of time spent waiting for data, and on cards the energy of all ranks, since the last
    reading."""

    def __init__(self, trainer: Trainer) -> None:
        self._step, self._waited, self._start = trainer.step, trainer.waited, time.perf_counter()
        self._counter = energy_counter(trainer.engine.device)
        self._energy = self._counter() if self._counter else 0.0

    def read(self, trainer: Trainer) -> Metrics:
        now = time.perf_counter()
        elapsed, steps = now - self._start, trainer.step - self._step
        metrics: Metrics = {
            "perf/samples_per_s": (steps * trainer.topology.global_batch / elapsed, "mean"),
            "perf/step_ms": (1e3 * elapsed / max(1, steps), "mean"),
            "perf/data_wait_frac": ((trainer.waited - self._waited) / elapsed, "mean"),
        }
        if self._counter:  # On every rank or none, as reductions want it.
            before, self._energy = self._energy, self._counter()
            used = self._energy - before
            metrics |= {"perf/energy_j": (used, "sum"), "perf/power_w": (used / elapsed, "sum")}
        self._step, self._waited, self._start = trainer.step, trainer.waited, now
        return metrics
