"""What a training step owes its routers: labels and noise before the forward pass, updates after the optimiser's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from shodh.config import ExpertsConfig
from shodh.core.devices import send
from shodh.core.seeding import Key, stable_seed
from shodh.moe.balance import update_selection_bias
from shodh.moe.clusters import Clusters
from shodh.moe.routers import Router


def router_arguments(
    config: ExpertsConfig,
    regime: Tensor,
    samples: Iterable[tuple[Key, ...]] = (),
    *noise_key: Key,
    look: Callable[[], Tensor] | None = None,
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
    look : callable, optional
        Makes the fingerprints of the samples ``[B, F]`` (`shodh.moe.fingerprint`), for the kinds that observe.
    """
    given: dict[str, Any] = {}
    if config.num_experts and config.router.traits.labelled:
        given["regime"] = regime
    if config.num_experts and config.router.traits.noisy and noise_key:
        given["noise"] = send((stable_seed("router noise", *noise_key, *name) for name in samples), regime.device)
    if config.num_experts and config.router.traits.observes and look is not None:
        given["fingerprint"] = look()
    return given


def finish_step(
    model: nn.Module,
    config: ExpertsConfig,
    counts: Callable[[], Tensor],
    fingerprints: Callable[[], Tensor] | None = None,
) -> None:
    """After an optimiser step: move selection biases towards the mean load, temperatures down their schedules, and
    clusters to the samples that were seen.

    Parameters
    ----------
    counts : callable
        Gives the assignments ``[layers, E]`` of the step's global batch. Collective; called only if it is needed.
    fingerprints : callable, optional
        Gives those of the step's global batch, ``[B, F]``. Likewise.
    """
    routers = [m for m in model.modules() if isinstance(m, Router)]
    if config.balance.bias_rate:
        for router, load in zip(routers, counts(), strict=True):
            update_selection_bias(router, load, config.balance.bias_rate)
    for router in routers:
        router.finish_step()
    for clusters in model.modules():
        if isinstance(clusters, Clusters) and fingerprints is not None and clusters.learns:
            clusters.observe(fingerprints())
