"""What a real run leaves for those who watch it: its status, attempts and the logs of its ranks."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import pytest
import rank_jobs
from helper import run_ranks
from laboratory import Laboratory

from shodh.train.attempts import read_attempts
from shodh.train.events import read_events
from shodh.train.rank_logs import log_path
from shodh.train.status import read_status

pytestmark = pytest.mark.distributed


def test_a_run_and_its_resumption(laboratory: Laboratory) -> None:
    whole = laboratory.run(2, 2, 1)
    steps = len(whole.training("train/loss"))
    found = read_status(whole.path)
    assert (found.state, found.step, found.steps, found.restarts) == ("finished", steps, steps, 0)
    assert found.checkpoint == f"step_{steps:08d}" and found.problems == [] and found.experts
    assert found.samples_per_s and found.samples_per_s > 0 and found.owner is None
    run = laboratory.copy(whole, "watched", until=5)
    run_ranks(2, rank_jobs.pretrain, laboratory.config, run.overrides, "auto")
    assert [(line["event"], line["step"]) for line in read_attempts(run.path)] == [
        ("start", 0), ("end", steps), ("start", 5), ("end", steps)
    ]  # fmt: skip
    assert read_status(run.path).restarts == 1
    for number in (0, 1):
        lines = log_path(run.path, number).read_text().splitlines()
        assert all(re.search(rf"{socket.gethostname()} rank {number} ", line) for line in lines)
        assert [line.rsplit(" ", 1)[1] for line in lines if "starts at" in line] == ["0", "5"]
    assert len(list((run.path / "tensorboard").iterdir())) == 2


def test_a_run_that_fails_says_why(laboratory: Laboratory, tmp_path: Path) -> None:
    name = "watched-failing"
    changes = laboratory.overrides(name, 1, 1, "operator.train.max_skipped_steps=1", "operator.train.lr=1e30")
    with pytest.raises(AssertionError):
        run_ranks(1, rank_jobs.pretrain, laboratory.config, changes)
    found = read_status(laboratory.load(changes).run_dir)
    assert found.state == "failed" and found.why and "max_skipped_steps" in found.why
    assert json.dumps(found.problems) == "[]"


def test_ranks_that_lose_another_name_it_once(tmp_path: Path) -> None:
    first, *others = run_ranks(4, rank_jobs.ask_who_is_lost, tmp_path)
    assert re.fullmatch(rf"lost contact with rank 1 \(process \d+ on {socket.gethostname()}\)", first)
    assert others == [None, None, None]
    assert [(event["kind"], event["step"]) for event in read_events(tmp_path)] == [("lost contact", 7)]
