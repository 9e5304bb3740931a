"""Faults that a run must not hide: parameters that never move, and steps that the optimiser cannot take."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from shodh.core.distributed import SharedError, gather, rank, together
from shodh.core.errors import ShodhError
from shodh.train.callbacks.checkpoints import Checkpoints
from shodh.train.engine import MovementCheck
from shodh.train.events import record_event
from shodh.train.metrics import nonfinite_regimes
from shodh.train.trainer import Batch, Callback, Outcome, Trainer

log = logging.getLogger("shodh")


class FirstStep(Callback):
    """Stop a new run in whose first step a parameter that had a gradient did not move."""

    def __init__(self) -> None:
        self._check: MovementCheck | None = None

    def start(self, trainer: Trainer) -> None:
        self._check = MovementCheck(trainer.engine) if trainer.step == trainer.skipped else None

    def after_step(self, trainer: Trainer) -> None:
        if self._check is None:
            return
        if not trainer.applied:
            self._check = self._check.restarted()
            return
        still, self._check = self._check.finish(trainer.rate), None
        with together():
            if still:
                raise ShodhError(f"parameters that did not move in the first step: {', '.join(still[:5])}")


class RollBack(Exception):
    """Too many steps in a row were skipped: go back to a checkpoint (`Checkpoints.go_back`). Raised on all ranks."""


class SkippedSteps(Callback):
    """Count and report steps that the optimiser did not take, of values that are not finite and of spikes alike.

    After too many in a row the run goes back to its last checkpoint and on with other batches, and stops at last. All
    ranks skip, or none.
    """

    def __init__(self, regimes: Sequence[str], run: Path, checkpoints: Checkpoints) -> None:
        self._regimes, self._run, self._checkpoints = regimes, run, checkpoints
        self._errors: list[tuple[Tensor, Tensor]] = []

    def start(self, trainer: Trainer) -> None:
        self._errors = []

    def after_loss(self, trainer: Trainer, batch: Batch, outcome: Outcome) -> None:
        self._errors.append((batch["regime"], outcome.errors))

    def after_step(self, trainer: Trainer) -> None:
        errors, self._errors = self._errors, []
        if trainer.applied:
            trainer.skipped_in_row = 0
            return
        trainer.skipped += 1
        trainer.skipped_in_row += 1
        spike = None if trainer.usual is None else trainer.usual.spike
        names = [] if spike else sorted({n for part in gather(nonfinite_regimes(errors, self._regimes)) for n in part})
        what = f"errors of {', '.join(names)}" if names else "gradients, of finite errors,"
        why = f"a spike, {spike}" if spike else f"{what} are not finite"
        row, step, train = trainer.skipped_in_row, trainer.step, trainer.train
        log.warning("step %d skipped: %s; %d skipped in a row, %d in all", step, why, row, trainer.skipped)
        self._record("skipped", step, why=why, in_row=row)
        if row < train.max_skipped_steps:
            return
        most = train.max_skipped_steps
        line = f"{row} steps in a row up to step {step} were skipped, train.max_skipped_steps={most}: {why}"
        start = self._checkpoints.newest()
        if start is not None and trainer.returns(start) < train.max_rollbacks:
            log.warning("%s; back to %s, and on with other batches", line, start)
            self._record("rolled back", step, to=start.name, why=why)
            raise RollBack(start)
        self._record("stopped", step, why=why)
        raise SharedError(f"{line}; {self._checkpoints.way_back()}")

    def _record(self, kind: str, step: int, **what: object) -> None:
        if rank() == 0:
            record_event(self._run, kind, step, **what)
