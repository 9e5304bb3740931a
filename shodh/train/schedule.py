"""The learning rate, a function of the step alone."""

from __future__ import annotations

import math

from shodh.config import TrainConfig

FIRST_OF_ONE_CYCLE = 1e-4  # first learning rate over the highest, as DPOT and MoE-POT train


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of a step, counted from 0, by ``config.schedule``.

    ``cosine``: linear warm-up, then a cosine from ``lr`` down to ``min_lr * lr`` at the last step. ``one_cycle`` (Smith
    and Topin, arXiv 1708.07120): a cosine up to ``lr`` during the warm-up, then one down to ``min_lr * lr``.
    """
    return _one_cycle(step, config) if config.schedule == "one_cycle" else _warm_cosine(step, config)


def _between(start: float, end: float, progress: float) -> float:
    """Half a cosine from ``start`` at progress 0 to ``end`` at 1 and beyond."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _warm_cosine(step: int, config: TrainConfig) -> float:
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * _between(1.0, config.min_lr, progress)


def _one_cycle(step: int, config: TrainConfig) -> float:
    top, last = max(0, min(config.warmup, config.steps) - 1), config.steps - 1
    if step < top:
        return config.lr * _between(FIRST_OF_ONE_CYCLE, 1.0, step / top)
    return config.lr * _between(1.0, config.min_lr, (step - top) / max(1, last - top))
