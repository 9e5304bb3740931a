"""Building blocks of the latent transformer: 3-D rotary attention and the pre-norm block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shodh.models.init import residual_gain
from shodh.models.kernels import Kernels, rms_norm
from shodh.moe.experts import FeedForward, LinearFeedForward
from shodh.moe.routing import NO_INPUTS, RouterInputs, Routing


def rotary_angles(grid: tuple[int, int, int], head_dim: int, base: float = 100.0) -> Tensor:
    """Angles ``[tokens, head_dim / 2]`` of axial rotary positions on a grid, x outermost.

    The frequencies are dealt to the axes in turn, so that any even head size works. Lengths of latent grids are tens
    of cells, hence the small base (RoFormer, arXiv 2104.09864, uses 10,000 for text).
    """
    pairs = head_dim // 2
    coordinates = torch.stack(torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij"), -1).reshape(-1, 3)
    pair = torch.arange(pairs)
    per_axis = (pairs + 2) // 3
    frequency = base ** -((pair // 3) / per_axis)
    return coordinates[:, pair % 3].double() * frequency


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate consecutive pairs of the last axis of ``x [..., tokens, head_dim]``."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class Attention(nn.Module):
    """Multi-head self-attention over all latent tokens, with optional rotary positions."""

    output_parameters = ("out.weight",)

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if cos is not None and sin is not None:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, tokens, dim))
        return out


class Block(nn.Module):
    """Pre-norm transformer block; its feed-forward is dense, or shared plus routed experts.

    ``forward(x [B, S, D], cos, sin, inputs) -> (x, Routing or None)``

    Parameters
    ----------
    mixing : Module, optional
        What mixes tokens, ``[B, S, D] -> [B, S, D]``, in the place of attention.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        depth: int,
        make_feed_forward: Callable[[], nn.Module],
        kernels: Kernels,
        mixing: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = rms_norm(dim, kernels)
        self.mixing = mixing
        self.attention = Attention(dim, heads) if mixing is None else None
        self.norm2 = rms_norm(dim, kernels)
        self.feed_forward = make_feed_forward()
        self.initial_gain = residual_gain(self, 2 * depth)

    def forward(
        self, x: Tensor, cos: Tensor | None, sin: Tensor | None, inputs: RouterInputs = NO_INPUTS
    ) -> tuple[Tensor, Routing | None]:
        y = self.norm1(x)
        if self.attention is not None:
            x = x + self.attention(y, cos, sin)
        elif self.mixing is not None:
            x = x + self.mixing(y)
        if isinstance(self.feed_forward, FeedForward | LinearFeedForward):
            return x + self.feed_forward(self.norm2(x)), None
        out, routing = self.feed_forward(self.norm2(x), inputs)
        return x + out, routing
