"""What a training step owes its routers: labels and noise before the forward pass, updates after the optimiser's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from shodh.config import ExpertsConfig
from shodh.core.devices import send
from shodh.core.seeding import Key, stable_seed
from shodh.moe.balance import update_selection_bias
from shodh.moe.routers import Router


def router_arguments(
    config: ExpertsConfig, regime: Tensor, samples: Iterable[tuple[Key, ...]] = (), *noise_key: Key
) -> dict[str, Any]:
    """Keyword arguments of a model's forward pass that its routers need; none for most kinds.

    Parameters
    ----------
    regime : Tensor [B]
        Labels, given to the kinds that are `labelled` alone.
    samples : iterable of tuple
        A name for each sample, as (regime, trajectory, frame).
    noise_key : int or str
        The seed and the step in training, for the noise of the noisy top-k; empty in evaluation, which has none.
    """
    given: dict[str, Any] = {}
    if config.num_experts and config.router.traits.labelled:
        given["regime"] = regime
    if config.num_experts and config.router.traits.noisy and noise_key:
        given["noise"] = send((stable_seed("router noise", *noise_key, *name) for name in samples), regime.device)
    return given


def finish_step(model: nn.Module, config: ExpertsConfig, counts: Callable[[], Tensor]) -> None:
    """After an optimiser step: move selection biases towards the mean load, and temperatures down their schedules.

    Parameters
    ----------
    counts : callable
        Gives the assignments ``[layers, E]`` of the step's global batch. Collective; called only if it is needed.
    """
    routers = [m for m in model.modules() if isinstance(m, Router)]
    if config.balance.bias_rate:
        for router, load in zip(routers, counts(), strict=True):
            update_selection_bias(router, load, config.balance.bias_rate)
    for router in routers:
        router.finish_step()
