"""Windows of history and target from the trajectories of one regime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from shodh.schema.normalize import FieldNormalizer
from shodh.data.source import RegimeSource, Split
from shodh.core.errors import ConfigError, DataError


class WindowIndex:
    """Arithmetic from a window's number to its trajectory and first frame; windows never cross trajectories.

    Parameters
    ----------
    frames : sequence of int
        Frames of each trajectory; those that are too short give no window.
    length : int
        Snapshots in a window.
    stride : int
        Frames from one snapshot of a window to the next. Windows start at every frame.
    """

    def __init__(self, frames: Sequence[int], length: int, stride: int = 1) -> None:
        if length < 1 or stride < 1:
            raise ConfigError(f"a window needs length >= 1 and stride >= 1, not {length} and {stride}")
        self.span = (length - 1) * stride + 1
        counts = np.maximum(np.asarray(frames, dtype=np.int64) - self.span + 1, 0)
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> tuple[int, int]:
        """``(trajectory, first frame)``."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        trajectory = int(np.searchsorted(self._ends, index, side="right"))
        return trajectory, index - int(self._starts[trajectory])

    def number(self, trajectory: int, frame: int) -> int:
        """The window that begins at a frame of a trajectory; undoes ``[]``."""
        index = int(self._starts[trajectory]) + frame
        if not 0 <= frame or index >= self._ends[trajectory]:
            raise IndexError(f"no window at frame {frame} of trajectory {trajectory}")
        return index


class WindowDataset(Dataset[dict[str, Any]]):
    """Normalised windows of one split of one regime (map-style, so that a sampler decides the order).

    An item is a dict: ``fields`` float32 ``[T, C, *grid]`` with ``T = history + horizon`` and the channels of the
    dynamic fields in order, components x, y, z; ``static`` float32 ``[S, *grid]``, as `Field.static_scale` says (as
    stored without a normaliser); channels of absent fields are zero; ``regime``,
    ``trajectory`` (its number in the split) and ``frame`` (the first one), int; with a table of them ``conditions``
    float32 ``[N]``.

    Parameters
    ----------
    source : RegimeSource
    split : {"train", "valid", "test"}
    history, horizon : int
        Snapshots given and to be predicted.
    stride : int
        Frames from one snapshot to the next.
    normalizer : FieldNormalizer, optional
        Physical units if omitted.
    regime : int, optional
        Number of the regime in the items; by default that of the source's name in ``normalizer``, or 0.
    conditions : Tensor [trajectories, N], optional
        What a model is told of each trajectory (`shodh.data.conditions.condition_table`).

    Raises
    ------
    DataError
        If there is no window in the split.
    """

    def __init__(
        self,
        source: RegimeSource,
        split: Split,
        *,
        history: int,
        horizon: int,
        stride: int = 1,
        normalizer: FieldNormalizer | None = None,
        regime: int | None = None,
        conditions: torch.Tensor | None = None,
    ) -> None:
        self.source, self.split, self.stride, self.conditions = source, split, stride, conditions
        self.length = history + horizon
        self.normalizer = normalizer
        known = normalizer.index(source.name) if normalizer is not None else 0
        self.regime = known if regime is None else regime
        frames = source.num_frames(split)
        self.index = WindowIndex(frames, self.length, stride)
        require_windows(self.index, f"regime {source.name!r}, split {split!r}", frames)
        if horizon == 1:  # Of longer ones the rollouts tell.
            source.name_short(split, self.index.span, "a window")

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of ``fields``."""
        return (self.length, self.source.num_channels, *self.source.grid)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors of an item, all float32."""
        return {"fields": self.sample_shape, "static": (self.source.num_static_channels, *self.source.grid)}

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read_into(index, {name: torch.empty(shape) for name, shape in self.tensor_shapes.items()})

    def read_into(self, index: int, out: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """The item ``index``, its tensors written into ``out`` (contiguous, as `tensor_shapes` says)."""
        trajectory, frame = self.index[index]
        fields, static = out["fields"], out["static"]
        frames = range(frame, frame + self.index.span, self.stride)
        constants = self.normalizer.constants[self.source.name] if self.normalizer is not None else None
        self.source.read(self.split, trajectory, frames, fields.numpy(), constants)
        self.source.read_static(self.split, trajectory, static.numpy())
        if self.normalizer is not None:
            self.normalizer.mask_(fields, static)
            self.normalizer.normalize_static_(static, self.source.name)
        return {
            "fields": fields,
            "static": static,
            "regime": self.regime,
            "trajectory": trajectory,
            "frame": frame,
            **told(self.conditions, trajectory),
        }


class JoinedWindows(Dataset[dict[str, Any]]):
    """Data sets of the same samples one after the other: windows of one split at several strides."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = list(parts)
        self._ends = np.cumsum([len(part) for part in self.parts])
        self.sample_shape = self.parts[0].sample_shape
        if all(hasattr(part, "tensor_shapes") for part in self.parts):
            self.tensor_shapes = self.parts[0].tensor_shapes

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _find(self, index: int) -> tuple[Any, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[number], index - int(self._ends[number]) + len(self.parts[number])

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, row = self._find(index)
        item: dict[str, Any] = part[row]
        return item

    def read_into(self, index: int, out: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """`WindowDataset.read_into`."""
        part, row = self._find(index)
        item: dict[str, Any] = part.read_into(row, out)
        return item


def told(conditions: torch.Tensor | None, trajectory: int) -> dict[str, torch.Tensor]:
    """What an item has of a table of conditions, if there is one."""
    return {} if conditions is None else {"conditions": conditions[trajectory]}


def require_windows(index: WindowIndex, where: str, frames: Sequence[int]) -> None:
    """Raise DataError if there is no window, with what would help."""
    if len(index) == 0:
        have = f"the longest of {len(frames)} trajectories has {max(frames)}" if frames else "there are no trajectories"
        raise DataError(
            f"{where}: no window of {index.span} frames, {have}; make longer trajectories or ask for less "
            "history, horizon or stride"
        )
