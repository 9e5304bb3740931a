"""Feed-forward experts in plain torch: the shared part, the dense baseline, and the twin of the expert-parallel layer.

Parameter names are those of the exchange format: ``experts.w1``, ``experts.w2``, ``experts.w3``, ``shared_experts.*``
and ``router.*``, whatever layer runs them. DeepSpeed saves three stacked matrices of these names and no others, so
every form of expert is written with three:

=========  ==========================  ========================================================================
swiglu     w1, w3 [E, H, D]            gate and up;                       ``w2 (silu(w1 x) * (w3 x))``
bilinear   w2 [E, D, H]                                                   ``w2 ((w1 x) * (w3 x))``
gelu       w1, w3 [E, H/2, D], w2      halves of one matrix ``W``;        ``w2 gelu(W x)``
linear     w1, w3 [E, O/2, D],         halves of one matrix ``W``, and    ``gelu(W x + b)``
           w2 [E, O, 1]                its bias ``b``;
=========  ==========================  ========================================================================

The halves cost nothing: there are as many parameters as without them, and all of them are trained.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shodh.config import ExpertsConfig
from shodh.moe.gates import Gate
from shodh.moe.router import SemanticRouter
from shodh.moe.routing import NO_INPUTS, RouterInputs, Routing
from shodh.seeding import Key, generator


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def bilinear(gate: Tensor, up: Tensor) -> Tensor:
    """Gated without a non-linearity: the expert is a quadratic form, so expert similarity is exact (2605.15183)."""
    return gate * up


def gelu(first: Tensor, second: Tensor) -> Tensor:
    """Without a gate: GELU of a hidden layer that comes in two halves."""
    return F.gelu(torch.cat((first, second), -1))


ACTIVATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"swiglu": swiglu, "bilinear": bilinear, "gelu": gelu}


def inner_rows(hidden: int, activation: str) -> int:
    """Rows of ``w1`` and of ``w3``: the hidden width, or half of it where they are halves of one matrix."""
    return hidden // 2 if activation == "gelu" else hidden


class FeedForward(nn.Module):
    """Two-layer feed-forward ``scale * w2(act(w1 x, w3 x))``: shared experts, or the dense baseline."""

    def __init__(self, dim: int, hidden: int, activation: str, scale: float = 1.0) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.scale = scale
        rows = inner_rows(hidden, activation)
        self.w1 = nn.Linear(dim, rows, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, rows, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(self.activation(self.w1(x), self.w3(x)))
        return out if self.scale == 1.0 else out * self.scale


class LinearFeedForward(nn.Module):
    """``scale * sum_s gelu(W_s x + b_s)``: shared experts of form linear, or the dense baseline."""

    def __init__(self, dim: int, width: int, copies: int, scale: float = 1.0) -> None:
        super().__init__()
        self.copies, self.scale = copies, scale
        self.w1 = nn.Linear(dim, copies * width)

    def forward(self, x: Tensor) -> Tensor:
        every = F.gelu(self.w1(x)).unflatten(-1, (self.copies, -1))
        return every.sum(-2) * self.scale


def output_width(config: ExpertsConfig, dim: int) -> int:
    """Width of what an expert layer returns for rows of width ``dim``."""
    return config.hidden if config.form == "linear" else dim


def build_dense(config: ExpertsConfig, dim: int, copies: int) -> FeedForward | LinearFeedForward:
    """Experts that every token meets, as one module: ``copies`` shared ones, or a baseline as large as so many."""
    scale = 1.0 / copies if config.shared_combine == "mean" else 1.0
    if config.form == "linear":
        return LinearFeedForward(dim, config.hidden, copies, scale)
    return FeedForward(dim, copies * config.hidden, config.activation, scale)


@torch.no_grad()
def reset_experts(experts: nn.Module, first_expert: int, *key: Key) -> None:
    """Draw each local expert from (key, its *global* id): no two are equal, whatever the expert-parallel degree.

    Parameters
    ----------
    experts : Module
        With ``w1``, ``w2`` and ``w3 [E_local, ...]``; those named in its ``biases`` start as zeros.
    first_expert : int
        Global id of local expert 0.
    """
    for name in ("w1", "w2", "w3"):
        parameter = getattr(experts, name)
        if name in getattr(experts, "biases", ()):
            parameter.zero_()
            continue
        for local in range(parameter.shape[0]):
            draw = torch.empty(parameter.shape[1:])
            draw.normal_(0.0, parameter.shape[2] ** -0.5, generator=generator(*key, name, first_expert + local))
            parameter[local].copy_(draw)


class ExpertStack(nn.Module):
    """All routed experts on one device, evaluated in a loop over experts."""

    def __init__(self, num_experts: int, dim: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        rows = inner_rows(hidden, activation)
        self.w1 = nn.Parameter(torch.empty(num_experts, rows, dim))
        self.w2 = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.w3 = nn.Parameter(torch.empty(num_experts, rows, dim))

    def seeded_reset(self, *key: Key) -> None:
        reset_experts(self, 0, *key)

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """Expert ``expert`` on rows ``[N, D]``."""
        gate, up = F.linear(x, self.w1[expert]), F.linear(x, self.w3[expert])
        return F.linear(self.activation(gate, up), self.w2[expert])


class LinearExpertStack(nn.Module):
    """All routed experts of form linear on one device."""

    biases = ("w2",)

    def __init__(self, num_experts: int, dim: int, width: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(num_experts, width // 2, dim))
        self.w2 = nn.Parameter(torch.empty(num_experts, width, 1))
        self.w3 = nn.Parameter(torch.empty(num_experts, width // 2, dim))

    def seeded_reset(self, *key: Key) -> None:
        reset_experts(self, 0, *key)

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """Expert ``expert`` on rows ``[N, D]``: ``[N, O]``."""
        weight = torch.cat((self.w1[expert], self.w3[expert]))
        return F.gelu(F.linear(x, weight, self.w2[expert, :, 0]))


RoutedExperts = ExpertStack | LinearExpertStack


def build_stack(config: ExpertsConfig, dim: int) -> RoutedExperts:
    """All routed experts of a layer, on one device."""
    if config.form == "linear":
        return LinearExpertStack(config.num_experts, dim, config.hidden)
    return ExpertStack(config.num_experts, dim, config.hidden, config.activation)


class AddedExperts(nn.Module):
    """``sum_j sigmoid(g_j . x) f_j(x)`` of ``config.num_added`` experts: ``[B, S, D] -> [B, S, O]``.

    They take no token from the experts that were there before: a hard top-k over old and new ones would either never
    choose a new expert, which then learns nothing, or change what is known from the first step on. Each has a gate of
    its own, of the token or, with granularity sample, of the sample mean; ``f_j`` starts as zero, so that the model
    starts bitwise as it was given, with a gradient. All ranks hold all of them, so any expert-parallel degree fits.
    """

    def __init__(self, config: ExpertsConfig, dim: int) -> None:
        super().__init__()
        self.num_added = config.num_added
        self.width = output_width(config, dim)
        self.of_sample = config.router.granularity == "sample"
        self.gate = Gate(dim, config.num_added, "softmax", 0, 1.0)
        self.stack = build_stack(config.model_copy(update={"num_experts": config.num_added}), dim)
        # The last map of gated experts; form linear has one map, in halves.
        zeroed = ("w1", "w3") if config.form == "linear" else ("w2",)
        self.initial_gain = {f"stack.{name}": 0.0 for name in zeroed}

    def forward(self, x: Tensor) -> Tensor:
        logits, _ = self.gate(x.float().mean(1, keepdim=True) if self.of_sample else x)
        weights = torch.sigmoid(logits)
        rows = x.reshape(-1, x.shape[-1])
        out = torch.zeros((*x.shape[:-1], self.width), dtype=weights.dtype, device=x.device)
        for expert in range(self.num_added):
            values = self.stack(rows, expert).view(out.shape).to(out.dtype)
            out = out + weights[..., expert : expert + 1] * values
        return out.to(x.dtype)


def build_added(config: ExpertsConfig, dim: int) -> AddedExperts | None:
    """The added experts of a layer; None where the configuration has none."""
    return AddedExperts(config, dim) if config.num_added else None


class ExpertLayerReference(nn.Module):
    """The expert layer in plain torch: one device, all experts, any float dtype, no DeepSpeed.

    The reference of every test, and what runs wherever DeepSpeed is not installed.

    ``forward(x [B, S, D], inputs) -> (output [B, S, O], Routing)``: shared experts always on, plus the chosen experts
    weighted by their soft scores and combined in float32, plus added experts where the configuration has some. ``O``
    is ``D``, but ``config.hidden`` for form linear; ``inputs`` is what noisy and oracle routers are given
    (`shodh.moe.routing.RouterInputs`).
    """

    def __init__(self, config: ExpertsConfig, dim: int) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.width = output_width(config, dim)
        self.router = SemanticRouter(config, dim)
        self.experts = build_stack(config, dim)
        self.shared_experts = build_dense(config, dim, config.num_shared) if config.num_shared else None
        self.added_experts = build_added(config, dim)

    def forward(self, x: Tensor, inputs: RouterInputs = NO_INPUTS) -> tuple[Tensor, Routing]:
        batch, tokens, dim = x.shape
        rows = x.reshape(-1, dim)
        self.router.prepare((batch, tokens), inputs)
        scores, selected, _ = self.router(rows)
        out = rows.new_zeros((*selected.shape, self.width), dtype=torch.promote_types(rows.dtype, torch.float32))
        for expert in range(self.num_experts):
            token, slot = (selected == expert).nonzero(as_tuple=True)
            routed = self.experts(rows[token], expert).to(out.dtype) * scores[token, slot].unsqueeze(-1)
            out[token, slot] = routed.to(out.dtype)
        # Summed slot by slot, as the expert-parallel layer does it: the same bits.
        combined = out.sum(1).to(x.dtype).view(batch, tokens, self.width)
        if self.shared_experts is not None:
            combined = combined + self.shared_experts(x)
        if self.added_experts is not None:
            combined = combined + self.added_experts(x)
        return combined, self.router.take()
