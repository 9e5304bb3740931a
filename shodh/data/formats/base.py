"""What every file of trajectories offers, whatever its format, and what a user may say about one."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np

from shodh.core.errors import ConfigError, DataError
from shodh.schema.fields import Boundary, Field


@dataclass(frozen=True)
class FileHeader:
    """Everything in a file except its field values.

    Parameters
    ----------
    grid, lengths, boundary : tuple
        Cells, box size and kind of boundary by axis.
    num_trajectories : int
    time : ndarray
        Times ``[T]``, or ``[B, T]`` where trajectories have their own; float64.
    fields : dict
        By their names in the file: the `Field` and where its values are stored.
    parameters : mapping
        Physical parameters: a number for all trajectories, or an array ``[B]``.
    notes : tuple of str
        What the format does not say and was assumed.
    doubts : tuple of str
        What was assumed and could as well be otherwise, with the cure: never to be stored as a fact.
    timeless : bool
        Whether frames are counted because the file has no times.
    """

    grid: tuple[int, ...]
    lengths: tuple[float, ...]
    boundary: tuple[Boundary, ...]
    num_trajectories: int
    time: np.ndarray
    fields: dict[str, Any]
    parameters: Mapping[str, float | np.ndarray] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    timeless: bool = False

    @property
    def num_frames(self) -> int:
        return int(self.time.shape[-1])


class TrajectoryFile(ABC):
    """Trajectories of one regime on one grid, read snapshot by snapshot.

    The header is read and checked when the object is made, and the file closed again. Reading opens it once per process: a
    handle that a forked worker inherited is dropped, never shared, and a pickled object carries none.
    """

    header: FileHeader
    _handle: Any = None
    _process = 0

    def __init__(self, path: str | os.PathLike[str], format: str) -> None:
        self.path = Path(path)
        self.format = format  # A key of `shodh.data.formats.FORMATS`.
        self._scratch: dict[tuple[int, ...], np.ndarray] = {}

    @property
    def fields(self) -> dict[str, Field]:
        """Fields by their names in the file; ``static`` for those without time."""
        return {name: stored.field for name, stored in self.header.fields.items()}

    @property
    def grid(self) -> tuple[int, ...]:
        return self.header.grid

    @property
    def lengths(self) -> tuple[float, ...]:
        """Box size by axis."""
        return self.header.lengths

    @property
    def spacing(self) -> tuple[float, ...]:
        return tuple(length / cells for length, cells in zip(self.lengths, self.grid))

    @property
    def boundary(self) -> tuple[Boundary, ...]:
        return self.header.boundary

    @property
    def num_trajectories(self) -> int:
        return self.header.num_trajectories

    @property
    def num_frames(self) -> int:
        return self.header.num_frames

    @property
    def time(self) -> np.ndarray:
        """Times ``[T]``, or ``[B, T]`` where trajectories have their own; float64."""
        return self.header.time

    @property
    def parameters(self) -> Mapping[str, float | np.ndarray]:
        """Physical parameters: a number for all trajectories, or an array ``[B]``."""
        return self.header.parameters

    def field(self, name: str) -> Field:
        """One field; DataError with the names there are if it is missing."""
        found: Field = self.stored(name).field
        return found

    def stored(self, name: str) -> Any:
        """A field and where its values are stored; DataError with the names there are if it is missing."""
        if name not in self.header.fields:
            raise DataError(f"{self.path}: there is no field {name!r}; there are {sorted(self.header.fields)}")
        return self.header.fields[name]

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
        """Read ``(x - shift) / scale`` of frames of one field, components first.

        Parameters
        ----------
        name : str
        trajectory : int
        frames : range
            Frames to read, in order; ignored for a static field.
        out : ndarray, float32
            ``[len(frames), C, *grid]``, or ``[C, *grid]`` for a static field; C is the number of space dimensions
            for a vector and 1 for a scalar. May be a view with any strides.
        finite : bool
            Refuse NaN and infinity.
        shift, scale : float
            Of float32 arithmetic.

        Raises
        ------
        DataError
            If the values cannot be read, or hold NaN or infinity: names file, field, trajectory and frame.
        """
        stored = self.stored(name)
        if not 0 <= trajectory < self.num_trajectories:
            raise IndexError(f"trajectory {trajectory} of {self.num_trajectories} in {self.path}")
        if stored.field.static:
            frames, out = range(1), out[None]
        elif frames and not (0 <= min(frames) and max(frames) < self.num_frames):
            raise IndexError(f"frames {frames} of {self.num_frames} in {self.path}")
        if len(out) != len(frames):
            raise ValueError(f"out has {len(out)} frames, wanted are {len(frames)}")
        self._read(stored, trajectory, frames, out, finite, shift, scale)

    @abstractmethod
    def _read(
        self, stored: Any, trajectory: int, frames: range, out: np.ndarray, finite: bool, shift: float, scale: float
    ) -> None:
        """`read` into ``out`` [T, C, *grid]; of a static field one frame."""

    def _open(self) -> Any:
        """A handle of the file, or its arrays by name."""
        raise NotImplementedError

    def _opened(self) -> Any:
        """What `_open` gives, once a process: a handle inherited through fork shares the parent's file description."""
        if self._process != os.getpid():
            self.close()
            self._process = os.getpid()
        if self._handle is None:
            self._handle = self._open()
        return self._handle

    def _buffer(self, shape: tuple[int, ...]) -> np.ndarray:
        """Memory for values as they are stored, float32, which the next read may reuse."""
        if shape not in self._scratch:
            self._scratch[shape] = np.empty(shape, dtype=np.float32)
        return self._scratch[shape]

    def close(self) -> None:
        """Close the handle of this process; the next read opens it again."""
        if isinstance(self._handle, h5py.File):
            self._handle.close()
        self._handle = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handle": None, "_scratch": {}}

    def __repr__(self) -> str:
        counts = f"{self.num_trajectories} x {self.num_frames} frames"
        return f"{type(self).__name__}({str(self.path)!r}, {self.format}, grid={self.grid}, {counts})"


@dataclass(frozen=True)
class FileHints:
    """What a user says about files whose format does not; None leaves it to the file or to the format's default.

    Parameters
    ----------
    boundary, lengths : tuple, optional
        By axis x, y, z.
    time_step : float, optional
        From one frame to the next.
    channels : tuple of str, optional
        Names of the channels of an array that has no names; a name that is repeated is a vector, whose components
        follow in order.
    axes : str, optional
        Letters of the axes of an array in order: n (trajectory), t, x, y, z, c (channel), for example "nxytc".
    image_shape, image_dtype, pore_value : optional
        Of a voxel image; see `shodh.physics.images.load_image`.

    Raises
    ------
    ConfigError
        A time step or a length is not a positive number.
    """

    boundary: tuple[Boundary, ...] | None = None
    lengths: tuple[float, ...] | None = None
    time_step: float | None = None
    channels: tuple[str, ...] | None = None
    axes: str | None = None
    image_shape: tuple[int, ...] | None = None
    image_dtype: str | None = None
    pore_value: float | None = None

    def __post_init__(self) -> None:
        for what, values in (("time_step", (self.time_step,)), ("lengths", self.lengths or ())):
            if any(v is not None and not 0 < v < math.inf for v in values):
                raise ConfigError(f"{what} must be positive, given {', '.join(map(str, values))}")

    def given(self) -> set[str]:
        """Names of what is said."""
        return {name for name, value in vars(self).items() if value is not None}


def rescale_(values: np.ndarray, shift: float, scale: float) -> None:
    """``(x - shift) / scale`` in place, in the arithmetic of the values' dtype."""
    if shift != 0.0:
        values -= values.dtype.type(shift)
    if scale != 1.0:
        values /= values.dtype.type(scale)
