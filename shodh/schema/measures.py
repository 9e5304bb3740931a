"""Error measures of a field, each named after its published definition; all are made of the same few moments.

A field is compared where it exists, in any units; the moments of the truth are taken once for all that is compared with
it. A measure of a truth that it cannot judge (VRMSE of one that does not vary) is NaN, *undefined*, and left out of
means; of a prediction that is not finite it is infinite, and stays in them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

EPS = 1e-7  # of The Well's VRMSE
LEAST_SHARE = 1e-6  # of a field's variance, that a component must have to be judged by its own


def mean_over(values: Tensor, exists: Tensor | None = None, start: int = 1) -> Tensor:
    """Mean over the axes from ``start`` on (by default of a sample), of the cells that exist; zero where none does."""
    if exists is None:
        return values.flatten(start).mean(start)
    exists = exists.expand_as(values)
    return torch.where(exists, values, 0.0).flatten(start).sum(start) / exists.flatten(start).sum(start).clamp(min=1)


class Truth(NamedTuple):
    """Mean and variance over space of each component of one field: ``[B, C]``."""

    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, target: Tensor, exists: Tensor | None = None) -> Self:
        """Of ``target [B, C, *grid]``; ``exists``, bool, in a shape that broadcasts with it."""
        mean = mean_over(target, exists, 2)
        centred = target - mean.view(*mean.shape, *(1,) * (target.ndim - 2))
        return cls(mean, mean_over(centred.square(), exists, 2))

    def square(self, zero: float = 0.0) -> Tensor:
        """Mean square about ``zero``: ``[B, C]``."""
        return self.variance + (self.mean - zero).square()


def mean_square_error(prediction: Tensor, target: Tensor, exists: Tensor | None = None) -> Tensor:
    """Over space, of each component, ``[B, C, *grid] -> [B, C]``; infinite of a prediction that is not finite."""
    return mean_over((prediction - target).square(), exists, 2).nan_to_num(nan=torch.inf, posinf=torch.inf)


def component_vrmse(error: Tensor, truth: Truth) -> Tensor:
    """VRMSE of each component, as The Well defines it: ``sqrt(mean (u-v)^2 / (mean (v - mean v)^2 + 1e-7))``.

    NaN of a component that does not vary: one whose variance is below 1e-7, where the definition would divide by its
    safeguard, or below a millionth of its field's (the third component of a flow in two dimensions).
    """
    least = (LEAST_SHARE * truth.variance.sum(1, keepdim=True)).clamp(min=EPS)
    return torch.where(truth.variance < least, torch.nan, (error / (truth.variance + EPS)).sqrt())


def vrmse(error: Tensor, truth: Truth, zero: float = 0.0) -> Tensor:
    """The Well (arXiv 2412.00568): mean over the components that vary; NaN where none does. Without an offset."""
    return component_vrmse(error, truth).nanmean(1)


def joint_vrmse(error: Tensor, truth: Truth, zero: float = 0.0) -> Tensor:
    """VRMSE of a vector as one: error and variance summed over its components, also those that do not vary."""
    variance = truth.variance.sum(1)
    return torch.where(variance < EPS, torch.nan, (error.sum(1) / (variance + EPS)).sqrt())


def l2re(error: Tensor, truth: Truth, zero: float = 0.0) -> Tensor:
    """``||u - v|| / ||v||`` of the field in the units given; of normalised ones it compares with the training mean."""
    return (error.sum(1) / (truth.square().sum(1) + 1e-12)).sqrt()


def nrmse(error: Tensor, truth: Truth, zero: float = 0.0) -> Tensor:
    """APEBench (arXiv 2411.00180), PDE-Transformer: ``sqrt(mse / mean v^2)`` in *physical* units.

    The L2RE that DPOT and MoE-POT report. It flatters a field with an offset, a temperature in kelvin.

    Parameters
    ----------
    zero : float
        What a physical zero is in the units given: ``-mean / scale`` of a normalised field.
    """
    return (error.sum(1) / (truth.square(zero).sum(1) + 1e-12)).sqrt()


@dataclass(frozen=True)
class Measure:
    """One measure: ``of(error [B, C], truth, zero) -> [B]`` for fields in model units."""

    label: str
    of: Callable[[Tensor, Truth, float], Tensor]


#: In the order of tables.
MEASURES = {
    "vrmse": Measure("VRMSE", vrmse),
    "vrmse_joint": Measure("VRMSE, components as one,", joint_vrmse),
    "l2re": Measure("L2RE", l2re),
    "nrmse": Measure("nRMSE, in units,", nrmse),
}


def measure(
    name: str, prediction: Tensor, target: Tensor, *, exists: Tensor | None = None, zero: float = 0.0
) -> Tensor:
    """One of `MEASURES` of one field: ``[B, C, *grid] -> [B]``; ``exists`` as `Truth.of`, ``zero`` as `nrmse`."""
    return MEASURES[name].of(mean_square_error(prediction, target, exists), Truth.of(target, exists), zero)


def physical_relative_l2(
    prediction: Tensor, target: Tensor, constants: tuple[float, float], *, exists: Tensor | None = None
) -> Tensor:
    """`nrmse` of one normalised field with its mean and scale: ``[B, C, *grid] -> [B]``."""
    mean, scale = constants
    if scale == 0:  # A constant comes back as its value.
        return prediction.new_zeros(len(prediction))
    return measure("nrmse", prediction, target, exists=exists, zero=-mean / scale)
