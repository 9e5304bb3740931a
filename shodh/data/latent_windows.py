"""Windows of cached latents: what the operator is trained on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from shodh.data.latents import LatentShapes, latent_path, read_manifest, static_path
from shodh.data.windows import WindowIndex, require_windows, told
from shodh.core.errors import DataError


class LatentWindowDataset(Dataset[dict[str, Any]]):
    """Windows of cached latents of one split of one regime (map-style).

    An item is a dict: ``latents`` float32 ``[T, L, *latent grid]`` with ``T = history + horizon``; ``static`` float32
    ``[S, *latent grid]``; ``regime``, ``trajectory`` and ``frame``, int, with the numbers that `WindowDataset` gives,
    and its ``conditions``.

    Parameters
    ----------
    folder : path-like
        From `split_folder`.
    stems : sequence of str
        Names of the chunks, in order: `file_stems`.
    history, horizon, stride : int
        As for `WindowDataset`.
    regime : int
        Number of the regime in the items.
    conditions : Tensor [trajectories, N], optional
        As for `WindowDataset`.
    shapes : sequence of LatentShapes, optional
        Of each chunk; read from their manifests if omitted.

    Raises
    ------
    DataError
        If latents of a file are missing, truncated, or of another shape than the rest; if there is no window.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        stems: Sequence[str],
        *,
        history: int,
        horizon: int,
        stride: int = 1,
        regime: int = 0,
        conditions: torch.Tensor | None = None,
        shapes: Sequence[LatentShapes] | None = None,
    ) -> None:
        self.folder, self.stems, self.conditions = Path(folder), list(stems), conditions
        self.length, self.stride, self.regime = history + horizon, stride, regime
        if not self.stems:
            raise DataError(f"{self.folder}: there are no files of fields, hence no latents")
        self.shapes = list(shapes or [read_manifest(self.folder, stem) for stem in self.stems])
        for stem, shape in zip(self.stems, self.shapes):
            if (shape.latents[2:], shape.static[1:]) != (self.shapes[0].latents[2:], self.shapes[0].static[1:]):
                raise DataError(
                    f"{self.folder / stem}.npy: shape {shape} differs from {self.shapes[0]} of the first file"
                )
        frames = [s.latents[1] for s in self.shapes for _ in range(s.latents[0])]
        self._firsts = np.cumsum([0] + [s.latents[0] for s in self.shapes])
        self.index = WindowIndex(frames, self.length, stride)
        require_windows(self.index, str(self.folder), frames)
        self._maps: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of ``latents``."""
        return (self.length, *self.shapes[0].latents[2:])

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        trajectory, frame = self.index[index]
        number = int(np.searchsorted(self._firsts, trajectory, side="right")) - 1
        local = trajectory - int(self._firsts[number])
        latents, static = self._arrays(number)
        return {
            "latents": torch.from_numpy(np.array(latents[local, frame : frame + self.index.span : self.stride])),
            "static": torch.from_numpy(np.array(static[local])),
            "regime": self.regime,
            "trajectory": trajectory,
            "frame": frame,
            **told(self.conditions, trajectory),
        }

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}

    def _arrays(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Memory maps of one file's latents and static features; pages are shared between workers."""
        if number not in self._maps:
            stem, shapes = self.stems[number], self.shapes[number]
            self._maps[number] = (
                _memory_map(latent_path(self.folder, stem), shapes.latents),
                _memory_map(static_path(self.folder, stem), shapes.static),
            )
        return self._maps[number]


def _memory_map(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    if 0 in shape:  # nothing to map
        return np.empty(shape, dtype=np.float32)
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read, remove it and encode again ({error})") from error
    if array.shape != shape or array.dtype != np.float32:
        raise DataError(f"{path}: holds {array.dtype} {array.shape}, its manifest says float32 {shape}; encode again")
    return array
