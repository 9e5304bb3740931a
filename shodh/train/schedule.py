"""The learning rate, a function of the step alone."""

from __future__ import annotations

import math

from shodh.config import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine from ``lr`` down to ``min_lr * lr`` at the last step; ``step`` counts from 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    floor = config.min_lr
    return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
