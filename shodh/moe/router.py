"""The router: which experts a token meets. No kind but the oracle, a control, is told a regime label.

Four kinds learn (design: a regime is recognised from the whole sample, a mechanism from the local patch):

``token``       p(e | token)
``context``     p(e | token + w * sample mean)
``two_level``   p(e) = p(group | sample mean) * p(e | group, token)
``noisy_topk``  as token, with Gaussian noise of a learned size on the logits in training (Shazeer, arXiv 1701.06538)

and three are controls:

``hash``        a fixed pseudo-random expert by the position of the token (position hash of Hash Layers, 2106.04426;
                fields have no vocabulary to hash), each expert equally often; weights 1 / K
``frozen``      as token, with a gate that is never trained. What balance terms push on then is the features
``oracle``      as two_level, with the group given by the regime label; the one kind that is told a label

Scores are ``cosine`` (token and expert prototypes meet in a small semantic space, ``softmax(tau cos(W x, p_e))``) or
``softmax`` (a linear gate, or MoE-POT's gate network). Everything is computed in float32, whatever the model's
precision.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shodh.config import ExpertsConfig
from shodh.core.seeding import Key, generator
from shodh.moe.gates import Gate, make_gate
from shodh.moe.routing import NO_INPUTS, RouterInputs, Routing, count_assignments


class SemanticRouter(nn.Module):
    """Hard top-k dispatch with soft scores.

    ``forward(x [B, S, D], inputs) -> Routing`` of ``T = B * S`` tokens. Nothing of a call is kept: what activation
    checkpointing computes again and drops, nobody holds.
    """

    def __init__(self, config: ExpertsConfig, dim: int) -> None:
        super().__init__()
        router = config.router
        self.kind = router.kind
        self.granularity = router.granularity
        self.normalise = router.normalise
        self.context_weight = router.context_weight
        self.num_experts = config.num_experts
        self.grouped = router.grouped
        self.num_groups = router.groups if router.grouped else 1
        self.top_k = config.top_k
        self._build_gates(config, dim)
        # Loss-free balance (arXiv 2408.15664): added for the selection only, never to the weight of an expert.
        self.register_buffer("selection_bias", torch.zeros(config.num_experts, dtype=torch.float32))
        self.selection_bias: Tensor
        self.schedule = router.temperature_schedule
        if self.schedule is not None:
            self.register_buffer("temperature", torch.full((1,), self.schedule.start))
            self.temperature: Tensor

    def _build_gates(self, config: ExpertsConfig, dim: int) -> None:
        if self.kind == "hash":
            # A seed of four bytes: such numbers survive a cast to any floating-point type.
            self.register_buffer("hash_seed", torch.zeros(4))
            self.hash_seed: Tensor
            self._table: tuple[tuple[int, ...], Tensor] | None = None
            return
        of_group = config.num_experts // self.num_groups
        self.expert_gate = make_gate(config.router, dim, config.num_experts, of_group)
        self.expert_gate.measures_similarity = config.balance.orthogonality > 0
        if self.kind == "two_level":
            self.group_gate = make_gate(config.router, dim, self.num_groups, self.num_groups)
        elif self.kind == "noisy_topk":
            self.noise_gate = Gate(dim, config.num_experts, "softmax", 0, 1.0)
            # All zeros at first, as published: no signal, and some noise.
            self.initial_gain = {"noise_gate.weight": 0.0}
            if isinstance(self.expert_gate, Gate):
                self.initial_gain["expert_gate.weight"] = 0.0

    def seeded_reset(self, *key: Key) -> None:
        """Draw what no gate draws: the seed of the hash."""
        if self.kind == "hash":
            self.hash_seed.copy_(torch.randint(256, (4,), generator=generator(*key, "hash")))

    def _check(self, samples: int, inputs: RouterInputs) -> None:
        """Refuse a regime label or noise that is missing, or that this router does not use."""
        told, noisy = self.kind == "oracle", self.kind == "noisy_topk" and self.training
        if (inputs.regime is not None) != told:
            problem = "needs the regime of each sample" if told else "takes no regime label; only an oracle does"
            raise ValueError(f"router kind {self.kind} {problem}")
        if inputs.regime is not None and not bool(((inputs.regime >= 0) & (inputs.regime < self.num_groups)).all()):
            raise ValueError(f"regime labels {inputs.regime.tolist()} do not fit router.groups={self.num_groups}")
        if noisy and (inputs.noise is None or len(inputs.noise) != samples):
            raise ValueError(f"router kind {self.kind} needs noise in training: {samples} seeds, one a sample")
        if inputs.noise is not None and self.kind != "noisy_topk":
            raise ValueError(f"router kind {self.kind} is not noisy; only noisy_topk takes seeds of noise")

    def finish_step(self) -> None:
        """Lower the temperature by one optimiser step of its schedule."""
        if self.schedule is not None:
            self.temperature.mul_(self.schedule.decay).clamp_(min=self.schedule.end)

    def _query(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the expert gate sees, ``[B, S or 1, D]``, and the sample means ``[B, 1, D]``."""
        query = x.float()
        mean = query.mean(1, keepdim=True)
        if self.granularity == "sample":
            query = mean
        elif self.kind == "context":
            query = query + self.context_weight * mean
        return query, mean

    def _group_probs(self, mean: Tensor, inputs: RouterInputs) -> Tensor:
        """Probabilities of the groups ``[B, 1, G]``: of the sample mean, or all on the one of the regime."""
        if self.kind == "two_level":
            return self.group_gate(mean)[0].softmax(-1)
        assert inputs.regime is not None
        return F.one_hot(inputs.regime, self.num_groups).float().unsqueeze(1)

    def _select(self, probs: Tensor, group_probs: Tensor) -> Tensor:
        bias = self.selection_bias.float()
        score = probs + bias
        if self.grouped:
            group_bias = bias.view(self.num_groups, -1).mean(1) if self.kind == "two_level" else 0.0
            group = (group_probs + group_bias).argmax(-1, keepdim=True)
            group_of_expert = torch.arange(self.num_experts, device=probs.device) * self.num_groups // self.num_experts
            score = score.masked_fill(group_of_expert != group, float("-inf"))
        return score.topk(self.top_k, dim=-1).indices

    def forward(self, x: Tensor, inputs: RouterInputs = NO_INPUTS) -> Routing:
        """Choose experts.

        Raises
        ------
        ValueError
            A regime label or noise is missing, or given to a router that does not use it.
        """
        self._check(len(x), inputs)
        return self._by_position(x) if self.kind == "hash" else self._by_score(x, inputs)

    def _by_score(self, x: Tensor, inputs: RouterInputs) -> Routing:
        query, mean = self._query(x)
        logits, similarity = self.expert_gate(query)
        load_probs = None
        if self.kind == "noisy_topk" and self.training:
            logits, load_probs = self._add_noise(query, logits, inputs)
        if self.schedule is not None:
            logits = logits / self.temperature.float()
        logits = _to_tokens(logits, x)
        if self.grouped:
            group_probs = _to_tokens(self._group_probs(mean, inputs), x)
            within = logits.view(-1, self.num_groups, self.num_experts // self.num_groups).softmax(-1)
            probs = (group_probs.unsqueeze(-1) * within).flatten(1)
        else:
            probs, group_probs = logits.softmax(-1), logits.new_empty(len(logits), 0)
        selected = self._select(probs.detach(), group_probs.detach())
        chosen = probs if self.normalise == "before" else logits
        weights = chosen.gather(-1, selected)
        if self.normalise == "after":
            weights = weights.softmax(-1)
        counts = count_assignments(selected, self.num_experts)
        if load_probs is not None:
            load_probs = _to_tokens(load_probs, x)
        return Routing(probs, logits, selected, counts, group_probs, weights, load_probs, similarity)

    def _add_noise(self, query: Tensor, clean: Tensor, inputs: RouterInputs) -> tuple[Tensor, Tensor | None]:
        """``H = x W_g + N(0, 1) softplus(x W_noise)``, and P(x, i) of Shazeer's load, ``[B, S or 1, E]``.

        The noise is drawn by the seeds of the samples: the same on any number of ranks, and in a resumed run.
        """
        assert inputs.noise is not None
        drawn = [torch.randn(clean.shape[1:], generator=generator(seed)) for seed in inputs.noise]
        std = F.softplus(self.noise_gate(query)[0])
        noisy = clean + torch.stack(drawn).to(clean) * std
        if self.top_k == self.num_experts:
            return noisy, None
        best = noisy.topk(self.top_k + 1, dim=-1).values
        last, next_best = best[..., -2:-1], best[..., -1:]
        threshold = torch.where(noisy >= last, next_best, last)  # The K-th best of the *other* experts.
        return noisy, torch.special.ndtr((clean - threshold) / std.clamp(min=1e-6))

    def _by_position(self, x: Tensor) -> Routing:
        selected = _to_tokens(self._positions(x.shape[1]).to(x.device).unsqueeze(0), x)
        weights = torch.full(selected.shape, 1.0 / self.top_k, device=x.device)
        logits = weights.new_zeros(len(selected), self.num_experts)
        counts = count_assignments(selected, self.num_experts)
        return Routing(logits.scatter(1, selected, weights), logits, selected, counts, logits[:, :0], weights)

    def _positions(self, tokens: int) -> Tensor:
        """Experts by position ``[tokens, K]``: every run of E positions meets every expert equally often."""
        key = (tokens, *(int(byte) for byte in self.hash_seed.tolist()))
        if self._table is None or self._table[0] != key:
            experts = self.num_experts
            runs = torch.rand(-(-tokens // experts), experts, generator=generator("hash", *key[1:])).argsort(1)
            choices = torch.stack([runs.roll(-k, 1).flatten()[:tokens] for k in range(self.top_k)], 1)
            self._table = (key, choices)
        return self._table[1]


def _to_tokens(values: Tensor, x: Tensor) -> Tensor:
    """``[B or 1, S or 1, C] -> [T, C]``, for the tokens of ``x [B, S, D]``."""
    return values.expand(*x.shape[:2], -1).flatten(0, 1)
