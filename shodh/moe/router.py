"""The router: which experts a token meets, decided without any regime label.

Three kinds (design: a regime is recognised from the whole sample, a mechanism from the local patch):

``token``      p(e | token)
``context``    p(e | token + w * sample mean)
``two_level``  p(e) = p(group | sample mean) * p(e | group, token)

Scores are ``cosine`` (token and expert prototypes meet in a small semantic space, ``softmax(tau cos(W x, p_e))``) or
``softmax`` (a linear gate). Everything is computed in float32, whatever the model's precision.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shodh.config import ExpertsConfig
from shodh.moe.routing import Routing, count_assignments
from shodh.seeding import Key, generator


class Gate(nn.Module):
    """Logits of ``choices`` alternatives for each row of ``[..., dim]``.

    Parameters
    ----------
    score : {"cosine", "softmax"}
        ``tau * cos(W x, p)`` with a learned inverse temperature, or a linear map.
    """

    def __init__(self, dim: int, choices: int, score: str, semantic_dim: int, temperature: float) -> None:
        super().__init__()
        self.score = score
        self.temperature = temperature
        if score == "cosine":
            self.projection = nn.Parameter(torch.empty(semantic_dim, dim))
            self.prototypes = nn.Parameter(torch.empty(choices, semantic_dim))
            # One element, not zero dimensions: a 0-dim parameter breaks DeepSpeed's bf16 broadcast on gloo.
            self.log_temperature = nn.Parameter(torch.empty(1))
        else:
            self.weight = nn.Parameter(torch.empty(choices, dim))

    def seeded_reset(self, *key: Key) -> None:
        """Draw the initial values from generators named by ``key``."""
        with torch.no_grad():
            for name, parameter in self.named_parameters(recurse=False):
                if name == "log_temperature":
                    parameter.fill_(math.log(self.temperature))
                    continue
                std = 1.0 if name == "prototypes" else parameter.shape[1] ** -0.5
                draw = torch.empty(parameter.shape).normal_(0.0, std, generator=generator(*key, name))
                parameter.copy_(draw)

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        if self.score == "softmax":
            return F.linear(x, self.weight.float())
        query = F.normalize(F.linear(x, self.projection.float()), dim=-1)
        return self.log_temperature.float().exp() * F.linear(query, F.normalize(self.prototypes.float(), dim=-1))


class SemanticRouter(nn.Module):
    """Hard top-k dispatch with soft scores.

    Called by the expert layer as ``router(x, expert_bias)`` with ``x [T, D]``, after `batch_shape` has been set to
    ``(samples, tokens)``; returns ``(top_scores [T, K], selected [T, K], counts [E])``, which is DeepSpeed's contract,
    and keeps the whole decision for `take`.
    """

    def __init__(self, config: ExpertsConfig, dim: int) -> None:
        super().__init__()
        router = config.router
        self.kind = router.kind
        self.granularity = router.granularity
        self.context_weight = router.context_weight
        self.num_experts = config.num_experts
        self.num_groups = router.groups if router.kind == "two_level" else 1
        self.top_k = config.top_k
        self.batch_shape: tuple[int, int] | None = None
        self._routing: Routing | None = None
        settings = (router.score, router.semantic_dim, router.temperature)
        self.expert_gate = Gate(dim, config.num_experts, *settings)
        if self.kind == "two_level":
            self.group_gate = Gate(dim, self.num_groups, *settings)
        # Loss-free balance (arXiv 2408.15664): added for the selection only, never to the weight of an expert.
        self.register_buffer("selection_bias", torch.zeros(config.num_experts, dtype=torch.float32))
        self.selection_bias: Tensor

    def _scores(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities [T, E], logits [T, E] and group probabilities [T, G or 0]."""
        assert self.batch_shape is not None and x.shape[0] == math.prod(self.batch_shape)
        samples, tokens = self.batch_shape
        query = x.float().view(samples, tokens, -1)
        mean = query.mean(1, keepdim=True)
        if self.granularity == "sample":
            query = mean
        elif self.kind == "context":
            query = query + self.context_weight * mean
        logits = self._to_tokens(self.expert_gate(query))
        if self.kind != "two_level":
            return logits.softmax(-1), logits, logits.new_empty(x.shape[0], 0)
        group_probs = self._to_tokens(self.group_gate(mean).softmax(-1))
        within = logits.view(-1, self.num_groups, self.num_experts // self.num_groups).softmax(-1)
        return (group_probs.unsqueeze(-1) * within).flatten(1), logits, group_probs

    def _to_tokens(self, values: Tensor) -> Tensor:
        """``[samples, tokens or 1, C] -> [T, C]``."""
        assert self.batch_shape is not None
        return values.expand(*self.batch_shape, -1).flatten(0, 1)

    def _select(self, probs: Tensor, group_probs: Tensor) -> Tensor:
        bias = self.selection_bias.float()
        score = probs + bias
        if self.kind == "two_level":
            group = (group_probs + bias.view(self.num_groups, -1).mean(1)).argmax(-1, keepdim=True)
            group_of_expert = torch.arange(self.num_experts, device=probs.device) * self.num_groups // self.num_experts
            score = score.masked_fill(group_of_expert != group, float("-inf"))
        return score.topk(self.top_k, dim=-1).indices

    def forward(self, x: Tensor, expert_bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        probs, logits, group_probs = self._scores(x)
        selected = self._select(probs.detach(), group_probs.detach())
        counts = count_assignments(selected, self.num_experts)
        self._routing = Routing(probs, logits, selected, counts, group_probs)
        return probs.gather(-1, selected), selected, counts

    def take(self) -> Routing:
        """The decision of the last call; it is handed over, so that no graph is kept alive here."""
        routing, self._routing = self._routing, None
        assert routing is not None, "take() before forward()"
        return routing

    def put(self, routing: Routing) -> None:
        """Set the decision that the next `take` hands over: for hooks that change what the router chose."""
        self._routing = routing
