"""What a router returns, and the statistics everybody derives from it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from shodh.core.noise import fold


class Routing(NamedTuple):
    """The decision of one router on ``T = samples * tokens`` tokens; ``E`` routed experts, ``K`` chosen per token.

    A plain tuple of tensors, so that it survives activation checkpointing.

    Attributes
    ----------
    probs : Tensor [T, E], float32
        Soft scores; they sum to one over the experts.
    logits : Tensor [T, E], float32
        What the probabilities were made from (for the z-loss); two-level: of the experts within their groups.
    selected : Tensor [T, K], int64
        Experts in the order of their scores.
    counts : Tensor [E], int32
        Assignments per expert on this rank.
    group_probs : Tensor [T, G], float32, or [T, 0]
        Grouped experts only: probabilities of the groups.
    weights : Tensor [T, K], float32
        What the outputs of the chosen experts are multiplied with.
    load_probs : Tensor [T, E], float32, optional
        Noisy top-k in training only: probability of each expert to be chosen if its noise were drawn anew.
    similarity : Tensor [], float32, optional
        Where `BalanceConfig.orthogonality` asks for it: mean squared cosine between the router's rows of two experts.
    """

    probs: Tensor
    logits: Tensor
    selected: Tensor
    counts: Tensor
    group_probs: Tensor
    weights: Tensor
    load_probs: Tensor | None = None
    similarity: Tensor | None = None

    @property
    def num_experts(self) -> int:
        return self.probs.shape[-1]

    @property
    def num_groups(self) -> int:
        return self.group_probs.shape[-1]


class RouterInputs(NamedTuple):
    """What some routers are given beside the tokens; the model hands it on, and a router refuses what it does not use.

    Attributes
    ----------
    regime : Tensor [B], int64, optional
        Regime of each sample, for `labelled` kinds alone: the oracle, a control.
    noise : Tensor [B], int64, optional
        A seed for each sample, for the noisy top-k in training alone; see `shodh.moe.step.router_arguments`.
    view : Tensor [B, G], optional
        For kinds that `observe` alone: logits of the groups by the fingerprint of each sample, of the model's own gate.
    """

    regime: Tensor | None = None
    noise: Tensor | None = None
    view: Tensor | None = None

    def at_layer(self, layer: int) -> RouterInputs:
        """The inputs of one layer: each draws noise of its own."""
        return self if self.noise is None else self._replace(noise=fold(self.noise, layer))


NO_INPUTS = RouterInputs()


def count_assignments(selected: Tensor, num_experts: int) -> Tensor:
    """Assignments per expert ``[E]``, int32; deterministic and without a device-to-host copy."""
    flat = selected.reshape(-1)
    counts = torch.zeros(num_experts, dtype=torch.int32, device=flat.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))


def count_by_regime(selected: Tensor, regime: Tensor, num_regimes: int, num_experts: int) -> Tensor:
    """Assignments by regime and expert, ``[R, E]`` int64.

    Parameters
    ----------
    selected : Tensor [T, K]
        Experts of the tokens of ``B`` samples, samples outermost.
    regime : Tensor [B]
        Regime of each sample. Used for analysis only; no router sees it.
    """
    per_sample = selected.numel() // regime.numel()
    cell = regime.repeat_interleave(per_sample) * num_experts + selected.reshape(-1)
    table = torch.zeros(num_regimes * num_experts, dtype=torch.int64, device=selected.device)
    return table.scatter_add_(0, cell, torch.ones_like(cell)).view(num_regimes, num_experts)


def regime_information(table: Tensor) -> tuple[float, float]:
    """How much the expert tells about the regime: ``(U, NMI)`` of a regime x expert table of counts.

    ``U = I(regime; expert) / H(regime)`` is 1 when the expert names the regime, whatever the number of experts.
    ``NMI = I / sqrt(H(regime) H(expert))`` is below 1 when several experts share one regime. Both are 0 for a table
    with one regime or without counts.
    """
    joint = table.double()
    total = joint.sum()
    if total == 0:
        return 0.0, 0.0
    joint = joint / total
    regime, expert = joint.sum(1), joint.sum(0)
    h_regime, h_expert, h_joint = (-torch.xlogy(p, p).sum() for p in (regime, expert, joint))
    information = (h_regime + h_expert - h_joint).clamp(min=0.0)
    if h_regime < 1e-12:
        return 0.0, 0.0
    nmi = 0.0 if h_expert < 1e-12 else float(information / (h_regime * h_expert).sqrt())
    return float(information / h_regime), nmi
