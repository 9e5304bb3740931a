"""Spikes: a loss, or a gradient norm, far above those of the last steps; judged alike on all ranks, and on resume.

Compared are only steps that the optimiser took, as plain float64 numbers that a checkpoint holds to the last bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import fmean, pstdev
from typing import Any

from shodh.config import SpikeConfig
from shodh.core.errors import CheckpointError

NAMES = ("loss", "grad_norm")
MARGIN = 0.01  # of the mean, which a spike exceeds too: equal values have no deviation


class Usual:
    """What the last steps had.

    Attributes
    ----------
    spike : str, optional
        Of the last step, if it was one: what was how far above the usual.
    """

    def __init__(self, config: SpikeConfig) -> None:
        self._config = config
        self._past = {name: deque[float](maxlen=config.window) for name in NAMES}
        self._now: Mapping[str, float] = {}
        self.spike: str | None = None

    def judge(self, now: Mapping[str, float]) -> bool:
        """Whether a step with this ``loss`` and ``grad_norm`` is a spike."""
        self._now, found = now, []
        for name, past in self._past.items():
            if len(past) < self._config.window:
                continue
            mean, deviation = fmean(past), pstdev(past)
            limit = mean + max(self._config.sigma * deviation, MARGIN * abs(mean))
            if now[name] > limit:
                found.append(f"{name} {now[name]:.4g} above {limit:.4g} (mean {mean:.4g}, deviation {deviation:.4g})")
        self.spike = ", ".join(found) or None
        return self.spike is not None

    def finish(self, applied: bool) -> None:
        """After a step: it is usual, if the optimiser took it. Without a judgement it was not finite, and no spike."""
        if applied:
            for name, past in self._past.items():
                past.append(self._now[name])
        if not self._now:
            self.spike = None
        self._now = {}

    def state(self) -> dict[str, list[float]]:
        """For a checkpoint."""
        return {name: list(past) for name, past in self._past.items()}

    def load(self, state: Any) -> None:
        """What `state` gave, of another window the newest; None: begin anew. Raises `CheckpointError` for others."""
        try:
            values = {name: [float(v) for v in state[name]] if state is not None else [] for name in NAMES}
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the manifest is damaged: its usual losses are {str(state)[:100]}") from error
        for name, past in self._past.items():
            past.clear()
            past.extend(values[name])
