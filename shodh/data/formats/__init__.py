"""Files that people already have, behind one reader: `open_file`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import h5py

from shodh.config import FileFormat
from shodh.data.formats import dpot, fno, jhtdb, named, pdebench, rock
from shodh.data.formats.arrays import ArrayFile, Describe, Load
from shodh.data.formats.base import FileHints, TrajectoryFile
from shodh.data.hdf5 import H5PY_ERRORS, damaged, open_hdf5
from shodh.data.well_reader import WellFile
from shodh.core.errors import ConfigError, DataError

FORMATS: tuple[str, ...] = tuple(f for f in get_args(FileFormat) if f != "auto")
HDF5_SUFFIXES = (".hdf5", ".h5", ".nc")
IMAGE_SUFFIXES = (".raw", ".tif", ".tiff", ".npy")
SUFFIXES = (*HDF5_SUFFIXES, ".mat")

__all__ = ["FORMATS", "SUFFIXES", "FileHints", "TrajectoryFile", "detect_format", "open_file"]

_LAYOUTS: dict[str, Callable[[h5py.File, FileHints], bool]] = {
    "well": lambda file, _: {"dimensions", "boundary_conditions"} <= set(file) or "t0_fields" in file,
    "jhtdb": lambda file, _: jhtdb.is_jhtdb(file),
    "dpot": lambda file, _: dpot.is_dpot(file) and "axes" not in file.attrs,
    "pdebench": lambda file, _: pdebench.is_pdebench(file),
    "fno": fno.is_fno,
    "arrays": named.is_named,
}

_ARRAYS: dict[str, tuple[Describe, Load | None]] = {
    "pdebench": (pdebench.describe, None),
    "dpot": (dpot.describe, None),
    "fno": (fno.describe, fno.load),
    "jhtdb": (jhtdb.describe, None),
    "arrays": (named.describe, None),
    "rock": (rock.describe, rock.load),
}
_GEOMETRY = {"boundary", "lengths", "time_step"}
#: Hints that a format reads, where these are not `_GEOMETRY`.
_READ: dict[str, set[str]] = {
    "well": set(),
    "dpot": _GEOMETRY | {"axes", "channels"},
    "fno": _GEOMETRY | {"axes", "channels"},
    "jhtdb": _GEOMETRY | {"axes"},
    "arrays": _GEOMETRY | {"axes", "channels"},
    "rock": {"boundary", "lengths", "image_shape", "image_dtype", "pore_value"},
}
_CURES = {
    "well": "or convert the original files again with --boundary, --lengths or --time-step to correct them",
    "pdebench": "or state format: arrays to have every dataset read as a field",
}


def open_file(path: str | os.PathLike[str], format: str = "auto", hints: FileHints | None = None) -> TrajectoryFile:
    """Open a file of trajectories of any known format.

    Parameters
    ----------
    path : path-like
    format : str
        One of `FORMATS`, or "auto": from the suffix and the names in the file.
    hints : FileHints, optional
        What the format does not say: boundary, lengths, time between frames, names of channels.

    Raises
    ------
    DataError
        If the file is missing, damaged, of another or an unknown format, or not to be trusted: links and storage
        outside the file, unknown filters, objects, sizes that it cannot have.
    ConfigError
        If ``format`` is unknown, or hints contradict the file.
    """
    hints = hints or FileHints()
    if format == "auto":
        format = detect_format(path, hints)
    if format not in FORMATS:
        raise ConfigError(f"unknown format {format!r}; expected auto or one of {', '.join(FORMATS)}")
    if unread := sorted(hints.given() - _READ.get(format, _GEOMETRY)):
        raise ConfigError(
            f"{path}: files of format {format} state {', '.join(unread)} themselves; remove "
            f"{'it' if len(unread) == 1 else 'them'}, {_CURES.get(format, 'or state another format')}"
        )
    if format == "well":
        return WellFile(path)
    describe, load = _ARRAYS[format]
    return ArrayFile(path, format, describe, hints, load)


def detect_format(path: str | os.PathLike[str], hints: FileHints | None = None) -> str:
    """Name of the format of a file, from its suffix, the names in it and the hints; DataError if it is none of them."""
    hints = hints or FileHints()
    suffix = Path(path).suffix.lower()
    if not os.path.isfile(path):
        raise DataError(f"{path}: no such file")
    if suffix in IMAGE_SUFFIXES:
        return "rock"
    if suffix == ".mat":
        return "fno"
    with open_hdf5(path) as file:
        try:
            names = sorted(file)
            found = next((name for name, fits in _LAYOUTS.items() if fits(file, hints)), None)
        except H5PY_ERRORS as error:
            raise damaged(path, error) from error
    if found is None:
        raise DataError(
            f"{path}: no known layout; expected The Well's layout or one of {', '.join(FORMATS[1:])}, and the file "
            f"holds {names[:8]}; if every dataset is a field, state the axes that they share, for example axes: ntxyz, "
            "and keep the times in a dataset 'time'"
        )
    return found
