"""Which parameters are routed experts, and which are decayed."""

from __future__ import annotations

from typing import Any

from torch import nn


def is_routed_expert(name: str) -> bool:
    """Whether a parameter, by its exchange-format name, is of the routed experts, stacked along its first axis."""
    return ".experts." in name


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two optimiser groups: matrices with weight decay; vectors, prototypes and positions without."""
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or name.endswith(("prototypes", "position"))
            (no_decay if plain else decay).append(parameter)
    return [
        {"params": decay, "name": "decay", "weight_decay": weight_decay},
        {"params": no_decay, "name": "no_decay", "weight_decay": 0.0},
    ]
