"""What all routers share: the selection bias, the temperature, and who is given labels and noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from shodh.config import ExpertsConfig
from shodh.moe.gates import make_gate
from shodh.moe.routing import NO_INPUTS, RouterInputs, Routing, count_assignments


class Router(nn.Module):
    """Hard top-k dispatch with soft scores.

    ``forward(x [B, S, D], inputs) -> Routing`` of ``T = B * S`` tokens; a kind defines `route`. Nothing of a call is
    kept: what activation checkpointing computes again and drops, nobody holds. Everything is computed in float32,
    whatever the model's precision.

    Attributes
    ----------
    route : callable
        ``route(x [B, S, D]) -> Routing``; of `labelled` kinds ``route(x, regime [B])``, of `noisy` ones ``route(x,
        noise=None)`` with a seed for each sample in training, of those that `observe` ``route(x, view [B, G])``. No
        other kind is given any of these.
    """

    route: Callable[..., Routing]

    def __init__(self, config: ExpertsConfig, dim: int) -> None:
        super().__init__()
        self.kind = config.router.kind
        self.traits = config.router.traits
        self.of_sample = config.router.granularity == "sample"
        self.normalise = config.router.normalise
        self.num_experts = config.num_experts
        self.num_groups = config.groups if self.traits.grouped else 1
        self.top_k = config.top_k
        self.build(config, dim)
        # Loss-free balance (arXiv 2408.15664): added for the selection only, never to the weight of an expert.
        self.register_buffer("selection_bias", torch.zeros(config.num_experts, dtype=torch.float32))
        self.selection_bias: Tensor
        self.schedule = config.router.temperature_schedule
        if self.schedule is not None:
            self.register_buffer("temperature", torch.full((1,), self.schedule.start))
            self.temperature: Tensor

    def build(self, config: ExpertsConfig, dim: int) -> None:
        """Make the parameters and buffers of this kind; their names are those of checkpoints."""

    def forward(self, x: Tensor, inputs: RouterInputs = NO_INPUTS) -> Routing:
        """Choose experts.

        Raises
        ------
        ValueError
            A regime label, noise or a view is missing, or given to a router that does not use it.
        """
        given: dict[str, Any] = {}
        if (inputs.regime is not None) != self.traits.labelled:
            problem = "needs the regime of each sample" if self.traits.labelled else "takes no regime label"
            raise ValueError(f"router kind {self.kind} {problem}")
        if inputs.noise is not None and not self.traits.noisy:
            raise ValueError(f"router kind {self.kind} is not noisy, and takes no seeds of noise")
        if (inputs.view is not None) != self.traits.observes:
            problem = "needs the fingerprint of each sample" if self.traits.observes else "takes no fingerprint"
            raise ValueError(f"router kind {self.kind} {problem}")
        if self.traits.labelled:
            given["regime"] = inputs.regime
        if self.traits.observes:
            given["view"] = inputs.view
        if self.traits.noisy and self.training:
            if inputs.noise is None or len(inputs.noise) != len(x):
                raise ValueError(f"router kind {self.kind} needs noise in training: {len(x)} seeds, one a sample")
            given["noise"] = inputs.noise
        return self.route(x, **given)

    def cooled(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Logits ``[B, S or 1, E]`` over the temperature, as ``[T, E]``."""
        return to_tokens(logits if self.schedule is None else logits / self.temperature.float(), tokens)

    def choose(self, logits: Tensor, probs: Tensor, allowed: Tensor | None = None, **more: Any) -> Routing:
        """The top k by biased probability.

        Parameters
        ----------
        logits, probs : Tensor [T, E]
            The probabilities sum to one.
        allowed : Tensor [T, E], bool, optional
            Experts that a token may meet (all of them).
        more
            Other entries of `Routing`.
        """
        score = probs.detach() + self.selection_bias.float()
        if allowed is not None:
            score = score.masked_fill(~allowed, float("-inf"))
        selected = score.topk(self.top_k, dim=-1).indices
        weights = (probs if self.normalise == "before" else logits).gather(-1, selected)
        if self.normalise == "after":
            weights = weights.softmax(-1)
        more.setdefault("group_probs", logits.new_empty(len(logits), 0))
        counts = count_assignments(selected, self.num_experts)
        return Routing(probs=probs, logits=logits, selected=selected, counts=counts, weights=weights, **more)

    def finish_step(self) -> None:
        """Lower the temperature by one optimiser step of its schedule."""
        if self.schedule is not None:
            self.temperature.mul_(self.schedule.decay).clamp_(min=self.schedule.end)


class GateRouter(Router):
    """A gate that gives each expert a logit.

    Scores are ``cosine`` (token and expert prototypes meet in a small semantic space, ``softmax(tau cos(W x, p_e))``)
    or ``softmax`` (a linear gate, or MoE-POT's gate network).
    """

    def build(self, config: ExpertsConfig, dim: int) -> None:
        self.expert_gate = make_gate(config.router, dim, self.num_experts, self.num_experts // self.num_groups)
        self.expert_gate.measures_similarity = config.balance.orthogonality > 0

    def query(self, tokens: Tensor) -> Tensor:
        """What the gate sees of tokens ``[B, S, D]`` in float32: ``[B, S or 1, D]``."""
        return sample_mean(tokens) if self.of_sample else tokens


class GroupedRouter(GateRouter):
    """One group of experts for a sample, and experts of this group by the gate.

    ``p(e) = p(group) * p(e | group, token)``; groups are runs of consecutive experts.
    """

    def route_in_groups(self, tokens: Tensor, group_probs: Tensor, group_bias: Tensor | None = None) -> Routing:
        """Choose experts of the likeliest group.

        Parameters
        ----------
        group_probs : Tensor [B, 1, G]
            Probabilities of the groups of a sample.
        group_bias : Tensor [G], optional
            Added to them for the choice alone.
        """
        logits, similarity = self.expert_gate(self.query(tokens))
        logits, group_probs = self.cooled(logits, tokens), to_tokens(group_probs, tokens)
        within = logits.view(-1, self.num_groups, self.num_experts // self.num_groups).softmax(-1)
        probs = (group_probs.unsqueeze(-1) * within).flatten(1)
        biased = group_probs.detach() if group_bias is None else group_probs.detach() + group_bias
        group_of_expert = torch.arange(self.num_experts, device=tokens.device) * self.num_groups // self.num_experts
        allowed = group_of_expert == biased.argmax(-1, keepdim=True)
        return self.choose(logits, probs, allowed, group_probs=group_probs, similarity=similarity)


def sample_mean(tokens: Tensor) -> Tensor:
    """``[B, S, D] -> [B, 1, D]``"""
    return tokens.mean(1, keepdim=True)


def to_tokens(values: Tensor, x: Tensor) -> Tensor:
    """``[B or 1, S or 1, C] -> [T, C]``, for the tokens of ``x [B, S, D]``."""
    return values.expand(*x.shape[:2], -1).flatten(0, 1)
