"""A part of a file as a file: some trajectories, or some frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from shodh.data.formats.base import TrajectoryFile
from shodh.schema.fields import Boundary, Field


class FileView:
    """Some trajectories, or some frames, of a file, as a `TrajectoryFile`."""

    def __init__(self, file: TrajectoryFile, trajectories: Sequence[int], frames: range) -> None:
        self.path = file.path
        self._file, self.trajectories, self.frames = file, tuple(trajectories), frames

    @property
    def is_part_in_time(self) -> bool:
        """Whether frames of the trajectories are left out."""
        return len(self.frames) < self._file.num_frames

    @property
    def format(self) -> str:
        return self._file.format

    @property
    def fields(self) -> dict[str, Field]:
        return self._file.fields

    @property
    def grid(self) -> tuple[int, ...]:
        return self._file.grid

    @property
    def lengths(self) -> tuple[float, ...]:
        return self._file.lengths

    @property
    def spacing(self) -> tuple[float, ...]:
        return self._file.spacing

    @property
    def boundary(self) -> tuple[Boundary, ...]:
        return self._file.boundary

    @property
    def num_trajectories(self) -> int:
        return len(self.trajectories)

    @property
    def num_frames(self) -> int:
        return len(self.frames)

    @property
    def time(self) -> np.ndarray:
        time = self._file.time
        return (time if time.ndim == 1 else time[list(self.trajectories)])[..., self.frames]

    @property
    def parameters(self) -> Mapping[str, float | np.ndarray]:
        chosen = list(self.trajectories)
        return {n: v if np.ndim(v) == 0 else np.asarray(v)[chosen] for n, v in self._file.parameters.items()}

    @property
    def notes(self) -> tuple[str, ...]:
        return self._file.notes

    @property
    def doubts(self) -> tuple[str, ...]:
        return self._file.doubts

    @property
    def timeless(self) -> bool:
        return self._file.timeless

    def field(self, name: str) -> Field:
        """One field of the file."""
        return self._file.field(name)

    def read(
        self,
        name: str,
        trajectory: int,
        frames: range,
        out: np.ndarray,
        *,
        finite: bool = True,
        shift: float = 0.0,
        scale: float = 1.0,
    ) -> None:
        """Read frames of the view; see `TrajectoryFile.read`."""
        if frames and not (0 <= min(frames) and max(frames) < self.num_frames):
            raise IndexError(f"frames {frames} of {self.num_frames} in a part of {self.path}")
        first, step = self.frames.start, frames.step
        shifted = range(first + frames.start, first + frames.stop, step)
        local = self.trajectories[trajectory]
        self._file.read(name, local, shifted, out, finite=finite, shift=shift, scale=scale)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
