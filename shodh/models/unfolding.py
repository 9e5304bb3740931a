"""Two-dimensional fields as latents without a tokenizer: the cells of a patch are the channels of one latent cell."""

from __future__ import annotations

from torch import Tensor


def unfold(frames: Tensor, cells: int) -> Tensor:
    """Fields as latents: ``[..., C, n, m] -> [..., C * cells^2, n / cells, m / cells, 1]``; nothing is lost."""
    apart = frames.unflatten(-1, (-1, cells)).unflatten(-3, (-1, cells))  # [..., C, x, i, y, j]
    return apart.movedim((-3, -1), (-4, -3)).flatten(-5, -3).unsqueeze(-1)


def fold(latents: Tensor, cells: int) -> Tensor:
    """The inverse of `unfold`."""
    apart = latents.squeeze(-1).unflatten(-3, (-1, cells, cells))  # [..., C, i, j, x, y]
    return apart.movedim((-4, -3), (-3, -1)).flatten(-4, -3).flatten(-2, -1)
