"""What a run was through, as lines of ``RUN/attempts.jsonl``: each start, and each end that a process lives to see."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shodh.core.cli import error_line
from shodh.train.events import add_line, read_with

if TYPE_CHECKING:
    from shodh.train.trainer import Trainer  # Who only reads does without torch.

ATTEMPTS = "attempts.jsonl"


@contextmanager
def attempt(folder: Path, stage: str, trainer: Trainer) -> Iterator[None]:
    """Record, on rank 0, the start and the end of a training of a stage (``operator`` or ``tokenizer``)."""
    from shodh.core.distributed import rank

    if rank() != 0:
        yield
        return
    where = {"host": socket.gethostname(), "process": os.getpid(), "ranks": trainer.topology.world_size}
    path = folder / ATTEMPTS
    add_line(path, event="start", stage=stage, step=trainer.step, **where, command=sys.argv)
    how, why = "failed", "interrupted from the keyboard"
    try:
        yield
        how, why = "finished" if trainer.finished else "stopped", trainer.ended or ""
    except Exception as error:
        why = error_line(error) or f"{type(error).__name__}: {error}"
        raise
    finally:
        with suppress(OSError):  # On a full disk the error that is on its way says more.
            add_line(path, event="end", step=trainer.step, how=how, why=why)


def read_attempts(folder: Path) -> list[dict[str, Any]]:
    """The attempts of a run, oldest first, without damaged lines; none of a run of an older version."""
    return read_with(folder / ATTEMPTS, step=int, time=float)
