"""Preconditioned conjugate gradients for a batch of independent systems."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Operator = Callable[[Tensor], Tensor]
LOOK_EVERY = 8


@dataclass(frozen=True)
class CGResult:
    """Solution ``[B, ...]``, 2-norm of the residual over that of the right-hand side ``[B]``, and iterations used."""

    solution: Tensor
    residual: Tensor
    iterations: int


def conjugate_gradients(
    apply: Operator,
    rhs: Tensor,
    *,
    precondition: Operator,
    tolerance: float | Tensor,
    max_iterations: int,
    look_every: int | None = None,
) -> CGResult:
    """Solve ``A x = b`` for symmetric positive semi-definite ``A`` and a consistent ``b``, system by system.

    A system that has converged is frozen, so its solution does not depend on the rest of the batch.

    Parameters
    ----------
    apply, precondition : callable
        Linear maps of ``[B, ...]`` that act on each system alone.
    rhs : Tensor [B, ...]
    tolerance : float or Tensor [B]
        Relative to the 2-norm of the right-hand side.
    max_iterations : int
        The iteration stops there, converged or not: look at the residual.
    look_every : int, optional
        Iterations between questions whether all systems have converged, each of which waits for the device; by default
        1 on the CPU and `LOOK_EVERY` elsewhere. The solution is the same: a system that has converged is frozen.
    """
    if look_every is None:
        look_every = 1 if rhs.device.type == "cpu" else LOOK_EVERY

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(1).sum(1)

    def spread(values: Tensor) -> Tensor:
        return values.view(-1, *[1] * (rhs.dim() - 1))

    def quotient(a: Tensor, b: Tensor, active: Tensor) -> Tensor:
        return torch.where(active & (b > 0), a / b, torch.zeros_like(a))

    norm = dot(rhs, rhs).sqrt()
    target = norm * tolerance
    solution = torch.zeros_like(rhs)
    residual = rhs.clone()
    active = norm > target
    direction = precondition(residual).clone()  # An identity returns the residual itself.
    rho = dot(residual, direction)
    iterations = torch.zeros((), dtype=torch.int64, device=rhs.device)
    for iteration in range(max_iterations):
        if iteration % look_every == 0 and not bool(active.any()):
            break
        iterations += active.any()
        image = apply(direction)
        step = spread(quotient(rho, dot(direction, image), active))
        solution.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1.0)
        active = active & (dot(residual, residual).sqrt() > target)
        conditioned = precondition(residual)
        rho_next = dot(residual, conditioned)
        direction.mul_(spread(quotient(rho_next, rho, active))).add_(conditioned)
        rho = rho_next
    relative = dot(residual, residual).sqrt() / norm.clamp(min=torch.finfo(norm.dtype).tiny)
    return CGResult(solution, relative, int(iterations))
