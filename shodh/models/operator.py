"""The operator: a sparse latent transformer that maps a history of latents to the next one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shodh.config import ExpertsConfig, OperatorConfig
from shodh.core.errors import ConfigError
from shodh.core.seeding import Key, generator
from shodh.models.blocks import Block, rotary_angles, rotary_tables
from shodh.models.conditioning import condition, make_conditioning
from shodh.models.fourier import FourierMixing
from shodh.models.kernels import Kernels
from shodh.moe.experts import ExpertLayerReference, build_dense, output_width
from shodh.moe.routers.operator import make_operator_gate
from shodh.moe.routing import RouterInputs, Routing

ExpertLayerFactory = Callable[[ExpertsConfig, int], nn.Module]


class OperatorOutput(NamedTuple):
    """``latent [B, L, x, y, z]``, the next frame; ``routing``, one a sparse layer in order."""

    latent: Tensor
    routing: list[Routing]


def observe(gate: nn.Module | None, fingerprint: Tensor | None) -> Tensor | None:
    """What routers are shown of a fingerprint; without a gate the thing itself, which they refuse."""
    return fingerprint if gate is None or fingerprint is None else gate(fingerprint)


class PositionTable(nn.Module):
    """Learned positions ``[tokens, dim]``."""

    undecayed = ("position",)

    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.empty(tokens, dim))

    def seeded_reset(self, *key: Key) -> None:
        with torch.no_grad():
            draw = torch.empty(self.position.shape).normal_(0.0, 0.02, generator=generator(*key))
            self.position.copy_(draw)


class LatentTransformer(nn.Module):
    """Latent history -> patch tokens -> pre-norm blocks with shared and routed experts -> next latent (residual).

    Parameters
    ----------
    config : OperatorConfig
    latent_channels, static_channels : int
        Channels ``L`` of a latent, and ``S`` of the time-constant inputs on the latent grid.
    latent_grid : tuple of int
        Cells of a latent; each divisible by ``config.patch``.
    history : int
        Past frames ``T``.
    expert_layer : callable
        ``(ExpertsConfig, dim) -> Module``: the plain-torch twin by default, the expert-parallel layer in training.
    """

    def __init__(
        self,
        config: OperatorConfig,
        latent_channels: int,
        static_channels: int,
        latent_grid: tuple[int, int, int],
        history: int,
        expert_layer: ExpertLayerFactory = ExpertLayerReference,
        kernels: Kernels = "torch",
    ) -> None:
        super().__init__()
        self.config = config
        self.patch = config.patch
        self.latent_channels = latent_channels
        x, y, z = (n // config.patch for n in latent_grid)
        self.token_grid = (x, y, z)
        cells = config.patch**3
        self.embed = nn.Linear((history * latent_channels + static_channels) * cells, config.dim)
        self.position = PositionTable(x * y * z, config.dim) if config.position == "learned" else None
        self.blocks = nn.ModuleList(
            Block(
                config.dim,
                config.heads,
                config.depth,
                lambda: self._feed_forward(expert_layer),
                kernels,
                self._mixing(),
            )
            for _ in range(config.depth)
        )
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.history = history
        self.head = nn.Linear(config.dim, history * latent_channels * cells)
        # The first prediction is close to persistence: the residual starts small.
        self.initial_gain = {"head.weight": 0.1}
        self.router = make_operator_gate(config.experts, latent_channels, 3)
        self.conditioning = make_conditioning(config)
        self._angles: tuple[torch.device, torch.dtype, Tensor, Tensor] | None = None

    def _mixing(self) -> FourierMixing | None:
        """What takes the place of attention, if anything does."""
        if self.config.mixer == "attention":
            return None
        return FourierMixing(self.config.dim, self.config.heads, self.token_grid, self.config.modes)

    def _feed_forward(self, expert_layer: ExpertLayerFactory) -> nn.Module:
        experts = self.config.experts
        if output_width(experts, self.config.dim) != self.config.dim:
            raise ConfigError(
                f"operator.experts: form linear gives hidden={experts.hidden} channels; use hidden={self.config.dim}, "
                "which is operator.dim"
            )
        if experts.num_experts == 0:
            return build_dense(experts, self.config.dim, experts.num_shared + experts.top_k)
        return expert_layer(experts, self.config.dim)

    def _rotary(self, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if self.position is not None or self.config.mixer == "fourier":
            return None, None
        # Plain attributes, not buffers: DeepSpeed casts buffers to bf16, which would spoil the angles.
        if self._angles is None or self._angles[:2] != (like.device, like.dtype):
            angles = rotary_angles(self.token_grid, self.config.dim // self.config.heads)
            own, other = (table.to(like.device, like.dtype) for table in rotary_tables(angles))
            self._angles = (like.device, like.dtype, own, other)
        return self._angles[2], self._angles[3]

    def _to_tokens(self, x: Tensor) -> Tensor:
        """``[B, C, x, y, z] -> [B, S, C * patch^3]``, x outermost."""
        batch, channels = x.shape[:2]
        p = self.patch
        x = x.unflatten(4, (-1, p)).unflatten(3, (-1, p)).unflatten(2, (-1, p))
        return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, -1, channels * p**3)

    def _from_tokens(self, tokens: Tensor) -> Tensor:
        """``[B, S, C * patch^3] -> [B, C, x, y, z]``, the inverse of `_to_tokens`."""
        batch = tokens.shape[0]
        x, y, z = self.token_grid
        p = self.patch
        cells = tokens.view(batch, x, y, z, -1, p, p, p).permute(0, 4, 1, 5, 2, 6, 3, 7)
        return cells.reshape(batch, -1, x * p, y * p, z * p)

    def _next(self, history: Tensor, emitted: Tensor) -> Tensor:
        """Last latent + residual + gates times the past differences.

        The gates are what the norms of the blocks take away: a step as large as the last ones, in every channel. A flow
        that changes steadily is continued with gates of one, one that has lost its memory with gates of zero.
        """
        residual, *gates = emitted.chunk(self.history, 1)
        latent = history[:, -1] + residual
        for back, gate in enumerate(gates, 1):
            latent = latent + gate * (history[:, -back] - history[:, -back - 1])
        return latent

    def forward(
        self,
        history: Tensor,
        static: Tensor,
        regime: Tensor | None = None,
        noise: Tensor | None = None,
        fingerprint: Tensor | None = None,
        conditions: Tensor | None = None,
    ) -> OperatorOutput:
        """Predict the next latent.

        Parameters
        ----------
        history : Tensor [B, T, L, x, y, z]
            Normalised latents, oldest first.
        static : Tensor [B, S, x, y, z]
            Time-constant inputs on the latent grid.
        regime, noise, fingerprint
            For routers that are told the regime, draw noise or go by the fingerprint, and refused by all others; see
            `shodh.moe.step.router_arguments`.
        conditions : Tensor [B, N], optional
            What ``config.conditions`` names, in model units, NaN where absent.
        """
        inputs = RouterInputs(regime, noise, observe(self.router, fingerprint))
        tokens = self._to_tokens(torch.cat((history.flatten(1, 2), static.to(history.dtype)), 1))
        # In bf16 the residual keeps the precision of the input: the model rounds what it adds, not what it is given.
        x = self.embed(tokens.to(self.embed.weight.dtype))
        if self.position is not None:
            x = x + self.position.position.to(x.dtype)
        x = condition(self.conditioning, x, conditions)
        own, other = self._rotary(x)
        routing: list[Routing] = []
        for number, block in enumerate(self.blocks):
            given = (x, own, other, inputs.at_layer(number))
            if self.config.activation_checkpointing is True and torch.is_grad_enabled():
                x, decision = checkpoint(block, *given, use_reentrant=False)
            else:
                x, decision = block(*given)
            if decision is not None:
                routing.append(decision)
        return OperatorOutput(self._next(history, self._from_tokens(self.head(self.norm(x)))), routing)
