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
from torch import Tensor

from shodh.config import BalanceConfig
from shodh.core.distributed import connected, sum_over_ranks
from shodh.moe.routers import Router
from shodh.moe.routing import Routing


class BalanceTerms(NamedTuple):
    """Each term before its weight (scalars), the mean over the layers; ``cv2`` alone is the sum over them.

    Attributes
    ----------
    switch, information, z_loss : Tensor
        See README.
    importance, cv2 : Tensor
        CV^2 of the experts' importance, the sum of their weights over the batch (Shazeer 2017, arXiv 1701.06538), with
        the variance of the population. MoE-POT's paper adds it for every layer (``cv2``); its code leaves out the
        division by the squared mean.
    load : Tensor
        CV^2 of the smooth load, the sum of `Routing.load_probs` over the batch; 0 where no noise was drawn.
    orthogonality : Tensor
        Mean squared cosine between the router's rows of two experts; 0 where it was not measured.
    """

    switch: Tensor
    information: Tensor
    z_loss: Tensor
    importance: Tensor
    cv2: Tensor
    load: Tensor
    orthogonality: Tensor

    def weighted(self, config: BalanceConfig) -> Tensor:
        """The loss to add: information is maximised, all else is minimised."""
        loss = config.switch * self.switch - config.information * self.information + config.z_loss * self.z_loss
        for name in ("importance", "cv2", "load", "orthogonality"):
            if weight := getattr(config, name):
                loss = loss + weight * getattr(self, name)
        return loss

    def reported(self, config: BalanceConfig) -> dict[str, Tensor]:
        """The terms that a run's metrics show: the three of every run, and those that have a weight."""
        always = ("switch", "information", "z_loss")
        return {name: term for name, term in self._asdict().items() if name in always or getattr(config, name)}


def entropy(p: Tensor) -> Tensor:
    """Shannon entropy in nats over the last axis; zero probabilities count as zero."""
    return torch.special.entr(p).sum(-1)


def _stacked(routings: Sequence[Routing]) -> Routing:
    """The decisions of ``L`` layers as one, with a first axis for them: every step below is taken once for all."""
    fields = zip(Routing._fields, zip(*routings, strict=True), strict=True)
    return Routing(**{name: torch.stack(values) for name, values in fields if values[0] is not None})


def _layer_means(routing: Routing) -> Tensor:
    """What must be averaged over the global batch, ``[L, M]``, so that all layers need one collective."""
    fraction = routing.counts.float() / routing.selected[0].numel()
    importance = torch.zeros_like(routing.probs).scatter(2, routing.selected, routing.weights).mean(1)
    parts = [fraction, routing.probs.mean(1), routing.group_probs.mean(1), importance]
    if routing.load_probs is not None:
        parts.append(routing.load_probs.mean(1))
    if routing.num_groups:
        grouped = routing.probs.unflatten(2, (routing.num_groups, -1))
        within = grouped / grouped.sum(-1, keepdim=True).clamp(min=1e-20)
        # Mean of p(e | g) over the tokens that chose group g, kept as the numerator: the share of g times that mean.
        groups = torch.arange(routing.num_groups, device=routing.selected.device)
        chosen = routing.selected[..., :1] // grouped.shape[-1] == groups
        parts.append((within * chosen.unsqueeze(-1)).mean(1).flatten(1))
    return torch.cat(parts, 1)


def _switch(fraction: Tensor, probs: Tensor) -> Tensor:
    """``E sum_e f_e p_e`` (Switch Transformer, arXiv 2101.03961): 1 when balanced, E when collapsed."""
    return fraction.shape[-1] * (fraction * probs).sum(-1)


def _squared_variation(values: Tensor) -> Tensor:
    """``CV^2`` over the last axis, the variance over the squared mean."""
    return values.var(-1, correction=0) / values.mean(-1).square().clamp(min=1e-20)


def _layer_terms(routing: Routing, means: Tensor) -> BalanceTerms:
    """The terms of each layer, ``[L]``."""
    experts, groups = routing.num_experts, routing.num_groups
    smooth = 0 if routing.load_probs is None else experts
    sizes = [experts, experts, groups, experts, smooth, experts if groups else 0]
    fraction, probs, group_probs, weights, load, within = means.split(sizes, 1)
    z_loss = torch.logsumexp(routing.logits, -1).square().mean(1)
    if not groups:
        information = entropy(probs) - entropy(routing.probs).mean(1)
        switch = _switch(fraction, probs)
    else:
        # Decided groups that are all used, and balance inside each group, weighted by the group's share.
        information = entropy(group_probs) - entropy(routing.group_probs).mean(1)
        fraction, within = (values.unflatten(1, (groups, -1)) for values in (fraction, within))
        share = fraction.sum(-1).detach().clamp(min=1e-20)
        switch = (_switch(fraction, within) / share).sum(1)
    importance = _squared_variation(weights)
    none = importance.new_zeros(len(importance))
    of_load = _squared_variation(load) if smooth else none
    similarity = none if routing.similarity is None else routing.similarity
    return BalanceTerms(switch, information, z_loss, importance, importance, of_load, similarity)


class GlobalBalance:
    """Balance terms over the global batch: all ranks, and all micro-batches of the step so far.

    One collective a forward pass, whatever the number of layers. With one micro-batch a step the terms are exact; with
    gradient accumulation each micro-batch is judged with those before it, and the last one sees the whole batch.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0
        self.means, self.terms = _layer_means, _layer_terms  #: The arithmetic around the collective.

    def start_step(self) -> None:
        """Forget the micro-batches of the last optimiser step."""
        self._sum, self._count = None, 0

    def _globalise(self, local: Tensor) -> Tensor:
        value = sum_over_ranks(local.detach().clone()) / connected()
        if torch.is_grad_enabled():
            self._count += 1
            self._sum = value if self._sum is None else self._sum + value
            value = self._sum / self._count
        return local + (value - local.detach())

    def __call__(self, routings: Sequence[Routing]) -> BalanceTerms:
        """Terms of all layers, averaged over the layers; every rank gets the same Switch and mean-probability part."""
        stacked = _stacked(routings)
        terms = self.terms(stacked, self._globalise(self.means(stacked)))
        # z-loss and mean entropies are per-token means: data parallelism averages them, no collective is needed.
        means = BalanceTerms(*torch.stack(terms).mean(1).unbind())
        return means._replace(cv2=len(routings) * means.importance)


def update_selection_bias(router: Router, counts: Tensor, rate: float) -> None:
    """Loss-free balance: move each expert's selection bias by ``rate`` towards the mean load.

    Parameters
    ----------
    counts : Tensor [E]
        Assignments of the whole global batch since the last update.
    """
    load = counts.to(router.selection_bias)
    router.selection_bias.add_(torch.sign(load.mean() - load), alpha=rate)
