"""The linear part of the tokenizer: principal components of patches, one basis for each set of fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

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

    def _parts(self, head: Tensor) -> list[tuple[PatchBasis, list[int], Tensor]]:
        """``(basis, channels, rows of the batch)`` of each head that occurs."""
        bases = list(self.heads.values())
        return [(bases[h], self.channels[h], (head == h).nonzero()) for h in head.unique().tolist()]  # type: ignore

    def encode(self, fields: Tensor, head: Tensor) -> Tensor:
        """``[B, C, X, Y, Z]`` with heads ``[B]`` -> ``[B, L, X/8, Y/8, Z/8]``."""
        rows, parts = [], []
        for basis, channels, chosen in self._parts(head):
            rows.append(chosen.flatten())
            parts.append(basis.encode(fields[chosen, channels]))
        return torch.cat(parts)[torch.cat(rows).argsort()]

    def decode(self, latent: Tensor, head: Tensor) -> Tensor:
        """``[B, L, x, y, z]`` with heads ``[B]`` -> ``[B, C, X, Y, Z]``; zero in the channels of absent fields."""
        fields = latent.new_zeros(len(latent), self.num_channels, *(PATCH * n for n in latent.shape[2:]))
        for basis, channels, chosen in self._parts(head):
            fields[chosen, channels] = basis.decode(latent[chosen.flatten()])
        return fields
