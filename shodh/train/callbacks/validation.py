"""Validation: errors over held-out samples, the same ones every time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from shodh.core.distributed import sum_over_ranks
from shodh.train.callbacks.experts import regime_table, routing_metrics
from shodh.train.callbacks.step_metrics import StepMetrics
from shodh.train.metrics import RegimeMeans, reduce_metrics
from shodh.train.trainer import Batch, Callback, Measured, Trainer, to_device


class Validation(Callback):
    """Errors by regime every ``valid_every`` steps and after the last one; stands after `StepMetrics`.

    Of the average of the weights, where the run keeps one.

    Parameters
    ----------
    measure : callable
        Errors of a model on a batch, without gradients: of a forecast of one step, or of a reconstruction.
    batches : callable
        As of the trainer.
    """

    def __init__(
        self,
        measure: Callable[[Any, Batch], Measured],
        batches: Callable[[int, int], Iterator[Batch]],
        regimes: Sequence[str],
        metrics: StepMetrics,
    ) -> None:
        self._measure, self._batches, self._regimes, self._metrics = measure, batches, regimes, metrics

    def after_step(self, trainer: Trainer) -> None:
        if not trainer.due(trainer.train.valid_every):
            return
        trainer.engine.eval()
        average = trainer.average
        with torch.no_grad(), nullcontext() if average is None else average.in_place():
            trainer.validated = self._validate(trainer)
        self._metrics.write_validation(trainer, trainer.validated)

    def _validate(self, trainer: Trainer) -> dict[str, float]:
        means, table = RegimeMeans(self._regimes), None
        for batch in self._batches(0, trainer.train.valid_batches):
            batch = to_device(batch, trainer.engine.device)
            errors, routing = self._measure(trainer.engine, batch)
            for name, (values, regime) in errors.items():
                means.add(name, values, regime)
            trainer.call("after_validation", batch, routing)
            if routing:
                counts = regime_table(routing, batch["regime"], len(self._regimes))
                table = counts if table is None else table + counts
        metrics = means.reduce("valid")
        if table is not None:
            found = routing_metrics(sum_over_ranks(table.clone()).cpu())
            metrics.update({f"valid/{name}": value for name, value in found.items()})
        return reduce_metrics(metrics, trainer.engine.device)
