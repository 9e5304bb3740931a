"""The training loop: steps of an engine. What is learned is the task's; all that happens beside it, the callbacks'."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from shodh.checkpoint.average import WeightAverage
from shodh.config import TrainConfig
from shodh.core.topology import Topology
from shodh.moe.routing import Routing
from shodh.train.engine import refuse_steps
from shodh.train.metrics import Metrics, reduce_metrics
from shodh.train.schedule import learning_rate
from shodh.train.spikes import Usual

Batch = dict[str, Tensor]

SAMPLE_KEY = ("regime", "trajectory", "frame")


def to_device(batch: Batch, device: torch.device) -> Batch:
    """A batch where it is computed with; the keys of its samples also stay on the host, as ``sample [B, 3]``.

    Nothing waits for the device: not here, if the batch lies in pinned memory, nor where the keys are read.
    """
    keys = torch.stack([batch[name] for name in SAMPLE_KEY], 1)
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()} | {"sample": keys}


def sample_names(batch: Batch) -> list[tuple[int, ...]]:
    """What names each sample of a batch of `to_device`: regime, trajectory, frame."""
    return [tuple(key) for key in batch["sample"].tolist()]


@dataclass(frozen=True)
class Outcome:
    """What a task makes of one micro-batch.

    Attributes
    ----------
    loss : Tensor []
        What is differentiated.
    errors : Tensor [B]
        Error of each sample, without a gradient.
    metrics : Metrics
        To be reported of it.
    routing : sequence of Routing
        Of each expert layer.
    fingerprint : Tensor [B, F], optional
        What routers that observe were shown.
    """

    loss: Tensor
    errors: Tensor
    metrics: Metrics
    routing: Sequence[Routing] = ()
    fingerprint: Tensor | None = None


@dataclass(frozen=True)
class Best:
    """The validation with the lowest value of a measure, and what it said of persistence, if it did."""

    step: int
    measure: str
    value: float
    persistence: float | None = None


class Measured(NamedTuple):
    """Held-out errors of a batch by name, each as values ``[N]`` and the labels ``[N]`` of their regimes."""

    errors: dict[str, tuple[Tensor, Tensor]]
    routing: Sequence[Routing] = ()


class Task(Protocol):
    """What is learned."""

    @property
    def measures(self) -> Sequence[str]:
        """Names of the errors of `measured`."""

    def start_step(self) -> None:
        """Called before the first micro-batch of a step."""

    def loss(self, model: Any, batch: Batch, step: int) -> Outcome:
        """Loss of one micro-batch."""

    def measured(self, model: Any, batch: Batch) -> Measured:
        """Errors on held-out samples."""


class Callback:
    """What happens beside the steps. All ranks have the same ones in the same order: each may be collective."""

    def start(self, trainer: Trainer) -> None:
        """Before the first step."""

    def after_loss(self, trainer: Trainer, batch: Batch, outcome: Outcome) -> None:
        """After each forward pass; ``trainer.step`` is the step's number."""

    def after_step(self, trainer: Trainer) -> None:
        """After each step, taken by the optimiser or skipped; ``trainer.step`` counts it already."""

    def after_validation(self, trainer: Trainer, batch: Batch, routing: Sequence[Routing]) -> None:
        """After each forward pass over held-out samples."""

    def flush(self, trainer: Trainer) -> None:
        """Write what was collected: a checkpoint of this step follows."""

    def finish(self, trainer: Trainer) -> None:
        """After the last step."""

    def close(self) -> None:
        """In the end, also of a run that failed. Not collective."""


class Trainer:
    """Runs a task on a DeepSpeed engine.

    Parameters
    ----------
    batches : callable
        ``batches(start, stop)`` gives this rank's micro-batches of the steps ``start .. stop - 1``, in order.
    seed : int
        Saved with every checkpoint; a resumed run must have the same.

    Attributes
    ----------
    step : int
        Steps that are done, skipped ones too; while one is at work, its number.
    skipped, skipped_in_row : int
        Steps that the optimiser did not take, because a gradient somewhere was not finite, or of a spike.
    passed : int
        Batches that the run has passed over, because it went back: step n sees batch n + passed.
    rollbacks : int
        Times that it went back to a checkpoint.
    usual : Usual, optional
        Losses and gradient norms of the last steps, where spikes are skipped.
    applied : bool
        Whether the optimiser took the last step.
    rate : float
        Learning rate of the last step.
    metrics : Metrics
        What is to be reported of the last step.
    waited : float
        Seconds spent waiting for data.
    average : WeightAverage, optional
        Of the weights, where the run keeps one.
    validated : dict, optional
        Means of the validation after the last step, the same on all ranks; None if there was none.
    best : Best, optional
        The best validation so far; ``improved``: it is the one after the last step.
    stale : int
        Validations since the best one.
    ended : str, optional
        Set, on all ranks, by a callback that ends the run before its last step: why. The run is then finished.
    stopping : bool
        Set, on all ranks, by a callback that interrupts the run.
    meeting : bool
        Whether all ranks meet after this step, because a callback asked them something: the time for more questions.
    """

    def __init__(
        self,
        engine: Any,
        task: Task,
        batches: Callable[[int, int], Iterator[Batch]],
        train: TrainConfig,
        topology: Topology,
        seed: int,
        callbacks: Sequence[Callback],
    ) -> None:
        self.engine, self.task, self.batches = engine, task, batches
        self.train, self.topology, self.seed, self.callbacks = train, topology, seed, callbacks
        self.step = self.skipped = self.skipped_in_row = self.passed = self.rollbacks = 0
        self.applied, self.stopping, self.meeting = True, False, True
        self.rate = self.waited = 0.0
        self.average: WeightAverage | None = None
        self.validated: Mapping[str, float] | None = None
        self.best: Best | None = None
        self.stale, self.improved = 0, False
        self.ended: str | None = None
        self.metrics: Metrics = {}
        self._returns: tuple[Path | None, int] = (None, 0)
        self.usual: Usual | None = None
        if train.spikes is not None:
            self.usual = Usual(train.spikes)
            refuse_steps(engine, self._is_spike)

    def _is_spike(self, norm: float) -> bool:
        """Whether the step at work, of this gradient norm, is a spike; all ranks agree. Collective."""
        assert self.usual is not None
        loss, device = self.metrics["train/loss"][0], self.engine.device
        values = reduce_metrics({"loss": (loss, "mean"), "grad_norm": (norm, "max")}, device)
        return self.usual.judge(values)

    def returns(self, checkpoint: Path) -> int:
        """How often, in a row, the run went back to a checkpoint."""
        return self._returns[1] if self._returns[0] == checkpoint else 0

    def go_back(self, checkpoint: Path, resume: Callable[[], object]) -> None:
        """Let ``resume`` restore a checkpoint, and go on with batches that follow those of the step that failed."""
        batch, rollbacks, returns = self.step + self.passed, self.rollbacks + 1, self.returns(checkpoint) + 1
        resume()
        self.passed, self.rollbacks, self.skipped_in_row = batch - self.step, rollbacks, 0
        self._returns = (checkpoint, returns)

    @property
    def finished(self) -> bool:
        return self.step >= self.train.steps or self.ended is not None

    def due(self, every: int) -> bool:
        """Whether something that is done every so many steps (0: never), and after the last one, is to be done now."""
        return self.finished or bool(every and self.step % every == 0)

    def call(self, event: str, *arguments: Any) -> None:
        """Let every callback know."""
        for callback in self.callbacks:
            getattr(callback, event)(self, *arguments)

    def fit(self) -> bool:
        """Train to the last step; False if the run was interrupted."""
        batches = self.batches(self.step + self.passed, self.train.steps + self.passed)
        self.applied, self.stopping, self.meeting = True, False, True
        try:
            self.call("start")
            while not self.finished and not self.stopping:
                self._take_step(batches)
                self.call("after_step")
            self.call("finish")
            return self.finished
        finally:
            failing = sys.exc_info()[0] is not None
            with ExitStack() as closing:  # all of them, in order, also where one fails
                for callback in reversed(self.callbacks):
                    closing.callback(_close, callback, failing)

    def _take_step(self, batches: Iterator[Batch]) -> None:
        """Forward and backward passes of a global batch, and the optimiser's step."""
        self.engine.train()
        # A skipped step does not move the schedule.
        self.rate = learning_rate(self.step - self.skipped, self.train)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.rate
        self.task.start_step()
        self.metrics, self.validated, self.improved = {}, None, False
        for _ in range(self.topology.accumulation):
            batch = self._next(batches)
            outcome = self.task.loss(self.engine, batch, self.step)
            self.call("after_loss", batch, outcome)
            self._add({"train/loss": (outcome.loss.detach(), "mean"), **outcome.metrics})
            self.engine.backward(_poisoned(outcome.loss))
            self.engine.step()
        self.applied = bool(self.engine.was_step_applied())
        if self.usual is not None:
            self.usual.finish(self.applied)
        self.step += 1

    def _next(self, batches: Iterator[Batch]) -> Batch:
        began = time.perf_counter()
        batch = to_device(next(batches), self.engine.device)
        self.waited += time.perf_counter() - began
        return batch

    def _add(self, metrics: Metrics) -> None:
        """Those of a micro-batch to those of the step."""
        for name, (value, reduction) in metrics.items():
            share = value / self.topology.accumulation if reduction == "mean" else value
            old = self.metrics.get(name)
            self.metrics[name] = (share if old is None else old[0] + share, reduction)  # type: ignore[assignment]


def _close(callback: Callback, failing: bool) -> None:
    """End a callback; its error says less than one that is on its way."""
    try:
        callback.close()
    except OSError:
        if not failing:
            raise


def _poisoned(loss: Tensor) -> Tensor:
    """The loss; if it is not finite, so that all its gradients are not either and every rank skips the step."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan).to(loss.dtype)
