"""The expert layer as MoE-POT's public code evaluates it: every expert on every token."""

from __future__ import annotations

import torch
from torch import Tensor

from shodh.moe.experts import ExpertLayerReference
from shodh.moe.routing import NO_INPUTS, RouterInputs, Routing


class AllExperts(ExpertLayerReference):
    """Every expert on every token, weighted by zero where it was not chosen."""

    def forward(self, x: Tensor, inputs: RouterInputs = NO_INPUTS) -> tuple[Tensor, Routing]:
        routing: Routing = self.router(x, inputs)
        rows = x.flatten(0, 1)
        spread = torch.zeros_like(routing.probs).scatter(1, routing.selected, routing.weights).to(x.dtype)
        out = rows.new_zeros(len(rows), self.width)
        for expert in range(routing.num_experts):
            out = out + self.experts.one(rows, expert) * spread[:, expert : expert + 1]
        out = out.view(*x.shape[:2], -1)
        return out if self.shared_experts is None else out + self.shared_experts(x), routing
