"""Ranks find each other, and nobody else, however many jobs start at once on one machine."""

from __future__ import annotations

import sys
from datetime import timedelta

import pytest
from torch.distributed import DistNetworkError, DistStoreError

from shodh.core.errors import ConfigError
from shodh.experiments.harness.ranks import Ranks
from shodh.train import runtime
from shodh.train.runtime import AGENT_STORE, ATTEMPT, JOIN, JoinError, join_seconds, meet

SOON = timedelta(seconds=0.3)


def place(monkeypatch: pytest.MonkeyPatch, rank: int, world: int, *command: str, **more: object) -> None:
    """What a launcher tells a rank."""
    monkeypatch.setattr(sys, "argv", ["launch/pretrain.py", f"--local_rank={rank}", *command])
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    names |= {AGENT_STORE: "False", JOIN: SOON.total_seconds(), **more}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))


@pytest.fixture
def port() -> int:
    """One that is free."""
    from torch.distributed import TCPStore

    return int(TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False).port)


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of one process, which cannot wait for each other."""
    monkeypatch.setattr(runtime, "_wait_for_all", lambda *_: None)


def test_one_rank_needs_no_port_of_its_own(port: int, one_by_one: None, monkeypatch: pytest.MonkeyPatch) -> None:
    place(monkeypatch, 0, 2, MASTER_PORT=port)
    taken = meet(SOON)
    place(monkeypatch, 0, 1, MASTER_PORT=port)
    meet(SOON).set("key", "mine")
    assert not taken.check(["key"])


def test_a_rank_that_comes_to_the_port_of_another_job_does_not_disturb_it(
    port: int, one_by_one: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(monkeypatch, 0, 2, "--set", "name=a", MASTER_PORT=port)
    first = meet(SOON)
    place(monkeypatch, 1, 2, "--set", "name=a", MASTER_PORT=port)
    second = meet(SOON)
    place(monkeypatch, 1, 2, "--set", "name=b", MASTER_PORT=port)
    stranger = meet(SOON)
    stranger.set("address", "elsewhere")
    second.set("address", "here")
    assert first.get("address") == b"here" and stranger.get("address") == b"elsewhere"
    first.set("answer", "")
    with pytest.raises(DistStoreError):
        stranger.get("answer")
    place(monkeypatch, 0, 2, "--set", "name=b", MASTER_PORT=port)
    with pytest.raises(DistNetworkError, match="EADDRINUSE"):
        meet(SOON)


def test_a_job_of_a_study_is_given_a_port_that_nobody_can_take(
    port: int, one_by_one: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(monkeypatch, 0, 2, MASTER_PORT=port)
    study = Ranks()
    given = study.environment("job")
    place(monkeypatch, 0, 2, "job.json", **given)
    first = meet(SOON)
    place(monkeypatch, 1, 2, "job.json", **given)
    meet(SOON).set("key", "value")
    assert first.get("key") == b"value" and int(given["MASTER_PORT"]) != port
    place(monkeypatch, 0, 2, "thief.json", **{**given, AGENT_STORE: "False"})
    with pytest.raises(DistNetworkError, match="EADDRINUSE"):
        meet(SOON)


def test_jobs_on_one_rank_need_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    place(monkeypatch, 0, 1)
    assert Ranks().environment("job") == {}


def test_ranks_started_again_do_not_read_what_the_first_attempt_left(
    port: int, one_by_one: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun --max_restarts keeps its store, where the addresses of the dead ranks stand."""
    place(monkeypatch, 0, 2, MASTER_PORT=port, **{ATTEMPT: 0})
    first = meet(SOON)
    first.set("address", "of a dead rank")
    place(monkeypatch, 1, 2, MASTER_PORT=port, **{ATTEMPT: 1})
    assert not meet(SOON).check(["address"])


def test_rank_that_does_not_come_is_named(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    place(monkeypatch, 0, 3, MASTER_PORT=port)
    with pytest.raises(JoinError, match="^2 of 3 ranks did not come in 0.3 s: rank 1, 2; "):
        meet(SOON)


def test_rank_0_that_does_not_come_is_named(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    place(monkeypatch, 1, 2, MASTER_PORT=port)
    with pytest.raises(JoinError, match=f"did not reach rank 0 at 127.0.0.1:{port} in 0.3 s"):
        meet(SOON)


@pytest.mark.parametrize("text", ["0", "-3", "soon", "inf", ""])
def test_time_to_join_that_is_none(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JOIN, text)
    with pytest.raises(ConfigError, match=f"^{JOIN}={text}: expected"):
        join_seconds()
