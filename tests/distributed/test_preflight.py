"""Ranks that are not alike, or do not see the same files, are named with their hosts before a run is begun."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from helper import run_ranks

from shodh.core.distributed import SharedError, divide, from_first, rank, together
from shodh.core.errors import DataError

pytestmark = pytest.mark.distributed


def connect() -> None:
    """As two ranks on each of several nodes."""
    from shodh.train.runtime import start_distributed

    socket.gethostname = lambda: f"node{rank() // 2}"  # type: ignore[assignment]
    start_distributed()


def line_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except SharedError as error:
        return str(error)
    return ""


def fail(lines: dict[int, str]) -> str:
    connect()

    def block() -> None:
        with together():
            if rank() in lines:
                raise DataError(lines[rank()])

    return line_of(block)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ({}, ""),
        ({2: "a is missing"}, "a is missing [rank 2 on node1]"),
        (dict.fromkeys(range(4), "no"), "no [ranks 0-1 on node0, 2-3 on node1]"),
        ({0: "no", 1: "a", 3: "no"}, "no [ranks 0 on node0, 3 on node1]; a [rank 1 on node0]"),
    ],
)
def test_errors_of_ranks_become_one_line_that_says_where(lines: dict[int, str], expected: str) -> None:
    assert run_ranks(4, fail, lines) == [expected] * 4


def pass_on() -> tuple[str, str]:
    connect()

    def again() -> None:
        with together():
            from_first(lambda: 1 // (1 - rank()) and (_ for _ in ()).throw(DataError("of the first")))

    return line_of(again), from_first(lambda: f"what rank {rank()} says")


def test_what_the_first_rank_decides_holds_for_all() -> None:
    assert run_ranks(2, pass_on) == [("of the first [rank 0 on node0]", "what rank 0 says")] * 2


def share_work() -> tuple[list[int], list[int], bool]:
    """Long work of rank 0; whether it was done whenever a rank went into a collective."""
    connect()
    store = dist.distributed_c10d._get_default_store()
    own, done, original = [], [], dist.all_gather_object

    def work(item: int) -> int:
        own.append(item)
        if rank() == 0:
            time.sleep(0.05)
            store.add("done by rank 0", 1)
        return item * item

    def watched(*arguments: Any) -> None:
        done.append(store.add("done by rank 0", 0) == 4)
        original(*arguments)

    dist.all_gather_object = watched
    return divide(range(7), work), own, bool(done) and all(done)


def test_work_is_done_once_and_nobody_waits_for_it_in_a_collective() -> None:
    (one, first, waited_outside), (other, second, other_waited_outside) = run_ranks(2, share_work)
    assert one == other == [n * n for n in range(7)]
    assert sorted(first + second) == list(range(7)) and len(first) == 4
    assert waited_outside and other_waited_outside


def count_collectives(config: Path, overrides: list[str], ep_size: int, changes: dict[str, Any]) -> dict[str, Any]:
    """`Job.begin` on ranks of which those of node 1 may see or have something else."""
    from shodh.config import load_config
    from shodh.train import jobs, preflight

    calls: list[str] = []

    def counted(name: str, call: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        calls.append(name)
        return call(*arguments, **more)

    for name in ("broadcast_object_list", "all_gather_object", "all_reduce", "all_to_all_single", "barrier"):
        setattr(dist, name, partial(counted, name, getattr(dist, name)))
    connect()
    preflight.PATIENCE = 0.3
    settings = [*overrides, f"parallel.ep_size={ep_size}"]
    if rank() >= 2:
        settings += changes.get("settings", [])
        if "version" in changes:
            installed = preflight.installed_version
            preflight.installed_version = lambda name: changes["version"] if name == "torch" else installed(name)
        if "source" in changes:
            preflight.sources = lambda: {changes["source"]: "changed"}
        if "clock" in changes:
            now = time.time
            time.time = lambda: now() + changes["clock"]
        if "hidden" in changes:  # a path that this node does not have, or has otherwise
            exists, stat = Path.exists, Path.stat

            def look(path: Path, **more: Any) -> Any:
                if path.match(changes["hidden"]):
                    raise FileNotFoundError(2, "no such file", str(path))
                return stat(path, **more)

            Path.stat = look  # type: ignore[method-assign]
            Path.exists = lambda path, **_: not path.match(changes["hidden"]) and exists(path)  # type: ignore
    if changes.get("full"):
        shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10, 10, 1000)  # type: ignore[attr-defined]
    if changes.get("bits") and rank() == 3:
        reduce = dist.all_reduce
        dist.all_reduce = lambda tensor: (reduce(tensor), tensor[-1:].add_(1.0))
    run = load_config(config, overrides).run_dir
    line = line_of(lambda: jobs.Job.begin(load_config(config, settings), changes.get("resume"), 0, {}))
    left = [p.name for p in (*run.parent.glob(".*"), *run.glob(".*"))] if rank() == 0 else []
    return {"line": line, "calls": calls, "left": left, "run": run.exists()}


@pytest.fixture
def begin(write_config: Callable[..., Path], tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    config = write_config(tmp_path / "tiny.yaml")

    def run(ranks: int = 4, ep_size: int = 2, **changes: Any) -> list[dict[str, Any]]:
        return run_ranks(ranks, count_collectives, config, ["name=new"], ep_size, changes)

    return run


def test_few_collectives_whatever_the_number_of_ranks(begin: Callable[..., list[dict[str, Any]]]) -> None:
    two, four = begin(2)[0], begin(4)[0]
    assert two["line"] == four["line"] == "" and two["calls"] == four["calls"]
    assert len(two["calls"]) <= 12
    assert not two["run"] and not [name for name in two["left"] if name != ".lock"], "nothing is left behind"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"settings": ["seed=7"]}, ["config.seed 7, there 3"]),
        ({"version": "2.0.0"}, ["torch 2.0.0, there"]),
        ({"source": "moe/layer.py"}, ["other sources than rank 0: "]),
        ({"hidden": "*.partial"}, ["is not the folder of rank 0", "--set out="]),
        ({"hidden": "*/open_channel_00002.hdf5"}, ["open_channel_00002.hdf5 is not there, and rank 0 has it"]),
    ],
)
def test_what_differs_on_a_node_is_named_with_its_ranks(
    begin: Callable[..., list[dict[str, Any]]], changes: dict[str, Any], words: list[str]
) -> None:
    found = begin(**changes)
    assert len({answer["line"] for answer in found}) == 1
    assert all(word in found[0]["line"] for word in [*words, "[ranks 2-3 on node1]"]), found[0]["line"]
    assert not found[0]["run"] and not found[0]["left"]


def test_full_disks_and_numbers_that_change_on_their_way(begin: Callable[..., list[dict[str, Any]]]) -> None:
    assert "GiB are free, and a checkpoint of this run takes" in begin(2, full=True)[0]["line"]
    assert "arrive changed" in (line := begin(4, bits=True)[0]["line"]) and "[rank 3 on node1]" in line
