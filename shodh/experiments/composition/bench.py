"""What every method is measured by: errors on the observed steps, and on those that follow.

The first ``history`` frames and the ``prefix`` steps after them are observed. Read-outs that adapt see the loss of a
rollout over the observed steps, from the first frames. The error that counts is of a rollout from the last observed
frames, over the ``rollout`` steps after the prefix, for every method: also for those that look at no prefix.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from shodh.checkpoint.pretrained import FieldModel
from shodh.core.errors import DataError
from shodh.core.weights import LazyWeights
from shodh.experiments.composition.members import Case, Family
from shodh.merge import Slider, check_prefix
from shodh.train.losses import physical_relative_l2

#: ``(window [B, history, C, *grid], static [B, S, *grid]) -> next frame [B, C, *grid]``, normalised.
Step = Callable[[Tensor, Tensor], Tensor]


def unroll(step: Step, window: Tensor, static: Tensor, steps: int) -> Tensor:
    """The ``steps`` frames that follow, each predicted from the last ones: ``[B, steps, C, *grid]``; differentiable."""
    frames = []
    for _ in range(steps):
        frames.append(step(window, static))
        window = torch.cat((window[:, 1:], frames[-1].unsqueeze(1)), 1)
    return torch.stack(frames, 1)


def persistence(window: Tensor, static: Tensor) -> Tensor:
    """The last frame again."""
    return window[:, -1]


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

    def model_step(self, model: FieldModel) -> Step:
        """What a network does with a window."""
        return lambda window, static: model.step(window, static, self.family.regime).latent

    def step_of(self, weights: LazyWeights) -> Step:
        """What the family's network does with these weights, until it is given others."""
        return self.model_step(self.family.put(weights))

    def l2re(self, prediction: Tensor, truth: Tensor, static: Tensor) -> Tensor:
        """Relative L2 error in physical units over the cells that exist, the mean over fields.

        ``[N, T, C, *grid]`` with ``static [N, S, *grid] -> [N, T]``. It is what is published; of a field with an offset
        it is small whatever is predicted.
        """
        cells = self.family.model.cells(static, self.family.regime)
        if cells is not None:
            cells = cells.unsqueeze(1).expand_as(truth).flatten(0, 1)
        constants = self.family.model.normalizer.constants[self.family.regime]
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

    def observed_loss(self, step: Step, case: Case) -> Tensor:
        """Error of a rollout over the observed steps, from the first frames: ``[N]``; differentiable."""
        return self._errors(step, case, 0, self.prefix).mean(1)

    @torch.no_grad()
    def observed(self, step: Step, case: Case) -> Tensor:
        """`observed_loss` in batches; infinite where the rollout is not finite. float64, on the CPU."""
        return _finite([self.observed_loss(step, part) for part in case.chunks(self.batch)])

    @torch.no_grad()
    def later(self, step: Step, case: Case) -> Tensor:
        """Error of each counted step, ``[N, rollout]``; infinite where it is not finite. float64, on the CPU."""
        self.check(case)
        return _finite([self._errors(step, part, self.prefix, self.rollout) for part in case.chunks(self.batch)])

    def window(self, case: Case) -> Tensor:
        """The last observed frames, from which the counted rollout starts."""
        return case.frames[:, self.prefix : self.prefix + self.history]

    def _errors(self, step: Step, case: Case, start: int, steps: int) -> Tensor:
        first = start + self.history
        predicted = unroll(step, case.frames[:, start:first], case.static, steps)
        return self.l2re(predicted, case.frames[:, first : first + steps], case.static)

    def loss_and_gradient(self, slider: Slider, case: Case) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
        """``alpha [d] -> (mean loss on the observed steps, its gradient [d])``, in batches."""

        def loss_of(part: Case) -> Callable[[torch.nn.Module], Tensor]:
            return lambda _: self.observed_loss(self.model_step(self.family.model), part).mean()

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

    def step(self, alpha: float) -> Step:
        """What the composed network does, until it is given another coordinate."""
        self.bench.family.slider().set(alpha)
        return self.bench.model_step(self.bench.family.model)

    def observed(self, alpha: float) -> Tensor:
        """`Bench.observed` at a coordinate."""
        if alpha not in self._observed:
            self._observed[alpha] = self.bench.observed(self.step(alpha), self.case)
        return self._observed[alpha]

    def later(self, alpha: float) -> Tensor:
        """`Bench.later` at a coordinate."""
        if alpha not in self._later:
            self._later[alpha] = self.bench.later(self.step(alpha), self.case)
        return self._later[alpha]

    def observed_mean(self, alpha: float) -> float:
        """For the read-outs that look at the prefix."""
        return float(self.observed(alpha).mean())

    def later_mean(self, alpha: float) -> float:
        """For calibration, and for the choice in hindsight."""
        return float(self.later(alpha).mean())
