"""The best validation so far, and the end of a run that finds no better one; the average of its weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from shodh.config import BestConfig
from shodh.core.distributed import SharedError, gather
from shodh.core.errors import ConfigError
from shodh.train.trainer import Best, Callback, Trainer

log = logging.getLogger("shodh")

PERSISTENCE = "persistence_"
PREFIX = "valid"


class Averaging(Callback):
    """Take the weights into their average after each step that the optimiser took; stands before `Validation`."""

    def after_step(self, trainer: Trainer) -> None:
        if trainer.average is not None and trainer.applied:
            trainer.average.update()


class Selection(Callback):
    """Compare each validation with the best one so far; stands after `Validation` and before `Checkpoints`.

    A value that is not finite is never the best. Rank 0 decides for all.
    """

    def __init__(self, config: BestConfig) -> None:
        self._config = config

    def after_step(self, trainer: Trainer) -> None:
        if trainer.validated is None:
            return
        measure, values = self._config.measure, trainer.validated
        value, best = gather(values.get(measure))[0], trainer.best
        if value is None:
            raise SharedError(
                f"the validation has no {measure}: none of its samples is of that regime, or varies in space; raise "
                "train.valid_batches, or choose another train.best.measure"
            )
        if math.isfinite(value) and (best is None or value < best.value):
            persistence = values.get(_of_persistence(measure))
            trainer.best, trainer.stale, trainer.improved = Best(trainer.step, measure, value, persistence), 0, True
            beside = "" if persistence is None else f" (persistence {persistence:.4g})"
            log.info("best so far: step %d, %s %.4g%s", trainer.step, measure, value, beside)
        else:
            trainer.stale += 1
        trainer.ended = reason_to_end(trainer, self._config)
        if trainer.ended is not None:
            log.info("the run ends at step %d of %d: %s", trainer.step, trainer.train.steps, trainer.ended)


def reason_to_end(trainer: Trainer, config: BestConfig | None) -> str | None:
    """Why a run is not to be trained further; None if it is."""
    if config is None or not config.patience or trainer.stale < config.patience or trainer.step >= trainer.train.steps:
        return None
    best = "finite" if trainer.best is None else f"below {trainer.best.value:.4g}, that of step {trainer.best.step}"
    return f"{config.measure} was not {best} in {trainer.stale} validations (train.best.patience={config.patience})"


def _of_persistence(measure: str) -> str:
    """The name under which a validation says persistence's error: ``persistence_vrmse`` of ``decoded_vrmse``."""
    prefix, name, *regime = measure.split("/")
    return "/".join([prefix, PERSISTENCE + name.rpartition("_")[2], *regime])


def check_measure(config: BestConfig | None, measures: Sequence[str], regimes: Sequence[str]) -> None:
    """Refuse a measure that no validation of a task reports; raises `ConfigError` with those that exist."""
    if config is None:
        return
    names = [f"{PREFIX}/{name}" for name in measures if not name.startswith(PERSISTENCE)]
    known = {*names, *(f"{name}/{regime}" for name in names for regime in regimes)}
    if config.measure not in known:
        raise ConfigError(
            f"train.best.measure={config.measure}: no validation of this run reports it; use {', '.join(names)}, or "
            f"one of these by regime, as {names[0]}/{regimes[0]}"
        )
