"""What errors of latents are measured by: the variance of their channels, or the fields that they decode to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from shodh.data import Split
from shodh.models.tokenizer import Tokenizer
from shodh.schema.domain import Domain
from shodh.schema.measures import mean_over
from shodh.schema.space import Space
from shodh.train.datasets import Regimes
from shodh.train.tokenizer_task import Geometry

#: Static fields ``[B, S, *grid]`` in model units, on the host, of samples named (regime, trajectory, frame).
ReadStatic = Callable[[Sequence[tuple[int, ...]]], Tensor]


def channel_weights(tokenizer: Tokenizer, domains: Sequence[Domain]) -> Tensor:
    """Variance of each channel before whitening over the mean of all, by domain: ``[R, L]``, a mean of one a row.

    The decoder adds its channels with these sizes: the weights are close to the diagonal of its pull-back metric, the
    mean of ``J^T J`` (`docs/objective.md`). Regimes with the same fields share the statistics, hence the weights.
    """
    variance = tokenizer.latent_std.double().square()
    share = variance / variance.mean(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return share.float()[tokenizer.heads(domains, range(len(domains)))]


def weighted_square(prediction: Tensor, target: Tensor, weights: Tensor | None) -> Tensor:
    """Mean square of the difference of each sample, ``[B, L, ...] -> [B]``; channels count by ``weights [B, L]``."""
    square = (prediction - target).square()
    if weights is not None:
        square = square * weights.view(*weights.shape, *(1,) * (square.ndim - 2))
    return square.flatten(1).mean(1)


class DecodedError:
    """Mean square of the difference of what two latents decode to, a sample each, in units of their components.

    Over the cells where a field exists, then over the channels that the regime has, as `FieldTask` measures fields.
    The tokenizer is frozen; the prediction has a gradient, the target none.

    Parameters
    ----------
    read_static : callable
        Static fields of samples at full resolution, which the latent cache does not hold.
    """

    def __init__(self, space: Space, tokenizer: Tokenizer, read_static: ReadStatic) -> None:
        self._space, self._tokenizer, self._read = space, tokenizer, read_static
        self._geometry = Geometry(space.domains)

    def static(self, samples: Sequence[tuple[int, ...]], device: torch.device) -> Tensor:
        """Static fields of samples where they are computed with."""
        return self._read(samples).to(device)

    def __call__(self, prediction: Tensor, target: Tensor, static: Tensor, regime: Tensor, index: Tensor) -> Tensor:
        """``[B, L, ...] -> [B]``; the labels ``regime`` on the device, and the same as ``index`` on the host."""
        geometry, domains = self._geometry(static, index), self._space.domains
        fields = self._tokenizer.decode(prediction, geometry, domains, index)
        with torch.no_grad():
            truth = self._tokenizer.decode(target, geometry, domains, index)
        exists, cells = self._space.exists(regime), self._space.cells(static, regime)
        by_channel = mean_over(((fields - truth) / self._space.units(regime)).square(), cells, 2)
        return torch.where(exists, by_channel, 0.0).sum(1) / exists.sum(1)


def static_reader(regimes: Regimes, split: Split, memory: int = 2**28) -> ReadStatic:
    """Static fields of the trajectories of a split; as many as ``memory`` bytes hold are remembered."""
    size = 4 * math.prod((regimes.sources[0].num_static_channels, *regimes.sources[0].grid))

    @lru_cache(maxsize=max(1, memory // max(1, size)))
    def read(regime: int, trajectory: int) -> Tensor:
        source = regimes.sources[regime]
        static = torch.empty(source.num_static_channels, *source.grid)
        source.read_static(split, trajectory, static.numpy())
        regimes.space.normalizer.normalize_static_(static, source.name)
        return static

    return lambda samples: torch.stack([read(regime, trajectory) for regime, trajectory, *_ in samples])
