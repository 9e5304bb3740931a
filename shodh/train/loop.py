"""The training loop: steps, metrics, validation, checkpoints; the task says what is learned."""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from shodh.checkpoint.folder import read_manifest
from shodh.checkpoint.training import load_checkpoint, save_checkpoint
from shodh.config import TrainConfig
from shodh.core.devices import uses_cuda
from shodh.core.distributed import SharedError, gather, rank, together
from shodh.core.errors import ShodhError
from shodh.core.topology import Topology
from shodh.train.engine import MovementCheck, find_nonfinite
from shodh.train.metrics import Metrics, MetricWriter, StepRecord, mean_over_ranks, reduce_metrics
from shodh.train.run_folder import RunFolder, describe_environment
from shodh.train.schedule import learning_rate

log = logging.getLogger("shodh")

Batch = dict[str, Tensor]


class Task(Protocol):
    """What the loop trains."""

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Micro-batches of this rank for the steps ``start .. stop - 1``, in order."""

    def loss(self, engine: Any, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        """Loss of one micro-batch and what to report of it."""

    def start_step(self, step: int) -> None:
        """Called before the first micro-batch of a step."""

    def finish_step(self, engine: Any, step: int) -> None:
        """Called after the optimiser has stepped; not after a step that was skipped."""

    def nonfinite_regimes(self) -> list[str]:
        """Regimes with a sample of this rank whose error in the step is not finite."""

    def report(self, step: int, writer: MetricWriter | None) -> Metrics:
        """Called at logging steps on every rank; the writer is there on rank 0 only."""

    def validate(self, engine: Any, step: int) -> Metrics:
        """Held-out metrics; called on every rank, without gradients."""

    def close(self) -> None:
        """Flush and close what the task holds."""


class Stop:
    """Set by SIGTERM or SIGUSR1 (what schedulers send before the end); read at a step's edge, agreed by all ranks."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._set)

    def _set(self, *_: object) -> None:
        self.asked = True


def next_micro_batch(batches: Iterator[Batch], device: torch.device) -> Batch:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in next(batches).items()}


class Trainer:
    """Runs a task on a DeepSpeed engine.

    Parameters
    ----------
    seed : int
        Saved with every checkpoint; a resumed run must have the same.
    """

    def __init__(
        self, task: Task, engine: Any, train: TrainConfig, topology: Topology, folder: RunFolder, seed: int
    ) -> None:
        self.task, self.engine, self.train, self.topology, self.folder = task, engine, train, topology, folder
        self.seed = seed
        self.step = self.skipped = self.skipped_in_row = 0
        self._record = StepRecord()
        self._topology = {
            "world_size": topology.world_size,
            "ep_size": topology.ep_size,
            "micro_batch": topology.micro_batch,
            "zero_stage": int(engine.zero_optimization_stage()),
        }

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint folder of any layout; raises `CheckpointError` if it does not fit."""
        state = read_manifest(checkpoint)["state"]
        if state["seed"] != self.seed:
            raise ShodhError(f"{checkpoint} was trained with seed {state['seed']}, and this run has seed {self.seed}")
        written = load_checkpoint(self.engine, checkpoint)["topology"]
        self.step = int(state["step"])
        self.skipped, self.skipped_in_row = (int(state.get(k, 0)) for k in ("skipped", "skipped_in_row"))
        log.info("resumed from %s at step %d of %d", checkpoint, self.step, self.train.steps)
        before, now = (t["world_size"] * t["micro_batch"] for t in (written, self._topology))
        if before != now:
            log.warning(
                "%d samples are balanced over the experts at once (ranks x micro_batch), and there were %d until now; "
                "results differ by more than rounding: keep the product to go on as before",
                now,
                before,
            )

    def save(self) -> None:
        """Publish a checkpoint of the current step; raises `SharedError` if a weight is not finite."""
        wrong = sorted({name for part in gather(find_nonfinite(self.engine)) for name in part})
        if wrong:
            raise SharedError(
                f"no checkpoint of step {self.step} is written: {', '.join(wrong[:5])} not finite; {self._way_back()}"
            )
        record = {
            "state": {k: getattr(self, k) for k in ("step", "seed", "skipped", "skipped_in_row")},
            "topology": self._topology,
            "precision": self.train.precision,
            "env": describe_environment() if rank() == 0 else {},
        }
        save_checkpoint(self.engine, self.folder.path, record, self.train.keep_checkpoints)

    def fit(self) -> bool:
        """Train to the last step; False if a signal ended it early (a checkpoint is then saved)."""
        writer = MetricWriter(self.folder.path, self.step) if rank() == 0 else None
        stop = Stop()
        hidden = rank() != 0 or not sys.stderr.isatty()
        bar = tqdm(total=self.train.steps, initial=self.step, unit="step", disable=hidden)
        batches = self.task.batches(self.step, self.train.steps)
        moved = MovementCheck(self.engine) if self.step == self.skipped else None
        clock = _Clock()
        saved = self.step
        try:
            while self.step < self.train.steps:
                metrics, applied = self._train_step(batches, clock)
                if moved is not None:
                    if applied:
                        _check_moved(moved.finish(self.rate))
                    moved = None if applied else moved.restarted()
                self.step += 1
                bar.update()
                self._count_skip(applied)
                last = self.step == self.train.steps
                if last or self.step % self.train.log_every == 0:
                    self._log(metrics, clock, writer, bar)
                elif self._record.full:
                    self._write_record(writer)
                if last or (self.train.valid_every and self.step % self.train.valid_every == 0):
                    self._write_record(writer)
                    self._validate(writer, bar)
                if last or (self.train.checkpoint_every and self.step % self.train.checkpoint_every == 0):
                    self._write_record(writer)
                    self.save()
                    saved = self.step
                if self._agree(stop.asked) and not last:
                    if saved != self.step:
                        self._write_record(writer)
                        self.save()
                    log.info("stopped at step %d by a signal; the same command with --resume auto goes on", self.step)
                    return False
            return True
        finally:
            bar.close()
            self.task.close()
            if writer is not None:
                with suppress(RuntimeError):  # A device that has failed keeps what it has.
                    self._write_record(writer)
                writer.close()

    @property
    def rate(self) -> float:
        """Learning rate of the current step: a skipped one does not move the schedule."""
        return learning_rate(self.step - self.skipped, self.train)

    def _train_step(self, batches: Iterator[Batch], clock: _Clock) -> tuple[Metrics, bool]:
        """What to report of a step, and whether the optimiser took it: not if a gradient somewhere is not finite."""
        self.engine.train()
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.rate
        self.task.start_step(self.step)
        metrics: Metrics = {}
        for _ in range(self.topology.accumulation):
            with clock:
                batch = next_micro_batch(batches, self.engine.device)
            loss, reported = self.task.loss(self.engine, batch, self.step)
            self.engine.backward(_poisoned(loss))
            self.engine.step()
            for name, (value, reduction) in {"train/loss": (loss.detach(), "mean"), **reported}.items():
                share = value / self.topology.accumulation if reduction == "mean" else value
                old = metrics.get(name)
                metrics[name] = (share if old is None else old[0] + share, reduction)  # type: ignore[assignment]
        applied = bool(self.engine.was_step_applied())
        if applied:
            self.task.finish_step(self.engine, self.step)
        clock.steps += 1
        values: dict[str, Tensor | float] = {
            "train/loss": mean_over_ranks(metrics.pop("train/loss")[0], self.engine.device),
            "train/grad_norm": self.engine.get_global_grad_norm(),
            "train/lr": self.rate,
            "train/skipped": float(not applied),
        }
        if rank() == 0:
            self._record.add(self.step, values)
        return metrics, applied

    def _count_skip(self, applied: bool) -> None:
        """Report a skipped step; raises `SharedError` after too many in a row. All ranks skip, or none."""
        if applied:
            self.skipped_in_row = 0
            return
        self.skipped += 1
        self.skipped_in_row += 1
        regimes = sorted({name for part in gather(self.task.nonfinite_regimes()) for name in part})
        what = f"errors of {', '.join(regimes)}" if regimes else "gradients, of finite errors,"
        row, total = self.skipped_in_row, self.skipped
        log.warning("step %d skipped: %s are not finite; %d skipped in a row, %d in all", self.step, what, row, total)
        if self.skipped_in_row >= self.train.max_skipped_steps:
            raise SharedError(
                f"{row} steps in a row up to step {self.step} were skipped, train.max_skipped_steps="
                f"{self.train.max_skipped_steps}: {what} are not finite; {self._way_back()}"
            )

    def _way_back(self) -> str:
        tag = self.folder.latest()
        if tag is None:
            return "there is no checkpoint yet: look at the data, or lower train.lr, and start again"
        return (
            f"the last good checkpoint is {self.folder.checkpoints / tag}: lower train.lr, and go on with --resume auto"
        )

    def _write_record(self, writer: MetricWriter | None, more: Mapping[str, float] | None = None) -> dict[str, float]:
        """Write the steps since the last call, the newest with ``more`` values; returns it (on rank 0)."""
        rows = self._record.take()
        if writer is None or not rows:
            return {}
        rows[-1][2].update(more or {})
        for step, when, values in rows:
            writer.write(step, values, when)
        writer.flush()
        return rows[-1][2]

    def _log(self, metrics: Metrics, clock: _Clock, writer: MetricWriter | None, bar: tqdm[Any]) -> None:
        metrics = {**metrics, **self.task.report(self.step - 1, writer), **clock.read(self.topology.global_batch)}
        if uses_cuda():
            metrics["mem/peak_gib"] = (torch.cuda.max_memory_allocated() / 2**30, "max")
        values = self._write_record(writer, reduce_metrics(metrics, self.engine.device))
        if values:
            shown = {k.split("/")[-1]: f"{values[k]:.4g}" for k in ("train/loss", "perf/samples_per_s") if k in values}
            bar.set_postfix(shown)
            if bar.disable:
                text = ", ".join(f"{k} {v}" for k, v in shown.items())
                log.info("step %d/%d: %s", self.step, self.train.steps, text)

    def _validate(self, writer: MetricWriter | None, bar: tqdm[Any]) -> None:
        self.engine.eval()
        with torch.no_grad():
            values = reduce_metrics(self.task.validate(self.engine, self.step - 1), self.engine.device)
        if writer is not None and values:
            writer.write(self.step - 1, values)
            writer.flush()
            text = ", ".join(f"{k.removeprefix('valid/')} {v:.4g}" for k, v in values.items())
            bar.clear()
            log.info("validation at step %d: %s", self.step, text)

    def _agree(self, asked: bool) -> bool:
        """Whether any rank was asked to stop."""
        if self.topology.world_size == 1:
            return asked
        return reduce_metrics({"stop": (float(asked), "max")}, self.engine.device)["stop"] > 0


class _Clock:
    """Samples a second and the share of time spent waiting for data, since the last reading.

    Waiting is what happens in a ``with`` block of the clock.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._start = time.perf_counter()
        self._waited = 0.0
        self._enter = 0.0

    def __enter__(self) -> None:
        self._enter = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._waited += time.perf_counter() - self._enter

    def read(self, global_batch: int) -> Metrics:
        elapsed = time.perf_counter() - self._start
        metrics: Metrics = {
            "perf/samples_per_s": (self.steps * global_batch / elapsed, "mean"),
            "perf/step_ms": (1e3 * elapsed / max(1, self.steps), "mean"),
            "perf/data_wait_frac": (self._waited / elapsed, "mean"),
        }
        self.steps, self._start, self._waited = 0, time.perf_counter(), 0.0
        return metrics


def _poisoned(loss: Tensor) -> Tensor:
    """The loss; if it is not finite, so that all its gradients are not either and every rank skips the step."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan).to(loss.dtype)


def _check_moved(still: list[str]) -> None:
    with together():
        if still:
            raise ShodhError(f"parameters that did not move in the first step: {', '.join(still[:5])}")
