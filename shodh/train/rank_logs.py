"""A log file a rank in the run folder: who ran where, every warning, and what ended it."""

from __future__ import annotations

import logging
import os
import socket
from contextlib import suppress
from logging.handlers import RotatingFileHandler
from pathlib import Path

from shodh.core.distributed import rank, world_size

log = logging.getLogger("shodh")
#: What belongs into the file alone: it was told to the user already, or by another rank.
file_log = logging.getLogger("shodh_rank")
file_log.propagate = False
file_log.addHandler(logging.NullHandler())

LOGS = "logs"
LIMIT = 2**20  # bytes of a file, beside one older file


class _RankFile(RotatingFileHandler):
    """Without a word about a disk that is full: a log must not end a run, nor fill the screen."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


def log_path(run: Path, number: int) -> Path:
    """The file of a rank."""
    return run / LOGS / f"rank_{number:05d}.log"


def keep_rank_log(run: Path, step: int) -> logging.Handler | None:
    """Write this rank's log below ``run`` from here on, at most 2 x `LIMIT`; None where there is no place for it."""
    path = log_path(run, rank())
    for old in [h for h in file_log.handlers if isinstance(h, _RankFile)]:
        drop_rank_log(old)
    try:
        path.parent.mkdir(exist_ok=True)
        handler = _RankFile(path, maxBytes=LIMIT, backupCount=1)
    except OSError as error:
        log.warning("no log of this rank is kept: %s", error)
        return None
    form = f"%(asctime)s {socket.gethostname()} rank {rank()} %(levelname)s %(message)s"
    handler.setFormatter(logging.Formatter(form, "%Y-%m-%dT%H:%M:%S%z"))
    for logger in (logging.getLogger(), file_log):
        logger.addHandler(handler)
    file_log.warning("process %d, one of %d ranks, starts at step %d", os.getpid(), world_size(), step)
    return handler


def drop_rank_log(handler: logging.Handler) -> None:
    """Close a log."""
    for logger in (logging.getLogger(), file_log):
        logger.removeHandler(handler)
    with suppress(OSError):
        handler.close()
