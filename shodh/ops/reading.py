"""Snapshots of plain float32 read by the compiled back end: checked, scaled and split in one pass over memory."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Callable
from functools import cache

import numpy as np

from shodh.ops import build, extension

log = logging.getLogger(__name__)

_NOT_FINITE, _END_OF_FILE = 1, 2
_MAX_COMPONENTS = 3


def can_read_into(out: np.ndarray) -> bool:
    """Whether `read_snapshot` is built here and can write into ``out`` [C, *grid]: float32, each component in order."""
    fits = out.dtype == np.float32 and out.flags.writeable and 1 <= len(out) <= _MAX_COMPONENTS
    return fits and out[0].flags.c_contiguous and out.strides[0] % 4 == 0 and _compiled() is not None


def read_snapshot(
    descriptor: int, offset: int, out: np.ndarray, *, shift: float = 0.0, scale: float = 1.0, finite: bool = True
) -> bool:
    """Read little-endian float32 [*grid, C] at ``offset`` of an open file and write ``(x - shift) / scale``.

    Parameters
    ----------
    descriptor : int
        Its position is neither used nor moved.
    offset : int
        In bytes.
    out : ndarray
        ``[C, *grid]``; `can_read_into` must hold. Left half-filled by an error.
    shift, scale : float
        Rounded to float32, in which the arithmetic is done: the bits are those of numpy's and torch's.
    finite : bool
        Look for NaN and infinity.

    Returns
    -------
    bool
        False if ``finite`` and there is one.

    Raises
    ------
    OSError
        If the file cannot be read, or ends earlier.
    """
    function = _compiled()
    assert function is not None
    outcome = function(
        descriptor, offset, out.ctypes.data, len(out), out[0].size, out.strides[0] // 4, shift, scale, int(finite)
    )
    if outcome == _END_OF_FILE:
        raise OSError(f"the file ends before byte {offset + out.size * 4}")
    if outcome < 0:
        raise OSError(-outcome, os.strerror(-outcome))
    return bool(outcome != _NOT_FINITE)


@cache
def _compiled() -> Callable[..., int] | None:
    """The compiled function; None, said once, where there is none."""
    reason = extension.unavailable_reason("cpp")
    if sys.byteorder != "little":
        reason = "this machine is big-endian"
    if reason is None:
        library = ctypes.CDLL(str(build.library_path("cpu")))
        try:
            function = library.shodh_read_snapshot
        except AttributeError:
            reason = "the library was built from older sources"
        else:
            number = ctypes.c_int64
            function.argtypes = [ctypes.c_int, number, ctypes.c_void_p, number, number, number]
            function.argtypes += [ctypes.c_float, ctypes.c_float, ctypes.c_int]
            function.restype = ctypes.c_int
            return function  # type: ignore[no-any-return]
    log.warning("data are read through HDF5, which is slower: %s; %s", reason, build.HINT)
    return None
