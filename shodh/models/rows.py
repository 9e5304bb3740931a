"""Samples of a batch by a label that the host knows: apart, and together again, without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from shodh.core.devices import send


class Groups:
    """The rows of a batch by label, in the order of the labels.

    Parameters
    ----------
    labels : sequence of int
        One a row.
    device : torch.device
        Where the batch lies.
    """

    def __init__(self, labels: Sequence[int], device: torch.device) -> None:
        self.rows = {label: [r for r, of in enumerate(labels) if of == label] for label in sorted(set(labels))}
        self._device = device

    def split(self, batch: Tensor) -> Iterator[tuple[int, Tensor]]:
        """``(label, rows of the batch)`` of each group; of a single one, the batch itself."""
        for label, rows in self.rows.items():
            yield label, batch if len(self.rows) == 1 else batch.index_select(0, send(rows, self._device))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Undo `split`."""
        if len(parts) == 1:
            return parts[0]
        order = sorted((row, place) for place, row in enumerate(r for rows in self.rows.values() for r in rows))
        return torch.cat(list(parts)).index_select(0, send((place for _, place in order), self._device))
