"""How operators are told the time step and physical parameters: a scale and a shift of the features of every token."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shodh.config import OperatorConfig
from shodh.core.errors import ConfigError


class _Float32Linear(nn.Linear):
    """A linear map of float32 in float32, whatever its weights are kept in: bf16 has two digits of a time step."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), self.weight.float(), bias)


class Conditioning(nn.Module):
    """Feature-wise modulation (Perez et al. 2018, arXiv 1709.07871) by an embedding of the conditions.

    ``forward(x [B, ..., dim], values [B, N]) -> x * (1 + scale) + shift``. Values are in model units, NaN where absent:
    a flag of its own tells zero from absent.

    Raises
    ------
    ConfigError
        No values are given.
    """

    def __init__(self, names: tuple[str, ...], dim: int) -> None:
        super().__init__()
        self.names = names
        self.hidden = _Float32Linear(2 * len(names), dim)
        self.modulation = _Float32Linear(dim, 2 * dim)
        # Close to the operator without conditions in the beginning, with a gradient for all of it.
        self.initial_gain = {"modulation.weight": 0.1}

    def forward(self, x: Tensor, values: Tensor | None) -> Tensor:
        if values is None:
            raise ConfigError(
                f"operator.conditions {', '.join(self.names)}: this command does not tell them to the model; use one "
                "without conditions"
            )
        there = ~values.isnan()
        told = torch.cat((torch.where(there, values, 0.0), there.to(values.dtype)), 1)
        scale, shift = self.modulation(F.silu(self.hidden(told))).to(x.dtype).chunk(2, 1)
        shape = (len(x), *(1,) * (x.ndim - 2), -1)
        return x * (1 + scale.view(shape)) + shift.view(shape)


def make_conditioning(config: OperatorConfig) -> Conditioning | None:
    """Of features as wide as the operator; None where nothing is told."""
    return Conditioning(config.conditions, config.dim) if config.conditions else None


def condition(conditioning: Conditioning | None, x: Tensor, values: Tensor | None) -> Tensor:
    """Features ``[B, ..., dim]`` of an operator that may have conditions."""
    return x if conditioning is None else conditioning(x, values)  # type: ignore[no-any-return]
