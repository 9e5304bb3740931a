"""What every method is measured by: errors on the observed steps, and on those that follow.

The first ``history`` frames and the ``prefix`` steps after them are observed. Read-outs that adapt see the loss of a
rollout over the observed steps, from the first frames. The error that counts is of a rollout from the last observed
frames, over the ``rollout`` steps after the prefix, for every method: also for those that look at no prefix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shodh.core.errors import DataError
from shodh.core.weights import LazyWeights
from shodh.experiments.composition.members import Case, Family
from shodh.merge import Slider, check_prefix
from shodh.models.forecaster import Forecaster
from shodh.models.operator import OperatorOutput
from shodh.schema.measures import physical_relative_l2


def still(states: Tensor, features: Tensor, **told: Any) -> OperatorOutput:
    """The operator of persistence: the last frame again."""
    return OperatorOutput(states[:, -1], [])


class Bench:
    """A family and the rules of its measurement.

    Parameters
    ----------
    prefix : int
        Observed steps after the history.
    rollout : int
        Counted steps after the prefix.

    Raises
    ------
    DataError
        Without an observed step there is nothing to adapt to.
    """

    def __init__(self, family: Family, prefix: int, rollout: int) -> None:
        self.family, self.prefix, self.rollout = family, prefix, rollout
        self.history = family.model.history
        check_prefix(self.history + prefix, self.history)
        self.batch = family.model.config.evaluation.batch

    def check(self, case: Case) -> None:
        """Refuse trajectories that end before the counted steps do."""
        needed = self.history + self.prefix + self.rollout
        if case.frames.shape[1] < needed:
            raise DataError(
                f"trajectories of {case.frames.shape[1]} frames; history {self.history}, prefix {self.prefix} and "
                f"rollout {self.rollout} need {needed}"
            )

    @property
    def persistence(self) -> Forecaster:
        """The last frame again and again."""
        return replace(self.family.model.forecaster, operator=still)

    def model_of(self, weights: LazyWeights) -> Forecaster:
        """The family's network with these weights, until it is given others."""
        return self.family.put(weights).forecaster

    def l2re(self, prediction: Tensor, truth: Tensor, static: Tensor) -> Tensor:
        """Relative L2 error in physical units over the cells that exist, the mean over fields.

        ``[N, T, C, *grid]`` with ``static [N, S, *grid] -> [N, T]``. It is what is published; of a field with an offset
        it is small whatever is predicted.
        """
        space = self.family.model.space
        cells = space.cells(static, torch.zeros(len(static), dtype=torch.long, device=static.device))
        if cells is not None:
            cells = cells.unsqueeze(1).expand_as(truth).flatten(0, 1)
        constants = space.constants(0)
        errors = [
            physical_relative_l2(
                prediction[:, :, channels].flatten(0, 1),
                truth[:, :, channels].flatten(0, 1),
                constants[name],
                exists=None if cells is None else cells[:, channels],
            )
            for name, channels in self.family.channels.items()
        ]
        return torch.stack(errors).mean(0).view(truth.shape[:2])

    def observed_loss(self, model: Forecaster, case: Case) -> Tensor:
        """Error of a rollout over the observed steps, from the first frames: ``[N]``; differentiable."""
        return self._errors(model, case, 0, self.prefix).mean(1)

    @torch.no_grad()
    def observed(self, model: Forecaster, case: Case) -> Tensor:
        """`observed_loss` in batches; infinite where the rollout is not finite. float64, on the CPU."""
        return _finite([self.observed_loss(model, part) for part in case.chunks(self.batch)])

    @torch.no_grad()
    def later(self, model: Forecaster, case: Case) -> Tensor:
        """Error of each counted step, ``[N, rollout]``; infinite where it is not finite. float64, on the CPU."""
        self.check(case)
        return _finite([self._errors(model, part, self.prefix, self.rollout) for part in case.chunks(self.batch)])

    def window(self, case: Case) -> Tensor:
        """The last observed frames, from which the counted rollout starts."""
        return case.frames[:, self.prefix : self.prefix + self.history]

    def _errors(self, model: Forecaster, case: Case, start: int, steps: int) -> Tensor:
        first = start + self.history
        states, features = model.encode(case.frames[:, start:first], case.static, 0)
        predicted = model.rollout(states, features, model.labels(0, states), steps)
        return self.l2re(predicted, case.frames[:, first : first + steps], case.static)

    def loss_and_gradient(self, slider: Slider, case: Case) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
        """``alpha [d] -> (mean loss on the observed steps, its gradient [d])``, in batches."""

        def loss_of(part: Case) -> Callable[[torch.nn.Module], Tensor]:
            return lambda _: self.observed_loss(self.family.model.forecaster, part).mean()

        parts = [(len(part.frames), slider.loss_and_gradient(loss_of(part))) for part in case.chunks(self.batch)]

        def at(alpha: np.ndarray) -> tuple[float, np.ndarray]:
            found = [(count, *part(alpha)) for count, part in parts]
            total = sum(count for count, *_ in found)
            value = sum(count * loss for count, loss, _ in found) / total
            return value, np.sum([count * gradient for count, _, gradient in found], axis=0) / total

        return at


def _finite(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts).double().cpu().nan_to_num(nan=torch.inf, posinf=torch.inf)


class Line:
    """A case along the line between the experts; each coordinate is computed once."""

    def __init__(self, bench: Bench, case: Case) -> None:
        self.bench, self.case = bench, case
        self._observed: dict[float, Tensor] = {}
        self._later: dict[float, Tensor] = {}

    def model(self, alpha: float) -> Forecaster:
        """The composed network, until it is given another coordinate."""
        self.bench.family.slider().set(alpha)
        return self.bench.family.model.forecaster

    def observed(self, alpha: float) -> Tensor:
        """`Bench.observed` at a coordinate."""
        if alpha not in self._observed:
            self._observed[alpha] = self.bench.observed(self.model(alpha), self.case)
        return self._observed[alpha]

    def later(self, alpha: float) -> Tensor:
        """`Bench.later` at a coordinate."""
        if alpha not in self._later:
            self._later[alpha] = self.bench.later(self.model(alpha), self.case)
        return self._later[alpha]

    def observed_mean(self, alpha: float) -> float:
        """For the read-outs that look at the prefix."""
        return float(self.observed(alpha).mean())

    def later_mean(self, alpha: float) -> float:
        """For calibration, and for the choice in hindsight."""
        return float(self.later(alpha).mean())
