"""Learning in plain torch on one device, as the engine does it: one step, and gradients of an error."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from shodh.config import OperatorConfig
from shodh.moe.routing import Routing
from shodh.moe.step import finish_step


def take_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Tensor,
    operator: OperatorConfig,
    routing: Sequence[Routing],
    fingerprints: Callable[[], Tensor] | None = None,
) -> None:
    """One optimiser step with the run's clipping, and what its routers do after it (`finish_step`)."""
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), operator.train.clip)
    optimizer.step()
    if routing:
        finish_step(model, operator.experts, lambda: torch.stack([r.counts for r in routing]), fingerprints)


def gradients_of(model: nn.Module, error: Tensor) -> dict[str, Tensor]:
    """By parameter, flat, in float64; zeros of one that the error does not depend on."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parts = torch.autograd.grad(error, list(named.values()), allow_unused=True)
    found = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), parts, strict=True)}
    return {name: gradient.detach().double().flatten() for name, gradient in found.items()}
