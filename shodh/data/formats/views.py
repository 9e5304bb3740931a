"""A part of a file as a file: some trajectories, or some frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from shodh.data.formats.base import TrajectoryFile


class FileView(TrajectoryFile):
    """Some trajectories, or some frames, of a file."""

    def __init__(self, file: TrajectoryFile, trajectories: Sequence[int], frames: range) -> None:
        super().__init__(file.path, file.format)
        self._file, self.trajectories, self.frames = file, tuple(trajectories), frames
        chosen = list(self.trajectories)
        self.header = replace(
            file.header,
            num_trajectories=len(chosen),
            time=(file.time if file.time.ndim == 1 else file.time[chosen])[..., frames],
            parameters={n: v if np.ndim(v) == 0 else np.asarray(v)[chosen] for n, v in file.parameters.items()},
        )

    @property
    def is_part_in_time(self) -> bool:
        """Whether frames of the trajectories are left out."""
        return len(self.frames) < self._file.num_frames

    def stored(self, name: str) -> Any:
        """See `TrajectoryFile.stored`."""
        return self._file.stored(name)

    def _read(self, stored: Any, trajectory: int, frames: range, *rest: Any) -> None:
        first = self.frames.start
        shifted = range(first + frames.start, first + frames.stop, frames.step)
        self._file._read(stored, self.trajectories[trajectory], shifted, *rest)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
