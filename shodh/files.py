"""Files that are either whole or absent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL_SUFFIX = ".partial"


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
        yield temporary
        sync_to_disk(temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_to_disk(target.parent)


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write a small file whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def remove_partial_files(folder: str | os.PathLike[str]) -> list[Path]:
    """Remove what killed writers left under ``folder`` (recursively); call it while no writer is at work there."""
    leftovers = sorted(Path(folder).rglob(f".*{PARTIAL_SUFFIX}"))
    for leftover in leftovers:
        leftover.unlink(missing_ok=True)
    return leftovers


def sync_to_disk(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
