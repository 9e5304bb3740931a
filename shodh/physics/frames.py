"""Snapshots of a batch under way: collected frame by frame, checked, and handed out as trajectories."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from shodh.physics.regime import Progress, check_finite, check_healthy
from shodh.schema.fields import RegimeSchema


class FrameStore:
    """Collects the frames of ``len(seeds)`` trajectories.

    Parameters
    ----------
    schema : RegimeSchema
    seeds : sequence of int
        Named in the error when a solution blows up.
    grid : cells along each axis
    frames : int
    remedy : str
        What to change when a solution blows up, for the error's text.

    Attributes
    ----------
    values : dict
        As `shodh.schema.fields.Trajectories.values`.
    """

    def __init__(
        self, schema: RegimeSchema, seeds: Sequence[int], grid: Sequence[int], frames: int, remedy: str
    ) -> None:
        self.schema, self.seeds, self.frames, self.remedy = schema, list(seeds), frames, remedy
        self.values: dict[str, np.ndarray] = {}
        for field in schema.fields:
            time = () if field.static else (frames,)
            components = (schema.ndim,) if field.kind == "vector" else ()
            kind = np.uint8 if field.name == "solid" else np.float32
            self.values[field.name] = np.zeros((len(self.seeds), *time, *grid, *components), dtype=kind)

    def put(self, index: int, **fields: Tensor) -> None:
        """Store frame ``index``: scalars ``[*grid, B]``, vectors ``[ndim, *grid, B]``, any dtype; static ones too.

        Raises
        ------
        NonFiniteError
            If a value is not finite; names the regime and the seed.
        """
        for name, value in fields.items():
            field = self.schema[name]
            ordered = torch.movedim(value, -1, 0)
            if field.kind == "vector":
                ordered = torch.movedim(ordered, 1, -1)
            check_finite(self.schema.name, self.seeds, ordered, self.remedy)
            array = ordered.to(torch.float32).cpu().numpy()
            self.values[name][(slice(None), *(() if field.static else (index,)))] = array

    def check(self, healthy: Tensor) -> None:
        """Refuse to go on when a trajectory is not ``healthy`` (bool ``[B]``)."""
        check_healthy(self.schema.name, self.seeds, healthy, self.remedy)


def run_frames(
    frames: int, store: Callable[[int], None], advance: Callable[[], None], progress: Progress | None
) -> None:
    """Store frame 0, then advance and store, ``frames`` in all."""
    for index in range(frames):
        if index:
            advance()
        store(index)
        if progress is not None:
            progress((index + 1) / frames)
