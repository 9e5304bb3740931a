"""The exponential moving average of a run's weights: every rank keeps that of the numbers its optimiser steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from shodh.checkpoint.shares import Share, flat_tensors, shares, write_model
from shodh.core.weights import StoredTensor


class WeightAverage:
    """Average of the float32 weights over the steps that the optimiser took; what it does not step has none.

    Update n, counted from 0, keeps ``min(decay, (1 + n) / (10 + n))`` of the average, as TensorFlow's
    ``ExponentialMovingAverage`` does by ``num_updates``: the first weights, far from all others, are soon forgotten. It
    works number by number, so the average does not depend on how the numbers are laid out over ranks.

    Parameters
    ----------
    engine
        Of DeepSpeed; the average starts at its weights.

    Attributes
    ----------
    updates : int
        Steps that are in it.
    """

    def __init__(self, engine: Any, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self._engine = engine
        self._flat = flat_tensors(engine)
        self._average = [flat.detach().clone() for flat in self._flat]
        self._of = {id(flat): average for flat, average in zip(self._flat, self._average, strict=True)}

    @property
    def tensors(self) -> list[Tensor]:
        """The averages that this rank keeps, flat, with what pads them."""
        return self._average

    def of(self, share: Share) -> Tensor:
        """The average of a share's numbers; of a frozen parameter, the model's."""
        return share.master if share.flat is None else self._of[id(share.flat)][share.own]

    @torch.no_grad()
    def restart(self) -> None:
        """Start again at the engine's weights."""
        self.updates = 0
        for flat, average in zip(self._flat, self._average, strict=True):
            average.copy_(flat)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step; nothing waits for the device."""
        kept = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self._average, self._flat, 1.0 - kept)
        self.updates += 1

    @torch.no_grad()
    def load(self, weights: Mapping[str, StoredTensor], updates: int) -> None:
        """What a checkpoint holds of this rank's shares, whatever layout wrote it."""
        self.restart()
        self.updates = updates
        for share in shares(self._engine):
            if share.flat is not None:
                self.of(share).copy_(weights[share.name].part(share.start, share.start + share.numel))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The engine's model computes with the average in the block, and has its bits again afterwards. Collective.

        The optimiser's numbers stay as they are: the model's are these, rounded. After an error they are not restored:
        other ranks may not be there.
        """
        write_model(self._engine, self.of)
        yield
        write_model(self._engine, lambda share: share.master)
