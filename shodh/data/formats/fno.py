"""The Navier-Stokes sets of the Fourier neural operator (Li et al. 2021) in MATLAB files.

``u [N, X, Y, T]`` is the vorticity on the periodic unit torus, one frame a time unit. MATLAB 7.3 is HDF5 with the axes
reversed; MATLAB 5 is read as a whole by SciPy.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np

from shodh.data import hdf5
from shodh.data.formats.arrays import ArrayField, ArrayHeader, Store
from shodh.data.formats.base import FileHints
from shodh.core.errors import DataError
from shodh.schema.fields import Field

# MATLAB 5 files cannot be larger, nor hold larger variables; compressed ones may claim more than they should.
MAX_MATLAB5_BYTES = 2 << 30


def load(path: Path, hints: FileHints) -> Store:
    """The arrays of either kind of file."""
    return hdf5.open_hdf5(path) if h5py.is_hdf5(path) else _load_matlab5(path)


def is_fno(file: h5py.File, hints: FileHints) -> bool:
    """Whether there is a ``u`` that is no component of a velocity, with the axes of these sets."""
    return "u" in file and "v" not in file and sorted(hints.axes or "ntxy") == sorted("ntxy")


def describe(store: Store, path: Path, hints: FileHints) -> ArrayHeader:
    """Header of one file."""
    reversed_axes = isinstance(store, h5py.File)
    if "u" not in store:
        raise DataError(f"{path}: there is no variable 'u'; there are {sorted(store)[:8]}")
    shape = hdf5.dataset(store, "u", str(path)).shape if isinstance(store, h5py.File) else store["u"].shape
    if len(shape) != 4:
        raise DataError(f"{path}: 'u' has the shape {shape}; expected four axes, trajectories, x, y and time")
    if reversed_axes and hints.axes is None and path.suffix.lower() != ".mat" and not _by_matlab(store):
        raise DataError(
            f"{path}: 'u' has the shape {tuple(shape)}, and the file is not MATLAB's; state its axes: ntxy, or tyxn as "
            "MATLAB stores them"
        )
    axes = hints.axes or ("tyxn" if reversed_axes else "nxyt")
    sizes = dict(zip(axes, (int(n) for n in shape)))
    if sorted(axes) != sorted("ntxy"):
        raise DataError(f"{path}: axes {axes!r}; expected the letters n, t, x and y in the order of the file")
    frames = sizes["t"]
    notes = (
        "boundary: periodic, as in the published sets",
        "lengths: 1, as in the published sets",
        "time_step: 1, as in the published sets",
    )
    name = (hints.channels or ("vorticity",))[0]
    fields = {name: ArrayField(Field(name), axes, (("u",),))}
    return ArrayHeader(
        (sizes["x"], sizes["y"]), (1.0, 1.0), ("periodic",) * 2, sizes["n"], 1.0 + np.arange(frames), fields, {}, notes,
        timeless=True,
    )  # fmt: skip


def _by_matlab(file: h5py.File) -> bool:
    """MATLAB puts a block of text before HDF5, and its class beside every variable."""
    return bool(file.userblock_size) or "MATLAB_class" in file["u"].attrs


def _load_matlab5(path: Path) -> Mapping[str, np.ndarray]:
    from scipy.io import loadmat, whosmat

    if not os.path.isfile(path):
        raise DataError(f"{path}: no such file")
    try:
        claimed = {name: shape for name, shape, _ in whosmat(path)}
        shape = claimed.get("u", ())
        if 8 * np.prod([int(n) for n in shape], dtype=object) > min(MAX_MATLAB5_BYTES, 1100 * os.path.getsize(path)):
            raise DataError(f"{path}: 'u' claims the absurd shape {shape}")
        arrays = loadmat(path, variable_names=["u"]) if shape else {}
    except DataError:
        raise
    except Exception as error:  # SciPy's parser raises whatever damage leads it to
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise DataError(f"{path}: no readable MATLAB file, truncated or damaged ({reason})") from error
    return {name: a for name, a in arrays.items() if isinstance(a, np.ndarray) and a.dtype.kind in "buif"}
