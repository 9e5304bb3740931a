"""The decode as `torch.library` operators: schema, shapes, gradients, and a fallback where nothing is compiled.

``shodh::decode(potential, harmonic, spacing, walls, central) -> velocity``
``shodh::decode_exact(...) -> (velocity, step [B])``: lattice step per sample, NaN where the input is not finite
``shodh::decode_adjoint(gradient, spacing, walls, central) -> (gradient of potential, of harmonic [B, P])``

The decode is linear, so the adjoint of the adjoint is the decode itself and gradients of any order exist. Gradients
pass straight through the rounding of the exact decode.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shodh.ops import reference
from shodh.ops.grid import Grid

NAMESPACE = "shodh"
_BOX = "float[] spacing, bool[] walls, bool central"

_definitions = torch.library.Library(NAMESPACE, "DEF")
_definitions.define(f"decode(Tensor potential, Tensor? harmonic, {_BOX}) -> Tensor")
_definitions.define(f"decode_exact(Tensor potential, Tensor? harmonic, {_BOX}) -> (Tensor, Tensor)")
_definitions.define(f"decode_adjoint(Tensor gradient, {_BOX}) -> (Tensor, Tensor)")

_Box = tuple[list[float], list[bool], bool]


def _grid(spacing: list[float], walls: list[bool], central: bool) -> Grid:
    return Grid(tuple(spacing), tuple(walls), central)


def _velocity_like(potential: Tensor) -> Tensor:
    ndim = potential.dim() - 2
    return potential.new_empty((potential.shape[0], ndim, *potential.shape[2:]))


@torch.library.register_fake(f"{NAMESPACE}::decode")
def _decode_fake(potential: Tensor, harmonic: Tensor | None, *box: Any) -> Tensor:
    return _velocity_like(potential)


@torch.library.register_fake(f"{NAMESPACE}::decode_exact")
def _decode_exact_fake(potential: Tensor, harmonic: Tensor | None, *box: Any) -> tuple[Tensor, Tensor]:
    return _velocity_like(potential), potential.new_empty((potential.shape[0],), dtype=torch.float64)


@torch.library.register_fake(f"{NAMESPACE}::decode_adjoint")
def _decode_adjoint_fake(
    gradient: Tensor, spacing: list[float], walls: list[bool], central: bool
) -> tuple[Tensor, Tensor]:
    channels = 3 if gradient.dim() == 5 else 1
    potential = gradient.new_empty((gradient.shape[0], channels, *gradient.shape[2:]))
    return potential, gradient.new_empty((gradient.shape[0], walls.count(False)))


def _keep_decode(ctx: Any, inputs: tuple, output: Any) -> None:
    _, harmonic, *ctx.box = inputs
    ctx.has_harmonic = harmonic is not None


def _decode_backward(ctx: Any, gradient: Tensor, *unused: Tensor) -> tuple:
    potential, harmonic = torch.ops.shodh.decode_adjoint(gradient.contiguous(), *ctx.box)
    return potential, harmonic if ctx.has_harmonic else None, None, None, None


def _keep_adjoint(ctx: Any, inputs: tuple, output: Any) -> None:
    _, *ctx.box = inputs


def _adjoint_backward(ctx: Any, potential: Tensor, harmonic: Tensor) -> tuple:
    return torch.ops.shodh.decode(potential.contiguous(), harmonic.contiguous(), *ctx.box), None, None, None


torch.library.register_autograd(f"{NAMESPACE}::decode", _decode_backward, setup_context=_keep_decode)
torch.library.register_autograd(f"{NAMESPACE}::decode_exact", _decode_backward, setup_context=_keep_decode)
torch.library.register_autograd(f"{NAMESPACE}::decode_adjoint", _adjoint_backward, setup_context=_keep_adjoint)


def _decode_fallback(potential: Tensor, harmonic: Tensor | None, *box: Any) -> Tensor:
    return reference.decode_reference(potential, harmonic, _grid(*box))


def _decode_exact_fallback(potential: Tensor, harmonic: Tensor | None, *box: Any) -> tuple[Tensor, Tensor]:
    return reference.decode_exact_reference(potential, harmonic, _grid(*box))


def _decode_adjoint_fallback(gradient: Tensor, *box: Any) -> tuple[Tensor, Tensor]:
    return reference.decode_adjoint_reference(gradient, _grid(*box))


FALLBACKS = {
    "decode": _decode_fallback,
    "decode_exact": _decode_exact_fallback,
    "decode_adjoint": _decode_adjoint_fallback,
}


def is_compiled(key: str) -> bool:
    """Whether a compiled kernel is registered for a dispatch key, ``"CPU"`` or ``"CUDA"``."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::decode", key)


def register_fallback(key: str) -> None:
    """Serve the operators of a dispatch key from the reference, so that an exported program runs anywhere."""
    for name, fallback in FALLBACKS.items():
        _definitions.impl(name, fallback, key)
