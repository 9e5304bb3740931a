"""Which parameters are routed or added experts, which are trained, and which are decayed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from shodh.config import FinetuneConfig


def is_routed_expert(name: str) -> bool:
    """Whether a parameter, by its exchange-format name, is of the routed experts, stacked along its first axis."""
    return ".experts." in name


def is_router(name: str) -> bool:
    """Whether a parameter is of a router, of a layer or of the whole model."""
    return ".router." in f".{name}"


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
        return is_routed_expert(name) or (config.router and is_router(name))
    return True


def freeze_others(model: nn.Module, config: FinetuneConfig) -> None:
    """Take every parameter that is not to be trained out of autograd, and so out of the optimiser."""
    for name, parameter in model.named_parameters():
        if not is_trained(name, config):
            parameter.requires_grad_(False)


def is_decayed(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay is meant for a parameter of a module: for the matrices of maps alone.

    Biases, norms and whatever else has one dimension are not decayed, nor what the module names in ``undecayed``:
    biases that are stacked, and points in a space, such as positions and expert prototypes.
    """
    return parameter.ndim > 1 and name not in getattr(module, "undecayed", ())


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two optimiser groups of the trainable parameters: with weight decay, and without; see `is_decayed`."""
    groups: dict[bool, dict[int, nn.Parameter]] = {True: {}, False: {}}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                groups[is_decayed(module, name, parameter)][id(parameter)] = parameter
    return [
        {"params": list(groups[True].values()), "name": "decay", "weight_decay": weight_decay},
        {"params": list(groups[False].values()), "name": "no_decay", "weight_decay": 0.0},
    ]
