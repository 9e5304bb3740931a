"""Cubes of rock for periodic flow: cut where the pores percolate, and joined to their periodic images.

The two ends of a cut sample do not match, so a periodic box would close most pores. Two remedies: *mirror* the cut
along every axis (reflected pores meet themselves; nothing is added), or put an open *buffer* layer before one axis,
the usual set-up of permeability measurements, in which the other two axes flow mostly through the layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy
from tqdm import tqdm

from shodh.core.errors import ConfigError, DataError
from shodh.physics.geometry import Solid, pore_space

JOINS = ("mirror", "buffer")


@dataclass(frozen=True)
class RockCube:
    """A periodic cube ``solid``, the corner of its cut in the image, and the porosity of the cut's connected pores."""

    solid: Solid
    corner: tuple[int, int, int]
    porosity: float


def connects(solid: Solid, axis: int) -> np.ndarray:
    """Pores (bool) of the clusters that touch both ends of ``axis``; the box is not periodic."""
    labels, _ = scipy.ndimage.label(~solid)
    ends = np.intersect1d(labels.take(0, axis=axis), labels.take(-1, axis=axis))
    return np.isin(labels, ends[ends > 0])


def mirrored(solid: Solid) -> Solid:
    """The cut followed by its reflection along every axis: twice the size, periodic."""
    for axis in range(solid.ndim):
        solid = np.concatenate((solid, np.flip(solid, axis)), axis=axis)
    return solid


def with_buffer(solid: Solid, layers: int, axis: int) -> Solid:
    """``layers`` of open voxels before the cut along ``axis``; as the box is periodic, they lie at both its ends."""
    shape = list(solid.shape)
    shape[axis] = layers
    return np.concatenate((np.zeros(shape, dtype=bool), solid), axis=axis)


def join(cut: Solid, kind: str, layers: int, axis: int) -> Solid | None:
    """The periodic cube of a cut with all pores filled that carry no flow, or None if it does not percolate.

    A mirrored cut must connect its ends along all three axes, a buffered one along ``axis``.
    """
    axes = range(3) if kind == "mirror" else (axis,)
    if not all(connects(cut, a).any() for a in axes):
        return None
    return pore_space(mirrored(cut) if kind == "mirror" else with_buffer(cut, layers, axis))


def cut_shape(size: int, kind: str, layers: int, axis: int) -> tuple[int, int, int]:
    """Shape of the cut that `join` makes a cube of ``size`` from."""
    if kind not in JOINS:
        raise ConfigError(f"join={kind!r} is not one of {', '.join(JOINS)}")
    if kind == "mirror":
        if size % 2:
            raise ConfigError(f"size={size}: a mirrored cube needs an even size")
        return (size // 2,) * 3
    if not 1 <= layers < size:
        raise ConfigError(f"layers={layers} must be between 1 and the size of the cube, {size}")
    shape = [size] * 3
    shape[axis] -= layers
    return (shape[0], shape[1], shape[2])


def rock_cubes(image: Solid, size: int, kind: str = "mirror", layers: int = 4, axis: int = 0) -> Iterator[RockCube]:
    """Periodic, percolating cubes from the disjoint cuts of an image, in the order of their corners.

    Parameters
    ----------
    image : ndarray [X, Y, Z]
        bool, True in the solid.
    size : int
        Edge of the cubes.
    kind : {"mirror", "buffer"}
    layers : int
        Open voxels of a buffer.
    axis : int
        Flow direction of a buffer.

    Raises
    ------
    DataError
        If the image is smaller than a cut.
    """
    shape = cut_shape(size, kind, layers, axis)
    counts = [n // cut for n, cut in zip(image.shape, shape)]
    if min(counts) == 0:
        raise DataError(f"the image {image.shape} is smaller than a cut {shape}; ask for smaller cubes")
    for number in tqdm(np.ndindex(*counts), total=int(np.prod(counts)), desc="cuts", disable=None, leave=False):
        corner = tuple(int(i) * cut for i, cut in zip(number, shape))
        cut = image[tuple(slice(start, start + n) for start, n in zip(corner, shape))]
        solid = join(cut, kind, layers, axis)
        if solid is not None:
            # The cut's own pores: what a buffer adds is not rock.
            rock = solid if kind == "mirror" else solid.take(range(layers, size), axis=axis)
            yield RockCube(solid, (corner[0], corner[1], corner[2]), float(1.0 - rock.mean()))
