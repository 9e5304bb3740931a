"""DPOT and MoE-POT: operators on fields that mix patches in Fourier space (arXiv 2403.03542, 2510.25803).

History of frames -> patches -> one latent frame by temporal aggregation -> blocks -> next frame. DPOT's blocks have a
dense feed-forward, MoE-POT's shared and routed experts; everything else is the same. In two or three dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from shodh.config import ExpertsConfig, OperatorConfig
from shodh.core.seeding import Key, generator
from shodh.models.conditioning import condition, make_conditioning
from shodh.models.field_space import CONVOLUTIONS, TRANSPOSED, FieldSpace, coordinates
from shodh.models.fourier import FourierMixing
from shodh.models.operator import ExpertLayerFactory, OperatorOutput, PositionTable, observe
from shodh.moe.experts import ExpertLayerReference, build_dense
from shodh.moe.routers.operator import make_operator_gate
from shodh.moe.routing import NO_INPUTS, RouterInputs, Routing

GROUPS = 8  # of every group norm, as published


class PatchEmbedding(nn.Module):
    """Frames with coordinates of space and time -> patches: ``[B, T, C, *grid] -> [B, T, S, dim]``.

    A convolution over patches to ``channels * patch + axes + 1`` features, GELU, and a linear map.
    """

    def __init__(self, space: FieldSpace, patch: int, dim: int) -> None:
        super().__init__()
        inputs = space.channels + space.static + space.ndim + 1
        hidden = space.channels * patch + space.ndim + 1
        convolution = CONVOLUTIONS[space.ndim]
        self.patches = convolution(inputs, hidden, patch, stride=patch)
        self.project = convolution(hidden, dim, 1)

    def forward(self, frames: Tensor, static: Tensor) -> Tensor:
        batch, steps, _, *grid = frames.shape
        time = torch.linspace(0, 1, steps, device=frames.device, dtype=frames.dtype)
        constant = torch.cat((static, coordinates(grid, frames).expand(batch, -1, *grid)), 1)
        given = torch.cat(
            (
                frames,
                constant.unsqueeze(1).expand(-1, steps, *constant.shape[1:]),
                time.view(1, -1, 1, *(1,) * len(grid)).expand(batch, steps, 1, *grid),
            ),
            2,
        )
        x = self.project(F.gelu(self.patches(given.flatten(0, 1).to(self.patches.weight.dtype))))
        return x.flatten(2).transpose(1, 2).unflatten(0, (batch, steps))


class TemporalAggregation(nn.Module):
    """``sum_t W_t z_t cos(gamma t)``: ``[B, T, S, dim] -> [B, S, dim]``, times from 0 to 1."""

    undecayed = ("gamma",)

    def __init__(self, steps: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(steps, dim, dim))
        self.gamma = nn.Parameter(torch.empty(dim))

    def seeded_reset(self, *key: Key) -> None:
        """Frequencies from ``2^-10`` to ``2^10``; weights as published."""
        steps, dim, _ = self.weight.shape
        with torch.no_grad():
            self.gamma.copy_(2.0 ** torch.linspace(-10, 10, dim))
            draw = torch.empty(self.weight.shape).normal_(generator=generator(*key, "weight"))
            self.weight.copy_(draw / (steps * dim**0.5))

    def forward(self, x: Tensor) -> Tensor:
        time = torch.linspace(0, 1, x.shape[1], device=x.device)
        phase = torch.cos(time[:, None] * self.gamma.float()).to(x.dtype)
        return torch.einsum("btsi,tij->bsj", x * phase[:, None], self.weight)


class DenseFeedForward(nn.Module):
    """DPOT's feed-forward: two affine maps with GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Linear(dim, hidden)
        self.contract = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, inputs: RouterInputs) -> tuple[Tensor, None]:
        return self.contract(F.gelu(self.expand(x))), None


class ExpertFeedForward(nn.Module):
    """Features that all experts share, then experts of one affine map each, as MoE-POT's public code has them.

    With ``experts.form: gated`` there are no shared features: each expert is a feed-forward of its own. Without routed
    experts, a dense layer of equal active size, but for the router, takes their place.
    """

    def __init__(self, config: ExpertsConfig, dim: int, mlp: int, expert_layer: ExpertLayerFactory) -> None:
        super().__init__()
        linear = config.form == "linear"
        self.features = nn.Linear(dim, mlp) if linear else None
        width = mlp if linear else dim
        self.sparse = config.num_experts > 0
        self.layer = (
            expert_layer(config, width) if self.sparse else build_dense(config, width, config.num_shared + config.top_k)
        )

    def forward(self, x: Tensor, inputs: RouterInputs) -> tuple[Tensor, Routing | None]:
        x = x if self.features is None else F.gelu(self.features(x))
        if not self.sparse:
            return self.layer(x), None
        out: tuple[Tensor, Routing] = self.layer(x, inputs)
        return out


class PotBlock(nn.Module):
    """Group norm, Fourier mixing with its input added, group norm, feed-forward; one skip around all.

    ``forward(x [B, S, dim], inputs of the router) -> (x, Routing or None)``
    """

    def __init__(self, config: OperatorConfig, grid: tuple[int, ...], expert_layer: ExpertLayerFactory) -> None:
        super().__init__()
        dim = config.dim
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, dim), nn.GroupNorm(GROUPS, dim)
        self.mixing = FourierMixing(dim, config.heads, grid, config.modes)
        mlp = config.field.mlp
        self.feed_forward = (
            DenseFeedForward(dim, mlp)
            if config.kind == "dpot"
            else ExpertFeedForward(config.experts, dim, mlp, expert_layer)
        )

    def forward(self, x: Tensor, inputs: RouterInputs = NO_INPUTS) -> tuple[Tensor, Routing | None]:
        y = self.norm1(x.transpose(1, 2)).transpose(1, 2)
        y = y + self.mixing(y)
        y = self.norm2(y.transpose(1, 2)).transpose(1, 2)
        out, routing = self.feed_forward(y, inputs)
        return x + out, routing


class PatchDecoder(nn.Module):
    """Patches -> fields: ``[B, dim, *patches] -> [B, C, *grid]``, by a transposed convolution and two linear maps."""

    def __init__(self, space: FieldSpace, patch: int, dim: int, hidden: int) -> None:
        super().__init__()
        convolution = CONVOLUTIONS[space.ndim]
        self.cells = TRANSPOSED[space.ndim](dim, hidden, patch, stride=patch)
        self.mix = convolution(hidden, hidden, 1)
        self.out = convolution(hidden, space.channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(F.gelu(self.mix(F.gelu(self.cells(x)))))
        return out


class PotOperator(nn.Module):
    """DPOT, or MoE-POT where the configuration has experts.

    ``forward(history [B, T, C, *grid], static [B, S, *grid]) -> OperatorOutput`` with the next frame ``[B, C, *grid]``,
    all normalised, absent channels ones; ``regime``, ``noise`` and ``fingerprint`` are what some routers need
    (`shodh.moe.step.router_arguments`), ``conditions [B, N]`` what ``config.conditions`` names.

    Parameter counts of the papers are those of two dimensions, ``T = 10``, 4 channels, no static field, patches of 8 in
    128^2, and ``field.classes`` outputs of a head that no loss uses (6 in MoE-POT, 12 in DPOT): Tiny 30.17 M, 17.56 M
    of them active, Small 166.3 M and 90.8 M, Medium 489.6 M and 288.2 M. Active counts the router, the shared experts
    and 4 of 16 routed ones. Learned positions tie a model to its grid; channels, patches and ``T`` change little but
    the ends.
    """

    def __init__(
        self, config: OperatorConfig, space: FieldSpace, expert_layer: ExpertLayerFactory = ExpertLayerReference
    ) -> None:
        super().__init__()
        self.config = config
        self.token_grid = tuple(n // config.patch for n in space.grid)
        self.embed = PatchEmbedding(space, config.patch, config.dim)
        self.position = PositionTable(math.prod(self.token_grid), config.dim)
        self.aggregate = TemporalAggregation(space.history, config.dim)
        self.blocks = nn.ModuleList(PotBlock(config, self.token_grid, expert_layer) for _ in range(config.depth))
        self.decode = PatchDecoder(space, config.patch, config.dim, config.field.decoder)
        sparse = config.experts if config.kind == "moe_pot" else config.experts.model_copy(update={"num_experts": 0})
        self.router = make_operator_gate(sparse, space.channels, space.ndim)
        self.conditioning = make_conditioning(config)
        if config.field.classes:
            self.classifier = _classifier(config.dim, config.field.classes)

    def forward(
        self,
        history: Tensor,
        static: Tensor,
        regime: Tensor | None = None,
        noise: Tensor | None = None,
        fingerprint: Tensor | None = None,
        conditions: Tensor | None = None,
    ) -> OperatorOutput:
        x = self.embed(history, static)
        x = condition(self.conditioning, self.aggregate(x + self.position.position.to(x.dtype)), conditions)
        inputs, routing = RouterInputs(regime, noise, observe(self.router, fingerprint)), []
        for layer, block in enumerate(self.blocks):
            given = (x, inputs.at_layer(layer))
            if self.config.activation_checkpointing is True and torch.is_grad_enabled():
                x, decision = checkpoint(block, *given, use_reentrant=False)
            else:
                x, decision = block(*given)
            if decision is not None:
                routing.append(decision)
        frame = self.decode(x.transpose(1, 2).unflatten(2, self.token_grid)).to(history.dtype)
        return OperatorOutput(history[:, -1] + frame if self.config.field.residual else frame, routing)


def _classifier(dim: int, classes: int) -> nn.Sequential:
    """The published head; frozen, because no loss uses it."""
    head = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, classes))
    return head.requires_grad_(False)
