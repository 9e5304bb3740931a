"""What the ranks of a distributed program share: their numbers, and errors that all of them stop for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from shodh.core.cli import error_line
from shodh.core.errors import ShodhError
from shodh.core.launcher import read_launch


class SharedError(ShodhError):
    """An error of some rank that all ranks have agreed to stop for."""


def rank() -> int:
    """This process's rank, as the launcher says; 0 without a launcher."""
    return read_launch().rank


def world_size() -> int:
    """Number of ranks, as the launcher says; 1 without a launcher."""
    return read_launch().world


def gather(value: Any) -> list[Any]:
    """The value of every rank, in their order. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def together() -> Iterator[None]:
    """All ranks succeed in the block, or all raise the first rank's error; so nobody waits in a later collective."""
    caught: Exception | None = None
    try:
        yield
    except Exception as error:
        caught = error
    line = None if caught is None else error_line(caught)
    if caught is not None and line is None:
        raise caught
    found = [text for text in gather(line) if text]
    if found:
        raise SharedError(found[0]) from caught
