"""Faults that a run must not hide: parameters that never move, and steps that the optimiser cannot take."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor

from shodh.core.distributed import SharedError, gather, together
from shodh.core.errors import ShodhError
from shodh.train.callbacks.checkpoints import Checkpoints
from shodh.train.engine import MovementCheck
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


class SkippedSteps(Callback):
    """Count and report steps that the optimiser did not take; stop after too many in a row. All ranks skip, or none."""

    def __init__(self, regimes: Sequence[str], checkpoints: Checkpoints) -> None:
        self._regimes, self._checkpoints = regimes, checkpoints
        self._errors: list[tuple[Tensor, Tensor]] = []

    def after_loss(self, trainer: Trainer, batch: Batch, outcome: Outcome) -> None:
        self._errors.append((batch["regime"], outcome.errors))

    def after_step(self, trainer: Trainer) -> None:
        errors, self._errors = self._errors, []
        if trainer.applied:
            trainer.skipped_in_row = 0
            return
        trainer.skipped += 1
        trainer.skipped_in_row += 1
        names = sorted({name for part in gather(nonfinite_regimes(errors, self._regimes)) for name in part})
        what = f"errors of {', '.join(names)}" if names else "gradients, of finite errors,"
        row, step = trainer.skipped_in_row, trainer.step
        log.warning(
            "step %d skipped: %s are not finite; %d skipped in a row, %d in all", step, what, row, trainer.skipped
        )
        if row >= trainer.train.max_skipped_steps:
            raise SharedError(
                f"{row} steps in a row up to step {step} were skipped, train.max_skipped_steps="
                f"{trainer.train.max_skipped_steps}: {what} are not finite; {self._checkpoints.way_back()}"
            )
