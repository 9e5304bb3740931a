"""Files that are either whole or absent."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import socket
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial as bound
from pathlib import Path
from typing import IO

from shodh.core.errors import ConfigError
from shodh.core.progress import get_on

log = logging.getLogger("shodh")

PARTIAL_SUFFIX = ".partial"
SHARED = "/dev/shm"  # memory that processes of a machine share
WEIGHTS = "model.safetensors"  # named here, because who looks for the file need not import torch
PART = 2**22  # bytes of a file that are read at once
#: What reading a number out of a damaged line may raise: no JSON, no number in it, infinity, or a thousand brackets.
UNREADABLE = (ValueError, KeyError, TypeError, OverflowError, RecursionError)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary name in the folder of ``path`` to write to; publish it as ``path`` when the block succeeds.

    The temporary file is flushed to disk before the rename and the folder after it, so that a reader, or a machine
    that lost power, sees the old file, the whole new one, or none. When the block raises, the temporary file is
    removed. A killed process may leave one behind, with a hidden name that no reader matches: see
    `remove_partial_files`.

    Parameters
    ----------
    path : path-like
        Final name; its folder is made if necessary.

    Yields
    ------
    Path
        The name to write to.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}{PARTIAL_SUFFIX}")
    try:
        with naming(target):
            yield temporary
        sync_to_disk(temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_to_disk(target.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of the operating system that names no file name this one: writing to an open file names none."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write a small file whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text)


class LineFile:
    """A file that lines are added to, the old ones kept; no line is lost or torn where a disk is full for a time.

    Parameters
    ----------
    lenient : bool
        What cannot be written waits in memory for the next `flush`, and for `close` at the latest; said once.
    """

    def __init__(self, path: Path, lenient: bool = False) -> None:
        self._path, self._file, self._lenient = path, path.open("ab", buffering=0), lenient
        self._left, self._failed = bytearray(), False

    def add(self, line: str) -> None:
        self._left += line.encode() + b"\n"
        if len(self._left) > PART:
            self.flush()

    def flush(self) -> None:
        """Give the lines to the operating system; raises OSError, which names the file."""
        try:
            self._write()
            self._failed = False
        except OSError as error:
            if not self._lenient:
                raise
            if not self._failed:
                log.warning("%s: %s; its lines are kept in memory until it can be written", self._path, error.strerror)
            self._failed = True

    def _write(self) -> None:
        with naming(self._path):
            while self._left:
                del self._left[: self._file.write(self._left)]

    def close(self) -> None:
        """Write what is left; the file is closed also where that fails."""
        with self._file:
            self._write()


def link_or_copy(source: Path, target: Path) -> None:
    """Make ``target`` a hard link to ``source``, or a copy where the file system has no links; it is replaced."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        with atomic_path(target) as partial:
            shutil.copy2(source, partial)


def remove_partial_files(folder: str | os.PathLike[str]) -> list[Path]:
    """Remove what killed writers left under ``folder`` (recursively); call it while no writer is at work there."""
    leftovers = sorted(Path(folder).rglob(f".*{PARTIAL_SUFFIX}"))
    for leftover in leftovers:
        leftover.unlink(missing_ok=True)
    return leftovers


def cut_lines(path: Path, number_of: Callable[[bytes], int], stop: int) -> int:
    """Keep the lines of a file whose number is below ``stop``; returns how many are left.

    Written aside and renamed, so that a killed process loses nothing. A line that ``number_of`` cannot read
    (`UNREADABLE`) is dropped, which is said.
    """
    if not path.exists():
        return 0
    kept = damaged = 0
    with path.open("rb") as source, atomic_path(path) as aside, aside.open("wb") as target:
        for line in source:
            try:
                if number_of(line) < stop:
                    target.write(line.rstrip(b"\n") + b"\n")
                    kept += 1
            except UNREADABLE:
                damaged += 1
    if damaged:
        log.warning("%s: damaged lines that were dropped: %d", path, damaged)
    return kept


def lock_file(path: Path) -> IO[str]:
    """Lock a file, made if necessary, until the answer is closed or the process ends.

    Where the file system has no locks the file is opened, and protects nothing.

    Raises
    ------
    ConfigError
        Another process holds the lock; it is named.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+")
    tries = 5  # Who only looks (`lock_owner`) holds it for an instant.
    while not (locked := _lock(file, fcntl.LOCK_EX)) and (tries := tries - 1):
        time.sleep(0.05)
    if not locked:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise ConfigError(f"{path.parent} is in use by {owner}; wait until it ends, or choose another --set name=...")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    # A child would keep the lock when this process is killed.
    os.register_at_fork(after_in_child=bound(_close, weakref.ref(file)))
    return file


def lock_owner(path: Path) -> str | None:
    """The process that holds the lock of `lock_file`, on whatever machine; None if none does. Nothing is written."""
    try:
        file = path.open()
    except FileNotFoundError:
        return None
    with file:
        return None if _lock(file, fcntl.LOCK_SH) else file.read().strip() or "another process"


def _lock(file: IO[str], kind: int) -> bool:
    """Whether a lock was free, and is now held; True also where the file system has none."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _close(reference: weakref.ref[IO[str]]) -> None:
    file = reference()
    if file is not None:
        file.close()


def checksum(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    for part in read_parts(path):
        digest.update(part)
    return digest.hexdigest()


def read_parts(path: Path, stops: Iterable[int] = ()) -> Iterator[memoryview]:
    """The bytes of a file in order, at most `PART` at once and never across one of the ascending ``stops``.

    Each part is a sign of work (`shodh.core.progress`) and holds until the next is asked for.
    """
    buffer = memoryview(bytearray(PART))
    with path.open("rb", buffering=0) as file:
        for stop in (*stops, sys.maxsize):
            while (wanted := min(PART, stop - file.tell())) > 0 and (count := file.readinto(buffer[:wanted])):
                yield buffer[:count]
                get_on()


def sync_to_disk(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
