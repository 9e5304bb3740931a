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

from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from shodh.config import ExpertsConfig
from shodh.core.seeding import Key, generator
from shodh.moe.gates import Gate
from shodh.moe.mixture import ACTIVATIONS, expert_reference, mix_experts
from shodh.moe.routers import make_router
from shodh.moe.routers.base import to_tokens
from shodh.moe.routing import NO_INPUTS, RouterInputs, Routing


def inner_rows(hidden: int, activation: str) -> int:
    """Rows of ``w1`` and of ``w3``: the hidden width, or half of it where they are halves of one matrix."""
    return hidden // 2 if activation in ("gelu", "linear") else hidden


class FeedForward(nn.Module):
    """Two-layer feed-forward ``scale * w2(act(w1 x, w3 x))``: shared experts, or the dense baseline."""

    output_parameters = ("w2.weight",)

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

    output_parameters = ("w1.weight",)

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


class ExpertStack(nn.Module):
    """Routed experts on this device, all of a layer or a rank's share, as three stacked matrices.

    ``forward(rows [T, D], selected [T, K], weights [T, K], counts, group, beside) -> [T, O]``, the weighted sum of the
    chosen ones, and of what is computed beside them: `shodh.moe.mixture.mix_experts`.

    Parameters
    ----------
    activation : str
        One of `ACTIVATIONS`, or "linear": one affine map and GELU, ``hidden`` wide.
    first_expert : int
        Global id of the first one.
    """

    def __init__(self, num_experts: int, dim: int, hidden: int, activation: str, first_expert: int = 0) -> None:
        super().__init__()
        self.first_expert = first_expert
        linear = activation == "linear"
        self.activation = activation
        self.undecayed = ("w2",) if linear else ()  # A bias, stacked.
        self.output_parameters = ("w1", "w3") if linear else ("w2",)
        rows = inner_rows(hidden, activation)
        self.w1 = nn.Parameter(torch.empty(num_experts, rows, dim))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden, 1) if linear else torch.empty(num_experts, dim, hidden))
        self.w3 = nn.Parameter(torch.empty(num_experts, rows, dim))

    @torch.no_grad()
    def seeded_reset(self, *key: Key) -> None:
        """Draw each expert from (key, its *global* id): no two are equal, whatever the expert-parallel degree."""
        for name, parameter in self.named_parameters():
            if name in self.undecayed:
                parameter.zero_()
                continue
            for local in range(parameter.shape[0]):
                draw = torch.empty(parameter.shape[1:])
                drawn_by = generator(*key, name, self.first_expert + local)
                parameter[local].copy_(draw.normal_(0.0, parameter.shape[2] ** -0.5, generator=drawn_by))

    def forward(
        self,
        rows: Tensor,
        selected: Tensor,
        weights: Tensor,
        counts: Tensor,
        group: dist.ProcessGroup | None = None,
        beside: Iterable[Callable[[], Tensor]] = (),
    ) -> Tensor:
        matrices = self.w1, self.w2, self.w3
        return mix_experts(rows, selected, weights, counts, matrices, self.activation, group, beside)

    def one(self, rows: Tensor, expert: int) -> Tensor:
        """Expert ``expert`` alone on rows ``[N, D]``."""
        return expert_reference(rows, self.w1[expert], self.w2[expert], self.w3[expert], self.activation)


def build_stack(config: ExpertsConfig, dim: int, num_experts: int, first_expert: int = 0) -> ExpertStack:
    """``num_experts`` of the experts that a configuration describes."""
    activation = "linear" if config.form == "linear" else config.activation
    return ExpertStack(num_experts, dim, config.hidden, activation, first_expert)


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
        self.stack = build_stack(config, dim, config.num_added)
        self.initial_gain = {f"stack.{name}": 0.0 for name in self.stack.output_parameters}

    def forward(self, x: Tensor) -> Tensor:
        logits, _ = self.gate(x.float().mean(1, keepdim=True) if self.of_sample else x)
        weights = to_tokens(torch.sigmoid(logits), x)
        every = torch.arange(self.num_added, device=x.device).expand(len(weights), -1)
        counts = torch.full((self.num_added,), len(weights), dtype=torch.int32, device=x.device)
        out: Tensor = self.stack(x.reshape(-1, x.shape[-1]), every, weights, counts)
        return out.view(*x.shape[:-1], self.width)


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

    def __init__(self, config: ExpertsConfig, dim: int, ep_size: int = 1, ep_rank: int = 0) -> None:
        super().__init__()
        self.width = output_width(config, dim)
        self.router = make_router(config, dim)
        local = config.num_experts // ep_size
        self.experts = build_stack(config, dim, local, local * ep_rank)
        self.shared_experts = build_dense(config, dim, config.num_shared) if config.num_shared else None
        self.added_experts = build_added(config, dim)
        self.ep_group: dist.ProcessGroup | None = None

    def forward(self, x: Tensor, inputs: RouterInputs = NO_INPUTS) -> tuple[Tensor, Routing]:
        routing: Routing = self.router(x, inputs)
        chosen = routing.selected, routing.weights, routing.counts
        beside = [partial(part, x) for part in (self.shared_experts, self.added_experts) if part is not None]
        out: Tensor = self.experts(x.reshape(-1, x.shape[-1]), *chosen, self.ep_group, beside=beside)
        return out.view(*x.shape[:-1], self.width), routing
