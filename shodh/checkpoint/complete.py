"""What must be there before a checkpoint is published: every byte that every rank wrote, as this machine sees it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import Any
from zlib import crc32

from shodh.core.distributed import rank
from shodh.core.errors import CheckpointError
from shodh.core.files import read_parts

PATIENCE = 30.0  # seconds until a machine has seen what another one wrote: network file systems remember for so long


def describe_shared(path: Path, size: int, written: Iterable[tuple[int, int, int]]) -> dict[str, Any]:
    """What a manifest says of a file that all ranks wrote to, once its bytes are what they wrote, all of them.

    Parameters
    ----------
    written : iterable of (first byte, bytes, CRC-32)

    Raises
    ------
    CheckpointError
        The parts are not the whole file, or other bytes lie there: a rank wrote to another folder.
    """
    parts = sorted(part for part in written if part[1])
    stops, digest, check = list(accumulate(count for _, count, _ in parts)), sha256(), 0
    if [start for start, _, _ in parts] != [0, *stops][:-1] or stops[-1:] != [size]:
        raise CheckpointError(f"{path}: the ranks did not write each of its {size} bytes once; nothing is published")
    wait_for(path, size)
    place, expected = 0, iter(zip(stops, (crc for _, _, crc in parts), strict=True))
    stop, crc = next(expected)
    for part in read_parts(path, stops):
        digest.update(part)
        place, check = place + len(part), crc32(part, check)
        if place == stop:
            if check != crc:
                break
            (stop, crc), check = next(expected, (-1, 0)), 0
    if stop != -1 or place != size:
        raise CheckpointError(_elsewhere(path, f"of {place} bytes, the last part is not what its rank wrote"))
    return {"size": size, "sha256": digest.hexdigest()}


def wait_for(path: Path, size: int | None = None) -> None:
    """Wait until this machine sees what another one made; raises `CheckpointError` if it never does."""
    end = time.monotonic() + PATIENCE
    while not path.exists() or (size is not None and path.stat().st_size != size):
        if time.monotonic() > end:
            found = f"{path.stat().st_size} bytes" if path.exists() else "nothing"
            made = "a folder was made" if size is None else f"{size} bytes were written"
            raise CheckpointError(_elsewhere(path, f"{made}, and rank {rank()} sees {found}"))
        time.sleep(0.2)


def _elsewhere(path: Path, what: str) -> str:
    return f"{path}: {what}; the run folder must be the same one on all nodes; nothing is published"


def check_there(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Wait until this machine sees files of a folder in their sizes; raises `CheckpointError` if it never does."""
    for name, entry in sorted(files.items()):
        wait_for(folder / name, entry["size"])
