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


def rotary_tables(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Factors ``[tokens, head_dim]`` of `rotate`, for numbers and for their partners, of angles ``[tokens, pairs]``."""
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((cos, cos), -1).flatten(-2), torch.stack((-sin, sin), -1).flatten(-2)


def rotate(x: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """Rotate consecutive pairs of the last axis of ``x [..., tokens, head_dim]``; factors of `rotary_tables`.

    Pairs, not halves, because the weights of every checkpoint mean pairs. Each number is multiplied in its place and
    its partner added, so nothing is taken apart and joined: the bits of `rotate_reference` in fewer passes.
    """
    partner = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return x * own + partner * other


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` as it is defined, of cosines and sines ``[tokens, pairs]``."""
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

    def forward(self, x: Tensor, own: Tensor | None, other: Tensor | None) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv
        if own is not None and other is not None:
            q, k = rotate(qkv[:2], own, other)
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, tokens, dim))
        return out


class Block(nn.Module):
    """Pre-norm transformer block; its feed-forward is dense, or shared plus routed experts.

    ``forward(x [B, S, D], own, other, inputs) -> (x, Routing or None)``, with the factors of `rotary_tables`.

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

    @property
    def dense(self) -> bool:
        """Whether its feed-forward has no routed experts."""
        return isinstance(self.feed_forward, FeedForward | LinearFeedForward)

    def mix(self, x: Tensor, own: Tensor | None, other: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the feed-forward is added to, and what it is given."""
        y = self.norm1(x)
        if self.attention is not None:
            x = x + self.attention(y, own, other)
        elif self.mixing is not None:
            x = x + self.mixing(y)
        return x, self.norm2(x)

    def forward(
        self, x: Tensor, own: Tensor | None, other: Tensor | None, inputs: RouterInputs = NO_INPUTS
    ) -> tuple[Tensor, Routing | None]:
        x, y = self.mix(x, own, other)
        if self.dense:
            return x + self.feed_forward(y), None
        out, routing = self.feed_forward(y, inputs)
        return x + out, routing
