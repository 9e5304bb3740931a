"""Balance terms: keep every expert alive, yet let it specialise.

Counts and mean probabilities are those of the *global* batch. Balance per rank or micro-batch would forbid the
specialisation the project is about (Qwen, arXiv 2501.11873). A local mean is made global in value while its gradient
stays the local share; averaging gradients over ranks, which data parallelism does anyway, then gives exactly the
gradient of the global term, without a differentiable collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from shodh.config import BalanceConfig
from shodh.moe.router import SemanticRouter
from shodh.moe.routing import Routing


class BalanceTerms(NamedTuple):
    """Mean over the layers of each term (scalars), before its weight."""

    switch: Tensor
    information: Tensor
    z_loss: Tensor

    def weighted(self, config: BalanceConfig) -> Tensor:
        """The loss to add: Switch and z-loss are minimised, information is maximised."""
        return config.switch * self.switch - config.information * self.information + config.z_loss * self.z_loss


def entropy(p: Tensor) -> Tensor:
    """Shannon entropy in nats over the last axis; zero probabilities count as zero."""
    return torch.special.entr(p).sum(-1)


def _layer_means(routing: Routing) -> Tensor:
    """What must be averaged over the global batch, as one flat vector, so that all layers need one collective."""
    fraction = routing.counts.float() / routing.selected.numel()
    parts = [fraction, routing.probs.mean(0), routing.group_probs.mean(0)]
    if routing.num_groups:
        grouped = routing.probs.unflatten(1, (routing.num_groups, -1))
        within = grouped / grouped.sum(-1, keepdim=True).clamp(min=1e-20)
        # Mean of p(e | g) over the tokens that chose group g, kept as the numerator: the share of g times that mean.
        chosen = torch.nn.functional.one_hot(routing.selected[:, 0] // grouped.shape[-1], routing.num_groups).unsqueeze(
            -1
        )
        parts.append((within * chosen).mean(0).flatten())
    return torch.cat(parts)


def _switch(fraction: Tensor, probs: Tensor) -> Tensor:
    """``E sum_e f_e p_e`` (Switch Transformer, arXiv 2101.03961): 1 when balanced, E when collapsed."""
    return fraction.shape[-1] * (fraction * probs).sum(-1)


def _layer_terms(routing: Routing, means: Tensor) -> BalanceTerms:
    experts, groups = routing.num_experts, routing.num_groups
    fraction, probs, group_probs, within = means.split([experts, experts, groups, experts if groups else 0])
    z_loss = torch.logsumexp(routing.logits, -1).square().mean()
    if not groups:
        information = entropy(probs) - entropy(routing.probs).mean()
        return BalanceTerms(_switch(fraction, probs), information, z_loss)
    # Two levels: decided groups that are all used, and balance inside each group, weighted by the group's share.
    information = entropy(group_probs) - entropy(routing.group_probs).mean()
    fraction, within = fraction.view(groups, -1), within.view(groups, -1)
    share = fraction.sum(-1).detach().clamp(min=1e-20)
    switch = (_switch(fraction, within) / share).sum()
    return BalanceTerms(switch, information, z_loss)


class GlobalBalance:
    """Balance terms over the global batch: all ranks, and all micro-batches of the step so far.

    One collective a forward pass, whatever the number of layers. With one micro-batch a step the terms are exact; with
    gradient accumulation each micro-batch is judged with those before it, and the last one sees the whole batch.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    def start_step(self) -> None:
        """Forget the micro-batches of the last optimiser step."""
        self._sum, self._count = None, 0

    def _globalise(self, local: Tensor) -> Tensor:
        value = local.detach().clone()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(value)
            value /= dist.get_world_size()
        if torch.is_grad_enabled():
            self._count += 1
            self._sum = value if self._sum is None else self._sum + value
            value = self._sum / self._count
        return local + (value - local.detach())

    def __call__(self, routings: Sequence[Routing]) -> BalanceTerms:
        """Terms of all layers, averaged over the layers; every rank gets the same Switch and mean-probability part."""
        flat = [_layer_means(routing) for routing in routings]
        means = self._globalise(torch.cat(flat)).split([m.numel() for m in flat])
        terms = [_layer_terms(routing, m) for routing, m in zip(routings, means, strict=True)]
        # z-loss and mean entropies are per-token means: data parallelism averages them, no collective is needed.
        return BalanceTerms(*(torch.stack(t).mean() for t in zip(*terms, strict=True)))


def update_selection_bias(router: SemanticRouter, counts: Tensor, rate: float) -> None:
    """Loss-free balance: move each expert's selection bias by ``rate`` towards the mean load.

    Parameters
    ----------
    counts : Tensor [E]
        Assignments of the whole global batch since the last update.
    """
    load = counts.to(router.selection_bias)
    router.selection_bias.add_(torch.sign(load.mean() - load), alpha=rate)
