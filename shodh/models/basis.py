"""The linear part of the tokenizer: principal components of patches, one basis for each set of fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from shodh.core.devices import send
from shodh.models.rows import Groups

PATCH = 8  # cells of the field per latent cell and axis


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
        values, vectors = _principal_components(patches.double())
        count = min(len(self.weight), vectors.shape[1])
        chosen = vectors[:, -count:].flip(1)
        # An eigenvector's sign is arbitrary: make its largest entry positive, so that machines agree to rounding.
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


def _principal_components(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Variances, ascending, and directions ``[D, n]`` of patches ``[N, D]``; from the smaller of both products."""
    count, size = patches.shape
    if count >= size:
        values, vectors = torch.linalg.eigh(patches.T @ patches / count)
        return values, vectors
    values, rows = torch.linalg.eigh(patches @ patches.T / count)
    there = values > 1e-12 * values[-1]  # The rest is rounding: it has no direction.
    values, rows = values[there], rows[:, there]
    return values, patches.T @ rows / (count * values).sqrt()


class SchemaBasis(nn.Module):
    """One `PatchBasis` for each set of fields that occur together (a *head*), over the channels of those alone.

    A basis over the channels of all fields would share its components between regimes that have nothing in common, and
    its covariance would grow with the square of the vocabulary.

    Parameters
    ----------
    channels : mapping
        ``{head: channels of its fields}``.
    num_channels : int
        Channels of the vocabulary.
    latent_channels : int
    """

    def __init__(self, channels: Mapping[str, Sequence[int]], num_channels: int, latent_channels: int) -> None:
        super().__init__()
        self.channels = [list(c) for c in channels.values()]
        self.num_channels = num_channels
        # A name like "type" or "values" is taken by the dictionary itself.
        names = [name + "+" * hasattr(nn.ModuleDict, name) for name in channels]
        self.heads = nn.ModuleDict(
            {name: PatchBasis(len(c), latent_channels) for name, c in zip(names, self.channels, strict=True)}
        )

    def _basis(self, head: int) -> tuple[PatchBasis, list[int]]:
        """A basis and its channels."""
        return list(self.heads.values())[head], self.channels[head]  # type: ignore[return-value]

    def encode(self, fields: Tensor, heads: Sequence[int]) -> Tensor:
        """``[B, C, X, Y, Z]`` with heads ``[B]`` -> ``[B, L, X/8, Y/8, Z/8]``."""
        groups, parts = Groups(heads, fields.device), []
        for head, rows in groups.split(fields):
            basis, channels = self._basis(head)
            if len(channels) < self.num_channels:
                rows = rows.index_select(1, send(channels, fields.device))
            parts.append(basis.encode(rows))
        return groups.join(parts)

    def decode(self, latent: Tensor, heads: Sequence[int]) -> Tensor:
        """``[B, L, x, y, z]`` with heads ``[B]`` -> ``[B, C, X, Y, Z]``; zero in the channels of absent fields."""
        groups, parts = Groups(heads, latent.device), []
        for head, rows in groups.split(latent):
            basis, channels = self._basis(head)
            fields = basis.decode(rows)
            if len(channels) < self.num_channels:
                every = fields.new_zeros(len(fields), self.num_channels, *fields.shape[2:])
                fields = every.index_copy(1, send(channels, latent.device), fields)
            parts.append(fields)
        return groups.join(parts)
