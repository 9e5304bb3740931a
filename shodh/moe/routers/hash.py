"""A control: a fixed pseudo-random expert by the position of the token."""

from __future__ import annotations

import torch
from torch import Tensor

from shodh.config import ExpertsConfig
from shodh.core.seeding import Key, generator
from shodh.moe.routers.base import Router, to_tokens
from shodh.moe.routing import Routing, count_assignments


class HashRouter(Router):
    """Position hash of Hash Layers (arXiv 2106.04426; fields have no vocabulary to hash).

    Each expert equally often, with the weight 1 / K.
    """

    def build(self, config: ExpertsConfig, dim: int) -> None:
        # A seed of four bytes: such numbers survive a cast to any floating-point type.
        self.register_buffer("hash_seed", torch.zeros(4))
        self.hash_seed: Tensor
        self._table: tuple[tuple[int, ...], Tensor] | None = None

    def seeded_reset(self, *key: Key) -> None:
        """Draw the seed of the hash."""
        self.hash_seed.copy_(torch.randint(256, (4,), generator=generator(*key, "hash")))

    def route(self, x: Tensor) -> Routing:
        selected = to_tokens(self._positions(x.shape[1]).to(x.device).unsqueeze(0), x)
        weights = torch.full(selected.shape, 1.0 / self.top_k, device=x.device)
        logits = weights.new_zeros(len(selected), self.num_experts)
        counts = count_assignments(selected, self.num_experts)
        return Routing(logits.scatter(1, selected, weights), logits, selected, counts, logits[:, :0], weights)

    def _positions(self, tokens: int) -> Tensor:
        """Experts by position ``[tokens, K]``: every run of E positions meets every expert equally often."""
        seed = torch.zeros(4) if self.hash_seed.is_meta else self.hash_seed  # Of a rehearsal, that counts alone.
        key = (tokens, *(int(byte) for byte in seed.tolist()))
        if self._table is None or self._table[0] != key:
            experts = self.num_experts
            runs = torch.rand(-(-tokens // experts), experts, generator=generator("hash", *key[1:])).argsort(1)
            choices = torch.stack([runs.roll(-k, 1).flatten()[:tokens] for k in range(self.top_k)], 1)
            self._table = (key, choices)
        return self._table[1]
