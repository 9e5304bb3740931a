"""The training loop: steps, metrics, validation, checkpoints; the task says what is learned."""

from __future__ import annotations

import logging
import math
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from shodh.config import TrainConfig
from shodh.devices import uses_cuda
from shodh.errors import ShodhError
from shodh.topology import Topology
from shodh.train.checkpoint import load_checkpoint, save_checkpoint
from shodh.train.engine import MovementCheck
from shodh.train.metrics import Metrics, MetricWriter, reduce_metrics
from shodh.train.run_folder import RunFolder
from shodh.train.runtime import SharedError, rank, together
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
        """Called after the optimiser has stepped."""

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
        self.step = 0
        self._identity = {
            "world_size": topology.world_size,
            "ep_size": topology.ep_size,
            "zero_stage": int(engine.zero_optimization_stage()),
        }

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint folder; raises `CheckpointError` if it does not fit."""
        state = load_checkpoint(self.engine, checkpoint, self._identity)
        if state["seed"] != self.seed:
            raise ShodhError(f"{checkpoint} was trained with seed {state['seed']}, and this run has seed {self.seed}")
        self.step = int(state["step"])
        log.info("resumed from %s at step %d of %d", checkpoint, self.step, self.train.steps)

    def save(self) -> None:
        """Publish a checkpoint of the current step."""
        state = {"step": self.step, "seed": self.seed}
        tag = f"step_{self.step:08d}"
        save_checkpoint(self.engine, self.folder, tag, state, self._identity, self.train.keep_checkpoints)

    def fit(self) -> bool:
        """Train to the last step; False if a signal ended it early (a checkpoint is then saved)."""
        writer = MetricWriter(self.folder.path, self.step) if rank() == 0 else None
        stop = Stop()
        hidden = rank() != 0 or not sys.stderr.isatty()
        bar = tqdm(total=self.train.steps, initial=self.step, unit="step", disable=hidden)
        batches = self.task.batches(self.step, self.train.steps)
        moved = MovementCheck(self.engine) if self.step == 0 else None
        clock = _Clock()
        saved = self.step
        try:
            while self.step < self.train.steps:
                metrics = self._train_step(batches, clock)
                if moved is not None:
                    _check_moved(moved.finish(learning_rate(self.step, self.train)))
                    moved = None
                self.step += 1
                bar.update()
                last = self.step == self.train.steps
                if last or self.step % self.train.log_every == 0:
                    self._log(metrics, clock, writer, bar)
                if last or (self.train.valid_every and self.step % self.train.valid_every == 0):
                    self._validate(writer, bar)
                if last or (self.train.checkpoint_every and self.step % self.train.checkpoint_every == 0):
                    self.save()
                    saved = self.step
                if self._agree(stop.asked) and not last:
                    if saved != self.step:
                        self.save()
                    log.info("stopped at step %d by a signal; the same command with --resume auto goes on", self.step)
                    return False
            return True
        finally:
            bar.close()
            self.task.close()
            if writer is not None:
                writer.close()

    def _train_step(self, batches: Iterator[Batch], clock: _Clock) -> Metrics:
        self.engine.train()
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.train)
        self.task.start_step(self.step)
        metrics: Metrics = {}
        for _ in range(self.topology.accumulation):
            with clock:
                batch = next_micro_batch(batches, self.engine.device)
            loss, reported = self.task.loss(self.engine, batch, self.step)
            self.engine.backward(loss)
            self.engine.step()
            for name, (value, reduction) in {"train/loss": (loss.detach(), "mean"), **reported}.items():
                share = value / self.topology.accumulation if reduction == "mean" else value
                old = metrics.get(name)
                metrics[name] = (share if old is None else old[0] + share, reduction)  # type: ignore[assignment]
        self.task.finish_step(self.engine, self.step)
        clock.steps += 1
        return metrics

    def _log(self, metrics: Metrics, clock: _Clock, writer: MetricWriter | None, bar: tqdm[Any]) -> None:
        metrics = {**metrics, **self.task.report(self.step - 1, writer), **clock.read(self.topology.global_batch)}
        if uses_cuda():
            metrics["mem/peak_gib"] = (torch.cuda.max_memory_allocated() / 2**30, "max")
        values = reduce_metrics(metrics, self.engine.device)
        values["train/grad_norm"] = float(self.engine.get_global_grad_norm() or 0.0)
        values["train/lr"] = learning_rate(self.step - 1, self.train)
        if not math.isfinite(values["train/loss"]):
            raise SharedError(
                f"the loss is {values['train/loss']} at step {self.step}; lower the learning rate, and resume from the "
                "last checkpoint with --resume auto"
            )
        if writer is not None:
            writer.write(self.step - 1, values)
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


def _check_moved(still: list[str]) -> None:
    with together():
        if still:
            raise ShodhError(f"parameters that did not move in the first step: {', '.join(still[:5])}")
