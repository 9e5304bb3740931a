"""HDF5 files that nobody vouches for: what they claim is checked before anything is allocated or followed.

A file may point out of itself (external links, external storage, virtual datasets), name filters whose plug-ins would
be loaded, hold objects, or claim shapes of petabytes. All of that is refused here, in one line that names the file.
"""

from __future__ import annotations

import errno
import math
import os
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np

from shodh.core.errors import DataError

# What h5py raises on a damaged structure, besides OSError.
H5PY_ERRORS = (OSError, RuntimeError, KeyError, TypeError, ValueError, AttributeError, OverflowError, MemoryError)

# Errors of a lock that another process has; all others say that the file system has no locks (ENOLCK, ENOSYS, ...).
HELD_BY_A_WRITER = (errno.EAGAIN, errno.EACCES)

# Errors of the operating system that say nothing about a file's content.
NOT_OF_THE_CONTENT = frozenset({
    errno.EACCES, errno.EPERM, errno.ENOENT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT,
    errno.ENODEV, errno.ENOTCONN,
})  # fmt: skip

# No list of coordinates or times is longer; a damaged file may claim any size, and reading it would end in memory.
MAX_SMALL_SIZE = 10_000_000
MAX_ATTRIBUTE_SIZE = 100_000

# Built into HDF5 and h5py: gzip, shuffle, fletcher32, szip, n-bit, scale-offset, lzf. Others would load plug-ins.
KNOWN_FILTERS = frozenset({1, 2, 3, 4, 5, 6, 32000})
# gzip cannot shrink data by more than 1032; a dataset that claims more than that of its file was never written.
MAX_COMPRESSION = 1100
MAX_CHUNK_BYTES = 4 << 30

_REQUIRED = object()


def open_hdf5(path: str | os.PathLike[str]) -> h5py.File:
    """Open a file for reading.

    Raises
    ------
    DataError
        It is missing, no HDF5, or not whole; another process is writing it, or was killed while it did.
    """
    if not os.path.isfile(path):
        raise DataError(f"{path}: no such file")
    try:
        return h5py.File(path, "r")
    except H5PY_ERRORS as error:
        if not _no_lock_service(error):
            raise damaged(path, error) from error
    try:  # some cluster file systems have no locks; published files never change, so none is needed
        return h5py.File(path, "r", locking=False)
    except H5PY_ERRORS as error:
        raise damaged(path, error) from error


def _no_lock_service(error: Exception) -> bool:
    return "unable to lock file" in str(error) and getattr(error, "errno", None) not in HELD_BY_A_WRITER


def damaged(path: str | os.PathLike[str], error: Exception) -> DataError:
    """The DataError for what HDF5 could not open or make sense of, with what is to be done."""
    reason, number = " ".join(str(error).split()), getattr(error, "errno", None)
    if isinstance(error, MemoryError):
        return DataError(f"{path}: does not fit into memory, or claims sizes it does not have; check the file")
    if "unable to lock file" in reason and number in HELD_BY_A_WRITER:
        return DataError(f"{path}: another process has it open for writing; wait until that has closed it")
    if "already open for write" in reason:  # HDF5's consistency flags, in files of the newer formats
        return DataError(
            f"{path}: is marked as open for writing: if its writer still runs, wait for it; if it was killed, look at "
            f"what is in the file after 'h5clear -s {path}', or write it anew"
        )
    if number in NOT_OF_THE_CONTENT:
        return DataError(f"{path}: cannot be read: {os.strerror(number)}")
    return DataError(f"{path}: cannot be read as HDF5, it is truncated or damaged; write it anew ({reason})")


def member(parent: h5py.Group, name: str, path: str) -> h5py.Group | h5py.Dataset | None:
    """The group or dataset at ``name`` (with slashes), None if there is none; DataError for a link out of its place."""
    item: Any = parent
    for part in (p for p in name.split("/") if p):
        if not isinstance(item, h5py.Group):
            return None
        link = item.get(part, getlink=True)
        if link is None:
            return None
        if not isinstance(link, h5py.HardLink):
            kind = "an external" if isinstance(link, h5py.ExternalLink) else "a soft"
            raise DataError(f"{path}: {name!r} is {kind} link, which is not followed; copy the data into the file")
        item = item.get(part)
    return item if isinstance(item, h5py.Group | h5py.Dataset) else None


def group(parent: h5py.Group, name: str, path: str) -> h5py.Group:
    """A group that must be there."""
    found = member(parent, name, path)
    if not isinstance(found, h5py.Group):
        raise DataError(f"{path}: group {name!r} is missing")
    return found


def dataset(parent: h5py.Group, name: str, path: str) -> h5py.Dataset:
    """A checked dataset that must be there; see `check_dataset`."""
    found = member(parent, name, path)
    if not isinstance(found, h5py.Dataset):
        raise DataError(f"{path}: dataset {'/'.join((parent.name, name)).strip('/')} is missing")
    check_dataset(found, path)
    return found


def values(parent: h5py.Group, name: str, path: str) -> np.ndarray:
    """All of a small numeric dataset."""
    found = dataset(parent, name, path)
    if found.size is None or found.size > MAX_SMALL_SIZE:
        raise DataError(f"{path}: {found.name.strip('/')} has the absurd shape {found.shape}")
    return np.asarray(found[()])


def attribute(item: h5py.Group | h5py.Dataset, name: str, path: str, default: Any = _REQUIRED) -> Any:
    """A number, a text, or a short list of them; a list of one is its element, whatever its shape.

    DataError if it is missing without a default, or anything else.
    """
    where = f"{path}: attribute {name!r} of {item.name.strip('/') or 'the file'}"
    if name not in item.attrs:
        if default is not _REQUIRED:
            return default
        raise DataError(f"{where} is missing")
    identifier = item.attrs.get_id(name)
    kind, shape = identifier.dtype, identifier.shape
    if math.prod(shape or ()) > MAX_ATTRIBUTE_SIZE:
        raise DataError(f"{where} has the absurd shape {shape}")
    if kind.kind not in "biufSU" and h5py.check_string_dtype(kind) is None:
        raise DataError(f"{where} has the type {kind}; expected numbers or text")
    value = item.attrs[name]
    if isinstance(value, h5py.Empty):
        return np.zeros(0)
    if isinstance(value, np.ndarray):
        return value.ravel()[0] if value.size == 1 else value.ravel()
    return value


def single(item: h5py.Group | h5py.Dataset, name: str, path: str, default: Any = _REQUIRED) -> Any:
    """`attribute` where one value is expected; DataError if there are several, or none."""
    value = attribute(item, name, path, default)
    if np.ndim(value) > 0:
        where = f"{path}: attribute {name!r} of {item.name.strip('/') or 'the file'}"
        raise DataError(f"{where} has {len(value)} values; expected one")
    return value


def text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def check_dataset(item: h5py.Dataset, path: str) -> None:
    """Refuse a dataset whose values are not numbers, lie outside the file, need plug-ins, or cannot all be there."""
    where = f"{path}: dataset {item.name.strip('/')}"
    if item.dtype.kind not in "buif":
        raise DataError(f"{where} has the type {item.dtype}; expected plain numbers (floating point for what changes)")
    if item.shape is None:
        raise DataError(f"{where} is empty")
    if item.is_virtual or item.external:
        raise DataError(f"{where} keeps its values in other files; copy them into this one (h5repack)")
    plan = item.id.get_create_plist()
    unknown = {plan.get_filter(i)[0] for i in range(plan.get_nfilters())} - KNOWN_FILTERS
    if unknown:
        raise DataError(f"{where} is compressed by the filters {sorted(unknown)}; use gzip, lzf or none (h5repack)")
    # Python integers: the products of damaged shapes overflow any other.
    size = math.prod(int(n) for n in item.shape) * item.dtype.itemsize
    stored = int(item.id.get_storage_size())
    if size > MAX_COMPRESSION * max(stored, 1 << 16):
        raise DataError(f"{where} claims the absurd shape {item.shape} ({size:.3g} bytes) but stores {stored} bytes")
    if item.chunks is not None and math.prod(item.chunks) * item.dtype.itemsize > min(
        MAX_CHUNK_BYTES, max(2 * size, 1 << 26)
    ):
        raise DataError(f"{where} claims absurd chunks {item.chunks} for the shape {item.shape}")


@dataclass(frozen=True)
class PlainSnapshots:
    """Where the snapshots of a dataset lie in the file, which holds them as plain little-endian float32.

    Parameters
    ----------
    dataset : h5py.h5d.DatasetID
    descriptor : int
        Of the open file, as long as HDF5 has it open.
    leading, shape : tuple of int
        The axes that an index takes, and those of a snapshot.
    start : int, optional
        Of contiguous values, in bytes; chunks are asked for one by one.
    """

    dataset: h5py.h5d.DatasetID
    descriptor: int
    leading: tuple[int, ...]
    shape: tuple[int, ...]
    start: int | None

    @classmethod
    def of(cls, item: h5py.Dataset, leading: int) -> PlainSnapshots | None:
        """None for another type, a filter, chunks of another shape, or what HDF5 does not read from a plain file."""
        file, plan = item.file, item.id.get_create_plist()
        if file.driver != "sec2" or file.userblock_size or plan.get_nfilters():
            return None
        if not item.id.get_type().equal(h5py.h5t.IEEE_F32LE):
            return None
        axes, shape = item.shape[:leading], item.shape[leading:]
        start = item.id.get_offset() if plan.get_layout() == h5py.h5d.CONTIGUOUS else None
        if start is None and item.chunks != (1,) * leading + shape:
            return None
        return cls(item.id, file.id.get_vfd_handle(), axes, shape, start)

    def offset(self, index: tuple[int, ...]) -> int | None:
        """Of a snapshot, in bytes; None if it was never written."""
        size = 4 * math.prod(self.shape)
        if self.start is not None:
            return self.start + size * int(np.ravel_multi_index(index, self.leading))
        chunk = self.dataset.get_chunk_info_by_coord((*index, *(0,) * len(self.shape)))
        offset: int | None = chunk.byte_offset
        return offset if chunk.size == size else None
