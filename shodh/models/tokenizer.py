"""The tokenizer: a convolutional autoencoder, 8x per axis, whose velocity conserves mass by construction.

The decoder never emits a velocity. It emits a vector potential and one constant per periodic axis (the harmonic part),
and `shodh.ops.decode_velocity` turns them into a discretely divergence-free field on the staggered grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shodh.config import TokenizerConfig
from shodh.fields import Field
from shodh.models.domain import NUM_WALL_CHANNELS, Domain
from shodh.ops import decode_velocity


def _conv(inputs: int, outputs: int) -> nn.Conv3d:
    return nn.Conv3d(inputs, outputs, 3, padding=1, padding_mode="circular")


class ResidualBlock(nn.Module):
    """Two 3x3x3 convolutions with group norm and SiLU, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        groups = max(g for g in (8, 4, 2, 1) if channels % g == 0)
        self.norm1, self.norm2 = nn.GroupNorm(groups, channels), nn.GroupNorm(groups, channels)
        self.conv1, self.conv2 = _conv(channels, channels), _conv(channels, channels)
        self.initial_gain = {"conv2.weight": 0.1}

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class Encoder(nn.Module):
    """``[B, C + G, X, Y, Z] -> [B, L, X/8, Y/8, Z/8]``: strided convolutions with residual blocks between."""

    def __init__(self, inputs: int, config: TokenizerConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width, stride in zip(config.widths, config.strides, strict=True):
            layers.append(nn.Conv3d(inputs, width, stride, stride=stride))
            layers.extend(ResidualBlock(width) for _ in range(config.depth))
            inputs = width
        self.layers = nn.Sequential(*layers)
        self.out = nn.Conv3d(inputs, config.latent_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.layers(x))
        return out


class Decoder(nn.Module):
    """``[B, L, x, y, z]`` and geometry ``[B, G, X, Y, Z]`` -> head channels ``[B, H, X, Y, Z]``, float32.

    The encoder's strides backwards. Every stage sees the geometry in full detail, as patches of the size of its cells:
    where a solid lies within a coarse cell decides the flow through it.
    """

    def __init__(self, num_geometry: int, outputs: int, config: TokenizerConfig) -> None:
        super().__init__()
        strides, widths = config.strides[::-1], config.widths[::-1]
        coarseness = [math.prod(strides[i:]) for i in range(len(strides))]
        self.enter = _conv(config.latent_channels, widths[0])
        self.geometry = nn.ModuleList(
            nn.Conv3d(num_geometry, width, cells, stride=cells, bias=False)
            for width, cells in zip(widths, coarseness, strict=True)
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(width) for _ in range(config.depth))) for width in widths
        )
        after = (*widths[1:], config.head_channels)
        self.ups = nn.ModuleList(
            nn.ConvTranspose3d(width, out, stride, stride=stride)
            for width, out, stride in zip(widths, after, strides, strict=True)
        )
        self.head = _conv(config.head_channels + num_geometry, outputs)
        # A curl multiplies noise between neighbours: the first velocities must not be larger than the true ones.
        self.initial_gain = {"head.weight": 0.1}

    def forward(self, latent: Tensor, geometry: Tensor) -> Tensor:
        x = self.enter(latent)
        seen = geometry.to(latent.dtype)
        for embed, blocks, up in zip(self.geometry, self.blocks, self.ups, strict=True):
            x = up(blocks(x + embed(seen)))
        # Always in float32: the velocity is a difference of neighbouring potentials, which 16 bits would round away.
        x = F.pad(torch.cat((F.silu(x).float(), geometry), 1), (1,) * 6, mode="circular")
        assert self.head.bias is not None
        return F.conv3d(x, self.head.weight.float(), self.head.bias.float())


class Tokenizer(nn.Module):
    """Autoencoder of normalised fields; latents are normalised by statistics kept with the weights.

    Fields, latents, potentials and velocity are float32 whatever the precision of the weights; the convolutions between
    run in the precision of the weights.

    Parameters
    ----------
    config : TokenizerConfig
    fields : sequence of Field
        Dynamic fields in channel order, a vector taking three channels; solenoidal vectors are decoded exactly.
    num_static : int
        Static fields given with every sample (solid mask and the like).
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: TokenizerConfig, fields: Sequence[Field], num_static: int) -> None:
        super().__init__()
        self.fields = tuple(fields)
        self.num_channels = sum(f.num_components(3) for f in self.fields)
        num_geometry = num_static + NUM_WALL_CHANNELS
        self.num_solenoidal = sum(f.solenoidal for f in self.fields)
        self.encoder = Encoder(self.num_channels + num_geometry, config)
        self.decoder = Decoder(num_geometry, self.num_channels, config)
        self.harmonic = nn.Linear(config.latent_channels, 3 * self.num_solenoidal) if self.num_solenoidal else None
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std", torch.ones(config.latent_channels))

    def encode(self, fields: Tensor, geometry: Tensor) -> Tensor:
        """Normalised fields ``[B, C, X, Y, Z]`` and geometry ``[B, G, X, Y, Z]`` -> latents ``[B, L, x, y, z]``."""
        dtype = self.encoder.out.weight.dtype
        latent = self.encoder(torch.cat((fields, geometry), 1).to(dtype)).float()
        return (latent - self.latent_mean.view(1, -1, 1, 1, 1)) / self.latent_std.view(1, -1, 1, 1, 1)

    def potentials(self, latent: Tensor, geometry: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the decoder emits: channels ``[B, C, X, Y, Z]`` (of a solenoidal vector, its potential), and harmonic
        parts ``[B, 3 * solenoidal]`` or None."""
        latent = latent * self.latent_std.view(1, -1, 1, 1, 1) + self.latent_mean.view(1, -1, 1, 1, 1)
        harmonic = None
        if self.harmonic is not None:
            weight, bias = self.harmonic.weight.float(), self.harmonic.bias.float()
            harmonic = F.linear(latent.mean((2, 3, 4)), weight, bias)
        return self.decoder(latent.to(self.encoder.out.weight.dtype), geometry), harmonic

    def assemble(self, channels: Tensor, harmonic: Tensor | None, domain: Domain, *, exact: bool = False) -> Tensor:
        """Fields of samples that share one domain, from `potentials`; every operation in the dtype given."""
        spacing = relative_spacing(domain, channels.shape[2:])
        periodic = [axis for axis, boundary in enumerate(domain.boundary) if boundary == "periodic"]
        parts = []
        start = solenoidal = 0
        for f in self.fields:
            stop = start + f.num_components(3)
            part = channels[:, start:stop]
            if f.solenoidal:
                assert harmonic is not None
                constants = harmonic[:, 3 * solenoidal : 3 * solenoidal + 3][:, periodic] if periodic else None
                part = decode_velocity(part, constants, spacing=spacing, boundary=domain.boundary, exact=exact)
                solenoidal += 1
            parts.append(part)
            start = stop
        return torch.cat(parts, 1)

    def decode(
        self, latent: Tensor, geometry: Tensor, domains: Sequence[Domain], index: Tensor, *, exact: bool = False
    ) -> Tensor:
        """Latents ``[B, L, x, y, z]`` -> normalised fields ``[B, C, X, Y, Z]``.

        Parameters
        ----------
        domains, index
            Sample ``b`` lives in ``domains[index[b]]``; samples are decoded domain by domain.
        exact : bool
            Round the potential to a lattice, so that the stored float32 divergence is bitwise zero.
        """
        channels, harmonic = self.potentials(latent, geometry)
        order: list[Tensor] = []
        parts: list[Tensor] = []
        for i in index.unique().tolist():
            rows = (index == i).nonzero().flatten()
            chosen = harmonic[rows] if harmonic is not None else None
            parts.append(self.assemble(channels[rows], chosen, domains[i], exact=exact))
            order.append(rows)
        out = torch.cat(parts)
        return out[torch.cat(order).argsort()]

    def forward(
        self, fields: Tensor, geometry: Tensor, domains: Sequence[Domain], index: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Reconstruction and latents, for training."""
        latent = self.encode(fields, geometry)
        return self.decode(latent, geometry, domains, index), latent


def relative_spacing(domain: Domain, grid: Sequence[int]) -> tuple[float, float, float]:
    """Cell sizes over their geometric mean: what curls in model units are taken with.

    A field that is divergence-free for these is so for the true sizes, and the potential stays of order one whatever
    the units of length.
    """
    x, y, z = domain.spacing(grid)
    mean = (x * y * z) ** (1 / 3)
    return x / mean, y / mean, z / mean
