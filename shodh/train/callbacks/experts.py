"""What expert layers need beside the optimiser: selection biases, temperatures, and a look at their load."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from shodh.config import ExpertsConfig
from shodh.core.distributed import connected, sum_over_ranks
from shodh.moe.balance import entropy
from shodh.moe.routing import Routing, count_by_regime, regime_information
from shodh.moe.step import finish_step
from shodh.train.callbacks.step_metrics import StepMetrics
from shodh.train.metrics import Metrics
from shodh.train.pictures import share_picture
from shodh.train.trainer import Batch, Callback, Outcome, Trainer


class Experts(Callback):
    """Update the routers after each step that was taken; report load and specialisation of the step where it is logged.

    Stands before `StepMetrics`, which writes what is reported.
    """

    def __init__(self, config: ExpertsConfig, regimes: Sequence[str], log_every: int, metrics: StepMetrics) -> None:
        self._config, self._regimes, self._every, self._metrics = config, regimes, log_every, metrics
        self._table: Tensor | None = None
        self._fingerprints: list[Tensor] = []

    def after_loss(self, trainer: Trainer, batch: Batch, outcome: Outcome) -> None:
        if outcome.routing:
            table = regime_table(outcome.routing, batch["regime"], len(self._regimes))
            self._table = table if self._table is None else self._table + table
        if outcome.fingerprint is not None:
            self._fingerprints.append(outcome.fingerprint)

    def after_step(self, trainer: Trainer) -> None:
        if self._table is None:
            return
        table, self._table = self._table, None
        seen, self._fingerprints = self._fingerprints, []
        if trainer.applied:
            counts, samples = lambda: sum_over_ranks(table.clone()).sum(1), lambda: join_ranks(torch.cat(seen))
            finish_step(trainer.engine.module, self._config, counts, samples if seen else None)
        if trainer.due(self._every):
            whole = sum_over_ranks(table.clone()).cpu()
            trainer.metrics.update(routing_metrics(whole))
            if self._metrics.writer is not None and self._picture_due(trainer):
                picture = share_picture(whole, self._regimes)
                self._metrics.writer.image(trainer.step - 1, "moe/expert_shares", picture)

    def _picture_due(self, trainer: Trainer) -> bool:
        """At the 1st, 2nd, 4th, 8th ... log: pictures are few thousand bytes each, and must not outgrow the metrics."""
        number = -(-trainer.step // self._every)
        return number & (number - 1) == 0 or trainer.finished


def regime_table(routing: Sequence[Routing], regime: Tensor, num_regimes: int) -> Tensor:
    """Assignments of this rank, ``[layers, regimes, experts]``, of samples with labels ``regime [B]``."""
    return torch.stack([count_by_regime(r.selected, regime, num_regimes, r.num_experts) for r in routing])


def join_ranks(rows: Tensor) -> Tensor:
    """Rows of all ranks, of which each has as many: ``[B, F] -> [world B, F]``. Collective."""
    if connected() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(connected())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def routing_metrics(table: Tensor) -> Metrics:
    """Load and specialisation of a global table ``[layers, regimes, experts]``; the same on every rank."""
    load = table.sum(1).double()
    share = load / load.sum(-1, keepdim=True)
    experts = table.shape[-1]
    information = [regime_information(layer) for layer in table]
    metrics: Metrics = {
        "moe/load_max_over_mean": (float((share.max(-1).values * experts).mean()), "max"),
        "moe/entropy": (float(entropy(share).mean() / math.log(experts)) if experts > 1 else 0.0, "max"),
        "moe/dead_experts": (float((share < 0.01 / experts).sum(-1).double().mean()), "max"),
        "moe/regime_information": (sum(u for u, _ in information) / len(information), "max"),
        "moe/nmi_regime": (sum(n for _, n in information) / len(information), "max"),
    }
    return metrics
