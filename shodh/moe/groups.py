"""Which parameters are routed or added experts, which are trained, and which are decayed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from shodh.config import FinetuneConfig


def is_routed_expert(name: str) -> bool:
    """Whether a parameter, by its exchange-format name, is of the routed experts, stacked along its first axis."""
    return ".experts." in name


def is_added(name: str) -> bool:
    """Whether a parameter is of the experts that were added to a trained model, or of their gate."""
    return ".added_experts." in name


def added_weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of added experts by name, as they are: what a file of the trained model lacks."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if is_added(name)}


def is_trained(name: str, config: FinetuneConfig) -> bool:
    """Whether fine-tuning trains a parameter, by its exchange-format name."""
    if config.train == "new_expert":
        return is_added(name)
    if config.train == "experts":
        return is_routed_expert(name) or (config.router and ".router." in name)
    return True


def freeze_others(model: nn.Module, config: FinetuneConfig) -> None:
    """Take every parameter that is not to be trained out of autograd, and so out of the optimiser."""
    for name, parameter in model.named_parameters():
        if not is_trained(name, config):
            parameter.requires_grad_(False)


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
