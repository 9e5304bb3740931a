"""The tokenizer: a convolutional autoencoder, 8x per axis, whose velocity conserves mass by construction.

The network emits a face field; `shodh.ops.helmholtz_potential` takes the vector potential and the harmonic part (one
constant per periodic axis) of its divergence-free part, and `shodh.ops.decode_velocity` turns them into a velocity
whose discrete divergence is zero. A network that emits the potential itself learns the large scales far more slowly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shodh.config import TokenizerConfig
from shodh.fields import Field
from shodh.models.domain import NUM_WALL_CHANNELS, Domain, extend_into_solids
from shodh.ops import decode_velocity, helmholtz_potential

PATCH = 8  # cells of the field per latent cell and axis


class Potential(NamedTuple):
    """Vector potential ``[B, 3, X, Y, Z]`` and harmonic part ``[B, P]``, None without a periodic axis."""

    potential: Tensor
    harmonic: Tensor | None


def field_slices(fields: Sequence[Field]) -> dict[str, slice]:
    """Channels of each dynamic field of a 3-D schema, in order."""
    slices, start = {}, 0
    for f in fields:
        stop = start + f.num_components(3)
        slices[f.name] = slice(start, stop)
        start = stop
    return slices


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


class PatchBasis(nn.Module):
    """Principal components of 8^3 patches: the linear part of the autoencoder, fixed before training.

    ``encode`` and ``decode`` are transposes of each other: the best linear autoencoder of its size on the patches it
    was fitted to. The networks beside it learn what a linear map cannot. Zero until `fit`.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, channels: int, latent_channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("weight", torch.zeros(latent_channels, channels * PATCH**3))
        self.register_buffer("scale", torch.ones(1))

    @staticmethod
    def patches(fields: Tensor) -> Tensor:
        """``[B, C, X, Y, Z] -> [B, C * 8^3, X/8, Y/8, Z/8]``."""
        cells = fields.unflatten(4, (-1, PATCH)).unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))
        return cells.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)

    @torch.no_grad()
    def fit(self, patches: Tensor) -> None:
        """Set the components from patches ``[N, C * 8^3]``; latents then have a root mean square of one."""
        covariance = patches.double().T @ patches.double() / len(patches)
        values, vectors = torch.linalg.eigh(covariance)
        count = min(len(self.weight), vectors.shape[1])
        chosen = vectors[:, -count:].flip(1)
        # An eigenvector's sign is arbitrary: make its largest entry positive, so that machines agree.
        rows = chosen.abs().argmax(0)
        chosen = chosen * chosen.gather(0, rows.view(1, -1)).sign()
        self.weight.zero_()
        self.weight[:count].copy_(chosen.T)
        self.scale.copy_((values[-count:].clamp(min=0).sum() / len(self.weight)).sqrt().clamp(min=1e-6).view(1))

    def encode(self, fields: Tensor) -> Tensor:
        return torch.einsum("bpxyz,lp->blxyz", self.patches(fields), self.weight.float() / self.scale.float())

    def decode(self, latent: Tensor) -> Tensor:
        cells = torch.einsum("blxyz,lp->bpxyz", latent, self.weight.float() * self.scale.float())
        cells = cells.unflatten(1, (self.channels, PATCH, PATCH, PATCH)).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return cells.flatten(6, 7).flatten(4, 5).flatten(2, 3)


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
        self.initial_gain = {"out.weight": 0.1}

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
    static : sequence of Field
        Static fields given with every sample (solid mask and the like), in channel order.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: TokenizerConfig, fields: Sequence[Field], static: Sequence[Field]) -> None:
        super().__init__()
        self.fields = tuple(fields)
        self.num_channels = sum(f.num_components(3) for f in self.fields)
        num_geometry = sum(f.num_components(3) for f in static) + NUM_WALL_CHANNELS
        masks = {name: where.start for name, where in field_slices(static).items()}
        #: (channel of a masked scalar, channel of its mask in the geometry)
        self.masked = [
            (field_slices(self.fields)[f.name].start, masks[f.masked_by])
            for f in self.fields
            if f.masked_by is not None
        ]
        self.basis = PatchBasis(self.num_channels, config.latent_channels)
        self.encoder = Encoder(self.num_channels + num_geometry, config)
        self.decoder = Decoder(num_geometry, self.num_channels, config)
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std", torch.ones(config.latent_channels))

    def encode(self, fields: Tensor, geometry: Tensor) -> Tensor:
        """Normalised fields ``[B, C, X, Y, Z]`` and geometry ``[B, G, X, Y, Z]`` -> latents ``[B, L, x, y, z]``."""
        dtype = self.encoder.out.weight.dtype
        fields = self.fill(fields, geometry)
        latent = self.basis.encode(fields) + self.encoder(torch.cat((fields, geometry), 1).to(dtype)).float()
        return (latent - self.latent_mean.view(1, -1, 1, 1, 1)) / self.latent_std.view(1, -1, 1, 1, 1)

    def fill(self, fields: Tensor, geometry: Tensor) -> Tensor:
        """Fields with masked scalars continued smoothly to where they do not exist."""
        if not self.masked:
            return fields
        fields = fields.clone()
        for channel, mask in self.masked:
            fields[:, channel, None] = extend_into_solids(fields[:, channel, None], geometry[:, mask, None])
        return fields

    def emit(self, latent: Tensor, geometry: Tensor) -> Tensor:
        """What the decoder network emits, ``[B, C, X, Y, Z]``: scalars, and of every solenoidal vector a face field
        whose divergence-free part is meant."""
        latent = latent * self.latent_std.view(1, -1, 1, 1, 1) + self.latent_mean.view(1, -1, 1, 1, 1)
        correction: Tensor = self.decoder(latent.to(self.encoder.out.weight.dtype), geometry)
        emitted = self.basis.decode(latent) + correction
        if not self.masked:
            return emitted
        exists = torch.ones_like(emitted)
        for channel, mask in self.masked:
            exists[:, channel] = 1 - geometry[:, mask]
        return emitted * exists

    def potentials(self, emitted: Tensor, domain: Domain) -> dict[str, Potential]:
        """Vector potential and harmonic part of each solenoidal field, for samples that share one domain."""
        spacing = relative_spacing(domain, emitted.shape[2:])
        slices = field_slices(self.fields)
        return {
            f.name: Potential(
                *helmholtz_potential(emitted[:, slices[f.name]], spacing=spacing, boundary=domain.boundary)
            )
            for f in self.fields
            if f.solenoidal
        }

    def assemble(self, emitted: Tensor, domain: Domain, *, exact: bool = False) -> Tensor:
        """Fields ``[B, C, X, Y, Z]`` of samples that share one domain, from `emit`."""
        spacing = relative_spacing(domain, emitted.shape[2:])
        potentials = self.potentials(emitted, domain)
        parts = []
        for f in self.fields:
            if f.solenoidal:
                potential, harmonic = potentials[f.name]
                parts.append(
                    decode_velocity(potential, harmonic, spacing=spacing, boundary=domain.boundary, exact=exact)
                )
            else:
                parts.append(emitted[:, field_slices(self.fields)[f.name]])
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
        emitted = self.emit(latent, geometry)
        order: list[Tensor] = []
        parts: list[Tensor] = []
        for i in index.unique().tolist():
            rows = (index == i).nonzero().flatten()
            parts.append(self.assemble(emitted[rows], domains[i], exact=exact))
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
