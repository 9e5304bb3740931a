"""The training loop: steps of an engine. What is learned is the task's; all that happens beside it, the callbacks'."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from shodh.config import TrainConfig
from shodh.core.topology import Topology
from shodh.moe.routing import Routing
from shodh.train.metrics import Metrics
from shodh.train.schedule import learning_rate

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


class Measured(NamedTuple):
    """Held-out errors of a batch by name, each as values ``[N]`` and the labels ``[N]`` of their regimes."""

    errors: dict[str, tuple[Tensor, Tensor]]
    routing: Sequence[Routing] = ()


class Task(Protocol):
    """What is learned."""

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
        Steps that the optimiser did not take, because a gradient somewhere was not finite.
    applied : bool
        Whether the optimiser took the last step.
    rate : float
        Learning rate of the last step.
    metrics : Metrics
        What is to be reported of the last step.
    waited : float
        Seconds spent waiting for data.
    stopping : bool
        Set, on all ranks, by a callback that ends the run early.
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
        self.step = self.skipped = self.skipped_in_row = 0
        self.applied, self.stopping, self.meeting = True, False, True
        self.rate = self.waited = 0.0
        self.metrics: Metrics = {}

    @property
    def finished(self) -> bool:
        return self.step >= self.train.steps

    def due(self, every: int) -> bool:
        """Whether something that is done every so many steps (0: never), and after the last one, is to be done now."""
        return self.finished or bool(every and self.step % every == 0)

    def call(self, event: str, *arguments: Any) -> None:
        """Let every callback know."""
        for callback in self.callbacks:
            getattr(callback, event)(self, *arguments)

    def fit(self) -> bool:
        """Train to the last step; False if the run was stopped early."""
        batches = self.batches(self.step, self.train.steps)
        try:
            self.call("start")
            while not self.finished and not self.stopping:
                self._take_step(batches)
                self.call("after_step")
            self.call("finish")
            return self.finished
        finally:
            for callback in self.callbacks:
                callback.close()

    def _take_step(self, batches: Iterator[Batch]) -> None:
        """Forward and backward passes of a global batch, and the optimiser's step."""
        self.engine.train()
        # A skipped step does not move the schedule.
        self.rate = learning_rate(self.step - self.skipped, self.train)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.rate
        self.task.start_step()
        self.metrics = {}
        for _ in range(self.topology.accumulation):
            batch = self._next(batches)
            outcome = self.task.loss(self.engine, batch, self.step)
            self.call("after_loss", batch, outcome)
            self.engine.backward(_poisoned(outcome.loss))
            self.engine.step()
            self._add({"train/loss": (outcome.loss.detach(), "mean"), **outcome.metrics})
        self.applied = bool(self.engine.was_step_applied())
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


def _poisoned(loss: Tensor) -> Tensor:
    """The loss; if it is not finite, so that all its gradients are not either and every rank skips the step."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan).to(loss.dtype)
