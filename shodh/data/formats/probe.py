"""A first look at a file in a process of its own: the HDF5 library itself may hang or crash on a damaged structure.

(Seen: HDF5 2.0 never returns from reading a text attribute whose global heap claims an object of size zero.)
"""

from __future__ import annotations

import multiprocessing
import os
import resource
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from shodh.data.formats.base import FileHints
from shodh.core.errors import DataError, ShodhError

TIMEOUT = 60.0
# Beyond the memory that the process has already, and four snapshots.
MEMORY = 4 << 30


def probe(
    path: str | os.PathLike[str], format: str = "auto", hints: FileHints | None = None, *, timeout: float | None = None
) -> None:
    """Open a file and read the last snapshot of each field in a child process.

    Raises
    ------
    DataError
        If that fails, in the reader's words; or if it crashes, takes longer than ``timeout`` seconds, or more memory
        than the file could need.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_look, args=(sender, Path(path), format, hints), daemon=True)
    child.start()
    sender.close()
    timeout = timeout or TIMEOUT
    try:
        answer = receiver.recv() if receiver.poll(timeout) else f"{path}: reading hangs, the file is damaged"
    except EOFError:
        answer = f"{path}: reading crashes the HDF5 library, the file is damaged"
    finally:
        child.kill()
        child.join()
        receiver.close()
    if answer:
        raise DataError(answer)


def _look(sender: Connection, path: Path, format: str, hints: FileHints | None) -> None:
    from shodh.data.formats import open_file

    try:
        file = open_file(path, format, hints)
        space = int(np.prod(file.grid, dtype=object)) * 4 * 4 * len(file.grid)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = used + MEMORY + space
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
        last = range(file.num_frames - 1, file.num_frames)
        for name, field in file.fields.items():
            out = np.empty((1, field.num_components(len(file.grid)), *file.grid), dtype=np.float32)
            file.read(name, file.num_trajectories - 1, last, out[0] if field.static else out, finite=False)
        sender.send("")
    except ShodhError as error:
        sender.send(str(error))
    except MemoryError:
        sender.send(f"{path}: claims more than fits into memory; check the file")
