"""Voxel geometries of porous media: random packs and blobs, and images from a file.

A geometry is a bool array ``solid [X, Y, Z]`` of cubic voxels, True in the solid, on a periodic box. Before flow is
solved the pore space is reduced to its largest connected cluster (6 neighbours, periodic), and that cluster must
percolate: along every axis it must connect to its own periodic image.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from shodh.errors import DataError
from shodh.physics.regime import smooth_noise
from shodh.seeding import generator

Solid = np.ndarray


def sphere_pack(seed: int, grid: Sequence[int], porosity: float, diameter: float) -> Solid:
    """Overlapping spheres at random places of the periodic box, added until the porosity falls to ``porosity``.

    ``diameter`` is in units of the longest edge of the box; each sphere's varies by +-25 %.
    """
    draw = generator(seed, "sphere pack")
    spacing = 1.0 / max(grid)
    centres = [(torch.arange(n, dtype=torch.float64) + 0.5) * spacing for n in grid]
    solid = torch.zeros(*grid, dtype=torch.bool)
    while 1.0 - solid.double().mean() > porosity:
        place = torch.rand(3, generator=draw, dtype=torch.float64)
        radius = 0.5 * diameter * (0.75 + 0.5 * float(torch.rand(1, generator=draw, dtype=torch.float64)))
        squared = []
        for axis, n in enumerate(grid):
            length = n * spacing
            distance = (centres[axis] - place[axis] * length).abs()
            squared.append(torch.minimum(distance, length - distance) ** 2)
        solid |= squared[0][:, None, None] + squared[1][:, None] + squared[2] < radius**2
    return solid.numpy()


def blobs(seed: int, grid: Sequence[int], porosity: float, diameter: float) -> Solid:
    """Smooth noise above the threshold that leaves ``porosity``; grains of about ``diameter`` longest edges."""
    lengths = [n / max(grid) for n in grid]
    noise = smooth_noise(seed, "blobs", grid, lengths, [diameter / 4.0] * 3)
    return (noise > torch.quantile(noise.flatten()[:: max(1, noise.numel() // 10_000_000)], porosity)).numpy()


GENERATORS = {"spheres": sphere_pack, "blobs": blobs}


def load_image(
    path: str | os.PathLike[str], shape: Sequence[int] | None, dtype: str | None, pore_value: float | None
) -> Solid:
    """Read a voxel image and return its solid mask ``[X, Y, Z]``.

    Parameters
    ----------
    path : path-like
        ``.npy``, ``.tif``/``.tiff`` (needs the package ``tifffile``), or ``.raw`` (C order, no header).
    shape : 3 ints
        Expected shape; required for ``.raw`` and checked otherwise.
    dtype : str
        NumPy name with byte order if it matters, for example ``"uint8"`` or ``">u2"``; as ``shape``.
    pore_value : float
        Value of the voxels that are pores; all others are solid.

    Raises
    ------
    DataError
        If the file cannot be read, or is not what was stated.
    """
    path = os.fspath(path)
    if pore_value is None:
        raise DataError(f"{path}: state the value of the pore voxels (pore_value)")
    if not os.path.isfile(path):
        raise DataError(f"{path}: no such image")
    suffix = os.path.splitext(path)[1].lower()
    readers = {".npy": _read_npy, ".raw": _read_raw, ".tif": _read_tif, ".tiff": _read_tif}
    if suffix not in readers:
        raise DataError(f"{path}: unknown image format {suffix!r}; expected one of {', '.join(readers)}")
    image = readers[suffix](path, shape, dtype)
    if image.ndim != 3:
        raise DataError(f"{path}: image has shape {image.shape}; expected three axes")
    if shape is not None and image.shape != tuple(shape):
        raise DataError(f"{path}: image has shape {image.shape}, expected {tuple(shape)}")
    if dtype is not None and image.dtype != _dtype(path, dtype):
        raise DataError(f"{path}: image has dtype {image.dtype}, expected {dtype}")
    solid: Solid = image != pore_value
    if solid.all() or not solid.any():
        found = np.unique(image)[:8].tolist()
        what = "no voxel" if solid.all() else "every voxel"
        raise DataError(f"{path}: {what} has pore_value={pore_value:g}; the image holds the values {found}")
    return solid


def _dtype(path: str, name: str) -> np.dtype:
    try:
        return np.dtype(name)
    except TypeError as error:
        raise DataError(f"{path}: unknown image dtype {name!r}; use for example uint8, <u2 or >u2") from error


def _read_npy(path: str, shape: Sequence[int] | None, dtype: str | None) -> np.ndarray:
    try:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path}: not a readable .npy array ({error})") from error


def _read_raw(path: str, shape: Sequence[int] | None, dtype: str | None) -> np.ndarray:
    if shape is None or dtype is None:
        raise DataError(f"{path}: a .raw image has no header; state image_shape and image_dtype")
    kind = _dtype(path, dtype)
    expected, found = int(np.prod(shape)) * kind.itemsize, os.path.getsize(path)
    if expected != found:
        raise DataError(
            f"{path}: has {found} bytes, but shape {tuple(shape)} of {kind} needs {expected}; correct shape or dtype"
        )
    return np.fromfile(path, dtype=kind).reshape(tuple(shape))


def _read_tif(path: str, shape: Sequence[int] | None, dtype: str | None) -> np.ndarray:
    try:
        import tifffile
    except ImportError as error:
        raise DataError(f"{path}: reading .tif needs the package tifffile (pip install tifffile)") from error
    try:
        return np.asarray(tifffile.imread(path))
    except (ValueError, OSError, tifffile.TiffFileError) as error:
        raise DataError(f"{path}: not a readable .tif image ({error})") from error


def crop_image(solid: Solid, seed: int, grid: Sequence[int]) -> Solid:
    """A sub-volume of shape ``grid`` at a random place of the image."""
    if any(n > size for n, size in zip(grid, solid.shape)):
        raise DataError(f"the image {solid.shape} is smaller than the grid {tuple(grid)}; ask for a smaller grid")
    draw = generator(seed, "crop")
    starts = [int(torch.randint(size - n + 1, (1,), generator=draw)) for n, size in zip(grid, solid.shape)]
    return solid[tuple(slice(start, start + n) for start, n in zip(starts, grid))].copy()


def label_pores(solid: Solid) -> np.ndarray:
    """Labels of the pore clusters (6 neighbours, periodic): 0 in the solid, else 1..n."""
    labels, count = ndimage.label(~solid)
    if count == 0:
        return labels
    pairs = []
    for axis in range(3):
        first, last = labels.take(0, axis=axis), labels.take(-1, axis=axis)
        touching = (first > 0) & (last > 0)
        pairs.append(np.stack([first[touching], last[touching]]))
    rows, columns = np.concatenate(pairs, axis=1)
    graph = coo_matrix((np.ones(len(rows)), (rows, columns)), shape=(count + 1, count + 1))
    _, cluster = connected_components(graph, directed=False)
    # Node 0 is the solid and touches nothing; number the clusters of pores from 1.
    _, renumbered = np.unique(cluster[1:], return_inverse=True)
    return np.concatenate(([0], renumbered + 1))[labels]


def largest_cluster(solid: Solid) -> Solid:
    """The solid with all pores filled but those of the largest cluster."""
    labels = label_pores(solid)
    if not labels.any():
        return np.ones_like(solid)
    return labels != np.bincount(labels[labels > 0]).argmax()


def percolates(solid: Solid, axis: int) -> bool:
    """Whether the pores, a single cluster, connect to their own periodic image along ``axis``.

    The box is repeated three times, periodically: copies of one voxel share a cluster exactly if some path winds
    around the box (a number of times that is no multiple of three).
    """
    if solid.all():
        return False
    labels = label_pores(np.concatenate([solid] * 3, axis=axis))
    voxel = list(np.argwhere(~solid)[0])
    copy = list(voxel)
    copy[axis] += solid.shape[axis]
    return bool(labels[tuple(voxel)] == labels[tuple(copy)])


def pore_space(solid: Solid) -> Solid | None:
    """The solid around the largest pore cluster, or None if that does not percolate along every axis."""
    filled = largest_cluster(solid)
    return filled if all(percolates(filled, axis) for axis in range(3)) else None
