"""Voxel images from files: ``.npy``, ``.tif`` and headerless ``.raw``, checked before anything is allocated."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence

import numpy as np

from shodh.core.errors import DataError

Solid = np.ndarray

# 16384^3 voxels of one byte; no published image is larger.
MAX_IMAGE_BYTES = 1 << 42


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
    if pore_value is None:
        raise DataError(f"{os.fspath(path)}: state the value of the pore voxels (pore_value)")
    return solid_mask(path, read_image(path, shape, dtype), pore_value)


def read_image(path: str | os.PathLike[str], shape: Sequence[int] | None, dtype: str | None) -> np.ndarray:
    """The values of a voxel image ``[X, Y, Z]``, in its own dtype; `load_image` says the rest."""
    path = os.fspath(path)
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
    return image


def solid_mask(path: str | os.PathLike[str], image: np.ndarray, pore_value: float) -> Solid:
    """Where ``image`` is not ``pore_value``; DataError if that is everywhere or nowhere."""
    solid: Solid = image != pore_value
    if solid.all() or not solid.any():
        found = np.unique(image)[:8].tolist()
        what = "no voxel" if solid.all() else "every voxel"
        raise DataError(f"{os.fspath(path)}: {what} has pore_value={pore_value:g}; the image holds the values {found}")
    return solid


def _dtype(path: str, name: str) -> np.dtype:
    try:
        return np.dtype(name)
    except TypeError as error:
        raise DataError(f"{path}: unknown image dtype {name!r}; use for example uint8, <u2 or >u2") from error


def _read_npy(path: str, shape: Sequence[int] | None, dtype: str | None) -> np.ndarray:
    try:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (ValueError, OSError, EOFError, OverflowError, MemoryError, SyntaxError, TypeError) as error:
        raise DataError(f"{path}: not a readable .npy array ({' '.join(str(error).split())})") from error


def _read_raw(path: str, shape: Sequence[int] | None, dtype: str | None) -> np.ndarray:
    if shape is None or dtype is None:
        raise DataError(f"{path}: a .raw image has no header; state image_shape and image_dtype")
    kind = _dtype(path, dtype)
    expected, found = math.prod(shape) * kind.itemsize, os.path.getsize(path)
    if kind.hasobject or expected != found:
        raise DataError(
            f"{path}: has {found} bytes, but shape {tuple(shape)} of {kind} needs {expected}; correct shape or dtype"
        )
    return np.fromfile(path, dtype=kind).reshape(tuple(shape))


def _read_tif(path: str, shape: Sequence[int] | None, dtype: str | None) -> np.ndarray:
    try:
        import tifffile
    except ImportError as error:
        raise DataError(f"{path}: reading .tif needs the package tifffile (pip install tifffile)") from error
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it logs damage that is raised or harmless
    try:
        with tifffile.TiffFile(path) as file:
            claimed = int(file.series[0].nbytes) if file.series else 0
            packed = claimed > 0 and int(getattr(file.series[0].pages[0], "compression", 1)) != 1
            # Compressed pages may hold up to some thousand times their size; others hold what the file holds.
            if claimed > min(MAX_IMAGE_BYTES, (4000 if packed else 1) * os.path.getsize(path)):
                raise DataError(f"{path}: the image claims {claimed} bytes, more than the file can hold")
            return np.asarray(file.asarray())
    except DataError:
        raise
    except Exception as error:  # the parser raises whatever damage leads it to
        raise DataError(
            f"{path}: not a readable .tif image ({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error
