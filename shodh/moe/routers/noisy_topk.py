"""Experts by the token, with noise on the logits in training."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from shodh.config import ExpertsConfig
from shodh.core.noise import normal
from shodh.moe.gates import Gate
from shodh.moe.routers.base import GateRouter, to_tokens
from shodh.moe.routing import Routing


class NoisyTopKRouter(GateRouter):
    """As token, with Gaussian noise of a learned size on the logits in training (Shazeer, arXiv 1701.06538)."""

    def build(self, config: ExpertsConfig, dim: int) -> None:
        super().build(config, dim)
        self.noise_gate = Gate(dim, config.num_experts, "softmax", 0, 1.0)
        # All zeros at first, as published: no signal, and some noise.
        self.initial_gain = {"noise_gate.weight": 0.0}
        if isinstance(self.expert_gate, Gate):
            self.initial_gain["expert_gate.weight"] = 0.0

    def route(self, x: Tensor, noise: Tensor | None = None) -> Routing:
        tokens = x.float()
        query = self.query(tokens)
        logits, similarity = self.expert_gate(query)
        load = None
        if noise is not None:
            logits, load = self._add_noise(query, logits, noise)
            load = None if load is None else to_tokens(load, x)
        logits = self.cooled(logits, tokens)
        return self.choose(logits, logits.softmax(-1), load_probs=load, similarity=similarity)

    def _add_noise(self, query: Tensor, clean: Tensor, noise: Tensor) -> tuple[Tensor, Tensor | None]:
        """``H = x W_g + N(0, 1) softplus(x W_noise)``, and P(x, i) of Shazeer's load, ``[B, S or 1, E]``.

        The noise is drawn by the seeds of the samples: the same on any number of ranks, and in a resumed run.
        """
        std = F.softplus(self.noise_gate(query)[0])
        noisy = clean + normal(noise, clean.shape[1:]) * std
        if self.top_k == self.num_experts:
            return noisy, None
        best = noisy.topk(self.top_k + 1, dim=-1).values
        last, next_best = best[..., -2:-1], best[..., -1:]
        threshold = torch.where(noisy >= last, next_best, last)  # The K-th best of the *other* experts.
        return noisy, torch.special.ndtr((clean - threshold) / std.clamp(min=1e-6))
