"""Feed-forward experts in plain torch: the shared part, the dense baseline, and the twin of the expert-parallel layer.

Parameter names are those of the exchange format: ``experts.w1 [E, H, D]`` (gate), ``experts.w3 [E, H, D]`` (up),
``experts.w2 [E, D, H]`` (down), ``shared_experts.*`` and ``router.*``, whatever layer runs them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shodh.config import ExpertsConfig
from shodh.moe.router import SemanticRouter
from shodh.moe.routing import Routing
from shodh.seeding import Key, generator


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def bilinear(gate: Tensor, up: Tensor) -> Tensor:
    """Gated without a non-linearity: the expert is a quadratic form, so expert similarity is exact (2605.15183)."""
    return gate * up


ACTIVATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"swiglu": swiglu, "bilinear": bilinear}


class FeedForward(nn.Module):
    """Gated feed-forward ``w2(act(w1 x, w3 x))``: shared experts, or the dense baseline."""

    def __init__(self, dim: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(self.activation(self.w1(x), self.w3(x)))
        return out


@torch.no_grad()
def reset_experts(experts: nn.Module, first_expert: int, *key: Key) -> None:
    """Draw each local expert from (key, its *global* id): no two are equal, whatever the expert-parallel degree.

    Parameters
    ----------
    experts : Module
        With ``w1, w3 [E_local, H, D]`` and ``w2 [E_local, D, H]``.
    first_expert : int
        Global id of local expert 0.
    """
    for name in ("w1", "w2", "w3"):
        parameter = getattr(experts, name)
        for local in range(parameter.shape[0]):
            draw = torch.empty(parameter.shape[1:])
            draw.normal_(0.0, parameter.shape[2] ** -0.5, generator=generator(*key, name, first_expert + local))
            parameter[local].copy_(draw)


class ExpertStack(nn.Module):
    """All routed experts on one device, evaluated in a loop over experts."""

    def __init__(self, num_experts: int, dim: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.w1 = nn.Parameter(torch.empty(num_experts, hidden, dim))
        self.w2 = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.w3 = nn.Parameter(torch.empty(num_experts, hidden, dim))

    def seeded_reset(self, *key: Key) -> None:
        reset_experts(self, 0, *key)

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """Expert ``expert`` on rows ``[N, D]``."""
        gate, up = F.linear(x, self.w1[expert]), F.linear(x, self.w3[expert])
        return F.linear(self.activation(gate, up), self.w2[expert])


class ExpertLayerReference(nn.Module):
    """The expert layer in plain torch: one device, all experts, any float dtype, no DeepSpeed.

    The reference of every test, and what runs wherever DeepSpeed is not installed.

    ``forward(x [B, S, D]) -> (output [B, S, D], Routing)``: shared experts always on, plus the chosen experts weighted
    by their soft scores and combined in float32.
    """

    def __init__(self, config: ExpertsConfig, dim: int) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.router = SemanticRouter(config, dim)
        self.experts = ExpertStack(config.num_experts, dim, config.hidden, config.activation)
        self.shared_experts = (
            FeedForward(dim, config.num_shared * config.hidden, config.activation) if config.num_shared else None
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        batch, tokens, dim = x.shape
        rows = x.reshape(-1, dim)
        self.router.batch_shape = (batch, tokens)
        scores, selected, _ = self.router(rows)
        out = rows.new_zeros((*selected.shape, dim), dtype=torch.promote_types(rows.dtype, torch.float32))
        for expert in range(self.num_experts):
            token, slot = (selected == expert).nonzero(as_tuple=True)
            routed = self.experts(rows[token], expert).to(out.dtype) * scores[token, slot].unsqueeze(-1)
            out[token, slot] = routed.to(out.dtype)
        # Summed slot by slot, as the expert-parallel layer does it: the same bits.
        combined = out.sum(1).to(x.dtype).view(batch, tokens, dim)
        if self.shared_experts is not None:
            combined = combined + self.shared_experts(x)
        return combined, self.router.take()
