"""Initial weights that depend on (seed, parameter name) alone: not on the order, the ranks or the expert degree."""

from __future__ import annotations

import torch
from torch import nn

from shodh.core.seeding import generator


def _reset_affine(module: nn.Module, seed: int, name: str) -> None:
    """LeCun normal weights, zero biases."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    transposed = isinstance(module, nn.ConvTranspose3d | nn.ConvTranspose2d)
    fan_in = weight.shape[0] if transposed else weight[0].numel()
    draw = torch.empty(weight.shape).normal_(0.0, fan_in**-0.5, generator=generator(seed, name, "weight"))
    weight.copy_(draw)
    if isinstance(module.bias, torch.Tensor):
        module.bias.zero_()


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Draw every parameter of a model that is not on the meta device.

    Linear and convolution weights are LeCun normal, norms are one, biases zero; a module with a method
    ``seeded_reset(*key)`` draws its own. A parameter named in a module's ``initial_gain`` is scaled by it; see also
    `residual_gain`.
    """
    for name, module in model.named_modules():
        if any(p.is_meta for p in module.parameters(recurse=False)):
            continue
        if hasattr(module, "seeded_reset"):
            module.seeded_reset(seed, name)
        elif isinstance(module, nn.Linear | nn.Conv3d | nn.Conv2d | nn.ConvTranspose3d | nn.ConvTranspose2d):
            _reset_affine(module, seed, name)
    for module in model.modules():
        for path, gain in getattr(module, "initial_gain", {}).items():
            parameter = module.get_parameter(path)
            if not parameter.is_meta:
                parameter.mul_(gain)


def residual_gain(block: nn.Module, branches: int) -> dict[str, float]:
    """The ``initial_gain`` of a block whose residual branches start small (GPT-2).

    Every part that ends a branch names in ``output_parameters`` what the size of its output follows from. Scaled by the
    inverse square root of the number of branches of the whole model, they add the same variance whatever its depth.
    """
    return {
        f"{path}.{name}": branches**-0.5
        for path, part in block.named_modules()
        for name in getattr(part, "output_parameters", ())
    }
