"""The routing trace of a run; its format is in `shodh.moe.trace`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shodh.config import RunConfig
from shodh.core.distributed import rank
from shodh.core.topology import Topology
from shodh.moe.routing import Routing
from shodh.moe.trace import TraceWriter, cut_traces_of_others, thinning
from shodh.train.trainer import Batch, Callback, Outcome, Trainer


class RoutingTrace(Callback):
    """Trace of every rank in ``folder``, thinned so that a long run fits ``routing_trace`` records a rank."""

    def __init__(self, config: RunConfig, regimes: Sequence[str], topology: Topology, folder: Path) -> None:
        train, depth, world = config.operator.train, config.operator.depth, topology.world_size
        self._regimes, self._folder, self._world, self._log_every = regimes, folder, world, train.log_every
        self._limit = config.routing_trace if config.operator.experts.num_experts else 0
        self._samples = config.routing_samples // world + (rank() < config.routing_samples % world)
        # Training may fill a third of the trace, validation the rest.
        validations = train.steps // train.valid_every + 1 if train.valid_every else 1
        lines = train.valid_batches * topology.accumulation + self._samples
        third = self._limit // 3
        self._every = thinning(topology.accumulation * train.steps * depth, third)
        self._validation_every = thinning(validations * lines * depth, self._limit - third)
        self._writer: TraceWriter | None = None
        self._validated, self._left = -1, 0
        self._lenient = train.failed_save == "continue"

    def start(self, trainer: Trainer) -> None:
        path = self._folder / f"rank{rank()}.jsonl"
        self._writer = TraceWriter(path, rank(), self._regimes, self._limit, trainer.step, self._lenient)
        if rank() == 0:
            cut_traces_of_others(self._folder, self._world, trainer.step)

    def after_loss(self, trainer: Trainer, batch: Batch, outcome: Outcome) -> None:
        if self._writer is not None and outcome.routing and trainer.step % self._every == 0:
            self._writer.add(trainer.step, "train", outcome.routing, batch["regime"])

    def after_step(self, trainer: Trainer) -> None:
        if trainer.due(self._log_every):
            self.flush(trainer)

    def after_validation(self, trainer: Trainer, batch: Batch, routing: Sequence[Routing]) -> None:
        every = trainer.train.valid_every
        number = trainer.step // every if every else 0
        if self._writer is None or not routing or not (trainer.finished or number % self._validation_every == 0):
            return
        if self._validated != trainer.step:
            self._validated, self._left = trainer.step, self._samples
        step, keys = trainer.step - 1, batch["sample"]
        self._writer.add(step, "valid", routing, batch["regime"], with_pairs=True)
        grid = trainer.engine.module.token_grid
        self._left -= self._writer.add_samples(step, "valid", routing, keys, grid, self._left)

    def flush(self, trainer: Trainer) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
