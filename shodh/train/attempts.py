"""What a run was through, as lines of ``RUN/attempts.jsonl``: each start, and each end that a process lives to see."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shodh.core.cli import error_line
from shodh.core.files import UNREADABLE, naming
from shodh.core.reading import read_lines
from shodh.core.strict_json import dumps

if TYPE_CHECKING:
    from shodh.train.trainer import Trainer  # Who only reads does without torch.

ATTEMPTS = "attempts.jsonl"


def _add(folder: Path, line: dict[str, Any]) -> None:
    path = folder / ATTEMPTS
    with naming(path), path.open("a") as file:
        file.write(dumps({"time": time.time(), **line}) + "\n")


@contextmanager
def attempt(folder: Path, stage: str, trainer: Trainer) -> Iterator[None]:
    """Record, on rank 0, the start and the end of a training of a stage (``operator`` or ``tokenizer``)."""
    from shodh.core.distributed import rank

    if rank() != 0:
        yield
        return
    where = {"host": socket.gethostname(), "process": os.getpid(), "ranks": trainer.topology.world_size}
    _add(folder, {"event": "start", "stage": stage, "step": trainer.step, **where, "command": sys.argv})
    how, why = "failed", "interrupted from the keyboard"
    try:
        yield
        how, why = "finished" if trainer.finished else "stopped", trainer.ended or ""
    except Exception as error:
        why = error_line(error) or f"{type(error).__name__}: {error}"
        raise
    finally:
        with suppress(OSError):  # On a full disk the error that is on its way says more.
            _add(folder, {"event": "end", "step": trainer.step, "how": how, "why": why})


def read_attempts(folder: Path) -> list[dict[str, Any]]:
    """The attempts of a run, oldest first, without damaged lines; none of a run of an older version."""
    found = []
    for line in read_lines(folder / ATTEMPTS):
        with suppress(*UNREADABLE):
            found.append({**line, "step": int(line["step"]), "time": float(line["time"])})
    return found
