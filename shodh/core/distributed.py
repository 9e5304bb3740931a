"""What the ranks of a distributed program share: their numbers, and errors that all of them stop for."""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch.distributed as dist
from torch import Tensor

from shodh.core.cli import error_line
from shodh.core.errors import ShodhError
from shodh.core.launcher import read_launch

S = TypeVar("S")
T = TypeVar("T")
_DIVISIONS = itertools.count()  # alike on all ranks


class Share(Protocol):
    """Who does which work: `each`, or `divide` among all ranks."""

    def __call__(self, items: Sequence[S], work: Callable[[S], T], /) -> list[T]: ...


class SharedError(ShodhError):
    """An error of some rank that all ranks have agreed to stop for."""


def rank() -> int:
    """This process's rank, as the launcher says; 0 without a launcher."""
    return read_launch().rank


def world_size() -> int:
    """Number of ranks, as the launcher says; 1 without a launcher."""
    return read_launch().world


def connected() -> int:
    """Number of ranks that collectives reach; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(values: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduce a tensor over all ranks, in place. Collective."""
    if connected() > 1:
        dist.all_reduce(values, op=operation)
    return values


def gather(value: Any) -> list[Any]:
    """The value of every rank, in their order. Collective."""
    if connected() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def together(shared: bool = True) -> Iterator[None]:
    """All ranks succeed in the block, or all raise what failed, and where; so nobody waits in a later collective.

    ``shared=False`` is for a rank that is at work alone: errors are its own.

    Raises
    ------
    SharedError
        One line: each error once, with the ranks and hosts that met it.
    """
    caught: Exception | None = None
    try:
        yield
    except Exception as error:
        if not shared:
            raise
        caught = error
    if not shared:
        return
    line = None if caught is None else error_line(caught)
    if caught is not None and line is None:
        raise caught
    found = gather(None if line is None else (line, isinstance(caught, SharedError), socket.gethostname()))
    if any(found):
        raise SharedError(_named(found)) from caught


def from_first(make: Callable[[], T]) -> T:
    """What ``make()`` gives rank 0, on all ranks; its error stops them all. Collective.

    Raises
    ------
    SharedError
        In the words of rank 0.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return make()
    answer: list[Any] = [None, None]
    caught: Exception | None = None
    if dist.get_rank() == 0:
        try:
            answer[0] = make()
        except Exception as error:
            if (line := error_line(error)) is None:
                raise
            caught, answer[1] = error, f"{line} [{where_am_i()}]"
    dist.broadcast_object_list(answer, 0)
    if answer[1] is not None:
        raise SharedError(answer[1]) from caught
    return answer[0]  # type: ignore[no-any-return]


def each(items: Sequence[S], work: Callable[[S], T]) -> list[T]:
    """``work`` of every item: what `divide` does, by this process alone."""
    return [work(item) for item in items]


def divide(items: Sequence[S], work: Callable[[S], T]) -> list[T]:
    """``work`` of every item, each done by one rank; all ranks get all answers, in order. Collective.

    However long it takes, nobody waits in a collective, whose time is limited: ranks that are done ask the store.

    Raises
    ------
    SharedError
        As `together`; the others end after the item that they are at.
    """
    if not dist.is_initialized() or (size := dist.get_world_size()) == 1:
        return each(items, work)
    store, key = dist.distributed_c10d._get_default_store(), f"shodh/divide/{next(_DIVISIONS)}"
    done: list[T] = []
    with together():
        try:
            for item in items[dist.get_rank() :: size]:
                if store.add(f"{key}/failed", 0):
                    break
                done.append(work(item))
        except BaseException:
            store.add(f"{key}/failed", 1)
            raise
        finally:
            store.add(key, 1)
        pause = 0.001
        while store.add(key, 0) < size:
            time.sleep(pause)
            pause = min(1.0, 2 * pause)
    parts = gather(done)
    return [parts[n % size][n // size] for n in range(len(items))]


def where_am_i() -> str:
    """Rank and host of this process, for messages."""
    return f"rank {rank()} on {socket.gethostname()}"


def _named(found: Sequence[tuple[str, bool, str] | None]) -> str:
    """One line of the errors of ranks, each ``(line, whether all ranks have it, host)``."""
    places: dict[str, list[tuple[int, str]]] = {}
    for number, entry in enumerate(found):
        if entry is not None:
            line, common, host = entry
            places.setdefault(line, []).extend([] if common else [(number, host)])
    alone = len(found) == 1
    lines = [line if alone or not ranks else f"{line} [{describe_ranks(ranks)}]" for line, ranks in places.items()]
    return "; ".join(lines[:3]) + (f"; and {len(lines) - 3} other errors" if len(lines) > 3 else "")


def describe_ranks(places: Sequence[tuple[int, str]]) -> str:
    """``rank 3 on node2``, ``ranks 0-7 on node1, 8-15 on node2``; of many hosts the first four."""
    runs: list[tuple[int, int, str]] = []
    for number, host in places:
        if runs and runs[-1][1:] == (number - 1, host):
            runs[-1] = (runs[-1][0], number, host)
        else:
            runs.append((number, number, host))
    shown = [f"{a if a == b else f'{a}-{b}'} on {host}" for a, b, host in runs]
    more = f" and {len(runs) - 4} more" if len(runs) > 4 else ""
    return f"rank{'s' * (len(places) > 1)} {', '.join(shown[:4])}{more}"
