"""What every file of trajectories offers, whatever its format, and what a user may say about one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from shodh.core.errors import ConfigError
from shodh.schema.fields import Boundary, Field


class TrajectoryFile(Protocol):
    """Trajectories of one regime on one grid, read snapshot by snapshot.

    The header is read and checked when the object is made. Objects can be pickled and used in forked processes: each
    process opens its own handle.
    """

    path: Path

    @property
    def format(self) -> str:
        """Name of the format, a key of `shodh.data.formats.FORMATS`."""
        ...

    @property
    def fields(self) -> dict[str, Field]:
        """Fields by their names in the file; ``static`` for those without time."""
        ...

    @property
    def grid(self) -> tuple[int, ...]: ...

    @property
    def lengths(self) -> tuple[float, ...]:
        """Box size by axis."""
        ...

    @property
    def spacing(self) -> tuple[float, ...]: ...

    @property
    def boundary(self) -> tuple[Boundary, ...]: ...

    @property
    def num_trajectories(self) -> int: ...

    @property
    def num_frames(self) -> int: ...

    @property
    def time(self) -> np.ndarray:
        """Times ``[T]``, or ``[B, T]`` where trajectories have their own; float64."""
        ...

    @property
    def parameters(self) -> Mapping[str, float | np.ndarray]:
        """Physical parameters: a number for all trajectories, or an array ``[B]``."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What the format does not say and was assumed, in words."""
        ...

    @property
    def doubts(self) -> tuple[str, ...]:
        """What was assumed and could as well be otherwise, with the cure: never to be stored as a fact."""
        ...

    @property
    def timeless(self) -> bool:
        """Whether frames are counted because the file has no times."""
        ...

    def field(self, name: str) -> Field:
        """One field; DataError with the names there are if it is missing."""
        ...

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
        """Read ``(x - shift) / scale`` of one field into ``out`` [T, C, *grid] ([C, *grid] if static), float32.

        Components come first. DataError if values cannot be read or, with ``finite``, hold NaN or infinity.
        """
        ...

    def close(self) -> None:
        """Close the handle of this process; the next read opens it again."""
        ...


class StoredArrays(Protocol):
    """What a header says of one field."""

    @property
    def field(self) -> Field: ...


class FileHeader(Protocol):
    """Everything in a file except its field values; see `TrajectoryFile`."""

    @property
    def grid(self) -> tuple[int, ...]: ...

    @property
    def lengths(self) -> tuple[float, ...]: ...

    @property
    def boundary(self) -> tuple[Boundary, ...]: ...

    @property
    def num_trajectories(self) -> int: ...

    @property
    def num_frames(self) -> int: ...

    @property
    def time(self) -> np.ndarray: ...

    @property
    def fields(self) -> Mapping[str, StoredArrays]: ...

    @property
    def parameters(self) -> Mapping[str, float | np.ndarray]: ...

    @property
    def notes(self) -> tuple[str, ...]: ...

    @property
    def doubts(self) -> tuple[str, ...]: ...

    @property
    def timeless(self) -> bool: ...


class DescribedFile:
    """The part of a `TrajectoryFile` that its header answers."""

    header: FileHeader

    @property
    def notes(self) -> tuple[str, ...]:
        """What the format does not say and was assumed."""
        return self.header.notes

    @property
    def doubts(self) -> tuple[str, ...]:
        """What was assumed and could as well be otherwise, with the cure."""
        return self.header.doubts

    @property
    def timeless(self) -> bool:
        """Whether frames are counted because the file has no times."""
        return self.header.timeless

    @property
    def fields(self) -> dict[str, Field]:
        """Scalar and vector fields by name; ``static`` for those without time."""
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
        """Scalars that do not change in time: a number for all trajectories, or an array ``[B]``."""
        return self.header.parameters


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
