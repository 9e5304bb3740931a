"""The tokenizer: a convolutional autoencoder, 8x per axis, whose velocity conserves mass by construction.

The network emits a face field; `shodh.ops.helmholtz_potential` takes the vector potential and the harmonic part (one
constant per periodic axis) of its divergence-free part, and `shodh.ops.decode_velocity` turns them into a velocity
whose discrete divergence is zero. A network that emits the potential itself learns the large scales far more slowly.

Regimes may have different fields. The channels are those of the whole vocabulary; which of them exist is said by
constant channels of the geometry (`shodh.schema.domain.add_walls`), which every convolution of the networks sees. The
networks are shared; each set of fields has its own linear basis and its own statistics of latents (`SchemaBasis`).
Absent channels enter as zeros and leave as zeros.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shodh.config import TokenizerConfig
from shodh.core.devices import send
from shodh.core.errors import ConfigError
from shodh.models.basis import PATCH, PatchBasis, SchemaBasis
from shodh.models.circular import CircularConv3d, circular_pad
from shodh.models.rows import Groups
from shodh.ops import decode_velocity, helmholtz_potential
from shodh.schema.domain import NUM_WALL_CHANNELS, Domain, channel_units, extend_into_solids
from shodh.schema.fields import Field, field_slices

__all__ = ["PATCH", "PatchBasis", "Potential", "Tokenizer", "relative_spacing"]


class Potential(NamedTuple):
    """Vector potential ``[B, 3, X, Y, Z]`` and harmonic part ``[B, P]``, None without a periodic axis."""

    potential: Tensor
    harmonic: Tensor | None


class ResidualBlock(nn.Module):
    """Two 3x3x3 convolutions with group norm and SiLU, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        groups = max(g for g in (8, 4, 2, 1) if channels % g == 0)
        self.norm1, self.norm2 = nn.GroupNorm(groups, channels), nn.GroupNorm(groups, channels)
        self.conv1, self.conv2 = (CircularConv3d(channels, channels) for _ in range(2))
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
        self.enter = CircularConv3d(config.latent_channels, widths[0])
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
        self.head = CircularConv3d(config.head_channels + num_geometry, outputs)
        # A curl multiplies noise between neighbours: the first velocities must not be larger than the true ones.
        self.initial_gain = {"head.weight": 0.1}

    def forward(self, latent: Tensor, geometry: Tensor) -> Tensor:
        x = self.enter(latent)
        seen = geometry.to(latent.dtype)
        for embed, blocks, up in zip(self.geometry, self.blocks, self.ups, strict=True):
            x = up(blocks(x + embed(seen)))
        assert self.head.bias is not None
        return F.conv3d(self.enter_head(x, geometry), self.head.weight.float(), self.head.bias.float())

    def enter_head(self, x: Tensor, geometry: Tensor) -> Tensor:
        """What the last convolution reads, padded, the largest field there is: ``[B, C + G, X + 2, Y + 2, Z + 2]``.

        Always in float32: the velocity is a difference of neighbouring potentials, which 16 bits would round away.
        """
        return circular_pad(torch.cat((F.silu(x).float(), geometry), 1))


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
    schemas : sequence of collections of str, optional
        Names of the fields of each regime; by default there is one that has all.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(
        self,
        config: TokenizerConfig,
        fields: Sequence[Field],
        static: Sequence[Field],
        schemas: Sequence[Collection[str]] | None = None,
    ) -> None:
        super().__init__()
        self.fields = tuple(fields)
        self.num_channels = sum(f.num_components(3) for f in self.fields)
        schemas = [[f.name for f in (*fields, *static)]] if schemas is None else schemas
        self.optional = [f.name for f in (*fields, *static) if f.optional]
        num_geometry = sum(f.num_components(3) for f in static) + NUM_WALL_CHANNELS + len(self.optional)
        slices = field_slices(self.fields)
        heads: dict[str, list[int]] = {}
        #: Number of the head of each known combination of presence flags.
        self._head_of: dict[tuple[bool, ...], int] = {}
        self._units: dict[tuple[tuple[Domain, ...], torch.device], Tensor] = {}
        for schema in schemas:
            names = [f.name for f in self.fields if f.name in schema]
            channels = [c for name in names for c in range(slices[name].start, slices[name].stop)]
            heads.setdefault("+".join(names), channels)
            flags = tuple(name in schema for name in self.optional)
            self._head_of[flags] = list(heads).index("+".join(names))
        masks = {name: where.start for name, where in field_slices(static).items()}
        #: (channel of a masked scalar, channel of its mask in the geometry)
        self.masked = [
            (field_slices(self.fields)[f.name].start, masks[f.masked_by])
            for f in self.fields
            if f.masked_by is not None
        ]
        self.basis = SchemaBasis(heads, self.num_channels, config.latent_channels)
        self.encoder = Encoder(self.num_channels + num_geometry, config)
        self.decoder = Decoder(num_geometry, self.num_channels, config)
        self.register_buffer("latent_mean", torch.zeros(len(heads), config.latent_channels))
        self.register_buffer("latent_std", torch.ones(len(heads), config.latent_channels))

    def presence(self, geometry: Tensor) -> Tensor:
        """Which of the `optional` fields exist, read from the geometry: ``[B, G, X, Y, Z] -> [B, P]``, 0 or 1."""
        return geometry[:, geometry.shape[1] - len(self.optional) :, 0, 0, 0]

    def head(self, geometry: Tensor) -> list[int]:
        """Number of the linear basis and the latent statistics of each sample, read from the geometry."""
        if len(self._head_of) == 1:
            return [0] * len(geometry)
        return [self._head(tuple(bool(flag) for flag in row)) for row in self.presence(geometry).tolist()]

    def _head(self, flags: tuple[bool, ...]) -> int:
        """Of the presence of the optional fields."""
        if len(self._head_of) == 1:
            return 0
        if flags not in self._head_of:
            there = [name for name, flag in zip(self.optional, flags, strict=True) if flag]
            raise ConfigError(f"no regime that this tokenizer was made for has, of {self.optional}, just {there}")
        return self._head_of[flags]

    def exists(self, geometry: Tensor) -> Tensor:
        """1 where a field exists in a cell, else 0: ``[B, C, X, Y, Z]``, or ``[B, C, 1, 1, 1]`` without masks."""
        shape = geometry.shape[2:] if self.masked else (1, 1, 1)
        exists = geometry.new_ones(len(geometry), self.num_channels, *shape)
        for channel, mask in self.masked:
            exists[:, channel] = 1 - geometry[:, mask]
        slices, presence = field_slices(self.fields), self.presence(geometry)
        for number, name in enumerate(self.optional):
            if name in slices:
                exists[:, slices[name]] *= presence[:, number].view(-1, 1, 1, 1, 1)
        return exists

    def units(self, domains: Sequence[Domain], labels: Sequence[int], device: torch.device) -> Tensor:
        """What the basis and the networks see the channels of samples in these domains in: ``[B, C, 1, 1, 1]``."""
        key = (tuple(domains), device)
        if key not in self._units:
            self._units[key] = channel_units(self.fields, domains).to(device)
        return self._units[key][send(labels, device)].view(len(labels), -1, 1, 1, 1)

    def encode(
        self, fields: Tensor, geometry: Tensor, unit: Tensor | float = 1.0, head: Sequence[int] | None = None
    ) -> Tensor:
        """Normalised fields ``[B, C, X, Y, Z]`` and geometry ``[B, G, X, Y, Z]`` -> latents ``[B, L, x, y, z]``.

        ``unit`` is of `units`, ``head`` that of `head`, where it is known.
        """
        dtype = self.encoder.out.weight.dtype
        fields, head = self.fill(fields, geometry) / unit, self.head(geometry) if head is None else head
        latent = self.basis.encode(fields, head) + self.encoder(torch.cat((fields, geometry), 1).to(dtype)).float()
        mean, std = self._latent_statistics(head)
        return (latent - mean) / std

    def _latent_statistics(self, head: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = send(head, self.latent_mean.device)
        mean, std = (values[rows].view(len(head), -1, 1, 1, 1) for values in (self.latent_mean, self.latent_std))
        return mean, std

    def fill(self, fields: Tensor, geometry: Tensor) -> Tensor:
        """Fields with masked scalars continued smoothly to where they do not exist."""
        if not self.masked:
            return fields
        fields = fields.clone()
        for channel, mask in self.masked:
            fields[:, channel, None] = extend_into_solids(fields[:, channel, None], geometry[:, mask, None])
        return fields

    def emit(
        self, latent: Tensor, geometry: Tensor, unit: Tensor | float = 1.0, head: Sequence[int] | None = None
    ) -> Tensor:
        """What the decoder network emits, ``[B, C, X, Y, Z]``: scalars, and of every solenoidal vector a face field
        whose divergence-free part is meant; zero where a field does not exist. Arguments as `encode`."""
        head = self.head(geometry) if head is None else head
        mean, std = self._latent_statistics(head)
        latent = latent * std + mean
        correction: Tensor = self.decoder(latent.to(self.encoder.out.weight.dtype), geometry)
        emitted = (self.basis.decode(latent, head) + correction) * unit
        return emitted * self.exists(geometry) if self.masked or self.optional else emitted

    def potentials(self, emitted: Tensor, domain: Domain) -> dict[str, Potential]:
        """Vector potential and harmonic part of each solenoidal field, for samples that share one domain."""
        emitted = self._flatten(emitted, domain)
        spacing = relative_spacing(domain, emitted.shape[2:])
        slices = field_slices(self.fields)
        return {
            f.name: Potential(
                *helmholtz_potential(emitted[:, slices[f.name]], spacing=spacing, boundary=domain.boundary)
            )
            for f in self.fields
            if f.solenoidal and f.name not in domain.absent
        }

    def _flatten(self, emitted: Tensor, domain: Domain) -> Tensor:
        """What is emitted in a flat domain: the mean over its equal layers, vectors without a component across."""
        if not domain.flat:
            return emitted
        emitted = emitted.mean(4, keepdim=True).expand_as(emitted).clone()
        for f in self.fields:
            if f.kind == "vector":
                emitted[:, field_slices(self.fields)[f.name].stop - 1] = 0
        return emitted

    def assemble(self, emitted: Tensor, domain: Domain, *, exact: bool = False) -> Tensor:
        """Fields ``[B, C, X, Y, Z]`` of samples that share one domain, from `emit`."""
        emitted = self._flatten(emitted, domain)
        spacing = relative_spacing(domain, emitted.shape[2:])
        potentials = self.potentials(emitted, domain)
        floors = dict(domain.floors)
        parts = []
        for f in self.fields:
            if f.name in potentials:
                potential, harmonic = potentials[f.name]
                parts.append(
                    decode_velocity(potential, harmonic, spacing=spacing, boundary=domain.boundary, exact=exact)
                )
            elif f.positive and f.name in floors:
                parts.append(keep_above(emitted[:, field_slices(self.fields)[f.name]], floors[f.name]))
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
            Sample ``b`` lives in ``domains[index[b]]``; samples are decoded domain by domain. An index on the CPU is
            read without waiting for a device.
        exact : bool
            Round the potential to a lattice, so that the stored float32 divergence is bitwise zero.
        """
        labels: list[int] = index.tolist()
        unit = self.units(domains, labels, latent.device)
        emitted = self.emit(latent, geometry, unit, self.heads(domains, labels))
        groups = Groups(labels, emitted.device)
        return groups.join([self.assemble(rows, domains[i], exact=exact) for i, rows in groups.split(emitted)])

    def heads(self, domains: Sequence[Domain], labels: Sequence[int]) -> list[int]:
        """`head` of samples that live in these domains."""
        return [self._head(tuple(there for _, there in domains[i].presence)) for i in labels]

    def forward(
        self, fields: Tensor, geometry: Tensor, domains: Sequence[Domain], index: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Reconstruction and latents, for training."""
        labels: list[int] = index.tolist()
        unit = self.units(domains, labels, fields.device)
        latent = self.encode(fields, geometry, unit, self.heads(domains, labels))
        return self.decode(latent, geometry, domains, index), latent


def keep_above(values: Tensor, floor: float, width: float = 0.01) -> Tensor:
    """Keep normalised values of a positive field above the ``floor`` that zero has become, smoothly.

    With ``z = values - floor`` and ``w = width``: ``p(z) = z`` for ``z >= w``, else ``w^2 / (2 w - z)``. Continuous
    with its first derivative, increasing, positive for every ``z``; its inverse is ``z = 2 w - w^2 / p`` below ``w``.
    Data farther than ``w`` (a hundredth of a standard deviation) from zero pass unchanged, data between zero and ``w``
    are raised by at most ``w / 2``; so it is applied to what is decoded alone, and the truth is never transformed. A
    value of exactly zero stays: it does not exist (`Field.masked_by`), or is the mean.
    """
    # A little above, or the rounding of float32 on the way back to physical units could reach zero and beyond.
    floor += 4 * torch.finfo(values.dtype).eps * abs(floor)
    z = values - floor
    kept = torch.where(z >= width, values, floor + width**2 / (2 * width - z.clamp(max=width)))
    return torch.where(values == 0, values, kept)


def relative_spacing(domain: Domain, grid: Sequence[int]) -> tuple[float, float, float]:
    """Cell sizes over their geometric mean: what curls in model units are taken with.

    A field that is divergence-free for these is so for the true sizes, and the potential stays of order one whatever
    the units of length.
    """
    x, y, z = domain.spacing(grid)
    mean = (x * y * z) ** (1 / 3)
    return x / mean, y / mean, z / mean
